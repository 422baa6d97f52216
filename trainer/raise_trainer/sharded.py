"""Weights shared out over the processes by FSDP2, as `accelerate launch` asks for it.

Two rules keep the processes in step. Where nothing is learned (sampling, scoring, evaluation) the weights are
gathered once and stay (`gathered`): passes then make no collective, however many a process has. In an update
every process makes as many passes, one forward and one backward each (`update.policy_step`), and parameters
that a pass did not use are reduced as zeros.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from raise_core.scoring.backbone import Backbone
from raise_core.scoring.sharding import is_sharded

from . import ranks
from .adamw import HALF
from .errors import UserError

FSDP2 = "examples/accelerate/fsdp2_8gpu.yaml"


def check_launch() -> None:
    """UserError for a launcher's settings that a run cannot have: another engine, FSDP1, offloading."""
    if _flag("ACCELERATE_USE_DEEPSPEED"):
        raise UserError(
            "accelerate: got distributed_type DEEPSPEED, whose partitioned weights and optimizer the "
            f"checkpoints and the reference cannot read; use FSDP2 ({FSDP2}): fsdp_reshard_after_forward "
            "false is what ZeRO-2 shares out, true is ZeRO-3"
        )
    if _flag("ACCELERATE_USE_MEGATRON_LM"):
        raise UserError(f"accelerate: got distributed_type MEGATRON_LM; use FSDP2 ({FSDP2})")
    if not _flag("ACCELERATE_USE_FSDP"):
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError(f"accelerate: got FSDP version 1, wanted fsdp_version: 2, as in {FSDP2}")
    for name, why in (
        ("OFFLOAD_PARAMS", "weights that lie on the host are not supported"),
        ("CPU_RAM_EFFICIENT_LOADING", "each process loads the weights and keeps its part"),
    ):
        if _flag(f"FSDP_{name}"):
            raise UserError(f"accelerate: got fsdp_{name.lower()}: true; {why}; wanted false")


def shard(model: Any) -> Any:
    """The model with its layers, then the rest, under `fully_shard`, where the launcher asks for FSDP2.

    Gradients are sums over the processes, of 16-bit weights added up in fp32 on the way. Call it before the
    optimizer and the reference are made. One process shares nothing out.
    """
    if not _flag("ACCELERATE_USE_FSDP") or ranks.size() == 1:
        return model
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    half = any(p.requires_grad and p.dtype in HALF for p in model.parameters())
    precision = MixedPrecisionPolicy(reduce_dtype=torch.float32 if half else None)
    for part in (*Backbone(model).layers, model):
        freed = _freed() and part is not model  # beside the layers weights are needed until the backward pass
        fully_shard(part, reshard_after_forward=freed, mp_policy=precision)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
        part.set_reduce_scatter_unused_params(True, recurse=False)
    return model


def sharded(model: nn.Module) -> bool:
    """Whether its weights are shared out. Changes nothing."""
    return any(map(is_sharded, model.modules()))


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Whole weights, for any number of passes without gradient; all processes enter and leave together.

    Takes the memory of all weights, in their own precision. Nothing happens to a model that is not sharded.
    """
    modules: list[Any] = [module for module in model.modules() if is_sharded(module)]
    if not modules:
        yield
        return
    Backbone(model).forward_pass(lambda: None)  # the very first pass has to be the outermost module's
    inner = modules[1:]  # the outermost module keeps its weights after a pass as it is
    for module in inner:
        module.set_reshard_after_forward(False, recurse=False)
    for module in modules:
        module.unshard()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in inner:
            module.set_reshard_after_forward(_freed(), recurse=False)
        # Shards again, and no word of these passes: the next backward pass would gather weights in their
        # order, which is another one in every process.
        modules[0].reset_iter_state()


def _flag(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true", "yes", "on", "t", "y")


def _freed() -> bool:
    """Whether a layer's weights are freed between its forward and its backward pass."""
    return _flag("FSDP_RESHARD_AFTER_FORWARD") or "FSDP_RESHARD_AFTER_FORWARD" not in os.environ
