"""A GRPO run is the same whatever samples: the policy, a (fake) vLLM server, a (fake) vLLM in the process."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import raise_core as rc
from raise_trainer import grpo as grpo_module
from raise_trainer import tiny
from raise_trainer.dataset import write_dataset
from raise_trainer.demo import save_model
from raise_trainer.engines import (
    Engine,
    Generate,
    Sampling,
    VllmColocated,
    VllmServer,
    engine_of,
    rescored,
    vllm_server,
)
from raise_trainer.engines.http_json import HttpJson
from raise_trainer.engines.weights import weights_of
from raise_trainer.errors import UserError
from raise_trainer.grpo import Grpo, Outcome
from raise_trainer.method import Method
from raise_trainer.prompts import Prompt
from raise_trainer.rollout import draws
from raise_trainer.rows import Row
from raise_trainer.train import run_train
from raise_trainer.train_config import check
from tests.budget import assert_as_exact_as_fp32, assert_equal_but_for_roundings, assert_exact
from tests.tiny_models import text_model, text_prompt
from tests.trainer import fake_vllm
from tests.trainer.test_grpo import parity, questions, write_clips

G, LONGEST, STEPS = 3, 8, 2


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> list[Prompt]:
    """Questions about videos, and one of text alone."""
    folder = tmp_path_factory.mktemp("clips")
    write_clips(folder)
    seen = questions(folder, tiny.build_processor())[:3]
    ids = seen[0].ids[-9:]
    row = Row("text", "?", "text", "free-form", (), "<answer>x</answer>", None, "test")
    return [*seen, Prompt(row, {"input_ids": ids[None]}, None)]


def model() -> Any:
    made = tiny.build_model(tiny.build_processor(), seed=0).double()
    made.model.visual.requires_grad_(False)
    return made


def drawn(step: int, prompts: list[Prompt]) -> torch.Tensor:
    return draws(0, [(step, i) for i in range(len(prompts))], G, LONGEST)


def assert_same_but_for_fp32(one: torch.Tensor, other: torch.Tensor, *, name: str) -> None:
    """Log-probabilities leave the kernels in fp32, and the ratio to the sampler's is made of two of them."""
    assert_as_exact_as_fp32(float((one.double() - other.double()).abs().max()), 0.0, name=name)


METHOD = Method(group_size=G, max_new_tokens=LONGEST, temperature=0.8)
EOS = tiny.build_processor().tokenizer.eos_token_id
# Nothing is suppressed: the probability that suppressed tokens lose goes to the others, in the sampler alone.
SAMPLING = Sampling.of(METHOD, eos=[EOS], suppress=[])


@contextmanager
def engine(
    kind: str, policy: Any, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Engine, Any]]:
    """An engine, and the fake behind it, which starts with other weights than the policy's."""
    other = copy.deepcopy(policy)
    served = fake_vllm.Served(other, [drawn(s, prompts) for s in range(STEPS)], G)
    served.spoil()
    fake = fake_vllm.install(monkeypatch, served)
    if kind == "generate":
        yield Generate(policy, SAMPLING), None
    elif kind == "colocated":
        yield VllmColocated("tiny", policy, SAMPLING), fake
    else:
        with fake_vllm.FakeServer(served) as server:
            channel = fake_vllm.FakeChannel(server)
            yield VllmServer(server.url, policy.config, SAMPLING, channel=channel), server


def run(kind: str, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[Outcome], Any]:
    """Two steps."""
    monkeypatch.setattr(grpo_module, "score", parity)
    policy, tokenizer = model(), tiny.build_processor().tokenizer
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.1)
    with engine(kind, policy, prompts, monkeypatch) as (made, fake):
        grpo = Grpo(
            policy, rc.EmaReference(policy, every=1), optimizer, tokenizer, METHOD, eos=[EOS], suppress=[],
            engine=made,
        )  # fmt: skip
        outcomes = [grpo.step(prompts, drawn(step, prompts), step) for step in range(STEPS)]
        made.close()
    return policy, outcomes, fake


@pytest.fixture(scope="module")
def usual(prompts: list[Prompt]) -> tuple[Any, list[Outcome]]:
    """The run whose policy samples for itself."""
    with pytest.MonkeyPatch.context() as patch:
        return run("generate", prompts, patch)[:2]


