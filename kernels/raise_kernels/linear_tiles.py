"""What the kernels on hidden states share: the tile table, the product of one tile, the order of programs."""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
# Device functions take Triton values, which have no Python types.

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from raise_kernels._tiles import column

GROUP = 8  # blocks of rows that go through the vocabulary together, so that they find the weight in the cache


class Tile(NamedTuple):
    """How one program cuts its product."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


TABLE = {
    (name, narrow, use): Tile(128, 128, 64, 8, 3) if narrow else Tile(64, 64, 32, 4, 2)
    for name in ("sm_80", "sm_90", "sm_100", "gfx942")
    for narrow in (False, True)
    for use in ("level 0", "level 1", "level 2", "gradient")
}


@triton.jit
def program_of(pid, blocks, splits, GROUP: tl.constexpr):
    """(block of rows, split) of a program: the blocks of one group next to each other, then the next split."""
    i_g = pid // (GROUP * splits)
    height = tl.minimum(blocks - i_g * GROUP, GROUP)
    inside = pid % (GROUP * splits)
    return i_g * GROUP + inside % height, inside // height


@triton.jit
def logits_tile(
    p_h,
    m_h,
    p_w,
    o_v,
    V,
    D,
    h_stride_d,
    w_stride_v,
    w_stride_d,
    UNIT: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
):
    """hidden @ weight.T [BT, BV] of the rows that start at p_h [BT] and of columns o_v [BV], summed in fp32.

    Rows outside m_h and columns at or above V are not read and give 0.
    """
    p_v = p_w + o_v.to(tl.int64) * w_stride_v
    m_v = o_v < V
    x = tl.zeros([BT, BV], tl.float32)
    for d in range(0, D, BD):
        o_d = d + tl.arange(0, BD)
        m_d = o_d < D
        at_h = p_h[:, None] + column(o_d, h_stride_d, UNIT)[None, :]
        at_w = p_v[None, :] + column(o_d, w_stride_d, UNIT)[:, None]
        if EVEN:
            h = tl.load(at_h, mask=m_h[:, None], other=0.0)
            w = tl.load(at_w, mask=m_v[None, :], other=0.0)
        else:
            h = tl.load(at_h, mask=m_h[:, None] & m_d[None, :], other=0.0)
            w = tl.load(at_w, mask=m_v[None, :] & m_d[:, None], other=0.0)
        if WIDE:
            h = h.to(tl.float32)
            w = w.to(tl.float32)
        x = tl.dot(h, w, x, input_precision="ieee")
    return x


def is_wide(hidden: Tensor, weight: Tensor) -> bool:
    """Whether both sides are widened to fp32 first: mixed dtypes, and the interpreter, whose products know no bf16."""
    return hidden.dtype != weight.dtype or bool(triton.knobs.runtime.interpret)


def family(device: torch.device) -> str:
    """The entry of the tile table for a device; one that it does not name takes the most modest."""
    if torch.version.hip:
        return "gfx942"
    if device.type != "cuda":
        return "sm_80"
    major = torch.cuda.get_device_capability(device)[0]
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def tile_for(hidden: Tensor, weight: Tensor, use: str) -> Tile:
    """The tile of a product; `use` is "level 0", "level 1", "level 2" or "gradient"."""
    narrow = hidden.dtype == weight.dtype and hidden.dtype != torch.float32
    return TABLE[family(hidden.device), narrow, use]
