"""The reference as a second LoRA adapter: on the same base, named apart, switched to and always back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import raise_core as rc
from tests.budget import assert_exact, assert_within_error_budget
from tests.tiny_models import text_model, text_prompt

peft = pytest.importorskip("peft")
IDS = torch.tensor([[1, 5, 2]])


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.default = nn.Linear(8, 8)  # the name of PEFT's first adapter
        self.reference_1 = nn.Linear(8, 8)
        self.head = nn.Linear(8, 7)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.reference_1(self.default(self.embed(ids)).tanh()).tanh())


def lora(model: nn.Module | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=2, lora_dropout=0.3, **{"target_modules": ["default", "reference_1"], **options}
    )
    return train(peft.get_peft_model(Toy() if model is None else model, config), 0)


def train(model: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += (0.3 * torch.randn(weight.shape, generator=generator)).to(weight.dtype)
    return model


def state(model: nn.Module) -> dict[str, tuple[Tensor, bool, bool]]:
    """Everything that may change: bits, gradient flags, modes."""
    named = {name: (w.detach().clone(), w.requires_grad, True) for name, w in model.named_parameters()}
    return named | {f"mode of {n}": (torch.zeros(0), m.training, True) for n, m in model.named_modules()}


def assert_untouched(model: nn.Module, before: dict[str, tuple[Tensor, bool, bool]]) -> None:
    now = state(model)
    for name, (weight, *flags) in before.items():
        assert_exact(now[name][0], weight, name=name)
        assert [*now[name][1:]] == flags, name


def adapter_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: w.detach().clone() for name, w in model.named_parameters() if w.requires_grad}


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "DoRA": {"use_dora": True},
    "with a trained head": {"modules_to_save": ["head"]},
    "embedding": {"target_modules": ["embed", "default"]},
    "PiSSA": {"init_lora_weights": "pissa"},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_a_second_adapter_on_the_same_base(options: str) -> None:
    policy = lora(**OPTIONS[options]).train()
    before, torch_state = state(policy), torch.get_rng_state()
    names = [n for n, _ in policy.named_parameters()]
    reference = rc.EmaReference(policy, decay=0.25, every=1)
    assert_exact(torch.get_rng_state(), torch_state, name="random state")
    assert reference.model is policy
    assert_untouched(policy, before)
    assert policy.active_adapters == ["default"] and list(policy.peft_config) == ["default", "reference_2"]
    added = {n: w for n, w in policy.named_parameters() if n not in names}
    trained = adapter_weights(policy)
    assert not any(w.requires_grad for w in added.values())
    assert [w.shape for w in added.values()] == [w.shape for w in trained.values()]
    assert sorted(reference.state_dict()) == sorted(["step", *(f"weight.{name}" for name in trained)])

    start = policy.eval()(IDS).detach()
    old = adapter_weights(policy)
    with reference.active() as model:
        assert_exact(model(IDS), start, name="the start")
    train(policy.train(), 1)
    assert reference.update(policy, 1)
    before = state(policy)
    twin = lora(**OPTIONS[options]).eval()
    twin.load_state_dict(policy.state_dict(), strict=False)
    with torch.no_grad():
        for name, weight in twin.named_parameters():
            if weight.requires_grad:
                new = dict(policy.named_parameters())[name].detach()
                weight.copy_(old[name].lerp(new, 0.75))
                wanted = 0.25 * old[name].double() + 0.75 * new.double()
                average = reference.state_dict()[f"weight.{name}"]
                assert_within_error_budget(average, wanted, 0.25 * old[name] + 0.75 * new, name=name)
    with reference.active() as model:
        assert model.active_adapters == ["reference_2"] and not model.training
        assert_exact(model(IDS), twin(IDS).detach(), name="the average")
    assert policy.active_adapters == ["default"]
    assert_untouched(policy, before)


@pytest.mark.parametrize("kind", [rc.EmaReference, rc.FrozenReference])
def test_the_policys_adapter_is_back_after_an_exception(kind: Any) -> None:
    policy = lora().train()
    reference = kind(policy)
    train(policy, 2)
    before = state(policy)
    with pytest.raises(KeyError), reference.active(), reference.active():
        raise KeyError("in the reward")
    assert policy.active_adapters == ["default"]
    assert_untouched(policy, before)
    policy(IDS).sum().backward()
    trained = [name for name, weight in policy.named_parameters() if weight.grad is not None]
    assert trained == [name for name, weight in policy.named_parameters() if weight.requires_grad]


def test_what_is_frozen_in_the_adapter_stays_frozen() -> None:
    policy = lora()
    policy.base_model.model.default.lora_A["default"].requires_grad_(False)
    before = state(policy)
    reference = rc.EmaReference(policy)
    assert_untouched(policy, before)
    with reference.active():
        pass
    assert_untouched(policy, before)
    reference.close()
    assert_untouched(policy, before)


def test_two_references_and_their_adapters_go_again() -> None:
    policy = lora().eval()
    start = policy(IDS).detach()
    frozen, average = rc.FrozenReference(policy), rc.EmaReference(policy, decay=0.0, every=1)
    assert list(policy.peft_config) == ["default", "reference_2", "reference_3"]
    now = train(policy, 3)(IDS).detach()
    assert not frozen.update(policy, 1) and average.update(policy, 1)
    with average.active():
        assert_exact(policy(IDS), now, name="copied")
        with frozen.active():
            assert_exact(policy(IDS), start, name="frozen")
        assert_exact(policy(IDS), now, name="copied again")
    before = state(policy)
    average.close()
    frozen.close()
    assert list(policy.peft_config) == ["default"] and policy.active_adapters == ["default"]
    assert_untouched(policy, {n: v for n, v in before.items() if "reference_2" not in n and "_3" not in n})
    assert all("reference_2" not in name for name, _ in policy.named_parameters())
    with pytest.raises(RuntimeError, match="adapter 'reference_3' was deleted"), average.active():
        pass


def test_merged_or_disabled_adapters_are_refused_and_left_alone() -> None:
    policy = lora()
    reference = rc.EmaReference(policy)
    policy.merge_adapter()
    with pytest.raises(RuntimeError, match=r"merged or disabled.*unmerge_adapter\(\)"), reference.active():
        pass
    assert policy.base_model.model.default.merged
    policy.unmerge_adapter()
    disabled = r"leave disable_adapter\(\) first"
    with policy.disable_adapter(), pytest.raises(RuntimeError, match=disabled), reference.active():
        pass
    with reference.active():
        pass


def test_bf16_adapters_keep_their_dtype_and_an_average_in_fp32() -> None:
    policy = lora(Toy().bfloat16()).to(torch.bfloat16)
    reference = rc.EmaReference(policy, every=1)
    assert {w.dtype for w in policy.parameters()} == {torch.bfloat16}
    assert {w.dtype for n, w in reference.state_dict().items() if n != "step"} == {torch.float32}
    train(policy, 4)
    for step in range(1, 4):
        reference.update(policy, step)
    averages = reference.state_dict()
    with reference.active():
        scored = dict(policy.named_parameters())
    for name, average in averages.items():
        if name != "step":
            own = scored[name.removeprefix("weight.").replace(".default.weight", ".reference_2.weight")]
            assert_exact(own.detach(), average.bfloat16(), name=name)


@pytest.mark.parametrize("how", ["adapter", "swap", "copy"])
def test_every_way_to_hold_it_is_the_same_and_is_restored(how: str, tmp_path: Path) -> None:
    policy = lora()
    base = policy.base_model.model.head.weight
    reference = rc.EmaReference(policy, decay=0.9, every=1, how=how)
    twin = lora()
    other = rc.EmaReference(twin, decay=0.9, every=1, offload="cpu")
    for step in range(1, 4):
        reference.update(train(policy, step), step)
        other.update(train(twin, step), step)
    resumed = rc.EmaReference(lora(), decay=0.9, every=1, how=how)
    resumed.load(reference.save(tmp_path / "reference.safetensors"))
    results = []
    for it in (reference, other, resumed):
        with it.active() as model:
            results.append(model(IDS))
    assert_exact(results[1], results[0], name="swapped from the host")
    assert_exact(results[2], results[0], name="restored")
    assert reference.model.base_model.model.head.weight is base


def test_what_no_adapter_can_be_is_held_otherwise() -> None:
    policy = lora()
    policy.base_model.model.embed.weight.requires_grad_(True)
    reference = rc.EmaReference(policy)
    assert reference.model is not policy and list(policy.peft_config) == ["default"]
    assert "weight.base_model.model.embed.weight" in reference.state_dict()
    with pytest.raises(ValueError, match=r"how: got \"adapter\", but .*embed\.weight is trained too"):
        rc.EmaReference(policy, how="adapter")
    scaled = peft.get_peft_model(
        Toy(), peft.IA3Config(target_modules=["default"], feedforward_modules=["default"])
    )
    with pytest.raises(ValueError, match="are \\['IA3'\\], not LoRA"):
        rc.EmaReference(scaled, how="adapter")
    assert rc.EmaReference(scaled, every=1).update(train(scaled, 1), 1)


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # by peft itself
def test_the_scorer_scores_with_the_adapter() -> None:
    policy = lora(text_model("Llama"), target_modules=["q_proj", "v_proj"]).eval()
    reference = rc.EmaReference(policy, decay=0.0, every=1)
    scorer = rc.Scorer(reference.model)
    prompt, answers = [text_prompt(5)], [[[7, 8], [9]]]

    def logps() -> Tensor:
        with torch.no_grad():
            return torch.cat([stats.logp for stats in scorer.token_stats(prompt, answers)[0]])

    start = logps()
    train(policy, 1)
    moved = logps()
    with reference.active():
        assert_exact(logps(), start, name="start")
    reference.update(policy, 1)
    with reference.active():
        assert_exact(logps(), moved, name="followed")
    assert not moved.equal(start)