@pytest.mark.parametrize("kind", ["server", "colocated"])
def test_a_run_is_the_one_whose_policy_samples(
    kind: str,
    prompts: list[Prompt],
    usual: tuple[Any, list[Outcome]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Completions, rewards, what is known of each token, and weights after two steps: all weights arrived."""
    want_policy, want = usual
    policy, outcomes, fake = run(kind, prompts, monkeypatch)
    for got, expected in zip(outcomes, want, strict=True):
        assert got.rollout.completions == expected.rollout.completions
        assert got.scored is not None and expected.scored is not None
        assert_exact(got.scored.reward, expected.scored.reward, name="reward")
        for name in ("logp", "entropy"):
            for a, b in zip(getattr(got.rollout, name), getattr(expected.rollout, name), strict=True):
                assert_same_but_for_fp32(a, b, name=name)
        assert_as_exact_as_fp32(got.figures.pop("sampler_gap"), 0.0, name="sampler_gap")
        assert got.figures.keys() == expected.figures.keys()
    start = model().state_dict()
    for key, weight in policy.state_dict().items():
        assert_same_but_for_fp32(weight, want_policy.state_dict()[key], name=key)
    assert max(float((policy.state_dict()[k] - w).abs().max()) for k, w in start.items()) > 1e-3
    if kind == "server":
        assert fake.count("/v1/completions") == STEPS  # one request a prompt and step: encoded once for G
        assert fake.count("/inference/v1/generate") == STEPS * (len(prompts) - 1)
        assert fake.count("/update_weights") == STEPS and fake.count("/init_weight_transfer_engine") == 0
    else:
        (llm,) = fake.made
        assert llm.options["model"] == "tiny" and llm.options["logprobs_mode"] == "processed_logprobs"
        assert llm.options["limit_mm_per_prompt"] == {"image": 1, "video": 1} and llm.awake == set()


def test_a_sampler_with_other_weights_is_reported(
    prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gap is in the figures, and there is a warning."""
    policy = model()
    with engine("server", policy, prompts, monkeypatch) as (made, server):
        monkeypatch.setattr(grpo_module, "score", parity)
        grpo = Grpo(
            policy, rc.EmaReference(policy), torch.optim.SGD(policy.parameters(), lr=0.1),
            tiny.build_processor().tokenizer, METHOD, eos=[EOS], suppress=[], engine=made,
        )  # fmt: skip
        load = server.served.load_weights
        server.served.load_weights = lambda w: load((name, tensor * 1.2) for name, tensor in w)
        with pytest.warns(RuntimeWarning, match="does not sample from the model that is scored"):
            outcome = grpo.step(prompts, drawn(0, prompts), 0)
    assert outcome.figures["sampler_gap"] > 0.05
    assert outcome.figures["ratio_mean"] != 1.0  # the loss corrects for it


def test_the_gap_is_the_mean_distance_at_the_sampling_temperature(
    prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = model()
    with engine("server", policy, prompts, monkeypatch) as (made, _):
        made.sync(policy, 0)
        rollout = made.sample(prompts, drawn(0, prompts))
    assert rollout.sampled_logp is not None and rollout.logp == [] == rollout.entropy
    rollout.sampled_logp[0] += 0.25
    filled, gap = rescored(rollout, rc.Scorer(policy), METHOD.temperature)
    assert_as_exact_as_fp32(gap, 0.25 * len(rollout.completions[0]), name="gap")
    assert (
        [len(x) for x in filled.logp]
        == [len(x) for x in filled.entropy]
        == list(map(len, filled.completions))
    )


def test_nothing_is_sampled_for_no_prompts(prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has none of a step."""
    policy = model()
    for kind in ("server", "colocated", "generate"):
        with engine(kind, policy, prompts, monkeypatch) as (made, _):
            made.sync(policy, 0)
            empty = made.sample([], torch.zeros(0, LONGEST, dtype=torch.float64))
        assert empty.completions == [] == empty.prompts
        assert rescored(empty, rc.Scorer(policy), 1.0)[1] == 0.0


def test_weights_are_pushed_once_a_step(prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch) -> None:
    policy = model()
    with engine("server", policy, prompts, monkeypatch) as (made, server):
        for step in (0, 0, 1):
            made.sync(policy, step)
        assert server.count("/finish_weight_update") == server.count("/reset_prefix_cache") == 2
        made.close()


def test_lora_adapters_are_merged_into_a_copy() -> None:
    """Names and values of the merged model, without a reference's adapter; the model is as it was."""
    import peft

    base = text_model("Qwen2").double()
    names = {name for name, _ in base.named_parameters()}
    wrapped = peft.get_peft_model(
        base, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    )
    wrapped.add_adapter("other", peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter))
    before = copy.deepcopy(wrapped.state_dict())
    weights = weights_of(wrapped)
    found = {w.name: w.full().clone() for w in weights}
    for key, tensor in wrapped.state_dict().items():
        assert_exact(tensor, before[key], name=key)
    assert set(found) == names
    merged = dict(wrapped.merge_and_unload().named_parameters())
    for weight in weights:
        assert weight.shape == tuple(merged[weight.name].shape) and weight.dtype == torch.float64
        assert_equal_but_for_roundings(found[weight.name], merged[weight.name].detach(), name=weight.name)
    apart = (
        found["model.layers.0.mlp.down_proj.weight"]
        - before["base_model.model.model.layers.0.mlp.down_proj.base_layer.weight"]
    )
    assert float(apart.abs().max()) > 0.1


def test_an_engine_is_chosen_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, rest = text_model("Qwen2"), {"path": "tiny", "eos": [1], "suppress": []}
    fake_vllm.install(monkeypatch)
    assert isinstance(engine_of("generate", policy, METHOD, **rest), Generate)
    colocated = engine_of("vllm", policy, METHOD, **rest)
    assert isinstance(colocated, VllmColocated) and "limit_mm_per_prompt" not in colocated.llm.options
    with fake_vllm.FakeServer(None) as server:
        assert isinstance(engine_of(server.url, policy, METHOD, **rest), VllmServer)
    with pytest.raises(UserError, match=r"'sglang': is none; give generate, vllm .* or the URL"):
        engine_of("sglang", policy, METHOD, **rest)


def test_vllm_that_is_not_installed_is_named_with_the_command() -> None:
    with pytest.raises(UserError, match="pip install vllm"):
        VllmColocated("tiny", text_model("Qwen2"), SAMPLING)


def test_sampling_before_the_weights_are_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_vllm.install(monkeypatch)
    policy = text_model("Qwen2")
    row = Row(0, "?", "text", "free-form", (), "x", None, "test")
    prompt = Prompt(row, text_prompt(4), None)
    with fake_vllm.FakeServer(None) as server:
        http = HttpJson(server.url, remedy="")
        for made in (
            VllmColocated("tiny", policy, SAMPLING),
            VllmServer("", policy.config, SAMPLING, http=http),
        ):
            with pytest.raises(ValueError, match="before sync"):
                made.sample([prompt], None)


def test_a_training_run_takes_its_completions_from_the_server_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`engine=URL`, from the settings to the figures. The placeholders' bias is the gap that is left."""
    write_dataset(tmp_path / "data", train_videos=3, test_questions=1, seed=0, advance=lambda n=1: None)
    processor = tiny.build_processor()
    policy = tiny.build_model(processor, seed=0)
    save_model(policy, processor, tmp_path / "model")
    places = [[(step, i) for i in range(2)] for step in range(STEPS)]
    served = fake_vllm.Served(policy, [draws(0, some, G, LONGEST) for some in places], G)
    fake_vllm.install(monkeypatch)
    with fake_vllm.FakeServer(served) as server:
        channel = fake_vllm.FakeChannel(server)
        monkeypatch.setattr(vllm_server, "NcclChannel", lambda: channel)
        given: dict[str, Any] = {
            "model": str(tmp_path / "model"), "data": tmp_path / "data/train.json", "out": tmp_path / "run",
            "dtype": "float32", "template": "plain", "steps": STEPS, "prompts": 2, "group_size": G,
            "max_new_tokens": LONGEST, "frames": 8, "pixels": 56 * 56, "gradient_checkpointing": False,
            "workers": 0, "engine": server.url,
        }  # fmt: skip
        out = run_train(check(given))
        assert channel.closed and server.count("/inference/v1/generate") == STEPS * 2
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(STEPS))
    assert all(0 <= line["sampler_gap"] < 0.05 for line in lines)
