"""Sampling by a running vLLM server: token ids in, token ids and log-probabilities out, weights pushed.

Written against the source of vLLM 0.33.0: /v1/completions for text, /inference/v1/generate for preprocessed
media, the routes of `vllm.entrypoints.rl` for weights. Never run on a real server here; docs/engines.md.
"""

import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import Tensor

from raise_core.scoring.backbone import VisionFeatures

from .. import ranks
from ..checkpoints.ranks import share
from ..errors import UserError
from ..prompts import Prompt
from ..rollout import Rollout
from .answers import Answer, Expected, as_rollout, choices, seed_of, together
from .base import Sampling
from .http_json import HttpJson, NotThere
from .nccl import Channel, NcclChannel
from .vllm_media import Media, media_of, vllm_part
from .weights import Weight, weights_of

START = (
    "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --enable-scale-out --logprobs-mode processed_logprobs "
    """--weight-transfer-config '{"backend": "nccl"}'"""
)
AT_ONCE = 64  # requests under way from one process


class VllmServer:
    """An engine at `url`, of this run alone. The first process pushes weights; each asks for its own prompts.

    config: the policy's configuration. http: its manners with the server; channel: how weights travel.
    UserError when the server cannot be reached or was started in another way than is needed.
    """

    def __init__(
        self,
        url: str,
        config: Any,
        sampling: Sampling,
        *,
        http: HttpJson | None = None,
        channel: Channel | None = None,
    ) -> None:
        self.http = http or HttpJson(url, remedy=f"start it with: {START}; or set engine=generate")
        self.config, self.sampling = config, sampling
        self._channel: Channel = channel or NcclChannel()
        self._model, self._room = share(self._look)
        self._run = share(lambda: uuid.uuid4().hex[:12])  # another run's weights have another one
        self._open, self._step = False, -1

    def _look(self) -> tuple[str, int]:
        """Name of the served model and its longest sequence [tokens]; the server has to be started right."""
        self.http.get("/health")
        try:
            about = self.http.get("/server_info?config_format=json")["vllm_config"]
        except NotThere:
            raise self._started_wrong("has no /server_info: VLLM_SERVER_DEV_MODE=1 is missing") from None
        try:
            backend = (about["weight_transfer_config"] or {}).get("backend")
            mode, room = about["model_config"]["logprobs_mode"], int(about["model_config"]["max_model_len"])
            name = str(self.http.get("/v1/models")["data"][0]["id"])
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise self._started_wrong(f"says nothing of {error} in /server_info, as vLLM 0.33 does") from None
        if backend != "nccl":
            raise self._started_wrong(f"has weight transfer {backend!r}, wanted 'nccl'")
        if mode != "processed_logprobs":
            raise self._started_wrong(f"has --logprobs-mode {mode}, wanted processed_logprobs")
        return name, room

    def _started_wrong(self, what: str) -> UserError:
        return UserError(f"engine {self.http.url}: {what}; start it with: {START}")

    @property
    def _version(self) -> str:
        return f"{self._run}:{self._step}"

    def sync(self, model: Any, step: int) -> None:
        """Push all weights, unless those of this step are there. All processes call it.

        UserError when the server does not take them; it may then hold a part of them.
        """
        if step == self._step:
            return
        weights = weights_of(model)
        tensors = ((w.name, w.full()) for w in weights)
        self._step = step

        def push() -> None:
            try:
                if ranks.rank() == 0:
                    self._push(weights, tensors)
            finally:
                for _ in tensors:  # gathering takes all processes, whatever became of the push
                    pass

        together(push)

    def _push(self, weights: Sequence[Weight], tensors: Any) -> None:
        http = self.http
        if not self._open:
            self._channel.open(http)
            self._open = True
        info = {
            "names": [w.name for w in weights],
            "dtype_names": [str(w.dtype).removeprefix("torch.") for w in weights],
            "shapes": [list(w.shape) for w in weights],
        }
        http.post("/start_weight_update", {}, again=False)
        self._channel.send(lambda: http.post("/update_weights", {"update_info": info}, again=False), tensors)
        http.post("/finish_weight_update", {"weight_version": self._version}, again=False)
        if not http.post("/reset_prefix_cache", {})["success"]:
            raise UserError(
                f"engine {http.url}: keeps a prefix cache of other weights, since it is answering someone "
                "else; give the run a server of its own"
            )
        http.post("/reset_encoder_cache", {})
        got = http.get("/weight_info")["weight_version"]
        if got != self._version:
            raise UserError(
                f"engine {http.url}: has weights {got!r} after {self._version!r} were pushed; another "
                "trainer uses it: give each run a server of its own"
            )

    def sample(
        self,
        prompts: Sequence[Prompt],
        draws: Tensor | None,
        *,
        features: Sequence[VisionFeatures | None] | None = None,
        group_size: int | None = None,
    ) -> Rollout:
        """One request for each prompt, which the server encodes once for its G completions."""
        if self._step < 0:
            raise ValueError("sample: called before sync, so that the server has other weights")
        size = group_size or self.sampling.group_size

        def ask(number: int) -> list[Answer]:
            return self._ask(prompts[number], size, seed_of(draws, number * size))

        with ThreadPoolExecutor(max_workers=AT_ONCE) as pool:
            answers = together(lambda: list(pool.map(ask, range(len(prompts)))))
        return as_rollout(prompts, answers, features)

    def _ask(self, prompt: Prompt, size: int, seed: int) -> list[Answer]:
        s, length = self.sampling, len(prompt.ids)
        if length + s.max_new_tokens > self._room:
            raise UserError(
                f"engine {self.http.url}: row {prompt.row.problem_id} needs {length} + {s.max_new_tokens} "
                f"tokens, its --max-model-len is {self._room}; raise it or lower max_new_tokens"
            )
        media, wanted = media_of(prompt, self.config), choices(s, size, seed)
        expected = Expected(f"engine {self.http.url}", s, vocab_size(self.config), self._version)
        try:
            if media is None:
                read, answers = self._completions(prompt, wanted)
            else:
                read, answers = self._generate(prompt, media, wanted)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"engine {self.http.url}: row {prompt.row.problem_id}: an answer of another form than that "
                f"of vLLM 0.33 ({type(error).__name__}: {error}); use that version, or set engine=generate"
            ) from None
        expected.check(prompt, answers, size, read)
        return answers

    def _completions(self, prompt: Prompt, wanted: dict[str, Any]) -> tuple[list[int], list[Answer]]:
        asked = wanted | {
            "model": self._model,
            "prompt": prompt.ids.tolist(),
            "add_special_tokens": False,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "return_weight_versions": True,
        }
        made = sorted(self.http.post("/v1/completions", asked)["choices"], key=lambda c: c["index"])
        answers = [_answer(c, c["logprobs"]["token_logprobs"]) for c in made]
        return made[0]["prompt_token_ids"] if made else prompt.ids.tolist(), answers

    def _generate(
        self, prompt: Prompt, media: Media, wanted: dict[str, Any]
    ) -> tuple[list[int], list[Answer]]:
        encode = vllm_part("vllm.entrypoints.scale_out.token_in_token_out.mm_serde").encode_mm_kwargs_item
        asked = {
            "model": self._model,
            "token_ids": prompt.ids.tolist(),
            "features": {
                "mm_hashes": media.hashes,
                "mm_placeholders": {
                    kind: [{"offset": first, "length": n} for first, n in places]
                    for kind, places in media.places.items()
                },
                "kwargs_data": {kind: [encode(x) for x in media.items[kind]] for kind in media.places},
            },
            "sampling_params": wanted,
            "return_token_ids": True,
        }
        try:
            answer = self.http.post("/inference/v1/generate", asked)
        except NotThere:
            why = "has no /inference/v1/generate: --enable-scale-out is missing"
            raise self._started_wrong(why) from None
        made = sorted(answer["choices"], key=lambda c: c["index"])
        answers = [_answer(c, [x["logprob"] for x in c["logprobs"]["content"]]) for c in made]
        return answer["prompt_token_ids"], answers

    def close(self) -> None:
        """Leave the server, which goes on running."""
        self._channel.close()


def vocab_size(config: Any) -> int:
    """How many token ids a model has."""
    return int(config.get_text_config().vocab_size)


def _answer(choice: dict[str, Any], logp: Sequence[Any]) -> Answer:
    versions = frozenset(span["version"] for span in choice["weight_versions"] or ())
    return Answer([int(i) for i in choice["token_ids"]], [float(x) for x in logp], versions)
