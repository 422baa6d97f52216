"""Log-probabilities from hidden states and the gradient of a loss of them, in one pass over tiles of rows.

The loss is a sum over tokens, so its slope at a token is known as soon as that token's log-probability is:
each tile of logits is made once, reduced, turned into dz where it lies, and multiplied twice. That is three
matrix products instead of the four of a gradient that has to make the logits again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from raise_kernels._backward import LinearGradient, Normaliser, coefficients
from raise_kernels._checks import LogitMap, check_linear
from raise_kernels._gemm import matmul, matmul_rounded, same_dtype
from raise_kernels._linear_operator import linear_engine, scratch_bytes
from raise_kernels._maps import wide_dtype
from raise_kernels._operator import logits_engine

# Bytes of scratch on the CPU when the caller names none: at V = 151936, tiles of 138 rows in fp32.
MEMORY_CPU = 80 << 20
NAMES = ("logp", "top", "max_logp")

# slope(tokens, logp) -> d loss / d logp of these tokens
Slope = Callable[[slice, Tensor], Tensor]


def loss_and_gradient(
    engine: str,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    slope: Slope,
    *,
    bias: Tensor | None,
    rows: Tensor | None,
    how: LogitMap,
    needs: tuple[bool, bool, bool],
    accumulate_fp32: bool,
    memory: int | None,
) -> tuple[Tensor, LinearGradient]:
    """(log-probabilities [T], gradients of hidden, weight and bias for the loss that `slope` differentiates).

    `slope` is called once for each tile of tokens, in their order. Gradients have their tensors' dtypes. With
    several tiles, a 16-bit weight's gradient is added up in its own dtype, one rounding a tile; with
    accumulate_fp32 in an fp32 buffer [V, D], rounded once.
    """
    check_linear(hidden, weight, bias, targets, rows)
    memory = scratch_bytes(memory, hidden, MEMORY_CPU)
    run = logits_engine(engine)
    vocab, wide = how.columns(len(weight)), wide_dtype(hidden)
    flat, y = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).long()
    n = torch.arange(len(flat), device=y.device) if rows is None else rows.long()
    inside = (n >= 0) & (n < len(flat))
    # A row number outside hidden becomes a target outside the vocabulary, which has the same result.
    y = torch.where(inside | (y == how.ignore_index), y, vocab if vocab != how.ignore_index else -1)
    n = torch.where(inside, n, 0)
    plain = LogitMap(
        temperature=how.temperature,
        logit_scale=how.logit_scale,
        softcap=how.softcap,
        ignore_index=how.ignore_index,
    )
    low = torch.promote_types(hidden.dtype, weight.dtype)
    size = _tile_rows(len(y), vocab, wide.itemsize + (low.itemsize if low != wide else 0), memory)
    buffer = torch.empty(min(size, len(y)), vocab, dtype=wide, device=y.device)
    # dz takes the place of the logits, or is rounded at once to what the products take.
    place = buffer if low == wide else torch.empty_like(buffer, dtype=low)
    sums = _Sums(hidden, weight, bias, len(y), vocab, needs, accumulate_fp32)
    logp = torch.empty(len(y), dtype=wide, device=y.device)
    w = weight[:vocab]
    for start in range(0, len(y), size):
        tile = slice(start, min(start + size, len(y)))
        h = flat[tile] if rows is None else flat[n[tile]]
        logits = matmul(*same_dtype(h, w.T), out=buffer[: len(h)])
        if bias is not None:
            logits += bias[:vocab]
        stats = run.forward(logits, y[tile], None, plain, NAMES, 1)
        logp[tile] = stats["logp"]
        norm = Normaliser(stats["top"], stats["max_logp"])
        given = {"logp": slope(tile, stats["logp"])}
        weights = coefficients(given, norm, None, None, y[tile] != how.ignore_index)
        dz = run.backward(logits, y[tile], None, norm, weights, plain, place[: len(h)])
        # dz of a row without a result is 0, but 0 times its NaN would reach every row of the weight.
        live = torch.stack(weights).ne(0).any(0)
        sums.add(tile, dz, torch.where(live[:, None], h, 0.0), w)
    per_token = sums.hidden
    return logp, LinearGradient(
        None if per_token is None else linear_engine(engine).collect(per_token, hidden, rows), *sums.result()
    )


def _tile_rows(count: int, vocab: int, bytes_per_logit: int, memory: int) -> int:
    """Rows of a tile within `memory`, such that tiles are of nearly one size."""
    most = max(1, memory // (vocab * bytes_per_logit))
    tiles = -(-count // most)
    return -(-count // max(tiles, 1)) or 1


class _Sums:
    """Gradients as they grow, tile by tile."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        count: int,
        vocab: int,
        needs: tuple[bool, bool, bool],
        accumulate_fp32: bool,
    ) -> None:
        wide = wide_dtype(hidden)
        self.vocab = vocab
        self.weight_dtype = weight.dtype
        self.bias_dtype = None if bias is None else bias.dtype
        self.hidden = hidden.new_empty(count, hidden.shape[-1], dtype=wide) if needs[0] else None
        sum_dtype = wide if accumulate_fp32 else weight.dtype
        self.weight = torch.zeros_like(weight, dtype=sum_dtype) if needs[1] else None
        self.bias = bias.new_zeros(bias.shape, dtype=wide) if needs[2] and bias is not None else None

    def add(self, tile: slice, dz: Tensor, h: Tensor, w: Tensor) -> None:
        """The products of dz [rows, V], a tile's gradient of the logits."""
        if self.hidden is not None:
            matmul(*same_dtype(dz, w), out=self.hidden[tile])
        if self.weight is not None:
            matmul_rounded(*same_dtype(dz.T, h), out=self.weight[: self.vocab], accumulate=True)
        if self.bias is not None:
            self.bias[: self.vocab] += dz.sum(0, dtype=self.bias.dtype)

    def result(self) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of weight and bias in their dtypes."""
        return (
            None if self.weight is None else self.weight.to(self.weight_dtype),
            None if self.bias is None else self.bias.to(self.bias_dtype),
        )
