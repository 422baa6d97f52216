"""Every random stream of every rank, and what a run on another number of processes gets from them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from . import ranks
from .trees import digest_of

NAMED = "generator "
Generator = torch.Generator | random.Random | np.random.Generator


def random_tree(generators: Mapping[str, Generator]) -> list[dict[str, Any]]:
    """Per rank: python, numpy, torch, each CUDA device that is used, and the named generators."""
    return ranks.gather(_own(generators))


def restore_random(saved: list[dict[str, Any]], generators: Mapping[str, Generator]) -> None:
    """Give this rank its streams. ValueError if the named generators are not those that were saved.

    On as many processes as saved them, bit for bit. On another number, a named generator that was the same on
    all ranks is so again; every other stream is seeded from the saved ones, the rank and the number.
    """
    known = {name.removeprefix(NAMED) for name in saved[0] if name.startswith(NAMED)}
    if known != set(generators):
        raise ValueError(f"generators: got {sorted(generators)}, but {sorted(known)} were saved")
    streams: dict[str, Any] = {"python": random, "numpy": np.random, "torch": torch}
    if torch.cuda.is_available():
        streams |= {f"cuda {i}": torch.device("cuda", i) for i in range(torch.cuda.device_count())}
    streams |= {NAMED + name: generator for name, generator in generators.items()}
    rank, size = ranks.rank(), ranks.size()
    for name, stream in streams.items():
        states = [one[name] for one in saved if name in one]
        if size == len(saved) and name in saved[rank]:
            _set(stream, saved[rank][name])
        elif states and name.startswith(NAMED) and len({digest_of(state) for state in states}) == 1:
            _set(stream, states[0])
        elif states:
            text = f"{digest_of(states)} {name} {rank} of {size}".encode()
            _seed(stream, int.from_bytes(hashlib.sha256(text).digest()[:8], "little"))


def _own(generators: Mapping[str, Generator]) -> dict[str, Any]:
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state |= {f"cuda {i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return state | {NAMED + name: _get(generator) for name, generator in generators.items()}


def _get(stream: Generator) -> Any:
    if isinstance(stream, random.Random):
        return stream.getstate()
    if isinstance(stream, np.random.Generator):
        return stream.bit_generator.state
    if isinstance(stream, torch.Generator):
        return stream.get_state()
    raise TypeError(
        f"generators: got a {type(stream).__name__}, wanted torch.Generator, random.Random or "
        "numpy.random.Generator"
    )


def _set(stream: Any, state: Any) -> None:
    if isinstance(stream, random.Random) or stream is random:
        stream.setstate(state)
    elif stream is np.random:
        np.random.set_state(state)
    elif isinstance(stream, np.random.Generator):
        stream.bit_generator.state = state
    elif isinstance(stream, torch.Generator):
        stream.set_state(state.cpu())
    elif stream is torch:
        torch.set_rng_state(state.cpu())
    else:
        torch.cuda.set_rng_state(state.cpu(), stream)


def _seed(stream: Any, seed: int) -> None:
    if isinstance(stream, random.Random) or stream is random:
        stream.seed(seed)
    elif stream is np.random:
        np.random.seed(seed % 2**32)
    elif isinstance(stream, np.random.Generator):
        stream.bit_generator.state = type(stream.bit_generator)(seed).state
    elif isinstance(stream, torch.Generator):
        stream.manual_seed(seed)
    elif stream is torch:
        torch.default_generator.manual_seed(seed)
    else:
        torch.cuda.default_generators[stream.index].manual_seed(seed)
