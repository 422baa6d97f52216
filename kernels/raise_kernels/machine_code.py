"""Machine code: its instructions and loops, the way of a program through it, the units that it occupies."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple


class Machine(NamedTuple):
    """Published rates of a GPU; a core is an SM or a CU."""

    cores: int
    clock: float  # 1/s
    memory: float  # bytes/s
    tensor: float  # dense bf16 operations/s
    cache: float  # bytes a clock, of the whole second-level cache; not published for H100, that of A100
    # Name: pattern of its instructions, and clocks for which one of a warp occupies it.
    units: dict[str, tuple[str, float]]
    registers: int  # a thread, of all resident programs of a scheduler
    warps: int  # resident, at most, of a core
    shared: int  # bytes of a core


MACHINES = {
    "sm_90": Machine(
        132, 1.755e9, 3.35e12, 989e12, 5120.0,
        {
            "issue": (r".", 1 / 4),
            "half-rate ALU": (r"(?:FMNMX|FSETP?|[FI]?SEL|ISETP|SHF|LOP3|PRMT|V?IADD3?|LEA|F2FP)\b", 1 / 2),
            "MUFU": (r"MUFU|I2F|F2I", 2),
            "exchange": (r"SHFL|LDSM?\b|STS\b", 1),
        },
        512, 64, 233_472,
    ),
    "gfx942": Machine(
        304, 2.1e9, 5.3e12, 1307e12, 16_384.0,
        {
            "vector": (r"v_(?!mfma)", 1),
            "scalar": (r"s_(?!waitcnt|nop|endpgm|barrier|setprio)", 1),
            "exchange": (r"ds_", 2),
        },
        512, 32, 65_536,
    ),
}  # fmt: skip
EXP = re.compile(r"MUFU\.EX2|v_exp_f32")
LOAD = re.compile(r"LDG(?:STS)?\.|(?:global|buffer)_load_")  # by lane: what a whole warp shares is read apart
WIDE_LOAD = re.compile(r"LDG(?:STS)?\S*\.128\b|(?:global|buffer)_load_(?:lds_)?dwordx4")
SLOW = re.compile(r"v_(?:exp|log|rcp|rsq|sqrt|sin|cos|mul_(?:lo|hi))_")  # quarter rate on gfx942


class Instruction(NamedTuple):
    """One line of machine code."""

    text: str  # without predicate
    target: int | None = None  # index that it may jump to
    falls: bool = True  # may go on to the next


def read_sass(text: str) -> list[Instruction]:
    """Instructions of cuobjdump -sass."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@\S+\s+)?(.*?)\s*;", text, re.M)
    index = {int(address, 16): i for i, (address, _, _) in enumerate(lines)}
    code = []
    for _, predicate, words in lines:
        jump = re.match(r"BRA\b.*?(0x[0-9a-f]+)", words)
        always = not predicate and not re.match(r"BRA\S* !?U?P\d", words)
        stops = always and re.match(r"BRA|EXIT|RET", words)
        code.append(Instruction(words, index.get(int(jump[1], 16)) if jump else None, not stops))
    return code


def read_amdgcn(text: str) -> list[Instruction]:
    """Instructions of a kernel's AMDGCN assembly."""
    labels: dict[str, int] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = len(lines)
        elif found := re.match(r"\s+((?:[vs]|ds|global|buffer|flat)_.*?)\s*(?:;|$)", line):
            lines.append(found[1])
    code = []
    for words in lines:
        # Some lane is live: what skips a masked access for a warp without one is not taken.
        target = None if words.startswith("s_cbranch_execz") else labels.get(words.split()[-1])
        code.append(Instruction(words, target, not re.match(r"s_branch|s_cbranch_execnz|s_endpgm", words)))
    return code


