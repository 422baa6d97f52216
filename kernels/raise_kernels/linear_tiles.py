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
    piece: int  # columns of a finished tile that are reduced at a time

    def constants(self, depth: int) -> dict[str, int]:
        """Arguments of a kernel whose products have `depth` terms."""
        return {
            "EVEN": depth % self.depth == 0,
            "GROUP": GROUP,
            "BT": self.rows,
            "BV": self.columns,
            "BD": self.depth,
            "PIECE": self.piece,
        }


# By target and use; "capped" where a softcap needs another tile, "loose" where rows do that start anywhere or
# have columns apart: each number is a load of its own, with an address and a mask. Bounds found by compiling:
# sm_80    a thread holds 8 rows of 128 x 128, whose numbers spill at level 2
# sm_90    128 x 256 reads least, but with 8 warps its sums leave too few registers, with 16 level 1 does
# sm_100   sums live in tensor memory; 3 stages of 128 x 256 take 144 of 227 KB
# gfx942   4 warps own 64 x 64 each, whose masks exceed the scalar registers under a softcap and at level 2
LOOSE = ("level 0 loose", "level 1 loose", "level 2 loose", "gradient loose")
HALVES = {
    "sm_80": {
        "level 0": Tile(128, 128, 32, 8, 4, 128),
        "level 1": Tile(128, 128, 32, 8, 4, 128),
        "level 2": Tile(64, 128, 32, 8, 4, 64),
        "level 1 loose": Tile(64, 128, 32, 8, 4, 64),
        "gradient": Tile(128, 128, 32, 8, 4, 32),
    },
    "sm_90": {
        "level 0": Tile(128, 256, 64, 16, 3, 32),
        "level 1": Tile(128, 128, 64, 8, 3, 32),
        "level 2": Tile(128, 128, 64, 8, 3, 32),
        "level 0 capped": Tile(128, 128, 64, 8, 3, 32),
        "gradient": Tile(128, 128, 64, 8, 3, 32),
    }
    | dict.fromkeys(LOOSE, Tile(128, 128, 32, 8, 3, 32)),
    "sm_100": {
        "level 0": Tile(128, 256, 64, 8, 3, 32),
        "level 1": Tile(128, 256, 64, 8, 3, 32),
        "level 2": Tile(128, 256, 64, 8, 3, 32),
        "gradient": Tile(128, 128, 64, 8, 3, 32),
    }
    | dict.fromkeys(LOOSE, Tile(64, 128, 32, 8, 3, 32)),
    "gfx942": {
        "level 0": Tile(128, 128, 32, 4, 2, 32),
        "level 1": Tile(128, 128, 32, 4, 2, 32),
        "level 2": Tile(128, 128, 64, 8, 2, 32),
        "level 0 capped": Tile(128, 128, 64, 8, 2, 32),
        "level 1 capped": Tile(128, 128, 64, 8, 2, 32),
        "gradient": Tile(128, 128, 64, 8, 2, 32),
    }
    | dict.fromkeys(LOOSE, Tile(128, 128, 32, 8, 2, 32)),
}
# NVIDIA multiplies fp32 on its ordinary units, from registers: 4 warps spill, and a depth of 32 above level 0
SINGLES = {
    name: {
        "level 0": Tile(64, 64, 32, 8, 2, 64),
        "level 1": Tile(64, 64, 16, 8, 2, 64),
        "level 2": Tile(64, 64, 16, 8, 2, 64),
        "gradient": Tile(64, 64, 32, 8, 2, 64),
    }
    for name in ("sm_80", "sm_90", "sm_100")
} | {"gfx942": dict.fromkeys(HALVES["gfx942"], Tile(64, 64, 32, 4, 2, 64))}
# A tile of level 2 that is reduced in one piece stores a register: fp32 on sm_100, mixed dtypes on sm_90.
SINGLES["sm_90"]["level 2"] = Tile(64, 64, 16, 8, 2, 16)
SINGLES["sm_100"]["level 2"] = Tile(64, 64, 16, 8, 2, 32)


@triton.jit
def program_of(pid, blocks, splits, GROUP: tl.constexpr):
    """(block of rows, split) of a program: all blocks of a group, then those of the next split."""
    i_g = pid // (GROUP * splits)
    height = tl.minimum(blocks - i_g * GROUP, GROUP)
    inside = pid % (GROUP * splits)
    return i_g * GROUP + inside % height, inside // height


@triton.jit
def logits_tile(
    p_h,
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

    Columns at or above V are not read and give 0. Every row is read: a mask on them costs 50 registers.
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
            h = tl.load(at_h)
            w = tl.load(at_w, mask=m_v[None, :], other=0.0)
        else:
            h = tl.load(at_h, mask=m_d[None, :], other=0.0)
            w = tl.load(at_w, mask=m_v[None, :] & m_d[:, None], other=0.0)
        if WIDE:
            h = h.to(tl.float32)
            w = w.to(tl.float32)
        x = tl.dot(h, w, x, input_precision="ieee")
    return x


def is_wide(hidden: Tensor, weight: Tensor) -> bool:
    """Whether both sides become fp32 first: mixed dtypes, and the interpreter, which cannot multiply bf16."""
    return hidden.dtype != weight.dtype or bool(triton.knobs.runtime.interpret)


def stored(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a kernel stores numbers of `dtype`: the interpreter would not round to bf16."""
    return torch.float32 if triton.knobs.runtime.interpret else dtype


def family(device: torch.device) -> str:
    """The entry of the tile table for a device; one that it does not name takes the most modest."""
    if torch.version.hip:
        return "gfx942"
    if device.type != "cuda":
        return "sm_80"
    major = torch.cuda.get_device_capability(device)[0]
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def choose(name: str, narrow: bool, use: str, capped: bool, loose: bool = False) -> Tile:
    """The entry of the tile table.

    narrow: both operands have the same 16-bit dtype; loose: some row has columns apart or an unaligned start.
    """
    tiles = (HALVES if narrow else SINGLES)[name]
    for form in [" loose"] * loose + [" capped"] * capped:
        if use + form in tiles:
            return tiles[use + form]
    return tiles[use]


def tile_for(hidden: Tensor, weight: Tensor, use: str, capped: bool) -> Tile:
    """The tile of a product; `use` is "level 0", "level 1", "level 2" or "gradient"."""
    narrow = hidden.dtype == weight.dtype and hidden.dtype != torch.float32
    loose = any(
        x.stride(-1) != 1 or any(s * x.element_size() % 16 for s in x.stride()[:-1]) for x in (hidden, weight)
    )
    return choose(family(hidden.device), narrow, use, capped, loose)
