"""Peak memory of a step."""

import sys

import pytest
import torch

from raise_trainer import memory
from raise_trainer.memory import GIB, PeakMemory

MIB = 1 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux begins its count anew")
def test_the_peak_between_two_calls_is_counted_and_then_forgotten() -> None:
    peak = PeakMemory(torch.device("cpu"))
    before = peak.take()
    held = torch.ones(256 * MIB // 4)
    del held
    during, after = peak.take(), peak.take()
    assert during - before > 200 * MIB / GIB and during - after > 200 * MIB / GIB
    assert 0 < after * GIB < torch.iinfo(torch.int64).max


def test_without_proc_it_is_the_peak_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nowhere:
        def __init__(self, path: str) -> None:
            self.path = path

        def read_text(self) -> str:
            raise FileNotFoundError(self.path)

        def write_text(self, text: str) -> None:
            raise FileNotFoundError(self.path)

    monkeypatch.setattr(memory, "Path", Nowhere)
    peak = PeakMemory(torch.device("cpu"))
    assert peak.take() * GIB > 50 * MIB and peak.take() * GIB > 50 * MIB


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_it_is_the_allocators_peak() -> None:
    device = torch.device("cuda")
    peak = PeakMemory(device)
    held = torch.ones(64 * MIB // 4, device=device)
    del held
    assert peak.take() * GIB >= 64 * MIB > peak.take() * GIB
