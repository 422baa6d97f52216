"""Liger's kernels in the layers of one model object; other models of its family stay as they are."""

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from .errors import UserError

# Losses are this project's own, and the rotary function could be replaced for the whole family alone.
PIECES = {
    "rope": False,
    "cross_entropy": False,
    "fused_linear_cross_entropy": False,
    "rms_norm": True,
    "swiglu": True,
    "geglu": True,
}


def check_liger() -> None:
    """UserError, with the command that mends it, where the package is missing."""
    if find_spec("liger_kernel") is None:
        raise UserError("liger: got true, but liger-kernel is not installed: pip install liger-kernel")


def use_liger(model: Any) -> None:
    """Norms and feed-forward layers of `model` by Liger. UserError for a family that it does not know."""
    known = import_module("liger_kernel.transformers.monkey_patch").MODEL_TYPE_TO_APPLY_LIGER_FN
    kind = model.config.model_type
    if kind not in known:
        raise UserError(
            f"liger: this liger-kernel has nothing for {kind!r}; update it (pip install -U liger-kernel) or "
            "set liger=false"
        )
    takes = inspect.signature(known[kind]).parameters
    try:
        with _families_kept(model):
            known[kind](model=model, **{name: on for name, on in PIECES.items() if name in takes})
    except ImportError as error:
        raise UserError(
            f"liger: this liger-kernel does not fit this transformers for {kind!r} ({error}); update it (pip "
            "install -U liger-kernel) or set liger=false"
        ) from None


@contextmanager
def _families_kept(model: Any) -> Iterator[None]:
    """Puts back what is replaced meanwhile in the modules that define the model's classes.

    Liger changes the classes it finds there as well as the model: models made later would have them.
    """
    names = {kind.__module__ for module in model.modules() for kind in type(module).__mro__}
    defining = [sys.modules[name] for name in names if "transformers.models" in name]
    before = [(module, dict(vars(module))) for module in defining]
    try:
        yield
    finally:
        for module, attributes in before:
            vars(module).update(attributes)
