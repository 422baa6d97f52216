"""Statistics of softmax(z) on the CPU, a few rows at a time: no [T, V] tensor of probabilities exists.

    log p = log_softmax(z)    entropy = -sum p * log p    self_certainty = -mean log p - log V'

Two engines: C code, where the machine has a compiler and the code takes the logits (`native_compiled`), and
what follows here, in PyTorch, for everything else. `engine_name` says which one runs.

In PyTorch, rows pass in blocks through scratch that is allocated once per call. A row gives the same bits
alone and in any batch. PyTorch's log_softmax takes whole rows. Its transcendental functions round differently
at the end of what one thread covers of a call, so they get rows of whole vectors: one row, or few enough
elements for one thread. Its sums run over at least two rows: it would cut up a single one among threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from raise_kernels import _operator, native_compiled
from raise_kernels._backward import Coefficients, Engine, Normaliser
from raise_kernels._checks import PLAIN, LogitMap
from raise_kernels._layout import block_rows
from raise_kernels._spare import Spare

CALL = (
    16384  # elements of several rows that one call may cover: half of what PyTorch starts a second thread for
)
VECTOR = 64  # elements; a multiple of what any of PyTorch's vector loops takes at a time
IN_PLACE = 16  # blocks of rows whose gradient exists beside the logits that it is written over
LOG2_E = math.log2(math.e)  # exp(x) is computed as 2^(x log2 e): PyTorch's exp2 costs a third of its exp
INF = math.inf


class Block:
    """Scratch [buffers, rows + 1, columns] for `rows` rows; buffer 0 holds z when it must be made."""

    def __init__(self, logits: Tensor, how: LogitMap, buffers: int, tokens: int, spare: Spare) -> None:
        self.columns = how.columns(logits.shape[-1])
        self.rows = min(block_rows(self.columns), max(tokens, 1))
        self.dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        # One row more than is filled: a sum over a single row would be split among threads.
        width = -(-self.columns // VECTOR) * VECTOR
        shape = (buffers, self.rows + 1, width)
        self.scratch = spare.take("block", math.prod(shape), logits, self.dtype).view(shape)
        self.logits = (logits if logits.dim() > 1 else logits[None])[..., : self.columns]
        self.how = how

    def plain(self, k: int) -> Tensor:
        """Buffer k as contiguous rows [rows + 1, columns], as log_softmax wants them."""
        return self.scratch[k].view(-1)[: (self.rows + 1) * self.columns].view(-1, self.columns)

    def apply(self, function: Callable[[Tensor], Tensor], k: int, count: int) -> Tensor:
        """Buffer k [rows + 1, columns] after an in-place function of its first `count` rows."""
        width = self.scratch.shape[-1]
        for part in torch.split(self.scratch[k, :count], max(CALL // width, 1)):
            function(part.view(-1))
        return self.scratch[k, :, : self.columns]

    def exp(self, x: Tensor, k: int) -> Tensor:
        """e^x for rows x [r, columns] in buffer k, which is returned as [rows + 1, columns]."""
        torch.mul(x, LOG2_E, out=self.scratch[k, : len(x), : self.columns])
        return self.apply(Tensor.exp2_, k, len(x))

    def load(self, rows: Tensor) -> Tensor:
        """z [len(rows), columns]: a view of the logits where they are z already, else buffer 0."""
        a, b = self.how.factors
        near = adjacent(rows, self.logits)
        if near is not None and near.dtype == self.dtype and a == 1.0 and self.how.softcap is None:
            return near
        capped = self.how.softcap is not None
        z = (self.scratch[0, :, : self.columns] if capped else self.plain(0))[: len(rows)]
        if near is not None:
            z.copy_(near)
        elif self.columns < CALL:
            z.copy_(self.logits[torch.unravel_index(rows, self.logits.shape[:-1])])
        else:
            for k, n in enumerate(rows.tolist()):
                z[k].copy_(row_view(self.logits, n))
        if a != 1.0:
            z.mul_(a)
        if capped:
            masked = z == -INF
            self.apply(Tensor.tanh_, 0, len(rows))
            z.mul_(b).masked_fill_(masked, -INF)
        return z


def adjacent(rows: Tensor, x: Tensor) -> Tensor | None:
    """The rows of x [N, columns] as a view, when x is that and they follow each other."""
    first, count = int(rows[0]), len(rows)
    if x.dim() != 2 or not torch.equal(rows, torch.arange(first, first + count)):
        return None
    return x[first : first + count]


def row_view(x: Tensor, n: int) -> Tensor:
    """Row n of the flattened leading axes of x, a view whatever the strides."""
    index: list[int] = []
    for size in reversed(x.shape[:-1]):
        n, k = divmod(n, size)
        index.insert(0, k)
    return x[tuple(index)]


def _blocks(rows: Tensor | None, keep: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(tokens, row numbers) of at most `size` kept tokens at a time."""
    for tokens in torch.split(keep.nonzero()[:, 0], size):
        if len(tokens):
            yield tokens, tokens if rows is None else rows[tokens]


