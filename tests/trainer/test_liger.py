"""Liger on one model object: a stand-in for the package, which patches families as the real one does."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers.models.llama import modeling_llama

from raise_trainer import liger
from raise_trainer.errors import UserError
from tests.tiny_models import text_model, text_prompt


def stand_in(monkeypatch: pytest.MonkeyPatch, calls: list[dict[str, Any]], fault: str = "") -> None:
    class Norm(torch.nn.Module):
        pass

    def apply(rms_norm: bool = False, rope: bool = True, swiglu: bool = False, model: Any = None) -> None:
        calls.append({"rms_norm": rms_norm, "rope": rope, "swiglu": swiglu, "model": model})
        if fault:
            raise ImportError(fault)
        modeling_llama.LlamaRMSNorm = Norm
        model.model.norm.forward = lambda hidden: hidden

    for name in ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.monkey_patch"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    patches: Any = sys.modules["liger_kernel.transformers.monkey_patch"]
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": apply}


def test_one_model_is_changed_and_its_family_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    stand_in(monkeypatch, calls)
    norm, ids = modeling_llama.LlamaRMSNorm, text_prompt(5)["input_ids"]
    model, other = text_model("Llama"), text_model("Llama")
    want = other(input_ids=ids).logits
    liger.use_liger(model)
    assert calls == [{"rms_norm": True, "rope": False, "swiglu": True, "model": model}]
    assert not torch.equal(model(input_ids=ids).logits, want)
    assert modeling_llama.LlamaRMSNorm is norm
    assert torch.equal(other(input_ids=ids).logits, want)
    assert torch.equal(text_model("Llama")(input_ids=ids).logits, want)


def test_what_cannot_be_had_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, [], fault="cannot import name 'X'")
    with pytest.raises(UserError, match=r"nothing for 'qwen3'.*pip install -U liger-kernel"):
        liger.use_liger(text_model("Qwen3"))
    norm = modeling_llama.LlamaRMSNorm
    with pytest.raises(
        UserError, match=r"does not fit this transformers for 'llama' \(cannot import name 'X'\)"
    ):
        liger.use_liger(text_model("Llama"))
    assert modeling_llama.LlamaRMSNorm is norm
    monkeypatch.setattr(liger, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="liger-kernel is not installed: pip install liger-kernel"):
        liger.check_liger()
