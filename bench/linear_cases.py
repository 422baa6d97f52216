"""Cases from hidden states [N, D] and a head [V, D]: forward, forward + backward, the whole policy loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import raise_core as rc
from bench import peers
from bench.cases import Call, Case, Impl, Outputs, Truth
from bench.logits_cases import switched

BLOCK = 64  # rows whose fp64 logits exist at one time
SAMPLED = 1024  # rows of the weight whose gradient is compared
SEQUENCES = 8  # completions of equal length, as Liger's loss wants them
LogpOf = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Exact:
    """fp64: logp [N]; pull [N, D] = W[y] - p @ W; push [N, sampled] = onehot - p; peer: fp32 error of logp.

    The gradients of any loss with dL/dlogp = c are c * pull for hidden, (c * push).T @ hidden for weight.
    """

    logp: Tensor
    pull: Tensor
    push: Tensor
    columns: Tensor
    peer_error: float


@dataclass
class Hidden:
    """hidden [N, D], weight [V, D], targets [N], an upstream gradient [N], and what a policy loss takes."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    upstream: Tensor
    noise: Tensor
    advantage: Tensor
    offsets: Tensor
    loss: bool = False  # whether the case is the policy loss

    @staticmethod
    def draw(n: int, d: int, v: int, dtype: torch.dtype, device: str) -> Hidden:
        source = torch.Generator().manual_seed(0)
        hidden = torch.randn(n, d, generator=source)
        weight = torch.randn(v, d, generator=source).mul_(2.0 * d**-0.5)
        upstream, noise = torch.randn(n, generator=source), torch.randn(n, generator=source).mul_(0.1)
        advantage = torch.randn(SEQUENCES, generator=source)
        targets = torch.randint(0, v, (n,), generator=source)
        # a quarter of the tokens is likely: their logit gains 16
        likely = targets[::4]
        hidden[::4] += 16.0 * weight[likely] / weight[likely].square().sum(1, keepdim=True)
        offsets = torch.arange(0, n + 1, n // SEQUENCES)
        leaves = (x.to(device, dtype).requires_grad_() for x in (hidden, weight))
        rest = (x.to(device) for x in (targets, upstream, noise, advantage, offsets))
        return Hidden(*leaves, *rest)

    def few(self) -> Hidden:
        n = 2 * SEQUENCES
        offsets = torch.arange(0, n + 1, 2, device=self.offsets.device)
        hidden = self.hidden.detach()[:n].requires_grad_()
        short = (x[:n] for x in (self.targets, self.upstream, self.noise))
        few = Hidden(hidden, self.weight, *short, self.advantage, offsets, self.loss)
        few.logp_old = self.logp_old[:n]
        return few

    def with_loss(self, loss: bool) -> Hidden:
        """The same tensors for another case, their fp64 values too."""
        other = replace(self, loss=loss)
        other.exact, other.logp_old = self.exact, self.logp_old
        return other

    @cached_property
    def exact(self) -> Exact:
        hidden, weight = self.hidden.detach(), self.weight.detach().double()
        source = torch.Generator().manual_seed(1)
        spread = torch.randperm(len(weight), generator=source)[:SAMPLED].to(weight.device)
        columns = torch.cat([spread, self.targets]).unique()
        narrow = self.weight.detach().float()
        logp, pull, push, peer = [], [], [], 0.0
        for h, y in zip(hidden.split(BLOCK), self.targets.split(BLOCK), strict=True):
            log_p = torch.log_softmax(h.double() @ weight.T, -1)
            logp.append(log_p.gather(1, y[:, None])[:, 0])
            single = torch.log_softmax(h.float() @ narrow.T, -1).gather(1, y[:, None])[:, 0]
            peer = max(peer, float((single - logp[-1]).abs().max()))
            p = log_p.exp_()
            pull.append(weight[y] - p @ weight)
            push.append((columns == y[:, None]).double() - p[:, columns])
        return Exact(torch.cat(logp), torch.cat(pull), torch.cat(push), columns, peer)

    @cached_property
    def logp_old(self) -> Tensor:
        """The exact logp with some noise, so that a few ratios are clipped; fp32 [N]."""
        return (self.exact.logp + self.noise).float()

    def truth(self) -> dict[str, Truth]:
        exact = self.exact
        if not self.loss:
            found = {
                "logp": Truth(exact.logp, exact.peer_error),
                "nll": Truth(-exact.logp.sum(), exact.peer_error * len(exact.logp)),
            }
            return found | self._gradients(self.upstream.double())
        logp = exact.logp.clone().requires_grad_()
        loss = policy_loss(self, logp)
        (c,) = torch.autograd.grad(loss, logp)
        # what the budget of logp lets the loss move by, to first order
        moved = float(c.abs().sum()) * exact.peer_error
        return {"loss": Truth(loss.detach(), moved)} | self._gradients(c)

    def _gradients(self, c: Tensor) -> dict[str, Truth]:
        exact = self.exact
        weight = (c[:, None] * exact.push).T @ self.hidden.detach().double()
        return {
            "grad_hidden": Truth(c[:, None] * exact.pull, None),
            "grad_weight": Truth(weight, None, where=exact.columns),
        }


def policy_loss(x: Hidden, logp: Tensor) -> Tensor:
    """The GRPO-family loss of the case: token mean over the batch, ratios clipped at 0.2."""
    n, s = len(x.targets), len(x.advantage)
    return rc.policy_loss(
        logp, x.logp_old, x.advantage, x.offsets, kind="dapo", num_tokens=n, num_sequences=s
    ).loss


def fused_loss(x: Hidden) -> Tensor:
    n, s = len(x.targets), len(x.advantage)
    return rc.linear_policy_loss(
        x.hidden, x.weight, x.targets, x.logp_old, x.advantage, x.offsets,
        kind="dapo", num_tokens=n, num_sequences=s,
    ).loss  # fmt: skip


def eager_logp(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = hidden @ weight.T
    return torch.log_softmax(logits.float(), -1).gather(1, targets[:, None])[:, 0]


def our_logp(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logp = rc.linear_token_stats(hidden, weight, targets).logp
    assert logp is not None
    return logp


def forward(logp_of: LogpOf) -> Callable[[Hidden], Call]:
    def make(x: Hidden) -> Call:
        def call() -> Outputs:
            with torch.no_grad():
                return {"logp": logp_of(x.hidden, x.weight, x.targets)}

        return call

    return make


def both(
    loss_of: Callable[[Hidden], tuple[dict[str, Tensor], Tensor]], exact: bool = True
) -> Callable[[Hidden], Call]:
    """Forward and backward: what the forward gives, and the gradients of hidden and weight.

    exact=False: the loss has another upstream gradient, so that only its value is compared.
    """

    def make(x: Hidden) -> Call:
        def call() -> Outputs:
            out, loss = loss_of(x)
            grads = torch.autograd.grad(loss, (x.hidden, x.weight))
            names = ("grad_hidden", "grad_weight") if exact else ("other_hidden", "other_weight")
            return out | dict(zip(names, grads, strict=True))

        return call

    return make


def weighted(logp_of: LogpOf) -> Callable[[Hidden], tuple[dict[str, Tensor], Tensor]]:
    """A loss with the case's upstream gradient of each token's logp."""

    def loss_of(x: Hidden) -> tuple[dict[str, Tensor], Tensor]:
        logp = logp_of(x.hidden, x.weight, x.targets)
        return {"logp": logp}, (logp * x.upstream).sum()

    return loss_of


def policy(logp_of: LogpOf) -> Callable[[Hidden], tuple[dict[str, Tensor], Tensor]]:
    def loss_of(x: Hidden) -> tuple[dict[str, Tensor], Tensor]:
        loss = policy_loss(x, logp_of(x.hidden, x.weight, x.targets))
        return {"loss": loss}, loss

    return loss_of


def whole(
    loss: Callable[[Hidden], Tensor], name: str = "loss"
) -> Callable[[Hidden], tuple[dict[str, Tensor], Tensor]]:
    def loss_of(x: Hidden) -> tuple[dict[str, Tensor], Tensor]:
        value = loss(x)
        return {name: value}, value

    return loss_of


def bare(products: int) -> Callable[[Hidden], Call]:
    """The matrix products alone, with fresh memory as `@` takes it: 1, or 4 (logits twice, two gradients)."""

    def make(x: Hidden) -> Call:
        hidden, weight = x.hidden.detach(), x.weight.detach()

        def call() -> Outputs:
            logits = hidden @ weight.T
            if products == 1:
                return {"logits": logits}
            del logits
            logits = hidden @ weight.T
            return {"to_hidden": logits @ weight, "to_weight": logits.T @ hidden}

        return call

    return make


def bare_reused(x: Hidden) -> Call:
    hidden, weight = x.hidden.detach(), x.weight.detach()
    kept: list[Tensor] = []

    def call() -> Outputs:
        if not kept:
            kept.append(hidden.new_empty(len(hidden), len(weight)))
        return {"logits": torch.mm(hidden, weight.T, out=kept[0])}

    return call


def compiled(of: Callable[[LogpOf], Callable[[Hidden], Call]]) -> Callable[[Hidden], Call]:
    return lambda x: of(torch.compile(eager_logp, dynamic=False))(x)


def cce(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return -peers.cce(hidden, weight, targets)


def torch_sum(x: Hidden) -> Tensor:
    return peers.torch_linear_ce(x.hidden, x.weight, x.targets)


def liger(x: Hidden) -> Tensor:
    return peers.liger_grpo(x.hidden, x.weight, x.targets, x.logp_old, x.advantage)


def without_compiler(make: Callable[[Hidden], Call]) -> Callable[[Hidden], Call]:
    """The call with RAISE_COMPILED=0."""

    def made(x: Hidden) -> Call:
        call = make(x)

        def run() -> Outputs:
            with switched("0"):
                return call()

        return run

    return made


def _ours(name: str, make: Callable[[Hidden], Call], device: str) -> list[Impl]:
    """As it comes, and, on the CPU, without the C code that a compiler on the machine makes faster."""
    if device != "cpu":
        return [Impl(name, "ours", make)]
    floor = Impl("raise-core, no C compiler", "floor", without_compiler(make), note="PyTorch's product")
    return [Impl(name, "ours", make), floor]


def _others(of: Callable[[LogpOf], Callable[[Hidden], Call]]) -> list[Impl]:
    """What gives per-token values; of(logp from hidden states) is the call."""
    return [
        Impl("eager", "eager", of(eager_logp)),
        Impl("torch.compile", "peer", compiled(of), compiles=True, note="log-probabilities compiled"),
        Impl("TRL chunked log-prob", "peer", of(peers.trl_chunked), package="trl"),
    ]


def _cce(of: Callable[[LogpOf], Callable[[Hidden], Call]]) -> Impl:
    return Impl("cut-cross-entropy", "peer", of(cce), compiles=True, package="cut-cross-entropy")


def cases(n: int, d: int, v: int, device: str, dtypes: tuple[torch.dtype, ...]) -> list[Case]:
    table: list[tuple[str, list[Impl], str, int]] = [
        (
            "linear forward",
            [
                Impl("GEMM", "unit", bare(1), note="hidden @ weight.T"),
                Impl("GEMM, reused memory", "unit", bare_reused),
                *_ours("raise-core", forward(our_logp), device),
                *_others(forward),
                _cce(forward),
            ],
            "GEMM",
            1,
        ),
        (
            "linear forward + backward",
            [
                Impl("4 GEMMs", "unit", bare(4), note="logits twice, two gradients"),
                *_ours("raise-core", both(weighted(our_logp)), device),
                *_others(lambda logp_of: both(weighted(logp_of))),
                _cce(lambda logp_of: both(weighted(logp_of))),
                Impl(
                    "F.linear_cross_entropy", "peer", both(whole(torch_sum, "nll"), exact=False),
                    note="sum of NLL only",
                ),
            ],
            "4 GEMMs",
            4,
        ),
        (
            "linear policy loss",
            [
                *_ours("raise-core linear_policy_loss", both(whole(fused_loss)), device),
                *_others(lambda logp_of: both(policy(logp_of))),
                Impl(
                    "Liger fused-linear GRPO", "peer", both(whole(liger)),
                    compiles=True, package="liger-kernel",
                ),
            ],
            "eager",
            3,
        ),
    ]  # fmt: skip
    made = []
    for dtype in dtypes:
        shared = Shared(n, d, v, dtype, device)
        for name, impls, unit, products in table:
            made.append(
                Case(
                    name=name,
                    dtype=str(dtype).removeprefix("torch."),
                    shape={"N": n, "D": d, "V": v},
                    inputs=lambda shared=shared, name=name: shared.give(name == "linear policy loss"),
                    impls=tuple(impls),
                    unit=unit,
                    bytes=(n * d + v * d) * dtype.itemsize * (1 if products == 1 else 2),
                    flops=2 * n * d * v * products,
                    is_limit=products != 3,
                    expected_s={1: 25.0, 4: 60.0, 3: 60.0}[products] / (1 if dtype == torch.float32 else 2),
                )
            )
    return made


class Shared:
    """The inputs of one dtype, made at the first use; the policy loss, which comes last, lets them go."""

    def __init__(self, *drawn: Any) -> None:
        self.drawn = drawn
        self.kept: Hidden | None = None

    def give(self, loss: bool) -> Hidden:
        base = self.kept or Hidden.draw(*self.drawn)
        self.kept = None if loss else base
        return base.with_loss(loss)
