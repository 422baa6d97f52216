"""Token statistics on the CPU by csrc/token_stats.c: a row is one thread's, and is read once."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from raise_kernels import _compiled
from raise_kernels._backward import Coefficients, Normaliser
from raise_kernels._checks import LogitMap

# As the enums of token_stats.c number them.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FIELDS = ("logp", "lse", "entropy", "self_certainty", "max_logp", "varentropy", "rank", "top", "count")
MOMENTS = {"entropy", "self_certainty", "count"}
GRAIN = 65536  # elements that a thread takes at a time, at least; half of them are worth a second thread


class Job(ctypes.Structure):
    """`Job` of token_stats.c, field by field."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("dtype", ctypes.c_int64),
        ("axes", ctypes.c_int64),
        ("sizes", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("all_columns", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("y", ctypes.c_void_p),
        ("row_of", ctypes.c_void_p),
        ("ignored", ctypes.c_int64),
        ("a", ctypes.c_double),
        ("b", ctypes.c_double),
        ("capped", ctypes.c_int64),
        ("level", ctypes.c_int64),
        ("ranked", ctypes.c_int64),
        ("out", ctypes.c_void_p * len(FIELDS)),
        ("top", ctypes.c_void_p),
        ("max_logp", ctypes.c_void_p),
        ("weights", ctypes.c_void_p * 4),
        ("grad", ctypes.c_void_p),
        ("grad_dtype", ctypes.c_int64),
        ("first", ctypes.c_void_p),
        ("next", ctypes.c_void_p),
        ("units", ctypes.c_int64),
        ("grain", ctypes.c_int64),
        ("cursor", ctypes.c_int64),
    ]


def library_for(logits: Tensor) -> ctypes.CDLL | None:
    """The compiled library where it takes these logits [..., V]: fp32, bf16 or fp16, adjacent columns."""
    if logits.dtype not in DTYPES or logits.is_neg() or (logits.stride(-1) != 1 and logits.shape[-1] > 1):
        return None
    return _compiled.library("token_stats")


class _Call:
    """One call of the library: its `Job`, and everything that the job points to."""

    def __init__(self, logits: Tensor, y: Tensor, rows: Tensor | None, how: LogitMap) -> None:
        lead = logits.shape[:-1]
        shape = (ctypes.c_int64 * (2 * len(lead)))(*lead, *logits.stride()[:-1])
        self.kept: list[object] = [shape, logits]
        self.job = job = Job()
        job.x, job.dtype, job.axes = logits.data_ptr(), DTYPES[logits.dtype], len(lead)
        job.sizes = ctypes.addressof(shape)
        job.strides = ctypes.addressof(shape) + 8 * len(lead)
        job.rows, job.columns, job.all_columns = (
            lead.numel(),
            how.columns(logits.shape[-1]),
            logits.shape[-1],
        )
        job.tokens, job.y = len(y), self.address(y)
        job.row_of = None if rows is None else self.address(rows)
        job.ignored = how.ignore_index
        job.a, job.b = how.factors
        job.capped = how.softcap is not None

    def address(self, x: Tensor) -> int:
        """Address of x as an adjacent array, which lives as long as the call."""
        x = x.contiguous()
        self.kept.append(x)
        return x.data_ptr()

    def run(self, function: ctypes._NamedFuncPointer, units: int) -> None:
        """Run over `units` tokens or rows, on as many of PyTorch's threads as have something to do."""
        self.job.units, self.job.grain = units, max(GRAIN // self.job.columns, 1)
        worth = -(-units * self.job.columns // (GRAIN // 2))
        threads = max(min(torch.get_num_threads(), worth, units), 1)
        function(ctypes.byref(self.job), ctypes.c_int64(threads))


def stats_forward(
    library: ctypes.CDLL,
    logits: Tensor,
    y: Tensor,
    rows: Tensor | None,
    how: LogitMap,
    names: Sequence[str],
) -> dict[str, Tensor]:
    """Every name in `names`, which are of `FIELDS`, [T] fp32 each. y and rows [T] int64."""
    call = _Call(logits, y, rows, how)
    out = torch.empty(len(names), len(y), dtype=torch.float32)
    for name, row in zip(names, out, strict=True):
        call.job.out[FIELDS.index(name)] = row.data_ptr()
    call.job.level = 2 if "varentropy" in names else int(bool(MOMENTS & set(names)))
    call.job.ranked = "rank" in names
    call.run(library.raise_token_stats, len(y))
    return dict(zip(names, out, strict=True))


def stats_backward(
    library: ctypes.CDLL,
    logits: Tensor,
    y: Tensor,
    rows: Tensor | None,
    norm: Normaliser,
    weights: Coefficients,
    how: LogitMap,
    into: Tensor | None = None,
) -> Tensor:
    """Gradient of logits, contiguous and in their dtype; tokens of one row add up in fp32, in their order.

    into: where to write it, contiguous, of any dtype of `DTYPES`; contiguous logits themselves will do.
    """
    call = _Call(logits, y, rows, how)
    grad = torch.empty(logits.shape, dtype=logits.dtype) if into is None else into
    job, count = call.job, call.job.rows
    job.top, job.max_logp = call.address(norm.top), call.address(norm.max_logp)
    for k, weight in enumerate(weights):
        job.weights[k] = call.address(weight)
    lists = torch.empty(count + len(y), dtype=torch.int64)
    first = call.address(lists)  # a field reads back as None where the address is 0, as an empty tensor's is
    job.first, job.next = first, first + 8 * count
    job.grad, job.grad_dtype = grad.data_ptr(), DTYPES[grad.dtype]
    call.run(library.raise_token_stats_backward, count)
    return grad
