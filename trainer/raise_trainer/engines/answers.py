"""What vLLM says about completions, checked, and as a rollout. The same for a server and for this process."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from raise_core.scoring.backbone import VisionFeatures

from .. import ranks
from ..errors import UserError
from ..prompts import Prompt
from ..rollout import Rollout
from .base import Sampling

T = TypeVar("T")
NEVER = -100.0  # bias of a token that is never sampled; the lowest that vLLM takes
SEEDS = 2**53  # as many as there are draws


@dataclass(frozen=True)
class Answer:
    """One completion. logp: of each token at the sampling temperature [nats]. versions: of its weights."""

    ids: list[int]
    logp: list[float]
    versions: frozenset[str]


def seed_of(draws: Tensor | None, row: int) -> int:
    """The seed of the prompt whose first completion has this row of draws: a function of its place alone.

    vLLM gives completion i of a prompt seed + i. 0 without draws, for greedy sampling.
    """
    return 0 if draws is None else int(draws[row, 0].item() * SEEDS)


def choices(sampling: Sampling, group_size: int, seed: int) -> dict[str, Any]:
    """Sampling parameters, as both of vLLM's ways in take them; each named, since servers have defaults."""
    return {
        "n": group_size,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": seed,
        "stop_token_ids": list(sampling.eos),
        "logit_bias": {str(i): NEVER for i in sampling.suppress},
        "logprobs": 0,
    }


@dataclass(frozen=True)
class Expected:
    """What answers have to be. who: the engine, for messages. vocab: token ids. version: of the weights."""

    who: str
    sampling: Sampling
    vocab: int
    version: str

    def check(
        self, prompt: Prompt, answers: Sequence[Answer], group_size: int, read: Sequence[int] | None
    ) -> None:
        """UserError naming the row when its answers cannot be used. read: the prompt as vLLM took it."""
        self._check_prompt(prompt, read)
        if len(answers) != group_size:
            raise self._wrong(prompt, f"{len(answers)} completions, wanted {group_size}")
        for number, answer in enumerate(answers):
            fault = self._fault(answer)
            if fault:
                raise self._wrong(prompt, f"completion {number} {fault}")
            if answer.versions != {self.version}:
                raise UserError(
                    f"{self.who}: row {prompt.row.problem_id}: sampled by weights "
                    f"{sorted(answer.versions) or 'without a version'}, wanted {self.version!r}; it was "
                    "restarted or has another trainer: give each run a server of its own and start the run "
                    "again, which goes on from its checkpoint"
                )

    def _check_prompt(self, prompt: Prompt, read: Sequence[int] | None) -> None:
        want = prompt.ids.tolist()
        if read is None or list(read) != want:
            got = "no prompt ids" if read is None else f"a prompt of {len(read)} other tokens"
            raise self._wrong(prompt, f"{got}, wanted the {len(want)} that were sent")

    def _fault(self, answer: Answer) -> str:
        ids, s = answer.ids, self.sampling
        if not 1 <= len(ids) <= s.max_new_tokens:
            return f"has {len(ids)} tokens, wanted 1 to {s.max_new_tokens}"
        if len(answer.logp) != len(ids):
            return f"has {len(answer.logp)} log-probabilities for {len(ids)} tokens"
        outside = sorted({i for i in ids if not 0 <= i < self.vocab})
        if outside:
            return f"has token ids {outside[:5]} outside the vocabulary of {self.vocab}"
        never = sorted(set(ids) & set(s.suppress))
        if never:
            return f"has token ids {never[:5]}, which must never be sampled"
        if any(i in s.eos for i in ids[:-1]):
            return "goes on after its end-of-sequence token"
        if ids[-1] not in s.eos and len(ids) < s.max_new_tokens:
            return f"stops after {len(ids)} tokens without an end-of-sequence token"
        if not all(-torch.inf < x <= 0 for x in answer.logp):
            return "has log-probabilities that are above 0 or not finite"
        return ""

    def _wrong(self, prompt: Prompt, what: str) -> UserError:
        return UserError(
            f"{self.who}: row {prompt.row.problem_id}: {what}; nothing was put in its place: compare the "
            "engine's model, tokenizer and version with docs/engines.md, or set engine=generate"
        )


def together(make: Callable[[], T]) -> T:
    """What `make` returns in this process; a UserError of one process is raised by all, so that none waits.

    All processes call it.
    """
    made, failed = list[T](), None
    try:
        made.append(make())
    except UserError as error:
        failed = str(error)
    failures = [text for text in ranks.gather(failed) if text is not None]
    if failures:
        raise UserError(failures[0])
    return made[0]


def as_rollout(
    prompts: Sequence[Prompt],
    answers: Sequence[Sequence[Answer]],
    features: Sequence[VisionFeatures | None] | None,
) -> Rollout:
    """Completions by prompt as a rollout; `logp` and `entropy` are the policy's to give (`rescored`)."""
    flat = [answer for some in answers for answer in some]
    owner = [p for p, some in enumerate(answers) for _ in some]
    sampled = [torch.tensor(answer.logp, dtype=torch.float64) for answer in flat]
    return Rollout(list(prompts), [a.ids for a in flat], [], [], owner, features, sampled)
