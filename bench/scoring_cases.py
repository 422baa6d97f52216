"""The cases of `python -m bench scoring`: a group scored once, or its prompt repeated.

The truth is a pass of its own for each completion, weights and activations in fp64 (the model's own code
rounds its norms and rotary angles to fp32).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import raise_core as rc
from bench import peers
from bench.cases import PEER_FACTOR, Call, Case, Impl, Outputs, Truth
from bench.scoring_models import Size, build, repeated, text, video_prompt
from raise_core.spans import Found

MOST = 1e-4  # nats of logp; relative to the largest entry of a weight's gradient
REPEATED, OURS = "repeated prompt", "raise-core Scorer"
REWARDS, STATS, UPDATE = "rewards", "token_stats", "policy update"
GROWTH = "growth"
GRADIENT = "gradient of "
FEW = {"frames": 2, "side": 4, "group": 2, "length": 12}
LogpOf = Callable[[Any, dict[str, Any], Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """A video of frames x side x side patches, `group` completions of `length`, `answer` tokens last."""

    frames: int
    side: int
    group: int
    length: int
    answer: int


@dataclass
class Group:
    """A model, its scorer, a prompt with its completions [G, C], and what rewards and the update take."""

    model: Any
    shape: Shape
    kind: str = REWARDS
    exact: list[Tensor] = field(default_factory=list)  # fp64 log-probabilities [T], once they are known
    scorer: rc.Scorer = field(init=False)

    def __post_init__(self) -> None:
        v = self.model.config.text_config.vocab_size
        s = self.shape
        self.scorer = rc.Scorer(self.model)
        self.prompt = video_prompt(s.frames, s.side, v)
        self.completions = torch.tensor([text(s.length, v, 10 + g) for g in range(s.group)])
        source = torch.Generator().manual_seed(5)
        self.advantage = torch.randn(s.group, generator=source)
        self.noise = torch.randn(s.group * s.length, generator=source).mul_(0.1)
        self.score = torch.linspace(0.3, 1.0, s.group)
        self.offsets = torch.arange(0, s.group * s.length + 1, s.length)

    def few(self) -> Group:
        """A small group of the same model, by the same scorer: its first-use check runs here."""
        other = Group(self.model, Shape(answer=self.shape.answer, **FEW), self.kind)
        other.scorer = self.scorer
        other.logp_old = torch.zeros(FEW["group"] * FEW["length"])
        return other

    @cached_property
    def logp_old(self) -> Tensor:
        """Log-probabilities [T] of a policy that was a little different: some ratios are clipped."""
        with torch.no_grad():
            logp = one_by_one(self, self.model)
        return logp + self.noise

    def truth(self) -> dict[str, Truth]:
        exact = copy.deepcopy(self.model).double()
        allowed = MOST / PEER_FACTOR
        if self.kind != UPDATE:
            with torch.no_grad():
                self.exact[:] = self.exact or [one_by_one(self, exact)]
            logp = self.exact[0]
            if self.kind == STATS:
                return {"logp": Truth(logp, allowed)}
            logp = logp.view(len(self.completions), -1)[:, -self.shape.answer :]
            found = rc.confidence_rewards(answer_spans(self), self.score, self._strict(), logp=logp.flatten())
            return {
                "logp": Truth(logp.flatten(), allowed),
                "reward": Truth(found.reward.double(), allowed),
            }
        old, c = self.logp_old.double(), self.shape.length
        logps, names = [], [n for n, _ in exact.named_parameters()]
        total = [torch.zeros_like(p) for p in exact.parameters()]
        for g, logp in enumerate(separate(self, exact)):
            logps.append(logp.detach())
            part = token_loss(logp, old[g * c : (g + 1) * c], self.advantage[g : g + 1].double(), self)
            for whole, piece in zip(total, torch.autograd.grad(part, list(exact.parameters())), strict=True):
                whole += piece
        made = {"logp": Truth(torch.cat(logps), allowed)}
        for name, value in zip(names, total, strict=True):
            made[GRADIENT + name] = Truth(value, allowed * float(value.abs().max()))
        return made

    def _strict(self) -> Tensor:
        return torch.ones(len(self.completions), dtype=torch.bool)


def separate(x: Group, model: Any) -> Iterator[Tensor]:
    """Log-probabilities [C] of each completion from a pass of its own, all logits made."""
    for row in x.completions:
        yield by_logits(model, repeated(_as(x.prompt, model), row[None]), row[None])[0]


def one_by_one(x: Group, model: Any) -> Tensor:
    return torch.cat(list(separate(x, model)))


def _as(prompt: dict[str, Any], model: Any) -> dict[str, Any]:
    return {k: v.to(model.dtype) if k.startswith("pixel") else v for k, v in prompt.items()}


def by_logits(model: Any, batch: dict[str, Any], completions: Tensor) -> Tensor:
    """Log-probabilities [G, C] as trainers make them: `logits_to_keep`, selective log-softmax."""
    length = completions.shape[1]
    logits = model(**batch, logits_to_keep=length + 1, use_cache=False).logits[:, :-1]
    picked = logits.gather(-1, completions[..., None])[..., 0]
    logp: Tensor = picked - torch.stack([row.logsumexp(-1) for row in logits])  # a sequence at a time
    return logp


def by_trl(model: Any, batch: dict[str, Any], completions: Tensor) -> Tensor:
    """The same with TRL's head in vocabulary chunks, which stores no logits."""
    length = completions.shape[1]
    hidden = model.model(**batch, use_cache=False).last_hidden_state[:, -length - 1 : -1]
    flat = hidden.reshape(-1, hidden.shape[-1])
    return peers.trl_chunked(flat, model.lm_head.weight, completions.flatten()).view_as(completions)


