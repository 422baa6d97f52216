"""For TRL's GRPOTrainer, read in version 1.16.0: what hangs on the trainer itself, reached through `trl`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from torch import Tensor

from raise_core.ema import Reference
from raise_core.integrations.common import check_temperature

FILE = "raise_reference.safetensors"
"""Where `ConfidenceReward.attach` keeps the reference, inside each of the trainer's checkpoints."""


class ConfidenceMixin:
    """`class Trainer(ConfidenceMixin, GRPOTrainer)`: rewards get the reference's log-probabilities for free.

    Every reward function is given the column `ref_logps`: for each row one float [nats] per completion token
    under the trainer's reference (its ref_model, or the model without its adapter), None for a completion
    that mask_truncated_completions took out of the attention. A `ConfidenceReward()` without a
    reference uses them.

    ValueError when beta is 0, since TRL then computes none, and when the sampling temperature is not 1, by
    which TRL divides the logits; `any_temperature = True` in the class accepts the latter.
    """

    any_temperature = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        mine = cast("Any", self)
        if mine.beta == 0:
            raise ValueError(
                "beta: got 0, for which GRPOTrainer computes no reference log-probabilities; wanted beta > "
                "0, or GRPOTrainer itself with ConfidenceReward(model) or .attach(trainer)"
            )
        check_temperature(mine.temperature, self.any_temperature)
        self._last_logps: tuple[Tensor, Tensor] | None = None

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        made = cast("Any", super())._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )
        # TRL's order is policy, then reference, then rewards: the last one before the rewards is wanted.
        self._last_logps = (made[0].detach(), attention_mask[:, -logits_to_keep:])
        return made

    def _calculate_rewards(
        self,
        inputs: list[dict[str, Any]],
        prompts: Any,
        completions: Any,
        completion_ids_list: list[list[int]],
    ) -> Any:
        assert self._last_logps is not None
        logps, mask = (x.cpu() for x in self._last_logps)
        attended = mask.sum(1).tolist()
        lent = [
            logps[b, : len(ids)].tolist() if attended[b] == len(ids) else None
            for b, ids in enumerate(completion_ids_list)
        ]
        rows = [{**row, "ref_logps": values} for row, values in zip(inputs, lent, strict=True)]
        self._last_logps = None
        return cast("Any", super())._calculate_rewards(rows, prompts, completions, completion_ids_list)


def follow(reference: Reference) -> Any:
    """A callback that keeps the reference in step with the trainer and in its checkpoints.

    FileNotFoundError when training is resumed from a checkpoint without it.
    """
    from transformers import TrainerCallback

    base: Any = TrainerCallback

    class Follow(base):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step > 0:
                reference.load(Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE)

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            reference.update(model, state.global_step)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            sharded = "shard" in reference.state_dict()
            if state.is_world_process_zero or sharded:
                reference.save(Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE)

    return Follow()
