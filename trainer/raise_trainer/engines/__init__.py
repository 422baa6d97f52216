"""What samples completions: the built-in sampler, a vLLM server, or vLLM in this process. docs/engines.md."""

from .base import Engine, Generate, Sampling, rescored
from .choice import engine_of
from .vllm_colocated import VllmColocated
from .vllm_server import VllmServer

__all__ = ["Engine", "Generate", "Sampling", "VllmColocated", "VllmServer", "engine_of", "rescored"]
