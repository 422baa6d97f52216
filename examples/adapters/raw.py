"""Any trainer: from the per-token log-probabilities it has anyway to rewards and advantages, in 15 lines.

python examples/adapters/raw.py
"""

import torch

import raise_core as rc
from raise_trainer import tiny

tokenizer = tiny.build_tokenizer()
texts = ["<think>red</think><answer>B</answer>", "<answer>B</answer>", "<answer>A</answer>", "no answer"]
completion_ids = [tokenizer(text)["input_ids"] for text in texts]  # what the trainer sampled
# [B, C] nats at temperature 1 under its reference, column j for token j, padded behind
per_token_logps = -torch.rand(4, 64, generator=torch.Generator().manual_seed(0))
prompt_of_row, solution, kind = [0, 0, 0, 0], "B", "multiple_choice"

# the 15 lines
score = torch.tensor([rc.verify(kind, tokenizer.decode(ids), solution) for ids in completion_ids])
strict = torch.full_like(score, kind in ("multiple_choice", "numerical"), dtype=torch.bool)
found = rc.find_answer_spans(completion_ids, tokenizer)
width = per_token_logps.shape[1]
spans = rc.build_spans(found, completion_ids, [width * b for b in range(len(score))], prompt_of_row)
logp = per_token_logps.flatten()[spans.rows]
made = rc.confidence_rewards(spans, score, strict, logp=logp, group_size=4)
advantage = rc.group_advantages(made.reward, spans.group)

for text, reward, sure, a in zip(texts, made.reward, made.confidence, advantage, strict=True):
    print(f"reward {reward:.3f}  confidence {sure:.3f}  advantage {a:+.2f}  {text}")
