"""Video-R1, GRPO-CARE, VLM-R1, R1-V: what to write into their `compute_loss`. Not run with them here.

After the loop over reward_funcs, in the trainer's own names:

    rewards_per_func[:, 0] = confidence_column(
        self.processing_class, completion_ids, completion_mask, ref_per_token_logps, rewards_per_func[:, 0],
        kind=inputs[0]["problem_type"],
    )

As a script it does that to one made-up group: python examples/adapters/video_r1_step.py
"""

import torch

from raise_core.integrations.video_r1 import accuracy_reward, confidence_column
from raise_trainer import tiny

if __name__ == "__main__":
    tokenizer = tiny.build_tokenizer()
    texts = ["<answer>B</answer>", "I see <answer>B</answer>", "<answer>A</answer>"]
    ids = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
    completion_ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    completion_mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(i) for i in ids], batch_first=True)
    logps = -torch.rand(completion_ids.shape, generator=torch.Generator().manual_seed(0))
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    accuracy = torch.tensor(accuracy_reward(completions, ["B"] * 3, ["multiple choice"] * 3))
    reward = confidence_column(
        tokenizer, completion_ids, completion_mask, logps, accuracy, kind="multiple choice"
    )
    for text, value in zip(texts, reward, strict=True):
        print(f"{value:.3f}  {text}")
