"""The compact GRPO trainer: an application on top of raise_core."""
