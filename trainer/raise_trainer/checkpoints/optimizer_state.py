"""Optimizer and reference as trees whose tensors are whole, so that they fit another number of processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import raise_core as rc
from raise_core.reference_store import local, plain, reshard

from . import ranks
from .files import Reader
from .model_state import check_names

WEIGHT = "weight."  # what `Reference.state_dict` writes before the name of a parameter
SHARD = "shard"


def optimizer_tree(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Its state by the names of the model's parameters, and its groups with names for parameters."""
    optimizer, packed = _bare(optimizer), _bare(optimizer).state_dict()
    labels = _labels(model, optimizer)
    flat = [label for group in labels for label in group]
    return {
        "state": {flat[i]: state for i, state in packed["state"].items()},
        "groups": [
            {**group, "params": names} for group, names in zip(packed["param_groups"], labels, strict=True)
        ],
    }


def load_optimizer(reader: Reader, name: str, model: nn.Module, optimizer: Any) -> None:
    """Restore what `optimizer_tree` gave. ValueError, before anything is written, if the groups differ."""
    optimizer = _bare(optimizer)
    plain_model = plain(model)
    reshard(plain_model)
    labels = _labels(model, optimizer)
    tree = reader.later(name)
    if len(tree["groups"]) != len(labels):
        raise ValueError(
            f"optimizer: has {len(labels)} parameter groups, but {len(tree['groups'])} were saved"
        )
    for i, (saved, own) in enumerate(zip(tree["groups"], labels, strict=True)):
        check_names(f"optimizer: parameters of group {i}", saved["params"], own)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    flat = [label for group in labels for label in group]
    state = {
        i: _placed(tree["state"][label], parameters[i])
        for i, label in enumerate(flat)
        if label in tree["state"]
    }
    groups, start = [], 0
    for saved, own in zip(tree["groups"], labels, strict=True):
        groups.append({**read(saved), "params": list(range(start, start + len(own)))})
        start += len(own)
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    # torch rounds floating state to the parameter's dtype, which loses fp32 state of a bf16 parameter.
    for i, values in state.items():
        for key, value in values.items():
            now = optimizer.state[parameters[i]].get(key)
            if isinstance(now, Tensor) and now.dtype != value.dtype:
                optimizer.state[parameters[i]][key] = value.to(now.device)


def reference_tree(reference: rc.Reference) -> dict[str, Tensor | ranks.Part]:
    """`reference.state_dict()`, with this rank's parts as parts of the whole."""
    state = reference.state_dict()
    state.pop(SHARD, None)
    tree: dict[str, Tensor | ranks.Part] = {}
    for name, tensor in state.items():
        like = _parameter(reference, name)
        tree[name] = tensor if like is None else ranks.Part(tensor, like)
    return tree


def load_reference(reader: Reader, name: str, reference: rc.Reference) -> None:
    """Restore what `reference_tree` gave. Raises as `Reference.load_state_dict`."""
    own = reference.state_dict()
    state: dict[str, Tensor] = {}
    for key, later in reader.later(name).items():
        like, full = _parameter(reference, key), later()
        if like is not None and key in own:
            full = local(ranks.cut(full, like)).to(own[key].device)  # one at a time, where it is kept
        state[key] = full
    if SHARD in own:
        state[SHARD] = own[SHARD]
    reference.load_state_dict(state)


def _bare(optimizer: Any) -> Any:
    """Without accelerate's wrapper."""
    inner = getattr(optimizer, "optimizer", None)
    return inner if isinstance(inner, torch.optim.Optimizer) else optimizer


def _labels(model: nn.Module, optimizer: Any) -> list[list[str]]:
    """The names of the parameters of each group; one that is not the model's is named by its place."""
    reshard(plain(model))
    names = {id(p): name for name, p in plain(model).named_parameters()}
    return [
        [names.get(id(p), f"group {g}, parameter {i}") for i, p in enumerate(group["params"])]
        for g, group in enumerate(optimizer.param_groups)
    ]


def _placed(state: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
    """Tensors of the parameter's shape lie as the parameter does; counters stay as they are."""
    placed = {}
    for key, later in state.items():
        value = read(later)
        sharded = hasattr(parameter, "device_mesh") and isinstance(value, Tensor)
        placed[key] = ranks.cut(value, parameter) if sharded and value.shape == parameter.shape else value
    return placed


def read(tree: Any) -> Any:
    """What `Reader.later` left to be read, read."""
    if callable(tree):
        return tree()
    if isinstance(tree, dict):
        return {key: read(value) for key, value in tree.items()}
    return type(tree)(read(value) for value in tree) if isinstance(tree, list | tuple) else tree


def _parameter(reference: rc.Reference, name: str) -> Any:
    """The DTensor that a tensor of the reference's state is this rank's part of, or None."""
    if not name.startswith(WEIGHT):
        return None
    parameter = dict(reference.model.named_parameters()).get(name.removeprefix(WEIGHT))
    return parameter if hasattr(parameter, "device_mesh") else None