def answer_spans(x: Group) -> rc.Spans:
    """The answers as packed spans."""
    g, n = len(x.completions), x.shape.answer
    targets = x.completions[:, -n:].flatten()
    group = torch.zeros(g, dtype=torch.long)
    return rc.Spans(torch.arange(g * n), targets, torch.arange(0, g * n + 1, n), group, torch.arange(g))


def token_loss(logp: Tensor, old: Tensor, advantage: Tensor, x: Group) -> Tensor:
    """The part of the step's loss (token mean, ratios clipped at 0.2) that some of its completions make."""
    offsets = x.offsets[: len(advantage) + 1]
    return rc.policy_loss(
        logp, old, advantage, offsets, kind="dapo", num_tokens=len(x.noise), num_sequences=len(x.completions)
    ).loss


def gradients(x: Group, loss: Tensor) -> dict[str, Tensor]:
    names, weights = zip(*x.model.named_parameters(), strict=True)
    made = torch.autograd.grad(loss, weights)
    return {GRADIENT + name: g for name, g in zip(names, made, strict=True)}


def repeated_call(kind: str, logp_of: LogpOf) -> Callable[[Group], Call]:
    """The prompt and its media once for each completion, in one batch that exists beforehand."""

    def make(x: Group) -> Call:
        batch = repeated(x.prompt, x.completions)

        def update() -> Outputs:
            logp = logp_of(x.model, batch, x.completions).flatten()
            return {"logp": logp.detach(), **gradients(x, token_loss(logp, x.logp_old, x.advantage, x))}

        @torch.no_grad()
        def score() -> Outputs:
            logp = logp_of(x.model, batch, x.completions)
            if kind == STATS:
                return {"logp": logp.flatten()}
            logp = logp[:, -x.shape.answer :].flatten()
            made = rc.confidence_rewards(answer_spans(x), x.score, x._strict(), logp=logp)
            return {"logp": logp, "reward": made.reward}

        return update if kind == UPDATE else score

    return make


def our_rewards(x: Group) -> Call:
    ids, length = [x.completions.tolist()], x.shape.length
    found = [Found(length - x.shape.answer, length, "answer") for _ in ids[0]]
    unused: Any = None  # the tokenizer, which only finds the answers

    def call() -> Outputs:
        made = x.scorer.rewards([x.prompt], ids, x.score, x._strict(), unused, found=found)
        return {"logp": made.parts["logp"], "reward": made.reward}

    return call


def our_stats(x: Group) -> Call:
    ids = [x.completions.tolist()]

    @torch.no_grad()
    def call() -> Outputs:
        (stats,) = x.scorer.token_stats([x.prompt], ids)
        return {"logp": torch.cat([s.logp for s in stats if s.logp is not None])}

    return call


def our_update(x: Group) -> Call:
    ids = [x.completions.tolist()]

    def call() -> Outputs:
        rows = x.scorer.completion_rows([x.prompt], ids)
        head = x.scorer.head().options()
        made = rc.linear_policy_loss(
            rows.hidden, head.pop("weight"), rows.targets, x.logp_old, x.advantage, rows.offsets,
            kind="dapo", num_tokens=len(rows.targets), num_sequences=len(x.advantage), **head,
        )  # fmt: skip
        assert made.logp is not None
        return {"logp": made.logp, **gradients(x, made.loss)}

    return call


OUR_CALLS: dict[str, Callable[[Group], Call]] = {
    REWARDS: our_rewards,
    STATS: our_stats,
    UPDATE: our_update,
}


def cases(shape: Shape, sizes: tuple[Size, ...]) -> list[Case]:
    """Every case at every vocabulary; the cases of a vocabulary share its model."""
    made = []
    for size in sizes:
        models = Shared(size)
        for kind, ours in OUR_CALLS.items():
            note = "logits of all completion rows" if kind == REWARDS else ""
            impls = (
                Impl(REPEATED, "eager", repeated_call(kind, by_logits), note=note),
                Impl(
                    f"{REPEATED}, TRL's chunked head", "peer", repeated_call(kind, by_trl), package="trl"
                ),
                Impl(OURS, "ours", ours),
            )  # fmt: skip
            made.append(
                Case(
                    name=kind,
                    dtype=f"V = {size.vocabulary}",
                    shape={"frames": shape.frames, "side": shape.side, "G": shape.group, "C": shape.length,
                           "answer": shape.answer, "V": size.vocabulary, "D": size.width},
                    inputs=lambda models=models, kind=kind: Group(models.give(), shape, kind, models.exact),
                    impls=impls,
                    unit=REPEATED,
                    bytes=0,
                    is_limit=False,
                    expected_s=30.0 if kind == UPDATE else 20.0,
                )
            )  # fmt: skip
    return made


class Shared:
    """A model, made at the first use, and the fp64 results that its cases share."""

    def __init__(self, size: Size) -> None:
        self.size = size
        self.model: Any = None
        self.exact: list[Tensor] = []

    def give(self) -> Any:
        self.model = self.model or build(self.size)
        return self.model
