"""Matrix products with fp32 accumulation and an fp32 result, of bf16, fp16 and fp32.

PyTorch rounds the product of two bf16 matrices to bf16, and log-probabilities need more. `csrc/gemm.c` keeps
the fp32 sums, and the bits of a row depend neither on the other rows nor on the number of threads. Without it
(no compiler, no AVX-512) the operands are widened to fp32 piece by piece and multiplied by PyTorch.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from raise_kernels import _compiled
from raise_kernels._spare import Spare

KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # as in csrc/gemm.c
WIDE = {**dict.fromkeys(KINDS, torch.float32), torch.float64: torch.float64}
PIECE = 1 << 21  # elements of a and of b that are widened at one time: 8 MB each
DEPTH = 2048  # of those, along the contracted axis
AT_ONCE = 1024  # terms of a sum of bf16 that the C kernel takes before it touches its result
SCRATCH = 8 << 20  # bytes of an fp32 product on its way to a 16-bit tensor
ALONE = 10_000_000  # multiplications that are not worth a second thread


def matmul(
    a: Tensor,
    b: Tensor,
    *,
    out: Tensor,
    accumulate: bool = False,
    spare: Spare | None = None,
) -> Tensor:
    """Write a @ b, or out + a @ b with `accumulate`, to `out` and return it.

    a [M, K] and b [K, N] of one dtype, bf16, fp16, fp32 or fp64, with any strides; out [M, N] fp32 (fp64 for
    fp64) with adjacent rows or adjacent columns, sharing no memory with a and b. K = 0 adds nothing. NaN and
    infinities reach the row of a and the column of b that hold them, and nothing else. No gradient.

    The bits of a row do not depend on M where `kind` names a compiled kernel; elsewhere no bits are promised.
    The bf16 instruction takes subnormal numbers as 0. `spare`: where widened pieces are kept from call to
    call. With `accumulate` on CUDA, 16-bit operands take a second tensor of the size of `out`.

    Raises TypeError for other dtypes, ValueError for shapes, devices and an `out` that do not fit.
    """
    _check(a, b, out)
    if not out.numel():
        return out
    if not a.shape[1]:
        return out if accumulate else out.zero_()
    how = kind(a)
    with torch.no_grad():
        if how == "torch":
            _torch(a, b, out, accumulate)
        elif how == "out_dtype" and accumulate:
            out.add_(torch.mm(a, b, out_dtype=torch.float32))
        elif how == "out_dtype":
            torch.mm(a, b, out_dtype=torch.float32, out=out)
        elif how == "widened":
            _widened(a, b, out, accumulate, spare or Spare())
        elif out.stride(1) == 1 or out.shape[1] == 1:
            _compiled_product(a, b, out, accumulate)
        else:
            _compiled_product(b.T, a.T, out.T, accumulate)
    return out


def matmul_rounded(a: Tensor, b: Tensor, *, out: Tensor, accumulate: bool = False) -> Tensor:
    """`matmul` to an `out` of any float dtype, whose elements a 16-bit one rounds once for the whole sum."""
    if out.dtype == WIDE[a.dtype]:
        return matmul(a, b, out=out, accumulate=accumulate)
    depth = a.shape[1]
    if out.dtype == a.dtype and 0 < depth <= AT_ONCE and out.stride(1) == 1 and kind(a) == "avx512_bf16":
        _compiled_product(a, b, out, accumulate)
        return out
    if out.dtype == a.dtype and kind(a) == "out_dtype":
        _torch(a, b, out, accumulate)
        return out
    step = max(1, SCRATCH // (out.shape[1] * WIDE[a.dtype].itemsize))
    for start in range(0, len(out), step):
        block = out[start : start + step]
        part = torch.empty(block.shape, dtype=WIDE[a.dtype], device=out.device)
        matmul(a[start : start + step], b, out=part)
        block.copy_(block + part if accumulate else part)
    return out


def same_dtype(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both as they are where their dtypes agree, else both in the wider one."""
    if a.dtype == b.dtype:
        return a, b
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), b.to(dtype)


