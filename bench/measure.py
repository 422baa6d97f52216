"""Time and peak memory of one call, on a CPU or on a GPU.

CPU: `perf_counter`; peak memory is the process's peak resident set (VmHWM, reset before the call through
/proc/self/clear_refs) less what was resident before. That counts every page a call touches, whoever asked
for it: PyTorch, BLAS, C code. CUDA and HIP: events on the stream; PyTorch's own peak counter.
"""

from __future__ import annotations

import ctypes
import gc
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

Result = TypeVar("Result")


@dataclass(frozen=True)
class Timing:
    """Seconds: the median of some calls, and the quartiles as their spread."""

    median: float
    low: float
    high: float
    samples: int


def timing(seconds: Sequence[float]) -> Timing:
    if len(seconds) < 2:
        return Timing(seconds[0], seconds[0], seconds[0], len(seconds))
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(middle, low, high, len(seconds))


class Cpu:
    """The machine's processors, by wall clock."""

    kind = "cpu"

    def seconds(self, call: Callable[[], object]) -> float:
        """Seconds of one call. What it returns is freed after the clock stops."""
        begun = time.perf_counter()
        kept = call()
        spent = time.perf_counter() - begun
        del kept
        return spent

    def peak(self, call: Callable[[], Result]) -> tuple[Result, int | None]:
        """What the call returns, and the bytes it took at its peak; None where this system cannot say."""
        gc.collect()
        _give_back()
        before = _resident("VmRSS") if _reset_peak() else None
        kept = call()
        top = _resident("VmHWM")
        return kept, None if before is None or top is None else max(top - before, 0)

    def name(self) -> str:
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        return next(named, platform.machine())


class Gpu:
    """The current CUDA or HIP device, by events."""

    kind = "cuda"

    def seconds(self, call: Callable[[], object]) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        kept = call()
        stop.record()
        stop.synchronize()
        del kept
        return float(start.elapsed_time(stop)) / 1e3

    def peak(self, call: Callable[[], Result]) -> tuple[Result, int | None]:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call()
        torch.cuda.synchronize()
        return kept, torch.cuda.max_memory_allocated() - before

    def name(self) -> str:
        return str(torch.cuda.get_device_name())


def device() -> Cpu | Gpu:
    """The GPU where there is one, else the CPU."""
    return Gpu() if torch.cuda.is_available() else Cpu()


def _give_back() -> None:
    """Hand free heap back to the system, so that a call cannot use it without being seen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if platform.system() == "Linux" else None
    if trim is not None:
        trim(0)


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident(key: str) -> int | None:
    """Bytes of a line of /proc/self/status."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = (line.split()[1] for line in lines if line.startswith(key + ":"))
    return next((int(kilobytes) * 1024 for kilobytes in found), None)


def rounds(wanted: Mapping[str, tuple[float, float, int]], most: int = 15) -> list[list[str]]:
    """Names to call, round by round, each spread evenly over the rounds.

    wanted: name -> (seconds of one call, seconds to spend, the least number of calls); never over `most`.
    """
    counts = {n: min(max(int(spend / max(t, 1e-9)), least), most) for n, (t, spend, least) in wanted.items()}
    total = max(counts.values(), default=0)
    return [
        [name for name, n in counts.items() if (r + 1) * n // total > r * n // total] for r in range(total)
    ]
