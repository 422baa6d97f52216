"""A vLLM server in a thread and a package `vllm`, with the parts of 0.33.0 that `raise_trainer.engines` uses.

Behind both is a copy of a model that samples with the package's own sampler, from the draws that belong to a
request's seed: what it says is what `Generate` would have said, as long as its weights are the policy's.
"""

from __future__ import annotations

import base64
import copy
import json
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

import raise_core as rc
from raise_trainer.data import Row
from raise_trainer.engines.answers import seed_of
from raise_trainer.prompts import Prompt
from raise_trainer.rollout import sample

HIDDEN = 0.3  # seconds without an answer; the clients here wait less


class Served:
    """A model and what it samples for a seed; `load_weights` takes names of a checkpoint, as vLLM's do."""

    def __init__(self, model: Any, draws: Iterable[Tensor], group_size: int) -> None:
        self.model, self.lock = copy.deepcopy(model).eval(), threading.Lock()
        self.draws = {
            seed_of(step, row): step[row : row + group_size]
            for step in draws
            for row in range(0, len(step), group_size)
        }

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        own = dict(self.model.named_parameters())
        for name, tensor in weights:
            assert own[name].shape == tensor.shape and own[name].dtype == tensor.dtype
            own[name].data.copy_(tensor)

    def spoil(self) -> None:
        """What memory holds that was given back."""
        for weight in self.model.parameters():
            weight.data.fill_(float("nan"))

    def sample(self, ids: list[int], media: dict[str, Tensor], asked: dict[str, Any]) -> list[dict[str, Any]]:
        """Completions with their log-probabilities at the sampling temperature."""
        row = Row(0, "?", "text", "free-form", (), "x", None, "fake")
        prompt = Prompt(row, {"input_ids": torch.tensor([ids]), **media}, None)
        suppress = [int(i) for i in asked["logit_bias"]]
        assert all(bias == -100 for bias in asked["logit_bias"].values())
        with self.lock:
            made = sample(
                self.model, [prompt], group_size=asked["n"], max_new_tokens=asked["max_tokens"],
                temperature=asked["temperature"], eos=asked["stop_token_ids"], suppress=suppress,
                draws=self.draws[asked["seed"]],
            )  # fmt: skip
            stats = rc.Scorer(self.model).token_stats(
                made.inputs, made.groups, temperature=asked["temperature"]
            )
        return [
            {"token_ids": ids, "logp": found.logp.tolist()}
            for ids, found in zip(made.completions, stats[0], strict=True)
        ]


