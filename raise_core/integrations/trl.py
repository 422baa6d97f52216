"""TRL's GRPOTrainer, read in version 1.16.0: a reward function, and a mixin that lends it the reference.

A reward function is called `f(prompts=, completions=, completion_ids=, **columns, trainer_state=, log_extra=,
log_metric=)` once for each generation batch of a process and returns a float or None for each row; None means
that it does not apply. TRL generates, computes reference log-probabilities (only if beta != 0), then rewards;
it does not hand the log-probabilities on, which is what `ConfidenceMixin` is for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn

from raise_core.ema import EmaReference, FrozenReference, PolicyReference, Reference
from raise_core.integrations.common import (
    STRICT_KINDS,
    answer_logps,
    column,
    grade,
    mixed,
    rewards_of_answers,
    rewards_over_processes,
)
from raise_core.integrations.trl_trainer import FILE, ConfidenceMixin, follow
from raise_core.reference_store import evaluating
from raise_core.scoring.scorer import Scorer
from raise_core.spans import Found, find_answer_spans
from raise_core.verify import canonical_kind

REFERENCES = ("ema", "frozen", "policy")
__all__ = ["FILE", "REFERENCES", "ConfidenceMixin", "ConfidenceReward"]


class ConfidenceReward:
    """Reward function for GRPOTrainer: SCRE and IGSR rewards of each group, scored in one packed pass.

    reference: what confidence is taken from.
        A model of its own (a Hugging Face model, frozen by its owner), or a `rc.Reference`.
        "ema", "frozen", "policy": made from the trainer's model by `attach(trainer)`.
        None: the `ref_logps` that `ConfidenceMixin` adds; nothing is run again.
    processing_class: the trainer's tokenizer or processor. `attach` fills it in.
    group_size: the trainer's num_generations. None: rows that follow each other with the same prompt are a
        group; several processes need the number.
    kind, kind_column: one kind for all rows, or the column that holds it. solution_column: the solutions;
        None there gives the reward None.
    confidence_share k: text score * (1 - k) + confidence reward * k.
    strict_kinds: kinds that SCRE rewards; IGSR does the others.
    measure: another confidence in the answer, in place of both: a function of logp [T] and offsets [S+1] that
        gives [S] in [0, 1], such as rc.min_prob, rc.mean_prob or rc.sequence_likelihood; the reward is text
        score * measure.
    template_options: keyword arguments of the chat template, as the trainer's. encode: prompt -> what the
        scorer takes for it, in place of the processing class.
    max_tokens, options: those of `rc.Scorer` and of `rc.confidence_rewards` (eta, lam, tau, variant, …).
    process_group: the processes that share groups, where a process does not hold whole ones.

    The completion is the text of `completion_ids` with its special tokens, so that added answer tags count.
    Logged: text score and confidence of each row, the mean of both, the share of rows without an answer.
    Calling it is synchronous. Raises ValueError naming column, row or group.
    """

    def __init__(
        self,
        reference: nn.Module | Reference | str | None = None,
        processing_class: Any = None,
        *,
        group_size: int | None = None,
        kind: str | None = None,
        kind_column: str = "problem_type",
        solution_column: str = "solution",
        confidence_share: float = 1.0,
        strict_kinds: Collection[str] = STRICT_KINDS,
        template_options: Mapping[str, Any] | None = None,
        encode: Callable[[Any], Mapping[str, Any]] | None = None,
        measure: Callable[[Tensor, Tensor], Tensor] | None = None,
        max_tokens: int = 32768,
        process_group: Any = None,
        **options: Any,
    ) -> None:
        if isinstance(reference, str) and reference not in REFERENCES:
            raise ValueError(
                f"reference: got {reference!r}, wanted a model, a rc.Reference, None, or one of "
                f"{', '.join(REFERENCES)}"
            )
        nothing = torch.zeros(0)
        mixed(nothing, nothing, confidence_share)
        rewards_of_answers([], nothing, nothing.bool(), nothing.long(), **options)  # for its checks
        self.__name__ = "confidence"  # what TRL calls it in its logs
        self.processing_class = processing_class
        self.group_size = group_size
        self.options = options
        self._wanted = reference
        self._kind, self._kind_column, self._solution_column = kind, kind_column, solution_column
        self._share = confidence_share
        self._strict_kinds = tuple(canonical_kind(name) for name in strict_kinds)
        self._template: dict[str, Any] = dict(template_options or {})
        self._encode, self._measure = encode, measure
        self._max_tokens = max_tokens
        self._process_group = process_group
        self._trainer: Any = None
        self.reference: nn.Module | Reference | None = None if isinstance(reference, str) else reference
        self._scorer: Scorer | None = None

    def attach(self, trainer: Any, *, how: str = "swap", **ema: Any) -> ConfidenceReward:
        """Take processing class, group size, chat template and model from a GRPOTrainer; return self.

        A reference asked for by name is made here, updated after each optimiser step, saved in every
        checkpoint and read back when training is resumed. how, ema: arguments of `EmaReference`; TRL replaces
        the model's `forward` by one that is bound to the model, so a "copy" of it would run the policy:
        "swap", or "adapter" for LoRA. Raises ValueError under DeepSpeed ZeRO-3, whose weights are not there
        outside its own forward pass.
        """
        plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
        if plugin is not None and plugin.zero_stage == 3:
            raise ValueError("deepspeed: got ZeRO-3, wanted ZeRO-2, FSDP2 or a reference model of its own")
        if how == "copy":
            raise ValueError(
                'how: got "copy", but TRL binds forward to the model; wanted "swap" or "adapter"'
            )
        self.processing_class = self.processing_class or trainer.processing_class
        self.group_size = self.group_size or trainer.num_generations
        given = {"chat_template": trainer.chat_template, "tools": trainer.tools or None}
        self._template = {**given, **trainer.chat_template_kwargs, **self._template}
        self._trainer = trainer
        if isinstance(self._wanted, str):
            made: dict[str, Callable[[], Reference]] = {
                "ema": lambda: EmaReference(trainer.model, how=_how(trainer.model, how), **ema),
                "frozen": lambda: FrozenReference(trainer.model, how=_how(trainer.model, how)),
                "policy": lambda: PolicyReference(trainer.model),
            }
            self.reference, self._scorer = made[self._wanted](), None
        if isinstance(self.reference, Reference):
            trainer.add_callback(follow(self.reference))
        return self

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        *,
        trainer_state: Any = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        ref_logps: Sequence[Sequence[float] | None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Rewards of B rows, None where there is no solution (or where `ref_logps` has None)."""
        rows = len(completion_ids)
        if self.processing_class is None:
            raise ValueError("processing_class: got None, wanted the trainer's; pass it, or attach(trainer)")
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        solutions = column(columns, self._solution_column, rows, "the right answers")
        kinds = self._kind or column(columns, self._kind_column, rows, "the kinds of question; or give kind=")
        texts = [tokenizer.decode(list(ids)) for ids in completion_ids]
        graded = grade(texts, solutions, kinds, strict_kinds=self._strict_kinds)
        group, split = self._groups(prompts)
        usable = graded.usable
        if self.reference is None and ref_logps is not None:
            usable = [u and logps is not None for u, logps in zip(usable, ref_logps, strict=True)]
        kept = [b for b, is_usable in enumerate(usable) if is_usable]
        found = find_answer_spans([completion_ids[b] for b in kept], tokenizer)
        chosen = _Rows(
            [prompts[b] for b in kept], [list(completion_ids[b]) for b in kept], found,
            graded.score[kept], graded.strict[kept], [group[b] for b in kept],
        )  # fmt: skip
        logps = None if ref_logps is None else [cast("Sequence[float]", ref_logps[b]) for b in kept]
        reward, confidence = self._rewards(chosen, logps, split)
        reward = mixed(chosen.score, reward, self._share)
        made: list[float | None] = [None] * rows
        sure: list[float | None] = [None] * rows
        for b, value, c in zip(kept, reward.tolist(), confidence.tolist(), strict=True):
            made[b], sure[b] = value, c
        if log_extra is not None:
            log_extra("confidence", sure)
            log_extra(
                "text_score", [s if u else None for s, u in zip(graded.score.tolist(), usable, strict=True)]
            )
        if log_metric is not None and kept:
            log_metric("confidence/mean", float(confidence.mean()))
            log_metric("confidence/text_score", float(chosen.score.mean()))
            missing = sum(f.reason is not None for f in found) / len(found)
            log_metric("confidence/answer_missing_share", missing)
        return made

    def _rewards(
        self, rows: _Rows, logps: Sequence[Sequence[float]] | None, split: bool
    ) -> tuple[Tensor, Tensor]:
        if self.reference is not None:
            answers, whole = self._scored(rows)
        elif logps is not None:
            answers, whole = answer_logps(logps, rows.ids, rows.found), None
        else:
            raise ValueError(
                f"reference: got {self._wanted!r} and no ref_logps column, so there is no model to take "
                "confidence from; pass a model, attach(trainer), or train with ConfidenceMixin and beta > 0"
            )
        if self._measure is not None:
            sure = _measured(self._measure, answers)
            return rows.score * sure, sure
        if split:
            made = rewards_over_processes(
                answers,
                rows.score,
                rows.strict,
                rows.group,
                process_group=self._process_group,
                **self.options,
            )
            return made.reward, made.confidence
        if whole is None:
            made = rewards_of_answers(
                answers, rows.score, rows.strict, torch.tensor(rows.group, dtype=torch.long), **self.options
            )
            return made.reward, made.confidence
        return whole

    def _scored(self, rows: _Rows) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
        """Under the reference: the answers' log-probabilities, rewards and confidence of these rows."""
        bounds = [i for i in range(len(rows.group)) if i == 0 or rows.group[i] != rows.group[i - 1]]
        bounds.append(len(rows.group))
        inputs = [self._inputs(rows.prompts[i]) for i in bounds[:-1]]
        ids = [rows.ids[i:j] for i, j in pairwise(bounds)]
        reference = cast("nn.Module | Reference", self.reference)
        model = reference.model if isinstance(reference, Reference) else reference
        self._scorer = self._scorer or Scorer(model, max_tokens=self._max_tokens)
        with _scoring(reference), self._autocast():
            got = self._scorer.rewards(
                inputs, ids, rows.score, rows.strict, self.processing_class, found=rows.found, **self.options
            )
        answers = list(torch.split(got.parts["logp"].float().cpu(), got.parts["length"].tolist()))
        return answers, (got.reward.cpu(), got.confidence.cpu())

    def _autocast(self) -> AbstractContextManager[Any]:
        """The trainer's own precision, once attached."""
        return nullcontext() if self._trainer is None else self._trainer.accelerator.autocast()

    def _inputs(self, prompt: Any) -> Mapping[str, Any]:
        """What the scorer takes for a prompt: the processing class's tensors for it alone."""
        if self._encode is not None:
            return self._encode(prompt)
        if isinstance(prompt, str):
            return cast("Mapping[str, Any]", self.processing_class(text=[prompt], return_tensors="pt"))
        has_media = hasattr(self.processing_class, "tokenizer")
        messages = [_in_blocks(message) for message in prompt] if has_media else list(prompt)
        made = self.processing_class.apply_chat_template(
            conversation=[messages], add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt", **self._template,
        )  # fmt: skip
        return cast("Mapping[str, Any]", made)

    def _groups(self, prompts: Sequence[Any]) -> tuple[list[int], bool]:
        """A group number for each row, the same on all processes; whether groups lie on several of them."""
        size, rows = self._size(), len(prompts)
        several = distributed.is_available() and distributed.is_initialized()
        processes = distributed.get_world_size(self._process_group) if several else 1
        if size is None:
            if processes > 1:
                raise ValueError("group_size: got None on several processes, wanted num_generations")
            runs = [0]
            for before, prompt in pairwise(prompts):
                runs.append(runs[-1] + _differ(before, prompt))
            return runs[:rows], False
        split = rows % size != 0
        if rows * processes % size:
            where = "here" if processes == 1 else f"on each of {processes} processes"
            raise ValueError(
                f"group_size: got {rows} rows {where}, wanted a multiple of {size}; a group is split over "
                "calls, and its rewards need all of it: make the batch a multiple of num_generations"
            )
        first = rows * distributed.get_rank(self._process_group) if several else 0
        group = [(first + b) // size for b in range(rows)]
        for b in range(1, rows):
            if group[b] == group[b - 1] and _differ(prompts[b - 1], prompts[b]):
                raise ValueError(
                    f"prompts[{b}]: got another prompt than row {b - 1} of its group of {size}; group_size "
                    "must be num_generations, and rows in the trainer's order"
                )
        return group, split

    def _size(self) -> int | None:
        if self._trainer is not None and not self._trainer.model.training:
            return int(self._trainer.num_generations_eval)
        return self.group_size


class _Rows:
    """Rows to reward: prompts, ids, answers found, score and strict [S], group numbers."""

    def __init__(
        self,
        prompts: list[Any],
        ids: list[list[int]],
        found: list[Found],
        score: Tensor,
        strict: Tensor,
        group: list[int],
    ) -> None:
        self.prompts, self.ids, self.found = prompts, ids, found
        self.score, self.strict, self.group = score, strict, group


def _measured(measure: Callable[[Tensor, Tensor], Tensor], answers: Sequence[Tensor]) -> Tensor:
    """measure of each answer, [S]; ValueError for what is no confidence."""
    offsets = torch.tensor([0, *map(len, answers)]).cumsum(0)
    sure = measure(torch.cat([*answers, torch.zeros(0)]), offsets).float()
    if sure.shape != (len(answers),) or not bool(((sure >= 0) & (sure <= 1)).all()):
        raise ValueError(
            f"measure: got {sure.tolist()}, wanted a number from 0 to 1 for each of {len(answers)} answers"
        )
    return sure


def _differ(one: Any, other: Any) -> bool:
    """Whether two prompts are not the same; ValueError for what cannot be compared."""
    try:
        return bool(one != other)
    except (RuntimeError, ValueError):
        raise ValueError(
            "prompts: got arrays, which cannot be compared; wanted media as PIL images or paths"
        ) from None


def _how(model: nn.Module, how: str) -> str:
    return "adapter" if hasattr(model, "peft_config") and how == "swap" else how


def _scoring(reference: nn.Module | Reference) -> AbstractContextManager[Any]:
    return reference.active() if isinstance(reference, Reference) else evaluating(reference)


def _in_blocks(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose content is a list of parts, as processors want it."""
    content = message.get("content")
    return (
        {**message, "content": [{"type": "text", "text": content}]}
        if isinstance(content, str)
        else {**message}
    )