def kind(a: Tensor) -> str:
    """What multiplies matrices of this dtype and device.

    "avx512_bf16": the compiled kernel, with the instruction for pairs of bf16. "avx512": the compiled kernel,
    which widens to fp32 as it packs. "torch": torch.mm. "out_dtype": torch.mm of 16-bit operands on CUDA,
    whose library sums in fp32 and hands that out. "widened": torch.mm on pieces widened to fp32, on the CPU
    without the compiled kernel and on devices whose library is not known to sum 16-bit numbers in fp32.
    """
    if a.device.type == "cuda" and a.dtype in (torch.bfloat16, torch.float16) and not torch.version.hip:
        return "out_dtype"
    plain = "widened" if a.dtype in (torch.bfloat16, torch.float16) else "torch"
    if a.device.type != "cpu" or a.dtype not in KINDS:
        return plain
    if type(a) not in (Tensor, torch.nn.Parameter):  # one without values, say, has no address to read from
        return plain
    library = _compiled.library("gemm")
    level = 0 if library is None else library.raise_gemm_level()
    return plain if level == 0 else "avx512_bf16" if level == 2 and a.dtype == torch.bfloat16 else "avx512"


def _check(a: Tensor, b: Tensor, out: Tensor) -> None:
    if a.dtype not in WIDE or b.dtype != a.dtype:
        raise TypeError(f"a is {a.dtype}, b {b.dtype}; give both as one of bf16, fp16, fp32, fp64")
    if out.dtype != WIDE[a.dtype]:
        raise TypeError(f"out is {out.dtype}; give {WIDE[a.dtype]} for a product of {a.dtype}")
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"a has shape {tuple(a.shape)}, b {tuple(b.shape)}; give [M, K] and [K, N]")
    if out.shape != (a.shape[0], b.shape[1]):
        raise ValueError(f"out has shape {tuple(out.shape)}; give {(a.shape[0], b.shape[1])}")
    if not a.device == b.device == out.device:
        raise ValueError(f"a is on {a.device}, b on {b.device}, out on {out.device}; move them together")
    if not (_adjacent(out, 0) or _adjacent(out, 1)):
        raise ValueError(f"out has strides {out.stride()}; give one with adjacent rows or adjacent columns")


def _adjacent(out: Tensor, axis: int) -> bool:
    return out.stride(axis) == 1 or out.shape[axis] == 1


def _compiled_product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    """The C kernel, on out with adjacent columns."""
    library = _compiled.library("gemm")
    assert library is not None, "the caller asked `kind`"
    (rows, depth), columns = a.shape, b.shape[1]
    threads = 1 if rows * columns * depth < ALONE else torch.get_num_threads()
    sizes = (rows, columns, depth, *a.stride(), *b.stride(), out.stride(0))
    failed = library.raise_gemm(
        ctypes.c_int(KINDS[a.dtype]),
        *(ctypes.c_void_p(t.data_ptr()) for t in (a, b, out)),
        *map(ctypes.c_int64, sizes),
        ctypes.c_int(accumulate),
        ctypes.c_int(out.dtype == torch.bfloat16),
        ctypes.c_int64(threads),
    )
    if failed:
        raise MemoryError("no memory to pack the operands of a matrix product: up to 7 MB a thread")


def _torch(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    if accumulate:
        out.addmm_(a, b)
    else:
        torch.mm(a, b, out=out)


def _widened(a: Tensor, b: Tensor, out: Tensor, accumulate: bool, spare: Spare) -> None:
    """PyTorch's product of pieces in fp32, in scratch of at most 2 * PIECE elements."""
    depth = min(a.shape[1], DEPTH)
    size = PIECE // depth
    spare_a = spare.take("a", min(size, a.shape[0]) * depth, a, torch.float32)
    spare_b = spare.take("b", min(size, b.shape[1]) * depth, b, torch.float32)
    for m in range(0, a.shape[0], size):
        for k in range(0, a.shape[1], depth):
            left = _wide(a[m : m + size, k : k + depth], spare_a)
            for n in range(0, b.shape[1], size):
                right = _wide(b[k : k + depth, n : n + size], spare_b)
                _torch(left, right, out[m : m + size, n : n + size], accumulate or k > 0)


def _wide(x: Tensor, spare: Tensor) -> Tensor:
    """x in fp32, in `spare`, transposed there if x is: copying along adjacent elements is faster."""
    if x.stride(0) < x.stride(1):
        return _wide(x.T, spare).T
    return spare[: x.numel()].view(x.shape).copy_(x)
