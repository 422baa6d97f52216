"""TRL's GRPOTrainer with confidence rewards under an EMA of the policy.

python examples/adapters/trl_grpo.py    # a tiny random model: it runs, and answers nothing
python examples/adapters/trl_grpo.py Qwen/Qwen2.5-0.5B-Instruct
"""

import sys

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from raise_core.integrations.trl import ConfidenceReward
from raise_trainer import tiny

FORM = " Give the answer inside <answer> and </answer>."
QUESTIONS = {"Which letter comes after A?": "B", "Which letter comes before B?": "A"}
rows = [
    {"prompt": [{"role": "user", "content": q + FORM}], "solution": a, "problem_type": "multiple choice"}
    for q, a in QUESTIONS.items()
]
if len(sys.argv) > 1:
    model, processing = sys.argv[1], None
else:
    processing = tiny.build_processor()
    model = tiny.build_model(processing, seed=0)

reward = ConfidenceReward("ema")  # or ConfidenceReward(a_model), and no attach
trainer = GRPOTrainer(
    model=model,
    reward_funcs=reward,
    args=GRPOConfig(
        output_dir="runs/trl",
        num_generations=4,
        per_device_train_batch_size=8,
        max_completion_length=16 if processing else 256,
        max_steps=3 if processing else 200,
        bf16=processing is None,
        use_cpu=processing is not None,
        report_to="none",
        save_strategy="no",
    ),
    train_dataset=Dataset.from_list(rows),
    processing_class=processing,
)
reward.attach(trainer, decay=0.995, every=10)
trainer.train()
print({k: v for k, v in trainer.state.log_history[-1].items() if "reward" in k or "confidence" in k})
