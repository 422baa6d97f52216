"""Seeds, the Triton interpreter where there is no GPU, and poisoned uninitialised memory."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import numpy
import pytest

# Processes that share the cores with each other take one each; read when torch is loaded, also by their own.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Triton reads this when a kernel is decorated, so it is set before any kernel file is imported. With a GPU
# too: the tests hand CPU tensors to the kernels, and `python -m bench ops --check` judges them on the GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

# The interpreter computes with numpy, which warns where an infinity or a NaN is made on purpose.
numpy.seterr(all="ignore")

hypothesis.settings.register_profile("short", max_examples=20, deadline=None, derandomize=True)
hypothesis.settings.register_profile("long", max_examples=5000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("RAISE_FUZZ", "short"))


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _poisoned_memory() -> Iterator[None]:
    """Fill what `raise_kernels` allocates without a value, so that an element nobody writes is seen."""
    patch = pytest.MonkeyPatch()
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        patch.setattr(owner, name, _poisoning(getattr(owner, name)))
    yield
    patch.undo()


def _poisoning(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("raise_kernels") and out.device.type != "meta":
            if out.dtype.is_floating_point:
                out.fill_(float("nan"))
            elif out.dtype != torch.bool:
                out.fill_(torch.iinfo(out.dtype).min)
        return out

    return poisoned
