"""Other libraries, imported when they are asked for: what each computes here, in one call each.

Each function takes the inputs of its case and gives the call to time, or raises `NotHere` with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

PACKAGES = ("torch", "triton", "trl", "liger-kernel", "cut-cross-entropy")
EXTRA = "not installed; pip install -e '.[bench]'"


class NotHere(Exception):
    """Why an implementation cannot run here."""


def load(module: str, name: str) -> Any:
    """`name` from a module of another library."""
    try:
        return getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        whole = error.name == module.partition(".")[0]
        raise NotHere(EXTRA if whole else f"its import fails: {error}") from error
    except (ImportError, AttributeError, RuntimeError) as error:
        raise NotHere(f"its import fails: {error}") from error


def installed(package: str) -> str:
    """The version of a distribution, or "" without it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def trl_logp(logits: Tensor, targets: Tensor) -> Tensor:
    found: Tensor = load("trl.trainer.utils", "selective_log_softmax")(logits, targets)
    return found


def trl_entropy(logits: Tensor) -> Tensor:
    found: Tensor = load("trl.trainer.utils", "entropy_from_logits")(logits)
    return found


def trl_chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """TRL's chunked log-probabilities from hidden states [N, D], with the chunk width TRL itself passes."""
    chunked = load("trl.kernels", "ChunkedLogProbFunction")
    width = load("trl.trainer.utils", "_CHUNKED_LOGPROB_CHUNK_SIZE")
    found: Tensor = chunked.apply(hidden, weight, None, targets, 1.0, width, None, 1.0, ())[0]
    return found


def cce(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """cut-cross-entropy: NLL of each token. Its own kernel on a GPU, its torch_compile form on a CPU."""
    linear = load("cut_cross_entropy", "linear_cross_entropy")
    impl = "cce" if hidden.is_cuda else "torch_compile"
    nll: Tensor = linear(hidden, weight, targets, reduction="none", impl=impl)
    return nll


def torch_linear_ce(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """PyTorch's chunked linear cross-entropy: the sum of the NLL, which is all its chunked path gives."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise NotHere(f"torch {torch.__version__} has none; torch 2.13 has")
    options = torch.nn.LinearCrossEntropyOptions()
    linear: Callable[..., Tensor] = torch.nn.functional.linear_cross_entropy
    return linear(hidden, weight, targets, reduction="sum", options=options)


def liger_grpo(
    hidden: Tensor, weight: Tensor, targets: Tensor, logp_old: Tensor, advantage: Tensor
) -> Tensor:
    """Liger's fused-linear GRPO ("dapo" normaliser, no reference); completions of equal length."""
    made = load("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss")
    loss = made(beta=0.0, use_ref_model=False, loss_type="dapo", epsilon_low=0.2, epsilon_high=0.2)
    sequences = len(advantage)
    mask = torch.ones(sequences, len(targets) // sequences, device=hidden.device)
    value: Tensor = loss(
        hidden.view(sequences, -1, hidden.shape[-1]), weight, targets.view(sequences, -1), mask, advantage,
        old_per_token_logps=logp_old.view(sequences, -1),
    )[0]  # fmt: skip
    return value
