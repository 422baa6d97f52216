"""ms-swift, read at 4.6.0.dev0 (modelscope/ms-swift 3602360a5, 2026-08-22): an ORM and a trainer mixin.

A file given by --external_plugins holds `orms["raise_accuracy"] = TextScore`; --reward_funcs raise_accuracy.
Rewards come before log-probabilities, so the ORM gives the text score and the mixin, where advantages are
computed, turns its column into confidence rewards. Not run with ms-swift itself; tested against its published
signatures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, distributed

from raise_core.integrations.common import (
    STRICT_KINDS,
    answer_logps,
    check_temperature,
    column,
    grade,
    mixed,
    rewards_over_processes,
)
from raise_core.spans import find_answer_spans
from raise_core.verify import canonical_kind


class TextScore:
    """An ORM: text scores [B] in [0, 1] of the completions' answers, None where the solution is None.

    args: the trainer's, unused. Columns: `solution`, and the kind of question in `problem_type`.
    """

    solution_column = "solution"
    kind_column = "problem_type"

    def __init__(self, args: Any = None, **_: Any) -> None:
        self.args = args

    def __call__(self, completions: Sequence[str], **columns: Any) -> list[float | None]:
        """The scores; ValueError / TypeError naming column or row."""
        rows = len(completions)
        for b, text in enumerate(completions):
            if not isinstance(text, str):
                raise TypeError(f"completions[{b}]: got {type(text).__name__}, wanted the decoded text")
        solutions = column(columns, self.solution_column, rows, "the right answers")
        kinds = column(columns, self.kind_column, rows, "the kinds of question")
        graded = grade(completions, solutions, kinds)
        return [s if u else None for s, u in zip(graded.score.tolist(), graded.usable, strict=True)]


class ConfidenceMixin:
    """`class Trainer(ConfidenceMixin, GRPOTrainer)` with swift.rlhf_trainers' trainer.

    text_score: the name of the reward whose column (text scores in [0, 1]) becomes confidence rewards.
    source: "ref" (needs beta > 0) or "old", the policy's own log-probabilities, which ms-swift always has.
    confidence_share, options (of `rc.confidence_rewards`), any_temperature: as elsewhere. Groups are gathered
    by prompt_id over the processes. group_size: refuse groups of another size even then; None takes them as
    they are. Set these in the class.

    Raises ValueError: no reference log-probabilities, a temperature other than 1 (ms-swift divides the logits
    by it), padding_free, more samples than log-probabilities, a text score outside [0, 1].
    """

    text_score = "TextScore"
    source = "ref"
    confidence_share = 1.0
    any_temperature = False
    group_size: int | None = None
    options: Mapping[str, Any] = {}

    def _compute_advantages(
        self,
        samples: Sequence[Any],
        rewards_per_func: Tensor,
        batch_encoded_inputs: Sequence[Mapping[str, Any]],
    ) -> Any:
        mine = cast("Any", self)
        check_temperature(float(mine.temperature), self.any_temperature)
        names = list(mine.reward_func_names)
        if self.text_score not in names:
            raise ValueError(f"text_score: got {self.text_score!r}, wanted one of the rewards {names}")
        place = names.index(self.text_score)
        ids, logps = self._completions(batch_encoded_inputs)
        if len(ids) != len(samples):
            raise ValueError(f"samples: got {len(samples)}, but log-probabilities of {len(ids)} completions")
        first, score = _own(rewards_per_func[:, place], len(samples))
        usable = score.isfinite()
        if bool(((score < 0) | (score > 1)).any()):
            raise ValueError(f"rewards of {self.text_score}: got {score.tolist()}, wanted text scores 0 to 1")
        kept = [b for b in range(len(samples)) if bool(usable[b])]
        strict = [canonical_kind(samples[b].extra[TextScore.kind_column]) in STRICT_KINDS for b in kept]
        tokenizer = getattr(mine.processing_class, "tokenizer", mine.processing_class)
        found = find_answer_spans([ids[b] for b in kept], tokenizer)
        made = rewards_over_processes(
            answer_logps([logps[b] for b in kept], [ids[b] for b in kept], found),
            score[kept], torch.tensor(strict, dtype=torch.bool), [samples[b].prompt_id for b in kept],
            group_size=self.group_size, **self.options,
        )  # fmt: skip
        score[kept] = mixed(score[kept], made.reward, self.confidence_share)
        changed = rewards_per_func.clone()
        changed[:, place] = _whole(score, first, len(changed)).to(changed)
        return cast("Any", super())._compute_advantages(samples, changed, batch_encoded_inputs)

    def _completions(
        self, batch_encoded_inputs: Sequence[Mapping[str, Any]]
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Ids and log-probabilities of each completion, without its padding."""
        ids, logps = list[list[int]](), list[list[float]]()
        for batch in batch_encoded_inputs:
            grpo = batch["grpo_batch"]
            given = grpo.ref_per_token_logps if self.source == "ref" else grpo.old_per_token_logps
            if given is None:
                raise ValueError(
                    f"source: got {self.source!r}, but its log-probabilities were not computed; wanted "
                    '--beta above 0, or source = "old"'
                )
            tokens, mask = batch["model_inputs"]["input_ids"], grpo.completion_mask.bool()
            if tokens.shape[0] != mask.shape[0] or given.shape != mask.shape:
                raise ValueError("padding_free: wanted --padding_free false; rows must be apart to be read")
            tail = tokens[:, -mask.shape[1] :]
            ids += [row[m].tolist() for row, m in zip(tail, mask, strict=True)]
            logps += [row[m].float().tolist() for row, m in zip(given, mask, strict=True)]
        return ids, logps


def _own(values: Tensor, count: int) -> tuple[int, Tensor]:
    """Where this process's rows begin among those of all, and its values [count] on the CPU."""
    first = 0
    if distributed.is_available() and distributed.is_initialized():
        counts: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(counts, count)
        first = sum(counts[: distributed.get_rank()])
    return first, values[first : first + count].detach().float().cpu().clone()


def _whole(own: Tensor, first: int, count: int) -> Tensor:
    """The values [count] of all processes from each one's own."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return own
    every: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(every, own.tolist())
    return torch.tensor([value for part in every for value in part])[:count]
