"""Peak memory between two calls."""

import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

GIB = 1 << 30


class PeakMemory:
    """Peak memory of this process on a device since the last `take`: of a step, when taken after each.

    On a GPU what PyTorch's allocator gave out at most; on a CPU the resident memory, without that of decoding
    processes. Where the system cannot begin its count anew (other than Linux), the peak of the process.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._begin()

    def take(self) -> float:
        """The peak [GiB]; counting begins anew."""
        cuda = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.device) if cuda else _high_water()
        self._begin()
        return peak / GIB

    def _begin(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to what is resident now


def _high_water() -> int:
    """Largest resident memory [bytes]."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
