"""ms-swift: the text score as an ORM, and a trainer whose column of it becomes confidence rewards.

    swift rlhf --rlhf_type grpo --external_plugins examples/adapters/ms_swift_plugin.py \
        --reward_funcs raise_accuracy --beta 0.04 --temperature 1.0 ...

Not run with ms-swift here. As a script it grades two completions: python examples/adapters/ms_swift_plugin.py
"""

from raise_core.integrations.ms_swift import ConfidenceMixin, TextScore

try:
    from swift.rewards import orms
    from swift.rlhf_trainers import GRPOTrainer
except ImportError:
    orms, GRPOTrainer = None, object
else:
    orms["raise_accuracy"] = TextScore


class ConfidenceGRPOTrainer(ConfidenceMixin, GRPOTrainer):
    """Start training with this class in place of swift's GRPOTrainer."""

    text_score = "TextScore"
    source = "ref"


if __name__ == "__main__":
    texts = ["<answer>B</answer>", "<answer>a blue ball</answer>"]
    columns = {"solution": ["B", "blue ball"], "problem_type": ["multiple choice", "free-form"]}
    print(TextScore()(texts, **columns))
