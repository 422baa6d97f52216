"""Sampling by vLLM inside this process, on the GPU that trains.

Written against the source of vLLM 0.33.0: `LLM(enable_sleep_mode=True)`, its `apply_model`, `wake_up`,
`sleep`, `update_weight_version`, and `llm_engine.add_request` and `step`. Never run with a real vLLM here;
see docs/engines.md.
"""

import os
import uuid
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from raise_core.scoring.backbone import VisionFeatures

from .. import ranks
from ..prompts import Prompt
from ..rollout import Rollout
from .answers import Answer, Expected, as_rollout, choices, seed_of, together
from .base import Sampling
from .vllm_media import GRIDS, media_of, vllm_part
from .vllm_server import vocab_size
from .weights import weights_of

MEMORY = 0.35  # share of the GPU for vLLM while it is awake; the rest is the policy's


class VllmColocated:
    """An engine of this process; every process of a run has its own, which holds the whole model.

    path: Hugging Face id or folder of the model. model: the policy. Between steps vLLM sleeps: its weights
    lie in host memory, its cache is gone. UserError where vLLM is not installed.
    """

    def __init__(self, path: str, model: Any, sampling: Sampling) -> None:
        # Weights are handed over as tensors, which needs vLLM's workers in this process.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        vllm = vllm_part("vllm")
        self.config, self.sampling = model.config, sampling
        sees = getattr(model.config, "vision_config", None) is not None
        options: dict[str, Any] = {"limit_mm_per_prompt": dict.fromkeys(GRIDS, 1)} if sees else {}
        if ranks.size() > 1:
            options["distributed_executor_backend"] = "external_launcher"
        self.llm = vllm.LLM(
            model=path, dtype=str(model.dtype).removeprefix("torch."), enable_sleep_mode=True,
            gpu_memory_utilization=MEMORY, logprobs_mode="processed_logprobs", mm_processor_cache_gb=0,
            **options,
        )  # fmt: skip
        self._run, self._step = uuid.uuid4().hex[:12], -1
        self.llm.sleep(level=1)

    def sync(self, model: Any, step: int) -> None:
        """Load all weights, unless those of this step are there. All processes call it."""
        if step == self._step:
            return
        weights = weights_of(model)
        self.llm.wake_up(tags=["weights"])
        self.llm.apply_model(lambda inner: _load(inner, weights))
        self._step = step
        self.llm.update_weight_version(self._version)
        self.llm.sleep(level=1)  # which also forgets the caches of other weights

    @property
    def _version(self) -> str:
        return f"{self._run}:{self._step}"

    def sample(
        self,
        prompts: Sequence[Prompt],
        draws: Tensor | None,
        *,
        features: Sequence[VisionFeatures | None] | None = None,
        group_size: int | None = None,
    ) -> Rollout:
        """All prompts together; vLLM encodes each once for its G completions."""
        if self._step < 0:
            raise ValueError("sample: called before sync, so that vLLM has other weights")
        size = group_size or self.sampling.group_size
        return as_rollout(prompts, together(lambda: self._answers(prompts, draws, size)), features)

    def _answers(self, prompts: Sequence[Prompt], draws: Tensor | None, size: int) -> list[list[Answer]]:
        """Of each prompt, checked."""
        if not prompts:
            return []
        self.llm.wake_up()
        try:
            outputs = self._run_all(prompts, draws, size)
        finally:
            self.llm.sleep(level=1)
        expected = Expected("engine vllm", self.sampling, vocab_size(self.config), self._version)
        answers = []
        for number, prompt in enumerate(prompts):
            output = outputs.get(str(number))
            made = [] if output is None else [_answer(x) for x in output.outputs]
            read = prompt.ids.tolist() if output is None else output.prompt_token_ids
            expected.check(prompt, made, size, read)
            answers.append(made)
        return answers

    def _run_all(self, prompts: Sequence[Prompt], draws: Tensor | None, size: int) -> dict[str, Any]:
        """vLLM's outputs by the number of their prompt."""
        parameters, inputs = vllm_part("vllm.sampling_params"), vllm_part("vllm.inputs")
        engine, found = self.llm.llm_engine, dict[str, Any]()
        for number, prompt in enumerate(prompts):
            wanted = choices(self.sampling, size, seed_of(draws, number * size))
            final = parameters.RequestOutputKind.FINAL_ONLY
            asked = parameters.SamplingParams.from_optional(**wanted, detokenize=False, output_kind=final)
            media, ids = media_of(prompt, self.config), prompt.ids.tolist()
            if media is None:
                given = inputs.tokens_input(ids)
            else:
                place = vllm_part("vllm.multimodal.inputs").PlaceholderRange
                places = {
                    kind: [place(offset=first, length=n) for first, n in some]
                    for kind, some in media.places.items()
                }
                given = inputs.mm_input(ids, media.items, media.hashes, places)
            engine.add_request(str(number), given, asked)
        while engine.has_unfinished_requests():
            found |= {out.request_id: out for out in engine.step() if out.finished}
        return found

    def close(self) -> None:
        """vLLM's memory is given back when the process ends; until then it sleeps."""
        del self.llm


def _load(inner: Any, weights: Sequence[Any]) -> None:
    """In vLLM's worker, whose model takes names of a checkpoint; one whole tensor at a time."""
    inner.load_weights((w.name, w.full()) for w in weights)


def _answer(output: Any) -> Answer:
    ids = list(output.token_ids)
    logp = [at[i].logprob for at, i in zip(output.logprobs or (), ids, strict=False)]
    return Answer(ids, logp, frozenset(span.version for span in output.weight_versions or ()))
