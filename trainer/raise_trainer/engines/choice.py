"""The engine that the settings name."""

from collections.abc import Sequence
from typing import Any

from ..errors import UserError
from ..method import Method
from .base import Engine, Generate, Sampling
from .vllm_colocated import VllmColocated
from .vllm_server import VllmServer


def engine_of(
    name: str, model: Any, method: Method, *, path: str, eos: Sequence[int], suppress: Sequence[int]
) -> Engine:
    """The engine called `name`: "generate", "vllm" for one in this process, or the URL of a vLLM server.

    model: the policy. path: where its weights and configuration came from, for vLLM in this process.
    All processes call it. UserError for another name, and where the engine cannot be had.
    """
    sampling = Sampling.of(method, eos=eos, suppress=suppress)
    if name == "generate":
        return Generate(model, sampling)
    if name == "vllm":
        return VllmColocated(path, model, sampling)
    if name.startswith(("http://", "https://")):
        return VllmServer(name, model.config, sampling)
    raise UserError(
        f"engine {name!r}: is none; give generate, vllm (in this process) or the URL of a vLLM server, "
        "as in engine=http://localhost:8000"
    )
