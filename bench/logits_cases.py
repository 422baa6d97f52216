"""Cases from logits [T, V]: logp alone, and with entropy and self-certainty."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

import raise_core as rc
from bench import peers
from bench.cases import Call, Case, Impl, Outputs, Truth

THREE = ("logp", "entropy", "self_certainty")
SWITCH = "RAISE_COMPILED"
BLOCK = 32  # rows whose fp64 copy exists at one time


@dataclass(frozen=True)
class Logits:
    """logits [T, V] and targets [T]; every other row has its target far above the rest."""

    logits: Tensor
    targets: Tensor

    @staticmethod
    def draw(t: int, v: int, dtype: torch.dtype, device: str) -> Logits:
        source = torch.Generator().manual_seed(0)
        logits = torch.randn(t, v, generator=source).mul_(2.0)
        targets = torch.randint(0, v, (t,), generator=source)
        logits[torch.arange(0, t, 2), targets[::2]] += 16.0
        return Logits(logits.to(device, dtype), targets.to(device))

    def few(self) -> Logits:
        return Logits(self.logits[:8], self.targets[:8])

    def truth(self) -> dict[str, Truth]:
        parts = []
        for x, y in zip(self.logits.split(BLOCK), self.targets.split(BLOCK), strict=True):
            parts.append((_three(x.double(), y), _three(x.float(), y)))
        found = {}
        for name in THREE:
            true, peer = (torch.cat([part[k][name].double() for part in parts]) for k in (0, 1))
            found[name] = Truth(true, float((peer - true).abs().max()))
        return found


def _three(z: Tensor, y: Tensor) -> dict[str, Tensor]:
    log_p = torch.log_softmax(z, -1)
    return {
        "logp": log_p.gather(1, y[:, None])[:, 0],
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "self_certainty": -log_p.mean(-1) - math.log(z.shape[-1]),
    }


@contextmanager
def switched(value: str | None) -> Iterator[None]:
    """RAISE_COMPILED as given inside the block; None leaves it."""
    before = os.environ.get(SWITCH)
    if value is not None:
        os.environ[SWITCH] = value
    try:
        yield
    finally:
        if value is not None:
            os.environ.pop(SWITCH)
            if before is not None:
                os.environ[SWITCH] = before


def ours(want: tuple[str, ...], switch: str | None = None) -> Callable[[Logits], Call]:
    def make(inputs: Logits) -> Call:
        def call() -> Outputs:
            with switched(switch):
                stats = rc.token_stats(inputs.logits, inputs.targets, want=want)
            return {name: getattr(stats, name) for name in want}

        return call

    return make


def amax(inputs: Logits) -> Call:
    return lambda: {"amax": inputs.logits.amax(-1)}


def eager_fresh(want: tuple[str, ...]) -> Callable[[Logits], Call]:
    def make(inputs: Logits) -> Call:
        if len(want) > 1:
            return lambda: _three(inputs.logits.float(), inputs.targets)
        return lambda: {"logp": _logp(inputs.logits, inputs.targets)}

    return make


def _logp(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax(logits.float(), -1).gather(1, targets[:, None])[:, 0]


def eager_reused(want: tuple[str, ...]) -> Callable[[Logits], Call]:
    """Eager at its best: every tensor of the size of the logits is written where the last call wrote it."""

    def make(inputs: Logits) -> Call:
        x, y = inputs.logits, inputs.targets[:, None]
        kept: list[Tensor] = []

        def call() -> Outputs:
            if not kept:
                made = (len(want) > 1) + (x.dtype != torch.float32) + 1
                kept.extend(torch.empty(x.shape, device=x.device) for _ in range(made))
            z = x if x.dtype == torch.float32 else kept[-1].copy_(x)
            log_p = torch.log_softmax(z, -1, out=kept[0])
            out = {"logp": log_p.gather(1, y)[:, 0]}
            if len(want) > 1:
                p_log_p = torch.exp(log_p, out=kept[1]).mul_(log_p)
                out["entropy"] = -p_log_p.sum(-1)
                out["self_certainty"] = -log_p.mean(-1) - math.log(x.shape[-1])
            return out

        return call

    return make


def compiled(want: tuple[str, ...]) -> Callable[[Logits], Call]:
    def make(inputs: Logits) -> Call:
        if len(want) > 1:
            three = torch.compile(lambda x, y: _three(x.float(), y), dynamic=False)
            return lambda: three(inputs.logits, inputs.targets)
        one = torch.compile(_logp, dynamic=False)
        return lambda: {"logp": one(inputs.logits, inputs.targets)}

    return make


def trl(want: tuple[str, ...]) -> Callable[[Logits], Call]:
    def make(inputs: Logits) -> Call:
        def call() -> Outputs:
            out = {"logp": peers.trl_logp(inputs.logits, inputs.targets)}
            if len(want) > 1:
                out["entropy"] = peers.trl_entropy(inputs.logits)
            return out

        return call

    return make


def our_impls(make: Callable[..., Callable[..., Call]], device: str) -> list[Impl]:
    """As it comes, and, on the CPU, without the C code that a compiler on the machine makes faster."""
    if device != "cpu":
        return [Impl("raise-core", "ours", make())]
    return [
        Impl("raise-core", "ours", make()),
        Impl("raise-core, no C compiler", "floor", make("0"), note="blocked PyTorch"),
    ]


def cases(t: int, v: int, device: str, dtypes: tuple[torch.dtype, ...]) -> list[Case]:
    made = []
    for want in (("logp",), THREE):
        for dtype in dtypes:
            impls = [
                Impl("amax", "unit", amax, note="one read of the logits"),
                *our_impls(lambda switch=None, want=want: ours(want, switch), device),
                Impl("eager, reused memory", "eager", eager_reused(want)),
                Impl("eager, fresh memory", "eager", eager_fresh(want)),
                Impl("torch.compile", "peer", compiled(want), compiles=True),
                Impl(
                    "TRL selective_log_softmax", "peer", trl(want), package="trl",
                    note="with entropy_from_logits; no self-certainty" if len(want) > 1 else "",
                ),
            ]  # fmt: skip
            made.append(
                Case(
                    name=" + ".join(want),
                    dtype=str(dtype).removeprefix("torch."),
                    shape={"T": t, "V": v},
                    inputs=lambda dtype=dtype: Logits.draw(t, v, dtype, device),
                    impls=tuple(impls),
                    unit="amax",
                    bytes=t * v * dtype.itemsize,
                    expected_s=20.0,
                )
            )
    return made
