"""The launch table: the targets, and the kernel variants that a launcher asks for on one of them.

That is every one for operands of one dtype with adjacent columns, aligned rows and a hidden size that the
tiles divide, and of all other forms a sample under limits of its own (`_of_other_forms`): rows that start
anywhere, columns apart, hidden sizes that tiles do not divide, operands of two dtypes.

Of the linear path only what changes a kernel's code is a flag: dtype, level, softcap. Bias and row list are
masks that cost a load for each row or column of a tile.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from triton.backends.compiler import GPUTarget

from raise_kernels import (
    confidence,
    linear_stats,
    linear_stats_backward,
    linear_tiles,
    scre,
    span_logp,
    token_stats,
    token_stats_backward,
    token_topk,
)
from raise_kernels._layout import WARPS
from raise_kernels.machine_code import EXP, LOAD


class Target(NamedTuple):
    """A GPU, what one program may use of it, and what its tensor cores' instructions are called."""

    gpu: GPUTarget
    shared_limit: int  # bytes
    max_threads: int
    product: str


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 166_912, 1024, "HMMA"),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 232_448, 1024, "HGMMA"),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 232_448, 1024, "UTCHMMA"),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 65_536, 1024, "v_mfma"),
}
ITEM = {"fp32": 4, "bf16": 2, "fp16": 2}
BITS = {"fp32": 32, "bf16": 16, "fp16": 19}
FLAGS = (False, True)
STRIDES = ("stride_v", "h_stride_d", "w_stride_d")
PRODUCT = re.compile(r"HMMA|HGMMA|UTCHMMA|v_mfma|FFMA")
# Exponentials of a logit at most, by lanes and level: its own, and its share of a rescaling. That is 1/8, at
# level 2 1/4, and above level 0 on gfx942 1/2 (`token_stats.COLUMNS`).
EXPONENTIALS = {32: (1.15, 1.15, 1.28), 64: (1.15, 1.55, 1.55)}
# A softcap takes one more for tanh, and fewer columns share a rescaling: 1/4 on gfx942, 1/2 at level 2.
CAPPED_EXPONENTIALS = {32: (2.15, 2.15, 2.55), 64: (2.28, 2.55, 2.55)}


class Variant(NamedTuple):
    """One specialisation of one kernel."""

    name: str
    kernel: Any
    constants: dict[str, Any]
    types: dict[str, str]
    warps: int
    stages: int | None = None
    # The main loop, by instructions that it has; without one a program takes one tile, and all is counted.
    loop: re.Pattern[str] | None = None
    wide: int = 0  # 128-bit loads that a thread makes of what it streams, of one tile; at least
    narrow: int | None = None  # other loads in the main loop, at most
    logits: int = 0  # of a thread in a tile
    exponentials: float = (
        0.0  # for each of them in the loop over tiles, at most; 0 where they are not limited
    )
    product: bool = False  # multiplies on tensor cores
    spills: int = 0  # bytes of registers on the stack, at most
    odd: bool = False  # sizes, strides and addresses of what is streamed are multiples of nothing


def variants(name: str, quick: bool) -> Iterator[Variant]:
    """The launch table of a target: every combination of dtype, level and flags."""
    dtypes = ("bf16",) if quick else tuple(ITEM)
    yield from _of_logits(TARGETS[name], dtypes, quick)
    yield from _of_hidden(name, dtypes, quick)
    yield from _of_topk(dtypes)
    yield from _of_spans(name, quick)
    if not quick:
        yield from _of_other_forms(name)


