"""Weights from this process's GPU to the workers of a vLLM server, by NCCL.

Written against vLLM 0.33.0: `vllm.distributed.weight_transfer` (`nccl_common`, `packed_tensor`) and the HTTP
routes of `vllm.entrypoints.rl`. Never run on a real server here; see docs/engines.md.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import UserError
from .http_json import HttpJson
from .vllm_media import vllm_part


class Channel(Protocol):
    """What carries tensors to the server's workers."""

    def open(self, http: HttpJson) -> None:
        """Meet the workers, once."""

    def send(self, announce: Callable[[], Any], tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Send the tensors while `announce` has the workers receive them."""

    def close(self) -> None:
        """Leave them."""


class NcclChannel:
    """This process is rank 0 of a group with all workers of the server. It needs a CUDA device."""

    def __init__(self) -> None:
        self._group: Any = None

    def open(self, http: HttpJson) -> None:
        """Both sides enter the meeting at once: the server's request returns when this process is there."""
        if not torch.cuda.is_available():
            raise UserError(
                "engine: weights go to a vLLM server by NCCL, and this process has no CUDA device; train on "
                "a GPU, or set engine=generate"
            )
        nccl = vllm_part("vllm.distributed.weight_transfer.nccl_common")
        net = vllm_part("vllm.utils.network_utils")
        init = {
            "master_address": net.get_ip(),
            "master_port": net.get_open_port(),
            "rank_offset": 1,
            "world_size": 1 + http.get("/get_world_size")["world_size"],
            "packed": True,
        }

        def meet() -> None:
            self._group = nccl.trainer_init(init)

        nccl.run_trainer_rendezvous(
            init_worker=lambda: http.post("/init_weight_transfer_engine", {"init_info": init}, again=False),
            init_trainer=meet,
        )

    def send(self, announce: Callable[[], Any], tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Broadcast in packed buffers, of vLLM's default size and number on both sides."""
        produce = vllm_part("vllm.distributed.weight_transfer.packed_tensor").packed_nccl_broadcast_producer
        asking = ThreadPoolExecutor(max_workers=1)
        try:
            received = asking.submit(announce)
            produce(
                iterator=tensors, group=self._group, src=0,
                post_iter_func=lambda item: item[1].contiguous(),
            )  # fmt: skip
            received.result()
        finally:
            asking.shutdown(wait=False)  # after a failed broadcast the workers never answer

    def close(self) -> None:
        """Leave the group."""
        if self._group is not None:
            self._group.destroy()
            self._group = None
