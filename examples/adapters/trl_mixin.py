"""TRL with the log-probabilities it has: beta > 0 runs its reference anyway, so the rewards cost no pass.

python examples/adapters/trl_mixin.py    # a tiny random model: it runs, and answers nothing
python examples/adapters/trl_mixin.py Qwen/Qwen2.5-0.5B-Instruct
"""

import sys
import tempfile

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from raise_core.integrations.trl import ConfidenceMixin, ConfidenceReward
from raise_trainer import tiny


class ConfidenceTrainer(ConfidenceMixin, GRPOTrainer):
    """GRPOTrainer whose rewards are given `ref_logps`."""


row = {
    "prompt": [
        {"role": "user", "content": "Which letter comes after A? Answer inside <answer> and </answer>."}
    ],
    "solution": "B",
    "problem_type": "multiple choice",
}
small = len(sys.argv) < 2
model, processing = (tempfile.mkdtemp(), tiny.build_processor()) if small else (sys.argv[1], None)
if small:  # TRL reads its reference from where the model came from
    tiny.build_model(processing, seed=0).save_pretrained(model)
trainer = ConfidenceTrainer(
    model=model,
    reward_funcs=ConfidenceReward(processing_class=processing, group_size=4),
    args=GRPOConfig(
        output_dir="runs/trl", beta=0.04, num_generations=4, per_device_train_batch_size=4,
        max_completion_length=16 if small else 256, max_steps=3 if small else 200, bf16=not small,
        use_cpu=small, report_to="none", save_strategy="no",
    ),
    train_dataset=Dataset.from_list([row] * 8),
    processing_class=processing,
)  # fmt: skip
if not small:
    trainer.reward_funcs[0].attach(trainer)
trainer.train()
print({k: v for k, v in trainer.state.log_history[-1].items() if "reward" in k or "confidence" in k})
