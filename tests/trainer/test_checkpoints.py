"""A saved run goes on bit for bit, from files without pickle that `from_pretrained` loads."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import raise_core as rc
from raise_trainer.checkpoints import Checkpoints, ResumeRefused, TrainingState, changed_fields
from raise_trainer.checkpoints.files import Reader, Writer
from raise_trainer.checkpoints.trees import DTYPES, flatten, unflatten
from tests.budget import assert_exact
from tests.tiny_models import text_model, vision_model

# PEFT asks transformers for a name that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


class Sampler:
    """Shuffled epochs of ten rows."""

    def __init__(self) -> None:
        self.stream, self.pool = random.Random(5), list[int]()

    def next(self) -> int:
        self.pool = self.pool or self.stream.sample(range(10), 10)
        return self.pool.pop()

    def state_dict(self) -> dict[str, Any]:
        return {"stream": self.stream.getstate(), "pool": list(self.pool)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.setstate(state["stream"])
        self.pool = list(state["pool"])


class Mixed(nn.Module):
    """Not Hugging Face: bf16, fp32, tied and 0-dim weights, integer, empty and 0-dim buffers, NaN and -0."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(200, 8)
        self.norm = nn.BatchNorm1d(8)
        self.low = nn.Linear(8, 8).bfloat16()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.head = nn.Linear(8, 200, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("odd", torch.tensor([float("nan"), -0.0, float("inf")]))
        self.register_buffer("empty", torch.zeros(0, 3, dtype=torch.int16))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        states = self.norm(self.embed(input_ids).mean(1))
        states = nn.functional.dropout(self.low(states.bfloat16()).float(), 0.2, self.training) * self.scale
        loss = nn.functional.cross_entropy(self.head(states), labels[:, 0])
        return type("Out", (), {"loss": loss})


def lora() -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_dropout=0.3, target_modules=["q_proj"], modules_to_save=["lm_head"])
    return peft.get_peft_model(text_model("Llama"), config)


def frozen_tower() -> Any:
    model = vision_model("Qwen2_5_VL")
    model.model.visual.requires_grad_(False)
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "no Hugging Face": Mixed,
    "tied, bf16": lambda: text_model("Llama", tie_word_embeddings=True, attention_dropout=0.1).bfloat16(),
    "names differ on disk": frozen_tower,
    "adapter": lora,
}


def run(kind: str, **options: Any) -> TrainingState:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = MODELS[kind]().train()
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": trained[1:]}, {"params": trained[:1], "lr": 0.02, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, foreach=True)
    streams = {"torch": torch.Generator(), "python": random.Random(1), "numpy": np.random.default_rng(2)}
    options = {"config": {"lr": 0.01, "out": "a"}, "data": "rows 10", **options}
    return TrainingState(
        model,
        optimizer,
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1)),
        rc.EmaReference(model, every=1, decay=0.9),
        Sampler(),
        generators=streams,
        **options,
    )


def go_on(state: TrainingState, steps: int) -> list[Any]:
    """Some training steps that use every random stream, and what they measured."""
    seen: list[Any] = []
    for _ in range(steps):
        row = state.sampler.next()  # type: ignore[union-attr]
        noise = torch.randint(2, 100, (2, 5), generator=state.generators["torch"])  # type: ignore[arg-type]
        ids = (noise + row) % 180
        loss = state.model(input_ids=ids, labels=ids).loss
        loss.backward()
        state.optimizer.step()
        state.scheduler.step()  # type: ignore[union-attr]
        state.optimizer.zero_grad()
        state.step += 1
        state.counters["tokens"] = state.counters.get("tokens", 0) + ids.numel()
        assert state.reference is not None
        state.reference.update(state.model, state.step)
        with state.reference.active() as scored:
            score = scored(input_ids=ids, labels=ids).loss.item()
        draws = (random.random(), np.random.rand(), state.generators["python"].random())
        seen.append((loss.item(), score, row, *draws, state.generators["numpy"].random()))
    return seen


def assert_same_bits(got: nn.Module, wanted: nn.Module) -> None:
    for name, tensor in wanted.state_dict().items():
        assert_exact(got.state_dict()[name], tensor, name=name)


@pytest.mark.parametrize("kind", MODELS)
def test_a_resumed_run_equals_the_uninterrupted_one(kind: str, tmp_path: Path) -> None:
    whole = run(kind)
    go_on(whole, 3)
    place = Checkpoints(tmp_path).save(whole, 3)
    wanted = go_on(whole, 4)
    other = run(kind)
    go_on(other, 1)
    resumed = Checkpoints(tmp_path).resume(other)
    assert resumed is not None and (resumed.path, resumed.step, resumed.changes) == (place, 3, [])
    assert other.step == 3 and other.counters == {"tokens": 30}
    assert go_on(other, 4) == wanted
    assert_same_bits(other.model, whole.model)
    assert all(file.suffix in (".json", ".safetensors", ".md") for file in place.rglob("*") if file.is_file())
    size = sum(file.stat().st_size for file in place.rglob("*.safetensors"))
    assert size - 2**16 <= whole.bytes() <= size + 2**16


