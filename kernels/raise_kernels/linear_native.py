"""Statistics of softmax(hidden @ weight.T + bias) on the CPU, a block of vocabulary columns at a time.

The product of a tile of rows and a block of columns is made in one reused buffer, reduced as in `native`, and
the blocks are joined as in `merge`. The gradient makes each product again and turns it into dz:

    dhidden = sum over blocks of dz @ weight[block]    dweight[block] = dz.T @ hidden    dbias[block] = sum dz

Products add up in fp32 whatever the dtype. dz is rounded to the dtype of a 16-bit weight, as autograd does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from raise_kernels._backward import Coefficients, LinearEngine, LinearGradient, Normaliser, collect
from raise_kernels._checks import LogitMap
from raise_kernels._gemm import matmul, matmul_rounded, same_dtype
from raise_kernels._maps import to_z, wide_dtype
from raise_kernels._spare import Spare
from raise_kernels.merge import merge_parts, part_names
from raise_kernels.native import stats_backward, stats_forward

COLUMNS = 8192  # of a block of the forward; a constant, since the bits of a row depend on where blocks end
MOST_ROWS = 512  # of a tile of the forward; more make no product faster


def block_logits(h: Tensor, w: Tensor, bias: Tensor | None, out: Tensor, spare: Spare | None) -> Tensor:
    """h [T, D] @ w [C, D].T + bias [C] into the leading columns of out [T, >= C], returned as [T, C]."""
    logits = out[: len(h), : len(w)]
    matmul(h, w.T, out=logits, spare=spare)
    if bias is not None:
        logits += bias
    return logits


class _Rows:
    """Which tokens have a result, and the hidden states that belong to them."""

    def __init__(self, hidden: Tensor, y: Tensor, rows: Tensor | None, vocab: int, ignore_index: int) -> None:
        self.flat = hidden.reshape(-1, hidden.shape[-1])
        self.n = torch.arange(len(self.flat)) if rows is None else rows
        scored = y != ignore_index
        self.known = scored & (y >= 0) & (y < vocab) & (self.n >= 0) & (self.n < len(self.flat))
        self.nothing = torch.where(scored, math.nan, 0.0).to(wide_dtype(hidden))

    def take(self, tokens: Tensor) -> Tensor:
        """Hidden states [len(tokens), D], a view where the tokens are all the rows in their order."""
        if len(tokens) == len(self.flat) and torch.equal(self.n[tokens], torch.arange(len(self.flat))):
            return self.flat
        return self.flat[self.n[tokens]]


def _plain(how: LogitMap) -> LogitMap:
    """The map of a block of columns: none of them is padding, and no local target is ignored."""
    return LogitMap(
        temperature=how.temperature, logit_scale=how.logit_scale, softcap=how.softcap, ignore_index=-1
    )


def linear_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    rows: Tensor | None,
    how: LogitMap,
    names: tuple[str, ...],
    topk: int,
    memory: int,
) -> dict[str, Tensor]:
    """Every name in `names` [T] for flat targets y [T]; see `_backward.LinearEngine`."""
    vocab = how.columns(len(weight))
    which = _Rows(hidden, y, rows, vocab, how.ignore_index)
    out = {name: which.nothing.clone() for name in names}
    dtype = which.nothing.dtype
    columns = min(COLUMNS, vocab)
    tokens = which.known.nonzero()[:, 0]
    size = max(1, min(MOST_ROWS, memory // (2 * columns * dtype.itemsize)))
    buffer = torch.empty(min(size, len(tokens)), columns, dtype=dtype)
    spare = Spare()
    for tile in torch.split(tokens, size) if len(tokens) else ():
        h = which.take(tile)
        stats = _tile_stats(h, weight[:vocab], bias, y[tile], how, names, topk, buffer, spare)
        for name in names:
            out[name][tile] = stats[name]
    return out


def _tile_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    how: LogitMap,
    names: tuple[str, ...],
    topk: int,
    buffer: Tensor,
    spare: Spare,
) -> dict[str, Tensor]:
    wanted = part_names(names)
    from_engine = tuple(name for name in wanted if name != "rank")
    plain = _plain(how)
    parts: dict[str, list[Tensor]] = {name: [] for name in wanted}
    mine = []
    best = buffer.new_empty(len(y), 0)
    target = _target_logit(hidden, weight, bias, y) if "rank" in names else None
    for start in range(0, len(weight), COLUMNS):
        w = weight[start : start + COLUMNS]
        b = None if bias is None else bias[start : start + len(w)]
        logits = block_logits(*same_dtype(hidden, w), b, buffer, spare)
        local = (y - start).clamp(0, len(w) - 1)
        mine.append(y - start == local)
        for name, value in stats_forward(logits, local, None, plain, from_engine, topk, spare).items():
            parts[name].append(value)
        if target is not None:
            # Counted as numbers of one dtype: PyTorch would widen a whole tensor of truth values to int64.
            above = spare.take("above", logits.numel(), logits, logits.dtype).view(logits.shape)
            torch.gt(logits, target[:, None], out=above)
            itself = above.gather(1, local[:, None])[:, 0] * mine[-1]
            parts["rank"].append(above.sum(-1) - itself)
        if "topk_logp_mean" in names:
            best = torch.cat([best, logits.topk(min(topk, len(w)), -1).values], -1)
            best = best.topk(min(topk, best.shape[-1]), -1).values
    merged = tuple(dict.fromkeys((*names, "max_logp"))) if best.shape[1] else names
    joined = merge_parts(
        {name: torch.stack(values) for name, values in parts.items()},
        torch.stack(mine),
        [name for name in merged if name != "topk_logp_mean"],
    )
    if "topk_logp_mean" in names:
        z = to_z(best, how)
        log_p = (z - z[:, :1]) + joined["max_logp"][:, None]
        kept = best > -math.inf
        mean = torch.where(kept, log_p, 0.0).sum(-1) / kept.sum(-1)
        joined["topk_logp_mean"] = torch.where(joined["max_logp"].isnan(), math.nan, mean)
    return joined


def _target_logit(hidden: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
    """Raw logit of each row's target [T], for the rank: before any column is seen."""
    dtype = wide_dtype(hidden)
    logit = (hidden.to(dtype) * weight[y].to(dtype)).sum(-1)
    return logit if bias is None else logit + bias[y]


