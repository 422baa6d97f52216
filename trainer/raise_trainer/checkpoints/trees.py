"""Nested state as JSON and tensors, and back: no pickle, every bit kept.

    {"lr": 1e-3, "exp_avg": tensor}  ->  {"lr": 0.001, "exp_avg": {"$tensor": "exp_avg", ...}} + the tensor

JSON has no tuples, no keys but strings, no NaN: these, arrays and dtypes are written as one-key objects whose
key starts with "$".
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .ranks import Part, whole

Leaf = Tensor | Part

# The names of the safetensors format.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def flatten(
    tree: Any, at: str = "", other: Callable[[Any], Any] | None = None
) -> tuple[Any, dict[str, Leaf]]:
    """`tree` with its tensors replaced by their names, and the tensors.

    at: what the tree is, in messages and in front of the names. other: what to write for a value of another
    kind; without it TypeError, which names the place.
    """
    tensors: dict[str, Leaf] = {}
    return _flat(tree, at, tensors, other), tensors


def _flat(value: Any, at: str, tensors: dict[str, Leaf], other: Callable[[Any], Any] | None) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, np.generic):
        return _flat(value.item(), at, tensors, other)
    if isinstance(value, list | tuple):
        items = [_flat(item, f"{at}/{i}", tensors, other) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, Mapping):
        items = [[key, _flat(item, f"{at}/{key}", tensors, other)] for key, item in value.items()]
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return dict(items)
        return {"$pairs": [[_flat(key, f"{at} key", tensors, other), item] for key, item in items]}
    if isinstance(value, torch.dtype):
        return {"$dtype": NAMES[value]}
    if isinstance(value, np.ndarray):
        return {"$array": _flat(torch.from_numpy(value), at, tensors, other)}
    if isinstance(value, Tensor | Part):
        name = at.strip("/") or "tensor"
        while name in tensors:
            name += "+"
        tensors[name] = value
        return {"$tensor": name, "dtype": NAMES[value.dtype], "shape": list(value.shape)}
    if other is not None:
        return _flat(other(value), at, tensors, None)
    raise TypeError(
        f"{at}: got a {type(value).__name__}, wanted None, bool, int, float, str, a tensor, an array, or "
        "lists, tuples and dicts of these"
    )


def unflatten(value: Any, tensor: Callable[[str, torch.dtype, list[int]], Any]) -> Any:
    """What `flatten` took; `tensor(name, dtype, shape)` gives each tensor."""
    if isinstance(value, list):
        return [unflatten(item, tensor) for item in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensor(value["$tensor"], DTYPES[value["dtype"]], value["shape"])
    if "$array" in value:
        return unflatten(value["$array"], tensor).cpu().numpy()
    if "$float" in value:
        return float(value["$float"])
    if "$dtype" in value:
        return DTYPES[value["$dtype"]]
    if "$tuple" in value:
        return tuple(unflatten(value["$tuple"], tensor))
    if "$pairs" in value:
        return {unflatten(key, tensor): unflatten(item, tensor) for key, item in value["$pairs"]}
    return {key: unflatten(item, tensor) for key, item in value.items()}


def bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's bytes in row order."""
    array: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def digest_of(tree: Any) -> str:
    """SHA-256 of a tree of this rank's own tensors: equal trees of equal bits have equal digests."""
    structure, tensors = flatten(tree)
    digest = hashlib.sha256(json.dumps(structure).encode())
    for tensor in tensors.values():
        digest.update(bytes_of(whole(tensor)))
    return digest.hexdigest()


def safetensors_header(tensors: Mapping[str, Leaf]) -> tuple[bytes, list[str]]:
    """The head of a safetensors file, and the order in which the tensors follow it.

    Wide dtypes come first, so that every tensor lies at a multiple of its item size.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        start, end = end, end + size_of(tensors[name])
        dtype, shape = NAMES[tensors[name].dtype], list(tensors[name].shape)
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, order


def size_of(tensor: Leaf) -> int:
    """Bytes of the whole."""
    return tensor.numel() * tensor.element_size()