def _total(buffer: Tensor, r: int) -> Tensor:
    """Sum over the columns of the first r rows of a scratch buffer."""
    return buffer[: r + 1].sum(-1)[:r]


def engine_name(logits: Tensor) -> str:
    """What `token_stats` runs on logits like these: "compiled C" or "blocked torch" (`topk_logp_mean`
    always does)."""
    return "blocked torch" if native_compiled.library_for(logits) is None else "compiled C"


def stats_forward(
    logits: Tensor,
    y: Tensor,
    rows: Tensor | None,
    how: LogitMap,
    names: Sequence[str],
    topk: int,
    spare: Spare | None = None,
) -> dict[str, Tensor]:
    """Every name in `names`, "top" (largest z) and "count" (V') too. y and rows [T] int64 -> [T] each.

    spare: scratch that the caller keeps from call to call.
    """
    spare = spare or Spare()
    library = native_compiled.library_for(logits)
    if library is None:
        return _blocked_forward(logits, y, rows, how, names, topk, spare)
    own = [name for name in names if name in native_compiled.FIELDS]
    others = [name for name in names if name not in native_compiled.FIELDS]
    out = native_compiled.stats_forward(library, logits, y, rows, how, own) if own else {}
    return out | (_blocked_forward(logits, y, rows, how, others, topk, spare) if others else {})


def stats_backward(
    logits: Tensor,
    y: Tensor,
    rows: Tensor | None,
    norm: Normaliser,
    weights: Coefficients,
    how: LogitMap,
    into: Tensor | None = None,
    spare: Spare | None = None,
) -> Tensor:
    """Gradient of logits, in their dtype, for the `weights` of `_backward`; a repeated row adds up.

    into: where to write it instead, contiguous and of any float dtype; contiguous logits themselves will do.
    spare: scratch that the caller keeps from call to call.
    """
    spare = spare or Spare()
    library = native_compiled.library_for(logits)
    if library is not None:
        return native_compiled.stats_backward(library, logits, y, rows, norm, weights, how, into)
    if into is None:
        grad = torch.empty(logits.shape, dtype=logits.dtype)
        return _blocked_backward(logits, y, rows, norm, weights, how, grad, spare)
    # A block of rows at a time, whose gradient exists beside it until all of it has been read.
    flat, out = logits.reshape(-1, logits.shape[-1]), into.view(-1, logits.shape[-1])
    size = IN_PLACE * block_rows(flat.shape[-1])
    order = torch.arange(len(y)) if rows is None else torch.sort(rows, stable=True).indices
    row_of = order if rows is None else rows[order]
    for start in range(0, len(flat), size):
        block = flat[start : start + size]
        lo, hi = torch.searchsorted(row_of, torch.tensor([start, start + len(block)])).tolist()
        t = order[lo:hi]
        norm_here, weights_here = Normaliser(*(x[t] for x in norm)), Coefficients(*(x[t] for x in weights))
        grad = spare.take("grad", block.numel(), block, block.dtype).view(block.shape)
        _blocked_backward(block, y[t], row_of[lo:hi] - start, norm_here, weights_here, how, grad, spare)
        out[start : start + size].copy_(grad)
    return into


def _blocked_forward(
    logits: Tensor,
    y: Tensor,
    rows: Tensor | None,
    how: LogitMap,
    names: Sequence[str],
    topk: int,
    spare: Spare,
) -> dict[str, Tensor]:
    second = "varentropy" in names
    moments = second or bool({"entropy", "self_certainty", "count"} & set(names))
    block = Block(logits, how, 2 + moments + second, len(y), spare)
    scored = y != how.ignore_index
    known = scored & (y >= 0) & (y < block.columns)
    if rows is not None:
        known &= (rows >= 0) & (rows < logits.shape[:-1].numel())
    out = {name: torch.where(scored, math.nan, 0.0).to(block.dtype) for name in names}
    for tokens, numbers in _blocks(rows, known, block.rows):
        part = _block_stats(block, block.load(numbers), y[tokens], names, topk)
        for name in names:
            out[name][tokens] = part[name]
    return out


