"""verl: a v1 trainer whose scores become confidence rewards before the advantages. Not run with verl here.

    PYTHONPATH=examples/adapters VERL_USE_EXTERNAL_MODULES=verl_trainer python -m verl.trainer.main_ppo \
        reward.custom_reward_function.path=examples/adapters/verl_trainer.py \
        actor_rollout_ref.rollout.temperature=1.0 actor_rollout_ref.actor.use_kl_loss=true ...

Run as a script it shows what happens to a batch:  python examples/adapters/verl_trainer.py
"""

from types import SimpleNamespace

import torch

from raise_core.integrations.verl import ConfidenceMixin, apply_confidence, compute_score

__all__ = ["compute_score"]

try:
    from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
except ImportError:
    TRAINER_REGISTRY, PPOTrainerSync = {}, object


class ConfidenceTrainer(ConfidenceMixin, PPOTrainerSync):
    """IGSR in its balanced form; half the reward is the text score."""

    confidence = {"variant": "balanced", "confidence_share": 0.5}  # noqa: RUF012


TRAINER_REGISTRY["sync"] = ConfidenceTrainer  # verl compares trainer_mode with this name: keep it


def main() -> None:
    """A batch as verl has it before `compute_advantage`."""
    from raise_trainer import tiny

    tokenizer = tiny.build_tokenizer()
    texts = ["<answer>B</answer>", "it is <answer>B</answer>", "<answer>A</answer>"]
    ids = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
    responses = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    verdicts = [compute_score("demo", text, "B", {"problem_type": "multiple choice"}) for text in texts]
    scores = torch.zeros(responses.shape)
    scores[range(3), mask.sum(1) - 1] = torch.tensor([verdict["score"] for verdict in verdicts])
    data = SimpleNamespace(
        batch={
            "responses": responses,
            "response_mask": mask,
            "token_level_scores": scores,
            "ref_log_prob": -torch.rand(responses.shape, generator=torch.Generator().manual_seed(0)),
        },
        non_tensor_batch={"uid": ["q"] * 3, "strict": [verdict["strict"] for verdict in verdicts]},
        meta_info={"temperature": 1.0},
    )
    apply_confidence(data, tokenizer, group_size=3)
    for text, reward in zip(texts, data.batch["token_level_scores"].sum(1), strict=True):
        print(f"reward {reward:.3f}  {text}")


if __name__ == "__main__":
    main()