class FakeServer:
    """Its routes; `faults` of a path are used up one by one: a status, "hang", "drop", or bytes to answer."""

    def __init__(self, served: Any, *, scale_out: bool = True) -> None:
        self.served, self.scale_out = served, scale_out
        self.seen: list[tuple[str, Any]] = []
        self.faults: defaultdict[str, list[Any]] = defaultdict(list)
        self.replies: dict[str, Any] = {}  # by path, in place of what the route says
        self.arrived: dict[str, Tensor] = {}
        self.version, self.updating = "default", False
        self.config: dict[str, Any] = {
            "model_config": {"logprobs_mode": "processed_logprobs", "max_model_len": 400},
            "weight_transfer_config": {"backend": "nccl"},
        }
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                owner.handle(self, None)

            def do_POST(self) -> None:
                owner.handle(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def log_message(self, *_: Any) -> None:
                """Nothing is printed."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))

    def __enter__(self) -> FakeServer:
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def count(self, path: str) -> int:
        return sum(seen == path for seen, _ in self.seen)

    def bodies(self, path: str) -> list[Any]:
        return [body for seen, body in self.seen if seen == path]

    def handle(self, handler: BaseHTTPRequestHandler, body: Any) -> None:
        path = handler.path.partition("?")[0]
        self.seen.append((path, body))
        fault = self.faults[path].pop(0) if self.faults[path] else None
        if fault == "hang":
            time.sleep(HIDDEN)
        if fault in ("hang", "drop"):
            handler.close_connection = True
            return
        status, said = (fault, {"error": "made up"}) if isinstance(fault, int) else self.route(path, body)
        text = fault if isinstance(fault, bytes) else json.dumps(said).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(text)))
        handler.end_headers()
        handler.wfile.write(text)

    def route(self, path: str, body: Any) -> tuple[int, Any]:
        if path in self.replies:
            return 200, self.replies[path]
        own = {
            "/health": lambda: None,
            "/server_info": lambda: {"vllm_config": self.config},
            "/v1/models": lambda: {"data": [{"id": "served"}]},
            "/get_world_size": lambda: {"world_size": 2},
            "/init_weight_transfer_engine": lambda: {},
            "/start_weight_update": self.start,
            "/update_weights": lambda: self.update(body["update_info"]),
            "/finish_weight_update": lambda: self.finish(body["weight_version"]),
            "/reset_prefix_cache": lambda: {"success": True},
            "/reset_encoder_cache": lambda: None,
            "/weight_info": lambda: {"weight_version": self.version},
            "/v1/completions": lambda: self.completions(body),
        }
        if self.scale_out:
            own["/inference/v1/generate"] = lambda: self.generate(body)
        return (200, own[path]()) if path in own else (404, {"detail": "Not Found"})

    def start(self) -> dict[str, str]:
        assert not self.updating
        self.updating = True
        return {}

    def update(self, info: dict[str, Any]) -> dict[str, str]:
        assert self.updating and list(self.arrived) == info["names"]
        for tensor, dtype, shape in zip(
            self.arrived.values(), info["dtype_names"], info["shapes"], strict=True
        ):
            assert tensor.dtype == getattr(torch, dtype) and list(tensor.shape) == shape
        self.served.load_weights(self.arrived.items())
        return {}

    def finish(self, version: str) -> dict[str, str]:
        assert self.updating
        self.version, self.updating = version, False
        return {}

    def _spans(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        return [{"version": self.version, "start": 0, "end": len(ids)}]

    def completions(self, body: dict[str, Any]) -> dict[str, Any]:
        """As /v1/completions; the last first, since nothing promises an order."""
        made = list(enumerate(self.served.sample(body["prompt"], {}, body)))
        choices = [
            {
                "index": i,
                "text": "",
                "finish_reason": "stop",
                "token_ids": c["token_ids"],
                "prompt_token_ids": body["prompt"],
                "logprobs": {
                    "tokens": [f"token_id:{t}" for t in c["token_ids"]],
                    "token_logprobs": c["logp"],
                },
                "weight_versions": self._spans(c["token_ids"]),
            }
            for i, c in reversed(made)
        ]
        return {"model": body["model"], "choices": choices}

    def generate(self, body: dict[str, Any]) -> dict[str, Any]:
        """As /inference/v1/generate, for preprocessed media."""
        ids, features, asked = body["token_ids"], body["features"], body["sampling_params"]
        media = dict[str, Tensor]()
        for kind, encoded in features["kwargs_data"].items():
            assert len(features["mm_hashes"][kind]) == len(features["mm_placeholders"][kind]) == len(encoded)
            for text in encoded:
                media |= load(base64.b64decode(text))
        choices = [
            {
                "index": i,
                "finish_reason": "stop",
                "token_ids": c["token_ids"],
                "logprobs": {
                    "content": [
                        {"token_id": t, "logprob": x} for t, x in zip(c["token_ids"], c["logp"], strict=True)
                    ]
                },
                "weight_versions": self._spans(c["token_ids"]),
            }
            for i, c in enumerate(self.served.sample(ids, media, asked))
        ]
        return {"choices": choices, "prompt_token_ids": ids}


class FakeChannel:
    """Puts tensors where the server finds them."""

    def __init__(self, server: FakeServer) -> None:
        self.server, self.opened, self.closed = server, 0, False

    def open(self, http: Any) -> None:
        self.opened += 1

    def send(self, announce: Any, tensors: Iterator[tuple[str, Tensor]]) -> None:
        self.server.arrived = {name: tensor.clone() for name, tensor in tensors}
        announce()

    def close(self) -> None:
        self.closed = True


@dataclass(frozen=True)
class Field:
    """`MultiModalFieldConfig`: a tensor's first axis holds one medium each, or runs of these sizes."""

    kind: str
    sizes: Tensor | None = None

    @staticmethod
    def batched(kind: str, *, keep_on_cpu: bool = False) -> Field:
        return Field(kind)

    @staticmethod
    def flat_from_sizes(kind: str, sizes: Tensor) -> Field:
        return Field(kind, sizes)


def from_hf_inputs(data: dict[str, Tensor], fields: dict[str, Field]) -> dict[str, list[dict[str, Tensor]]]:
    """`MultiModalKwargsItems.from_hf_inputs`: by kind, each medium's tensors."""
    found: dict[str, list[dict[str, Tensor]]] = {}
    for name, field in fields.items():
        sizes = [1] * len(data[name]) if field.sizes is None else field.sizes.tolist()
        items = found.setdefault(field.kind, [{} for _ in sizes])
        for item, part in zip(items, data[name].split(sizes), strict=True):
            item[name] = part
    return found


class FakeLLM:
    """`vllm.LLM`, asleep or awake by parts; `served` is set by the test."""

    served: Any = None
    made: ClassVar[list[FakeLLM]] = []

    def __init__(self, **options: Any) -> None:
        self.options, self.version = options, "default"
        self.awake = {"weights", "kv_cache"}
        self.asked: dict[str, tuple[Any, Any]] = {}
        self.llm_engine = SimpleNamespace(
            add_request=self.add, has_unfinished_requests=lambda: bool(self.asked), step=self.step
        )
        FakeLLM.made.append(self)

    def sleep(self, level: int) -> None:
        assert level == 1 and "weights" in self.awake
        self.awake = set()

    def wake_up(self, tags: list[str] | None = None) -> None:
        self.awake |= set(tags or ("weights", "kv_cache"))

    def apply_model(self, function: Any) -> list[Any]:
        assert "weights" in self.awake
        return [function(self.served)]

    def update_weight_version(self, version: str) -> None:
        self.version = version

    def add(self, number: str, given: dict[str, Any], asked: Any) -> None:
        assert self.awake == {"weights", "kv_cache"}
        self.asked[number] = (given, asked)

    def step(self) -> list[Any]:
        """One request at a time, the last first."""
        number, (given, asked) = self.asked.popitem()
        media = {k: v for items in given.get("mm_kwargs", {}).values() for i in items for k, v in i.items()}
        made = self.served.sample(given["prompt_token_ids"], media, vars(asked))
        outputs = [
            SimpleNamespace(
                token_ids=c["token_ids"],
                logprobs=[
                    {t: SimpleNamespace(logprob=x)} for t, x in zip(c["token_ids"], c["logp"], strict=True)
                ],
                weight_versions=[SimpleNamespace(version=self.version)],
            )
            for c in made
        ]
        ids = given["prompt_token_ids"]
        return [SimpleNamespace(request_id=number, finished=True, outputs=outputs, prompt_token_ids=ids)]


def install(monkeypatch: pytest.MonkeyPatch, served: Any = None) -> type[FakeLLM]:
    """Put the package into `sys.modules` for one test."""

    def module(name: str, **content: Any) -> None:
        made = ModuleType(name)
        vars(made).update(content)
        monkeypatch.setitem(sys.modules, name, made)

    monkeypatch.setattr(FakeLLM, "served", served)
    monkeypatch.setattr(FakeLLM, "made", [])
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    module("vllm", LLM=FakeLLM)
    module(
        "vllm.inputs",
        tokens_input=lambda ids: {"type": "token", "prompt_token_ids": ids},
        mm_input=lambda ids, items, hashes, places: {
            "type": "multimodal", "prompt_token_ids": ids, "mm_kwargs": items, "mm_hashes": hashes,
            "mm_placeholders": places,
        },
    )  # fmt: skip
    module(
        "vllm.sampling_params",
        SamplingParams=SimpleNamespace(from_optional=SimpleNamespace),
        RequestOutputKind=SimpleNamespace(FINAL_ONLY=2),
    )
    module("vllm.multimodal")
    module(
        "vllm.multimodal.inputs",
        MultiModalFieldConfig=Field,
        MultiModalKwargsItems=SimpleNamespace(from_hf_inputs=from_hf_inputs),
        PlaceholderRange=SimpleNamespace,
    )
    for parent in ("vllm.entrypoints", "vllm.entrypoints.scale_out"):
        module(parent)
    module("vllm.entrypoints.scale_out.token_in_token_out")
    module(
        "vllm.entrypoints.scale_out.token_in_token_out.mm_serde",
        encode_mm_kwargs_item=lambda item: base64.b64encode(save(item)).decode(),
    )
    return FakeLLM
