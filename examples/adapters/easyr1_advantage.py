"""EasyR1: confidence rewards before its advantages. Not run with EasyR1 here.

    worker.reward.reward_function=raise_core/integrations/easyr1.py:compute_score \
        worker.rollout.temperature=1.0

EasyR1 has no hook before its advantages. One line goes into `Runner.run` of its verl/trainer/main.py, after
the tokenizer is made, since that is the process that computes them:

    ray_trainer.compute_advantage = with_confidence(ray_trainer.compute_advantage, tokenizer, **OPTIONS)

Ground truths are JSON, {"solution": "B", "problem_type": "multiple choice"}. As a script it does so to one
made-up group: python examples/adapters/easyr1_advantage.py
"""

import json
from types import SimpleNamespace

import torch

from raise_core.integrations.easyr1 import compute_score, strict_of_truth, with_confidence

OPTIONS = {"strict": strict_of_truth, "group_size": 3}


def compute_advantage(data: SimpleNamespace) -> list[float]:
    """Stands for EasyR1's: rewards as it finds them."""
    return data.batch["token_level_rewards"].sum(1).tolist()


if __name__ == "__main__":
    from raise_trainer import tiny

    tokenizer = tiny.build_tokenizer()
    truth = json.dumps({"solution": "B", "problem_type": "multiple choice"})
    texts = ["<answer>B</answer>", "I see <answer>B</answer>", "<answer>A</answer>"]
    ids = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
    responses = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    graded = compute_score([{"response": text, "ground_truth": truth} for text in texts])
    scores = torch.zeros(responses.shape)
    scores[range(3), mask.sum(1) - 1] = torch.tensor([row["overall"] for row in graded])
    logps = -torch.rand(responses.shape, generator=torch.Generator().manual_seed(0))
    data = SimpleNamespace(
        batch={"responses": responses, "response_mask": mask, "ref_log_probs": logps,
               "token_level_scores": scores, "token_level_rewards": scores.clone()},
        non_tensor_batch={"uid": ["q"] * 3, "ground_truth": [truth] * 3},
        meta_info={"temperature": 1.0},
    )  # fmt: skip
    rewards = with_confidence(compute_advantage, tokenizer, **OPTIONS)(data)
    for text, reward in zip(texts, rewards, strict=True):
        print(f"{reward:.3f}  {text}")