def loops(code: list[Instruction]) -> list[range]:
    """What backward jumps span; those that overlap without nesting are parts of one loop."""
    found = sorted(
        {
            (x.target, i + 1)
            for i, x in enumerate(code)
            # A jump back to code from which there is no return is a way out.
            if x.target is not None and (x.target == i - 1 or (x.target < i and route(code, x.target, i)))
        }
    )
    spans: list[range] = []
    for start, stop in found:
        for k, other in enumerate(spans):
            if start == other.start or other.start < start < other.stop < stop:
                spans[k] = range(other.start, max(stop, other.stop))
                break
        else:
            spans.append(range(start, stop))
    return spans


def main_loop(code: list[Instruction], mark: re.Pattern[str]) -> tuple[list[int], list[int]]:
    """Indices of the innermost loop with most instructions that match `mark`, and of the outermost around it.

    ValueError where no loop has one.
    """
    found = {s: n for s in loops(code) if (n := count(code, s, mark))}
    inner = [s for s in found if not any(t != s and t.start >= s.start and t.stop <= s.stop for t in found)]
    if not inner:
        raise ValueError(f"no loop has an instruction like {mark.pattern!r}; count the whole kernel instead")
    main = max(inner, key=lambda s: found[s])
    outer = max((s for s in found if s.start <= main.start and main.stop <= s.stop), key=len)
    return _members(code, main), _members(code, outer)


def _members(code: list[Instruction], loop: range) -> list[int]:
    """What of a loop's span can get back to its start: waits laid out of line make the span too long."""
    before: dict[int, list[int]] = {}
    for i in loop:
        for j in _next(code, i):
            before.setdefault(j, []).append(i)
    came, queue = {loop.start}, [loop.start]
    while queue:
        fresh = [i for i in before.get(queue.pop(), []) if i not in came]
        came.update(fresh)
        queue += fresh
    return sorted(came)


def count(code: list[Instruction], where: Iterable[int], mark: re.Pattern[str]) -> int:
    """Instructions at the indices `where` that match `mark`."""
    return sum(bool(mark.match(code[i].text)) for i in where)


def leave(code: list[Instruction], loop: range) -> int:
    """Where a loop first goes on to when it ends."""
    for i in loop:
        for j in _next(code, i):
            if j not in loop:
                return j
    raise ValueError(f"no instruction leaves the loop {loop}; give one that ends")


def _next(code: list[Instruction], i: int) -> list[int]:
    after = [i + 1] if code[i].falls and i + 1 < len(code) else []
    target = code[i].target
    return after if target is None else [*after, target]


def route(code: list[Instruction], start: int, stop: int | None) -> list[int]:
    """Indices on the shortest way from start to stop, both left out, or to the end; empty if none."""
    came = {start: start}
    queue = deque([start])
    while queue:
        i = queue.popleft()
        if stop is None and not code[i].falls and code[i].target is None:
            return _back(came, i)
        for j in _next(code, i):
            if j == stop:
                return _back(came, i)
            if j not in came:
                came[j] = i
                queue.append(j)
    return []


def _back(came: dict[int, int], i: int) -> list[int]:
    way = []
    while came[i] != i:
        way.append(i)
        i = came[i]
    return way[::-1]


def tour(code: list[Instruction], marks: Iterable[int]) -> list[int]:
    """Indices on the shortest way from the first instruction to the end, in order through `marks`."""
    way, at = [0], 0
    for mark in marks:
        way += [*route(code, at, mark), mark]
        at = mark
    return way + route(code, at, None)


def clocks(machine: Machine, code: Iterable[Instruction]) -> dict[str, float]:
    """Clocks for which one warp's instructions occupy each unit of a core."""
    busy = dict.fromkeys(machine.units, 0.0)
    for text, _, _ in code:
        for unit, (pattern, cost) in machine.units.items():
            if re.match(pattern, text):
                words = 1.0
                if unit == "exchange" and (bits := re.search(r"(?:_b|LDS\S*?\.|STS\S*?\.)(64|128)\b", text)):
                    words = int(bits[1]) / 32 * (2 if re.match(r"ds_(?:read|write)2", text) else 1)
                busy[unit] += cost * (4 if unit == "vector" and SLOW.match(text) else words)
    return busy
