"""Which implementation a call runs, and the names of all of them.

    impl="auto"        CUDA, HIP and XPU tensors: triton; CPU tensors: native; anything else: the reference
    impl="triton"      Triton kernels; on CPU tensors only under TRITON_INTERPRET=1
    impl="native"      on the CPU: C code where a compiler is found (not with RAISE_COMPILED=0), else PyTorch
                       in blocks; span rewards are the reference's own lines
    impl="reference"   the definition, in plain PyTorch, anywhere, fp64-capable

A fallback is announced once; `chosen_impl` says beforehand what a call will run.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from raise_kernels._checks import check_tensor

IMPLS = ("auto", "triton", "native", "reference")
_announced: set[str] = set()


def chosen_impl(x: Tensor, impl: str = "auto") -> str:
    """The implementation that a call on x runs: "triton", "native" or "reference".

    Raises ValueError for an implementation that is unknown or cannot run on x's device here.
    """
    check_tensor("x", x)
    if impl not in IMPLS:
        raise ValueError(f"impl is {impl!r}; give one of {IMPLS}")
    kind = x.device.type
    if impl == "native" and kind != "cpu":
        raise ValueError(
            f'impl="native" runs on the CPU, the tensors are on {x.device}; use "auto" or "triton"'
        )
    # Neither look-up can be traced; a graph that is being compiled finds triton missing when it runs.
    tracing = torch.compiler.is_compiling()
    if impl == "triton" and not tracing:
        _check_triton(kind)
    if impl != "auto":
        return impl
    if kind == "cpu":
        return "native"
    if kind in ("cuda", "xpu") and (tracing or find_spec("triton") is not None):
        return "triton"
    why = "triton is not installed" if kind in ("cuda", "xpu") else "there are no kernels for this device"
    if kind not in _announced:
        _announced.add(kind)
        warnings.warn(f"raise_core runs its reference implementation on {kind}: {why}", stacklevel=3)
    return "reference"


def _check_triton(kind: str) -> None:
    if find_spec("triton") is None:
        raise ValueError('impl="triton" needs the package triton, which is not installed; use impl="auto"')
    if kind == "cpu" and not import_module("triton").knobs.runtime.interpret:
        raise ValueError(
            'impl="triton" on CPU tensors runs in the Triton interpreter only: set TRITON_INTERPRET=1 before '
            'triton is first imported, or use impl="native"'
        )


def kernels(name: str) -> Any:
    """A module of Triton kernels, imported at first use: `import raise_core` works without triton."""
    return import_module(f"raise_kernels.{name}")
