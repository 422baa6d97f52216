"""Writing and reading the files of one checkpoint: rank 0 touches the disk, every rank takes part."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import ranks
from .trees import Leaf, bytes_of, flatten, safetensors_header, unflatten


class Writer:
    """Writes into `folder` until something fails; `error` is the first failure.

    After a failure nothing more is written, but the collectives go on: the other ranks are waiting in them.
    here: whether this process writes; by default rank 0.
    """

    def __init__(self, folder: Path, *, here: bool | None = None) -> None:
        self.folder = folder
        self.error: Exception | None = None
        self._here = ranks.rank() == 0 if here is None else here

    def attempt(self, act: Callable[..., Any], *args: Any) -> Any:
        """`act(*args)` on the writing rank while all is well; None elsewhere."""
        if not self._here or self.error is not None:
            return None
        try:
            return act(*args)
        except Exception as error:
            self.error = error
            return None

    def json(self, name: str, value: Any) -> None:
        """`folder/name` with a value that is JSON."""
        self.attempt(self._json, name, value)

    def tree(self, name: str, tree: Any, other: Callable[[Any], Any] | None = None) -> None:
        """`folder/name.json` and `folder/name.safetensors` with what `trees.flatten` makes of `tree`."""
        structure, tensors = flatten(tree, name, other)
        self.json(f"{name}.json", structure)
        if tensors:
            self.tensors(f"{name}.safetensors", tensors)

    def tensors(self, name: str, tensors: Mapping[str, Leaf]) -> None:
        """A safetensors file, one tensor gathered and written at a time."""
        header, order = safetensors_header(tensors)
        stream = self.attempt(self._open, name)
        self.attempt(lambda: stream.write(header))
        for key in order:
            full = ranks.whole(tensors[key])
            self.attempt(lambda full: stream.write(bytes_of(full)), full)
        if stream is not None:
            self.attempt(stream.close)

    def _open(self, name: str) -> Any:
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        return file.open("wb")

    def _json(self, name: str, value: Any) -> None:
        with self._open(name) as stream:
            stream.write(json.dumps(value, indent=1, allow_nan=False).encode())


class Reader:
    """Reads what a `Writer` wrote; rank 0 needs the folder, the others are told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, Any] = {}

    def json(self, name: str) -> Any:
        """The value of `folder/name`."""
        return ranks.share(lambda: json.loads((self.folder / name).read_bytes()))

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        return ranks.share((self.folder / name).is_file)

    def tensor(self, file: str, key: str, dtype: torch.dtype, shape: list[int]) -> Tensor:
        """One tensor of a safetensors file, whole, on every rank."""
        ranks.share(lambda: self._check(file, key))
        # A copy: the file's own memory would keep a removed checkpoint's space taken.
        mine = self._open[file].get_tensor(key).clone() if ranks.rank() == 0 else None
        return ranks.share_tensor(mine, shape, dtype)

    def tree(self, name: str) -> Any:
        """What `Writer.tree` took."""
        return unflatten(self.json(f"{name}.json"), partial(self.tensor, f"{name}.safetensors"))

    def later(self, name: str) -> Any:
        """The same with a function for each tensor, which reads it when all ranks call it."""
        return unflatten(self.json(f"{name}.json"), partial(partial, self.tensor, f"{name}.safetensors"))

    def _check(self, file: str, key: str) -> None:
        from safetensors import safe_open

        if file not in self._open:
            self._open[file] = safe_open(self.folder / file, framework="pt")
        if key not in self._open[file].keys():  # noqa: SIM118  safe_open is no mapping
            raise ValueError(f"{self.folder / file}: holds no tensor {key!r}; the checkpoint was edited")