def linear_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    rows: Tensor | None,
    norm: Normaliser,
    weights: Coefficients,
    how: LogitMap,
    needs: tuple[bool, bool, bool],
    memory: int,
) -> LinearGradient:
    """Gradients for the `weights` of `_backward`; see `_backward.LinearEngine`."""
    vocab = how.columns(len(weight))
    which = _Rows(hidden, y, rows, vocab, how.ignore_index)
    tokens = (which.known & torch.stack(weights).ne(0).any(0)).nonzero()[:, 0]
    h, y = which.take(tokens), y[tokens]
    norm = Normaliser(*(x[tokens] for x in norm))
    weights = Coefficients(*(x[tokens] for x in weights))
    dtype, plain = which.nothing.dtype, _plain(how)
    on_hidden = torch.zeros(len(h), h.shape[1], dtype=dtype)
    # Every row of the vocabulary is written below, unless there is nothing to write.
    on_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if needs[1] else None
    if on_weight is not None:
        on_weight[vocab if len(h) else 0 :] = 0
    on_bias = torch.zeros_like(bias) if needs[2] and bias is not None else None
    columns = _backward_columns(len(h), vocab, dtype, memory)
    buffer = torch.empty(len(h) * columns, dtype=dtype)
    low, spare = torch.promote_types(h.dtype, weight.dtype), Spare()
    # dz takes the place of the logits, or is rounded at once to what the products take.
    place = buffer if low == dtype else torch.empty_like(buffer, dtype=low)
    for start in range(0, vocab if len(h) else 0, columns):
        block = slice(start, min(start + columns, vocab))
        w = weight[block]
        flat = slice(0, len(h) * len(w))
        b = None if bias is None else bias[block]
        logits = block_logits(*same_dtype(h, w), b, buffer[flat].view(len(h), -1), spare)
        local = (y - start).clamp(0, len(w) - 1)
        here = weights._replace(on_target=torch.where(y - start == local, weights.on_target, 0.0))
        dz = stats_backward(logits, local, None, norm, here, plain, place[flat].view(len(h), -1), spare)
        if on_bias is not None:
            on_bias[block] = dz.sum(0, dtype=dtype)
        if needs[0]:
            matmul(*same_dtype(dz, w), out=on_hidden, accumulate=start > 0, spare=spare)
        if on_weight is not None:
            matmul_rounded(*same_dtype(dz.T, h), out=on_weight[block])
    whole = rows is None and len(tokens) == len(which.flat)
    return LinearGradient(
        collect(on_hidden, hidden, None if whole else which.n[tokens]) if needs[0] else None,
        on_weight,
        on_bias,
    )


def _backward_columns(count: int, vocab: int, dtype: torch.dtype, memory: int) -> int:
    """Columns of a block: logits of all rows, and dz beside them in 16 bits."""
    per_column = count * (dtype.itemsize + 2)
    return min(vocab, max(64, memory // max(per_column, 1) // 64 * 64))


ENGINE = LinearEngine(linear_forward, linear_backward, collect)