@pytest.mark.parametrize("kind", ["tied, bf16", "names differ on disk"])
def test_from_pretrained_loads_it(kind: str, tmp_path: Path) -> None:
    state = run(kind)
    go_on(state, 1)
    place = Checkpoints(tmp_path).save(state, 1)
    assert not (place / "weights.safetensors").exists()
    loaded = type(state.model).from_pretrained(place / "model")  # type: ignore[attr-defined]
    assert_same_bits(loaded, state.model)


def test_an_adapter_is_saved_without_base_and_without_the_reference(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from safetensors.torch import load_file

    state = run("adapter")
    go_on(state, 1)
    place = Checkpoints(tmp_path).save(state, 1)
    saved = load_file(place / "model/adapter_model.safetensors")
    assert saved and all("q_proj.lora_" in name or "lm_head" in name for name in saved)
    assert not any("reference" in path.name for path in (place / "model").iterdir())
    again = peft.PeftModel.from_pretrained(text_model("Llama"), place / "model")
    wanted = {n: w for n, w in state.model.named_parameters() if w.requires_grad}
    assert wanted
    for name, weight in again.named_parameters():
        if name in wanted:
            assert_exact(weight, wanted[name], name=name)


def test_a_processor_lies_beside_the_model(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from raise_trainer.tiny import build_tokenizer

    state = run("tied, bf16", processor=build_tokenizer())
    place = Checkpoints(tmp_path).save(state, 0)
    assert AutoTokenizer.from_pretrained(place / "model")("a red ring") == state.processor("a red ring")


def test_fp32_state_of_a_bf16_parameter_is_not_rounded(tmp_path: Path) -> None:
    class Momentum(torch.optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {"lr": 0.1})

        def step(self) -> None:  # type: ignore[override]
            for p in self.param_groups[0]["params"]:
                state = self.state[p]
                state["mean"] = 0.9 * state.get("mean", torch.zeros(p.shape)) + torch.rand(p.shape)
                state["steps"] = torch.tensor(7)

    states = []
    for _ in range(2):
        model = nn.Linear(3, 2, dtype=torch.bfloat16)
        states.append(TrainingState(model, Momentum(model.parameters())))
    states[0].optimizer.step()
    Checkpoints(tmp_path).save(states[0], 1)
    Checkpoints(tmp_path).resume(states[1])
    for ours, theirs in zip(states[1].model.parameters(), states[0].model.parameters(), strict=True):
        got, wanted = states[1].optimizer.state[ours], states[0].optimizer.state[theirs]
        assert got["mean"].dtype == torch.float32
        assert_exact(got["mean"], wanted["mean"], name="mean")
        assert_exact(got["steps"], wanted["steps"], name="steps")


def test_every_kind_of_value_survives(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = {
        name: (torch.arange(24) % 3).reshape(4, 3, 2).to(dtype).transpose(0, 2)
        for name, dtype in DTYPES.items()
    }
    tree = {
        "tensors": tensors | {f"scalar {n}": t[0, 0, 0] for n, t in tensors.items()},
        "empty": torch.zeros(0, 2, dtype=torch.bfloat16),
        "array": np.arange(5, dtype=np.uint32),
        "values": [None, True, 3, 0.1, -0.0, 1e-310, float("-inf"), "text", (1, (2, [3])), np.float64(0.3)],
        "keys": {1: "a", (2, "b"): torch.float16, None: {}},
        "$dollar": [],
    }
    writer = Writer(tmp_path)
    writer.tree("tree", tree)
    assert writer.error is None
    again = Reader(tmp_path).tree("tree")
    assert {n: (t.dtype, t.tolist()) for n, t in again["tensors"].items()} == {
        n: (t.dtype, t.tolist()) for n, t in tree["tensors"].items()
    }
    assert (again["empty"].shape, again["empty"].dtype) == ((0, 2), torch.bfloat16)
    assert again["array"].dtype == np.uint32 and again["array"].tolist() == [0, 1, 2, 3, 4]
    assert repr(again["values"]) == repr([*tree["values"][:-1], 0.3])
    assert (again["keys"], again["$dollar"]) == (tree["keys"], [])
    assert len(load_file(tmp_path / "tree.safetensors")) == 2 * len(DTYPES) + 2
    with pytest.raises(TypeError, match=r"tree/a/0: got a object, wanted None, bool"):
        writer.tree("tree", {"a": [object()]})


LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([*DTYPES.values()])
)
KEYS = st.text() | st.integers() | st.tuples(st.integers(), st.text()) | st.none()
TREES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(KEYS, inner),
    max_leaves=20,
)


@given(TREES)
def test_any_tree_survives_as_strict_json(tree: Any) -> None:
    structure, tensors = flatten(tree)
    text = json.dumps(structure, allow_nan=False)
    assert not tensors
    assert repr(unflatten(json.loads(text), lambda *tensor: None)) == repr(tree)


def test_a_changed_run_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    saved = run("no Hugging Face")
    go_on(saved, 2)
    checkpoints = Checkpoints(tmp_path)
    place = checkpoints.save(saved, 2)
    wanted = go_on(saved, 2)
    now = {"lr": 0.02, "out": "b", "steps": 9}
    other = run("no Hugging Face", config=now)
    before = {name: tensor.clone() for name, tensor in other.model.state_dict().items()}
    with pytest.raises(
        ResumeRefused, match=r'lr: 0.01 -> 0.02; out: "a" -> "b"; steps: \(absent\) -> 9; undo'
    ):
        checkpoints.resume(other)
    with pytest.raises(
        ResumeRefused, match=f"{place.name} was saved with other settings: lr: 0.01 -> 0.02; undo"
    ):
        checkpoints.resume(other, may_change=["out", "steps"])
    other.config, other.data = saved.config, "rows 11"
    with pytest.raises(ResumeRefused, match=r"data fingerprint: rows 10 -> rows 11"):
        checkpoints.resume(other)
    with pytest.raises(ValueError, match="on_change: got 'ask', wanted"):
        checkpoints.resume(other, on_change="ask")
    for name, tensor in other.model.state_dict().items():
        assert_exact(tensor, before[name], name=name)
    other.config = now
    resumed = checkpoints.resume(other, on_change="accept", may_change=["out", "steps"])
    assert resumed is not None
    assert resumed.changes == ["lr: 0.01 -> 0.02", "data fingerprint: rows 10 -> rows 11"]
    assert go_on(other, 2) == wanted


def test_changed_fields_reads_nested_configs() -> None:
    before = {"a": {"b": 1, "c": (1, 2)}, "path": Path("x"), "gone": {}}
    assert changed_fields(before, {"a": {"b": 1, "c": [1, 2]}, "path": "x", "gone": {}}) == []
    after = {"a": {"b": 2, "c": [1]}, "path": "y", "new": None}
    assert changed_fields(before, after) == [
        "a.b: 1 -> 2",
        "a.c: [1, 2] -> [1]",
        "gone: {} -> (absent)",
        "new: (absent) -> null",
        'path: "x" -> "y"',
    ]
    assert changed_fields(before, after, ["a", "path", "new", "gone"]) == []
    assert changed_fields(before, after, ["a.b", "pat"]) == changed_fields(before, after)[1:]


def broken(change: Callable[[TrainingState], Any]) -> TrainingState:
    state = run("no Hugging Face")
    change(state)
    return state


WRONG: dict[str, tuple[Callable[[TrainingState], Any], str]] = {
    "shape": (lambda s: setattr(s.model, "norm", nn.BatchNorm1d(9)), "model: norm.weight is .* was saved"),
    "dtype": (lambda s: s.model.low.float(), "model: low.weight is torch.float32 .*bfloat16"),
    "names": (lambda s: setattr(s.model, "more", nn.Linear(1, 1)), "model: 2 were not saved"),
    "untied": (lambda s: setattr(s.model.head, "weight", nn.Parameter(torch.ones(200, 8))), "were not saved"),
    "frozen": (
        lambda s: s.model.low.requires_grad_(False),
        "trained parameters: 0 were not saved .*, 2 saved",
    ),
    "groups": (lambda s: s.optimizer.param_groups.pop(), "has 1 parameter groups, but 2"),
    "no sampler": (lambda s: setattr(s, "sampler", None), r"lacks \['sampler'\]"),
    "no reference": (lambda s: setattr(s, "reference", None), r"lacks \['reference'\]"),
    "more": (lambda s: s.others.update(x=Sampler()), r"has \['other x'\]"),
    "generators": (lambda s: s.generators.pop("numpy"), r"but \['numpy', 'python', 'torch'\] were saved"),
}


@pytest.mark.parametrize("case", WRONG)
def test_another_run_is_refused(case: str, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(run("no Hugging Face"), 0)
    change, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        checkpoints.resume(broken(change))


def test_unsupported_state_is_named(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"a": 1}

    with pytest.raises(TypeError, match="'_extra_state', which is neither parameter nor buffer"):
        Checkpoints(tmp_path).save(TrainingState(Extra(1, 1)), 0)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TypeError, match="generators: got a str"):
        Checkpoints(tmp_path).save(TrainingState(nn.Linear(1, 1), generators={"a": "b"}), 0)  # type: ignore[dict-item]
    sampler = Sampler()
    sampler.pool = [object()]  # type: ignore[list-item]
    with pytest.raises(TypeError, match="pool/0: got a object"):
        Checkpoints(tmp_path).save(TrainingState(nn.Linear(1, 1), sampler=sampler), 0)