def _of_logits(target: Target, dtypes: tuple[str, ...], quick: bool) -> Iterator[Variant]:
    threads = WARPS * target.gpu.warp_size
    for dtype, level, capped, rows in itertools.product(dtypes, range(3), FLAGS, FLAGS):
        if quick and (capped or not rows):
            continue
        u, w = token_stats.tile(target.gpu.warp_size, capped, level, ITEM[dtype])
        constants = dict(
            stride_v=1, HAS_ROWS=rows, CAPPED=capped, UNIT=True, ALIGN=16 // ITEM[dtype], LEVEL=level,
            SPLIT=token_stats.SPLIT, U=u, W=w,
        )  # fmt: skip
        yield Variant(
            f"stats {dtype} level {level}{' capped' * capped}{' rows' * rows}",
            token_stats._stats_kernel,
            constants,
            {"p_x": f"*{dtype}"},
            WARPS,
            loop=EXP,
            wide=u * w // threads * ITEM[dtype] // 16,
            narrow=0,
            logits=u * w // threads,
            exponentials=(CAPPED_EXPONENTIALS if capped else EXPONENTIALS)[target.gpu.warp_size][level],
        )
    block = token_stats_backward.BLOCK
    for dtype, capped, rows in itertools.product(dtypes, FLAGS, FLAGS):
        constants = dict(
            stride_v=1, HAS_ROWS=rows, CAPPED=capped, UNIT=True, ALIGN=16 // ITEM[dtype], BLOCK=block
        )
        yield Variant(
            f"gradient {dtype}{' capped' * capped}{' rows' * rows}",
            token_stats_backward._grad_kernel,
            constants,
            {"p_x": f"*{dtype}", "p_grad": f"*{dtype}"},
            WARPS,
            wide=block // threads * ITEM[dtype] // 16,
            logits=block // threads,
            exponentials=2.15 if capped else 1.15,
        )
    # What `linear_policy_loss` launches for a 16-bit head: fp32 logits of a tile to dz in the head's dtype.
    for dtype, capped in itertools.product([d for d in dtypes if d != "fp32"], FLAGS[: 1 if quick else 2]):
        constants = dict(stride_v=1, HAS_ROWS=False, CAPPED=capped, UNIT=True, ALIGN=4, BLOCK=block)
        types = {"p_x": "*fp32", "p_grad": f"*{dtype}"}
        name = f"loss gradient fp32 to {dtype}{' capped' * capped}"
        yield Variant(
            name,
            token_stats_backward._grad_kernel,
            constants,
            types,
            WARPS,
            wide=block // threads * 4 // 16,
            logits=block // threads,
            exponentials=2.15 if capped else 1.15,
        )
    for level, rows in itertools.product(range(3), FLAGS):
        constants = dict(HAS_ROWS=rows, LEVEL=level, ROWS=token_stats.ROWS)
        yield Variant(f"merge level {level}{' rows' * rows}", token_stats._merge_kernel, constants, {}, 2)


