"""Statistics of softmax(z) on the CPU, a few rows at a time: no [T, V] tensor of probabilities exists.

    log p = log_softmax(z)    entropy = -sum p * log p    self_certainty = -mean log p - log V'

Rows pass in blocks through scratch that is allocated once per call. A row gives the same bits alone and in
any batch, because PyTorch's log_softmax takes whole rows; its transcendental functions are called row by row,
since they round differently at the end of what one call covers; and its sums run over at least two rows,
since it would cut up a single one among threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from raise_kernels._backward import Coefficients, Engine, Normaliser, run
from raise_kernels._checks import PLAIN, LogitMap, check_stats, check_want

BLOCK = 4  # rows in flight; docs/kernels.md has the measurement
LOG2_E = math.log2(math.e)  # exp(x) is computed as 2^(x log2 e): PyTorch's exp2 costs a third of its exp
INF = math.inf


class Block:
    """Scratch [buffers, BLOCK + 1, columns] for `BLOCK` rows; buffer 0 holds z when it must be made."""

    def __init__(self, logits: Tensor, how: LogitMap, buffers: int) -> None:
        self.columns = how.columns(logits.shape[-1])
        self.dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        # One row more than is filled: a sum over a single row would be split among threads.
        self.scratch = torch.zeros(buffers, BLOCK + 1, self.columns, dtype=self.dtype)
        self.logits = logits
        self.how = how

    def load(self, rows: list[int]) -> Tensor:
        """z [len(rows), columns]: a view of the logits where they are z already, else buffer 0."""
        a, b = self.how.factors
        adjacent = rows == list(range(rows[0], rows[0] + len(rows)))
        z = self.scratch[0, : len(rows)]
        if self.logits.dtype == self.dtype and self.logits.dim() == 2 and adjacent:
            x = self.logits[rows[0] : rows[0] + len(rows), : self.columns]
            if a == 1.0 and self.how.softcap is None:
                return x
            torch.mul(x, a, out=z)
        else:
            for k, n in enumerate(rows):
                z[k].copy_(row_view(self.logits, n)[: self.columns])
            if a != 1.0:
                z.mul_(a)
        if self.how.softcap is not None:
            masked = z == -INF
            for row in z:
                row.tanh_()
            z.mul_(b).masked_fill_(masked, -INF)
        return z


def row_view(x: Tensor, n: int) -> Tensor:
    """Row n of the flattened leading axes of x, a view whatever the strides."""
    index: list[int] = []
    for size in reversed(x.shape[:-1]):
        n, k = divmod(n, size)
        index.insert(0, k)
    return x[tuple(index)]


def _blocks(rows: Tensor | None, keep: Tensor) -> Iterator[tuple[Tensor, list[int]]]:
    """(tokens, row numbers) of at most BLOCK kept tokens at a time."""
    for tokens in torch.split(keep.nonzero()[:, 0], BLOCK):
        if len(tokens):
            yield tokens, (tokens if rows is None else rows[tokens]).tolist()


def _total(buffer: Tensor, r: int) -> Tensor:
    """Sum over the columns of the first r rows of a scratch buffer."""
    return buffer[: r + 1].sum(-1)[:r]


def _exp(x: Tensor, out: Tensor) -> Tensor:
    """e^x for rows x [r, columns] into out, which may be x."""
    torch.mul(x, LOG2_E, out=out)
    for row in out:
        row.exp2_()
    return out


def stats_forward(
    logits: Tensor, y: Tensor, rows: Tensor | None, how: LogitMap, names: Sequence[str], topk: int
) -> dict[str, Tensor]:
    """Every name in `names`, "top" (largest z) and "count" (V') too. y and rows [T] int64 -> [T] each."""
    second = "varentropy" in names
    moments = second or bool({"entropy", "self_certainty", "count"} & set(names))
    block = Block(logits, how, 2 + moments + second)
    scored = y != how.ignore_index
    known = scored & (y >= 0) & (y < block.columns)
    if rows is not None:
        known &= (rows >= 0) & (rows < logits.shape[:-1].numel())
    out = {name: torch.where(scored, math.nan, 0.0).to(block.dtype) for name in names}
    for tokens, numbers in _blocks(rows, known):
        part = _block_stats(block.load(numbers), y[tokens], block.scratch[1:], names, topk)
        for name in names:
            out[name][tokens] = part[name]
    return out


def _block_stats(z: Tensor, y: Tensor, scratch: Tensor, names: Sequence[str], topk: int) -> dict[str, Tensor]:
    r = len(z)
    log_p = torch.log_softmax(z, -1, out=scratch[0, :r])
    chosen = log_p.gather(1, y[:, None])[:, 0]
    part = {"logp": chosen}
    # NaN, +inf, or no unmasked column makes all of a row's log p NaN.
    bad = chosen.isnan()
    if {"max_logp", "lse", "top"} & set(names):
        part["max_logp"] = log_p.amax(-1)
    if {"lse", "top"} & set(names):
        part["top"] = z.amax(-1)
        part["lse"] = part["top"] - part["max_logp"]
    if "rank" in names:
        part["rank"] = (z > z.gather(1, y[:, None])).sum(-1).to(z.dtype)
    if "topk_logp_mean" in names:
        best = log_p.topk(min(topk, z.shape[-1]), -1).values
        kept = best > -INF
        part["topk_logp_mean"] = best.masked_fill_(~kept, 0.0).sum(-1) / kept.sum(-1)
    if len(scratch) > 1:
        part |= _moments(scratch, r)
    return {name: value.masked_fill(bad, math.nan) for name, value in part.items()}


def _moments(scratch: Tensor, r: int) -> dict[str, Tensor]:
    """Sums over the vocabulary. scratch[0] holds log p; a third buffer asks for varentropy too."""
    log_p, p = scratch[0], scratch[1]
    _exp(log_p[:r], p[:r])
    total = _total(log_p, r)
    count = torch.full_like(total, log_p.shape[-1])
    masked_rows = (total == -INF).nonzero()[:, 0].tolist()
    for k in masked_rows:
        masked = log_p[k] == -INF
        log_p[k].masked_fill_(masked, 0.0)
        count[k] -= masked.sum()
    if masked_rows:
        total = _total(log_p, r)
    product = scratch[-1]  # p itself, unless varentropy needs it again
    torch.mul(p[:r], log_p[:r], out=product[:r])
    entropy = -_total(product, r)
    part = {"entropy": entropy, "self_certainty": -total / count - count.log(), "count": count}
    if len(scratch) > 2:
        torch.add(log_p[:r], entropy[:, None], out=product[:r]).square_().mul_(p[:r])
        part["varentropy"] = _total(product, r)
    return part


def stats_backward(
    logits: Tensor, y: Tensor, rows: Tensor | None, norm: Normaliser, weights: Coefficients, how: LogitMap
) -> Tensor:
    """Gradient of logits, in their dtype, for the `weights` of `_backward`; a repeated row adds up."""
    grad = torch.zeros(logits.shape, dtype=logits.dtype)
    curved, level = bool(weights.on_p_logp.any()), bool(weights.everywhere.any())
    block = Block(logits, how, 2 + curved)
    a, b = how.factors
    live = torch.stack(weights).ne(0).any(0)
    repeated = rows is not None and len(torch.unique(rows)) < len(rows)
    for tokens, numbers in _blocks(rows, live):
        on_p, on_p_logp, everywhere, on_target = (w[tokens, None] for w in weights)
        r = len(tokens)
        z = block.load(numbers)
        log_p = torch.sub(z, norm.top[tokens, None], out=block.scratch[1, :r])
        log_p.add_(norm.max_logp[tokens, None])
        dz = _exp(log_p, block.scratch[-1, :r])
        if curved:
            dz.mul_(log_p.masked_fill_(log_p == -INF, 0.0).mul_(on_p_logp).add_(on_p))
        else:
            dz.mul_(on_p)
        if level:
            dz.add_(everywhere)
        chosen = y[tokens, None]
        dz.scatter_add_(1, chosen, on_target.masked_fill(z.gather(1, chosen) == -INF, 0.0))
        if how.softcap is not None:
            dz.mul_((1 - (z / b) ** 2).mul_(a * b))
        elif a != 1.0:
            dz.mul_(a)
        if level or how.softcap is not None:
            dz.masked_fill_(z == -INF, 0.0)
        for k, n in enumerate(numbers):
            row = row_view(grad, n)[: block.columns]
            row.add_(dz[k]) if repeated else row.copy_(dz[k])
    return grad


NATIVE = Engine(stats_forward, stats_backward)


def token_stats(
    logits: Tensor,
    targets: Tensor,
    *,
    rows: Tensor | None = None,
    how: LogitMap = PLAIN,
    want: Sequence[str] = ("logp",),
    topk: int = 20,
) -> dict[str, Tensor]:
    """As `reference.token_stats`, on the CPU, in blocks of rows; differentiable once in logits.

    The gradient is recomputed from the saved log-normaliser; beside it, no tensor of the size of the logits
    is made in either direction. fp64 logits are computed in fp64, all others in fp32.
    """
    names = check_want(want)
    check_stats(logits, targets, rows)
    if logits.device.type != "cpu":
        raise ValueError(f'logits is on {logits.device}; impl="native" runs on the CPU, use impl="triton"')
    if topk < 1:
        raise ValueError(f"topk is {topk}; give at least 1")
    return run(NATIVE, logits, targets, rows, how, names, topk)