def _block_stats(block: Block, z: Tensor, y: Tensor, names: Sequence[str], topk: int) -> dict[str, Tensor]:
    log_p = torch.log_softmax(z, -1, out=block.plain(1)[: len(z)])
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
    if len(block.scratch) > 2:
        part |= _moments(block, len(z))
    # A row without an unmasked column has no statistics, but as a part of a longer row it has a top.
    return {n: v.masked_fill(bad & (v != -INF) if n == "top" else bad, math.nan) for n, v in part.items()}


def _moments(block: Block, r: int) -> dict[str, Tensor]:
    """Sums over the vocabulary. Buffer 1 holds log p; a fourth buffer asks for varentropy too."""
    log_p = block.plain(1)
    p = block.exp(log_p[:r], 2)
    total = _total(log_p, r)
    count = torch.full_like(total, log_p.shape[-1])
    if (total == -INF).any():
        masked = log_p[:r] == -INF
        log_p[:r].masked_fill_(masked, 0.0)
        count -= masked.sum(-1)
        total = _total(log_p, r)
    product = block.scratch[-1, :, : block.columns]  # p itself, unless varentropy needs it again
    torch.mul(p[:r], log_p[:r], out=product[:r])
    entropy = -_total(product, r)
    part = {"entropy": entropy, "self_certainty": -total / count - count.log(), "count": count}
    if len(block.scratch) > 3:
        torch.add(log_p[:r], entropy[:, None], out=product[:r]).square_().mul_(p[:r])
        part["varentropy"] = _total(product, r)
    return part


def _blocked_backward(
    logits: Tensor,
    y: Tensor,
    rows: Tensor | None,
    norm: Normaliser,
    weights: Coefficients,
    how: LogitMap,
    grad: Tensor,
    spare: Spare,
) -> Tensor:
    """Gradient of logits into the contiguous `grad`, which is returned."""
    grad.zero_()
    curved, level = bool(weights.on_p_logp.any()), bool(weights.everywhere.any())
    block = Block(logits, how, 2 + curved, len(y), spare)
    a, b = how.factors
    live = torch.stack(weights).ne(0).any(0)
    repeated = rows is not None and len(torch.unique(rows)) < len(rows)
    into = grad.view(logits.shape[:-1].numel(), logits.shape[-1])[:, : block.columns]
    order = torch.sort(rows, stable=True).indices if rows is not None and repeated else torch.arange(len(y))
    sums = RowSums(into, block.dtype)
    for tokens in torch.split(order[live[order]], block.rows) if live.any() else ():
        numbers = tokens if rows is None else rows[tokens]
        on_p, on_p_logp, everywhere, on_target = (w[tokens, None] for w in weights)
        r = len(tokens)
        z = block.load(numbers)
        log_p = torch.sub(z, norm.top[tokens, None], out=block.scratch[1, :r, : block.columns])
        log_p.add_(norm.max_logp[tokens, None])
        dz = block.exp(log_p, len(block.scratch) - 1)[:r]
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
        if repeated:
            sums.add(numbers, dz)
        else:
            store(into, numbers, dz)
    return grad


class RowSums:
    """Rows [N, columns] that are sums of rows which follow each other: each is rounded to its dtype once."""

    def __init__(self, into: Tensor, dtype: torch.dtype) -> None:
        self.into, self.row, self.total = into, -1, torch.empty(into.shape[1], dtype=dtype)

    def add(self, rows: Tensor, dz: Tensor) -> None:
        """Add dz [r, columns] to the rows with these numbers, in order."""
        for n, one in zip(rows.tolist(), dz, strict=True):
            if n == self.row:
                self.total += one
            else:
                self.row = n
                self.total.copy_(one)
            self.into[n].copy_(self.total)


def store(into: Tensor, rows: Tensor, dz: Tensor) -> None:
    """Write dz [r, columns] to the named rows of into [N, columns], none of which is named twice."""
    near = adjacent(rows, into)
    if near is not None:
        near.copy_(dz)
    elif into.shape[1] < CALL:
        into[rows] = dz.to(into.dtype)
    else:
        for n, row in zip(rows.tolist(), dz, strict=True):
            into[n].copy_(row)


ENGINE = Engine(stats_forward, stats_backward)


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
    return _operator.token_stats("native", logits, targets, rows=rows, how=how, want=want, topk=topk)