def _of_hidden(name: str, dtypes: tuple[str, ...], quick: bool, loose: bool = False) -> Iterator[Variant]:
    lanes = TARGETS[name].gpu.warp_size
    for dtype, use, capped in itertools.product(
        dtypes, ("level 0", "level 1", "level 2", "gradient"), FLAGS[: 1 if quick else 2]
    ):
        tile = linear_tiles.choose(name, dtype != "fp32", use, capped, loose)
        constants = dict(w_stride_d=1, CAPPED=capped, UNIT=True, WIDE=False) | tile.constants(tile.depth)
        kernel = linear_stats_backward._dlogits_kernel
        shared = 1.28 if tile.rows == 64 else 1.15
        if use != "gradient":
            kernel = linear_stats._linear_kernel
            constants |= dict(h_stride_d=1, LEVEL=int(use[-1]), ALIGN=16 // ITEM[dtype])
        yield Variant(
            f"linear {dtype} {use}{' capped' * capped}",
            kernel,
            constants,
            {"p_h": f"*{dtype}", "p_w": f"*{dtype}", "p_dz": f"*{dtype}"},
            tile.warps,
            tile.stages,
            loop=PRODUCT,
            wide=(tile.rows + tile.columns) * tile.depth * ITEM[dtype] // (16 * tile.warps * lanes),
            narrow=0,
            logits=tile.rows * tile.columns // (tile.warps * lanes),
            # 4 columns share a rescaling where products are fp32 or a tile has 64 rows. A gradient is not
            # limited: its code is there twice, once for blocks without a scored row.
            exponentials=0.0 if use == "gradient" else shared + capped,
            product=dtype != "fp32",
        )
    for dtype in dtypes:
        constants = dict(
            h_stride_d=1, w_stride_d=1, UNIT=True, ALIGN=16 // ITEM[dtype],
            ROWS=linear_stats.TARGET_ROWS, COLUMNS=linear_stats.TARGET_COLUMNS,
        )  # fmt: skip
        types = {"p_h": f"*{dtype}", "p_w": f"*{dtype}"}
        wide = 2 * linear_stats.TARGET_ROWS * linear_stats.TARGET_COLUMNS * ITEM[dtype] // (16 * 4 * lanes)
        name = f"linear {dtype} target"
        yield Variant(name, linear_stats._target_kernel, constants, types, 4, loop=LOAD, wide=wide, narrow=0)
        yield Variant(
            f"linear {dtype} collect",
            linear_stats_backward._collect_kernel,
            dict(BLOCK=linear_stats_backward.BLOCK),
            {"p_out": f"*{dtype}"},
            2,
        )


def _of_topk(dtypes: tuple[str, ...]) -> Iterator[Variant]:
    warps = token_topk.WARPS
    for dtype in dtypes:
        constants = dict(
            stride_v=1, UNIT=True, ALIGN=16 // ITEM[dtype], BITS=BITS[dtype], BLOCK=token_topk.BLOCK
        )
        types = {"p_x": f"*{dtype}"}
        yield Variant(f"topk {dtype} select", token_topk._select_kernel, constants, types, warps)
    for capped in FLAGS:
        constants = dict(CAPPED=capped, KEPT=token_topk.KEPT)
        yield Variant(f"topk finish{' capped' * capped}", token_topk._finish_kernel, constants, {}, warps)


def _of_spans(target: str, quick: bool) -> Iterator[Variant]:
    for normalize in FLAGS:
        constants = dict(stride=1, NORMALIZE=normalize, SPANS=scre.SPANS)
        flagged = " normalized" * normalize
        for name, kernel, of_gradient in (
            ("scre", scre._scre_kernel, scre._scre_grad_kernel),
            ("span_logp", span_logp._span_logp_kernel, span_logp._span_logp_grad_kernel),
        ):
            yield Variant(f"{name}{flagged}", kernel, constants, {}, 1)
            yield Variant(f"{name} gradient{flagged}", of_gradient, constants | dict(stride_up=1), {}, 1)
    sizes = (16, 64) if quick else (16, 32, 64)
    for splits, by_id, normal, balanced, size in itertools.product(FLAGS, FLAGS, FLAGS, FLAGS, sizes):
        if quick and normal:
            continue
        constants = dict(
            FROM_SPLITS=splits, SORTED=by_id, NORMALIZE=normal, BALANCED=balanced, GROUP=size, BLOCK=256
        )
        source = "splits" if splits else "logp"
        flagged = f"{' sorted' * by_id}{' balanced' * balanced}{' normalized' * normal}"
        name = f"groups of {size} from {source}{flagged}"
        # Triton lets ptxas keep to 80 registers there: one or two are stored, outside of every loop.
        spills = 16 if target == "sm_100" and size == 64 and splits and not by_id else 0
        warps = confidence.group_warps(size)
        yield Variant(name, confidence._group_kernel, constants, {}, warps, spills=spills)


def _of_other_forms(name: str) -> Iterator[Variant]:
    target = TARGETS[name]
    of_logits = [v for v in _of_logits(target, ("bf16", "fp32"), False) if v.name.endswith(" rows")]
    for v in of_logits:
        if v.name.startswith(("stats", "gradient bf16")) and "capped" not in v.name:
            yield _unaligned(v)
            if "bf16" in v.name:
                yield _strided(v)
    for v in _of_hidden(name, ("bf16",), True):
        if v.loop is PRODUCT:
            # Rows still start at multiples of 16 elements.
            yield v._replace(name=f"{v.name} uneven", constants=v.constants | {"EVEN": False})
    for v in _of_hidden(name, ("bf16",), True, loose=True):
        if v.loop is PRODUCT:
            yield _unaligned(v)
            yield _strided(v)
    yield from _of_two_dtypes(name)


def _unaligned(v: Variant) -> Variant:
    """Rows that start anywhere: at most one load for each number, and as many exponentials as ever."""
    changed = {k: {"ALIGN": 1, "EVEN": False}[k] for k in ("ALIGN", "EVEN") if k in v.constants}
    numbers = v.wide * 16 // (2 if "bf16" in v.name else 4)
    narrow = None if v.loop is None else numbers
    return v._replace(
        name=f"{v.name} unaligned", constants=v.constants | changed, wide=0, narrow=narrow, odd=True
    )


def _strided(v: Variant) -> Variant:
    """Columns apart, in rows that start anywhere; limits as `_unaligned`."""
    constants = {k: c for k, c in _unaligned(v).constants.items() if not k.startswith(STRIDES)}
    return _unaligned(v)._replace(name=f"{v.name} strided", constants=constants | {"UNIT": False})


def _of_two_dtypes(name: str) -> Iterator[Variant]:
    """Both operands become fp32 in registers, and are multiplied as fp32 ones are."""
    lanes = TARGETS[name].gpu.warp_size
    for v in _of_hidden(name, ("fp32",), True):
        for h, w in (("bf16", "fp32"), ("fp32", "bf16")):
            if v.loop is None or (h == "fp32" and not v.name.endswith("level 0")):
                continue
            c = v.constants
            if "WIDE" in c:
                numbers = (c["BT"] * c["BD"], c["BV"] * c["BD"])
            else:
                numbers = (c["ROWS"] * c["COLUMNS"],) * 2
            # Where a thread has less than 128 bits of an operand it loads them at once.
            bits = [n * ITEM[x] * 8 // (v.warps * lanes) for n, x in zip(numbers, (h, w), strict=True)]
            flags = {k: f for k, f in (("WIDE", True), ("ALIGN", 16 // ITEM[h])) if k in c}
            yield v._replace(
                name=v.name.replace("fp32", f"{h} by {w}"),
                constants=c | flags,
                types=v.types | {"p_h": f"*{h}", "p_w": f"*{w}"},
                wide=sum(b // 128 for b in bits),
                narrow=sum(b < 128 for b in bits),
            )
