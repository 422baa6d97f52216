"""slime: advantages from confidence rewards. Not run with slime here.

    PYTHONPATH=examples/adapters … --custom-advantage-function-path slime_advantage.custom_advantage \
        --use-kl-loss --kl-loss-coef 0 --rollout-temperature 1

As a script it computes those of one made-up group: python examples/adapters/slime_advantage.py
"""

from types import SimpleNamespace

import torch

from raise_core.integrations.slime import make_custom_advantage

OPEN = {"describe"}  # data sources whose questions are open: IGSR


def strict(rollout_data: dict) -> list[bool]:
    """SCRE for all samples but those of the open sources."""
    names = rollout_data.get("source_names") or [""] * len(rollout_data["tokens"])
    return [name not in OPEN for name in names]


custom_advantage = make_custom_advantage(strict=strict)


if __name__ == "__main__":
    from raise_trainer import tiny

    tokenizer = tiny.build_tokenizer()
    texts = ["<answer>B</answer>", "so <answer>B</answer>", "<answer>A</answer>", "no answer"]
    tokens = [torch.tensor([5, 6, *tokenizer(text)["input_ids"]]) for text in texts]
    lengths = [len(row) - 2 for row in tokens]
    source = torch.Generator().manual_seed(0)
    data = {
        "tokens": tokens,
        "response_lengths": lengths,
        "sample_indices": [8, 9, 10, 11],
        "raw_reward": [1.0, 1.0, 0.0, 0.0],
        "ref_log_probs": [-torch.rand(n, generator=source) for n in lengths],
    }
    make_custom_advantage(tokenizer, strict=strict)(SimpleNamespace(n_samples_per_prompt=4), data)
    for text, advantage in zip(texts, data["advantages"], strict=True):
        print(f"{float(advantage[0]):+.3f}  {text}")
