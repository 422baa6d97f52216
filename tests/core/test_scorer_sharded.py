"""Scoring and the policy update of a model under FSDP2, 2 processes: as without shards, and still packed."""

from __future__ import annotations

import copy
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch import multiprocessing as mp

import raise_core as rc
from tests.budget import assert_within_error_budget, no_better_than
from tests.tiny_models import completions, media_prompt, text_model, text_prompt, vision_model

WORLD = 2
Gradients = dict[str, Tensor]


def build(family: str, **options: Any) -> tuple[Any, list[Any], list[Any]]:
    if family == "Qwen2_5_VL":
        model = vision_model(family)
        prompts = [media_prompt(model, [(6, 4, 4)]), text_prompt(7)]
    else:
        model, prompts = text_model(family, **options), [text_prompt(8), text_prompt(5, 3)]
    return model, prompts, [completions([4, 1, 0, 6], seed=i) for i in range(len(prompts))]


def shard(model: Any, parts: str, **options: Any) -> Any:
    """fully_shard of some parts, in this order: layers, embedding, head, vision tower, inner model, root."""
    from torch.distributed.fsdp import fully_shard

    text = getattr(model.model, "language_model", model.model)
    for part in parts.split():
        named = {
            "layers": lambda: list(text.layers),
            "embedding": lambda: [text.embed_tokens],
            "tied": lambda: [[text.embed_tokens, model.lm_head]],
            "norm": lambda: [text.norm],
            "head": lambda: [model.lm_head],
            "tower": lambda: [model.model.visual],
            "inner": lambda: [model.model],
            "root": lambda: [model],
        }
        for module in named[part]():
            fully_shard(module, **options)
    return model


def step(scorer: rc.Scorer, prompts: list[Any], found: list[Any]) -> Tensor:
    """The policy loss of a group, on-policy."""
    rows = scorer.completion_rows(prompts, found)
    advantage = torch.linspace(-1, 1, len(rows.offsets) - 1, dtype=rows.hidden.dtype)
    options = scorer.head().options()
    size = {"num_tokens": len(rows.targets), "num_sequences": len(advantage)}
    return rc.linear_policy_loss(
        rows.hidden, options.pop("weight"), rows.targets, None, advantage, rows.offsets, **size, **options
    ).loss


def plain_step(model: Any, prompts: list[Any], found: list[Any]) -> Gradients:
    """The same by separate passes and whole logits."""
    scorer = rc.Scorer(model, packing="plain", self_check=False)
    rows = scorer.completion_rows(prompts, found)
    advantage = torch.linspace(-1, 1, len(rows.offsets) - 1, dtype=rows.hidden.dtype)
    logp = torch.log_softmax(rows.hidden @ scorer.head().weight.T, -1).gather(1, rows.targets[:, None])[:, 0]
    size = {"num_tokens": len(rows.targets), "num_sequences": len(advantage)}
    rc.policy_loss(logp, logp.detach(), advantage, rows.offsets, **size).loss.backward()
    return gradients(model)


def gradients(model: Any) -> Gradients:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in found.items()}


def assert_same(got: Gradients, oracle: Gradients, peer: Gradients, name: str) -> None:
    """As far from fp64 as the unsharded model's separate passes, relative to a weight's size."""
    assert got.keys() == peer.keys() == oracle.keys() and len(got) > 10
    share = max((peer[w] - g).abs().max() / g.abs().max() for w, g in oracle.items() if g.any())
    for weight, want in oracle.items():
        fair = no_better_than(peer[weight], want, share * want.abs().max())
        assert_within_error_budget(got[weight], want, fair, name=f"{name}: {weight}")


WRAPS = [
    ("Llama", "layers", {}),
    ("Llama", "layers root", {}),
    ("Llama", "root", {}),
    ("Llama", "layers embedding norm head root", {}),
    ("Llama", "embedding layers inner root", {}),
    ("Llama", "layers root", {"tie_word_embeddings": True}),
    ("Llama", "tied layers root", {"tie_word_embeddings": True}),
    ("Qwen2_5_VL", "layers tower inner root", {}),
]


def check_wrap(family: str, parts: str, options: dict[str, Any]) -> None:
    model, prompts, found = build(family, **options)
    oracle = plain_step(copy.deepcopy(model).double(), prompts, found)
    peer = plain_step(copy.deepcopy(model), prompts, found)
    net = shard(model, parts)
    packings = [("auto", 1000), ("suffix", 8), *([("plain", 1000)] if "inner" in parts else [])]
    for packing, room in packings:
        scorer = rc.Scorer(net, packing=packing, max_tokens=room)
        loss = step(scorer, prompts, found)
        with torch.no_grad():  # between a forward pass and its backward pass
            scorer.token_stats(prompts, found)
        loss.backward()
        assert set(scorer.plan(prompts, found)) == {packing if packing != "auto" else "packed"}
        name = f"{family} {parts} {packing}"
        assert_same(gradients(net), oracle, peer, name)
        if parts != "layers":
            assert all(hasattr(p, "to_local") for p in net.parameters()), f"{name}: gathered"


def check_mixed_precision() -> None:
    """bf16 layers of fp32 weights: as a bf16 model, packed without a word."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    for parts in ("layers", "layers root"):
        model, prompts, found = build("Llama")
        oracle = plain_step(copy.deepcopy(model).double(), prompts, found)
        peer = plain_step(copy.deepcopy(model).bfloat16(), prompts, found)
        net = shard(model, parts, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        scorer = rc.Scorer(net)
        step(scorer, prompts, found).backward()
        assert scorer.plan(prompts, found) == ["packed"] * len(prompts)
        got = gradients(net)
        assert {g.dtype for g in got.values()} == {torch.float32}
        assert_same(got, oracle, {name: g.float() for name, g in peer.items()}, f"bf16 {parts}")


def check_autocast() -> None:
    """The self-check and scoring have no gradient: what autocast cast for them must not be used again."""
    model, prompts, found = build("Llama")
    oracle = plain_step(copy.deepcopy(model).double(), prompts, found)
    peer = plain_step(copy.deepcopy(model).bfloat16(), prompts, found)
    for scored in (False, True):
        net = shard(copy.deepcopy(model), "layers root")
        scorer = rc.Scorer(net, self_check=not scored)
        with torch.autocast("cpu", torch.bfloat16):
            if scored:
                with torch.no_grad():
                    scorer.token_stats(prompts, found)
            loss = step(scorer, prompts, found)
        loss.backward()
        assert_same(gradients(net), oracle, {name: g.float() for name, g in peer.items()}, "autocast")


def check_refused() -> None:
    for parts, match in (
        ("layers inner", "decoder under fully_shard together with its embedding.*wrapped first"),
        ("layers head", r"head under fully_shard by itself.*fully_shard\(model\)"),
    ):
        model, prompts, found = build("Llama")
        scorer = rc.Scorer(shard(model, parts))
        with pytest.raises(ValueError, match=match):
            scorer.token_stats(prompts, found)


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error", UserWarning)
    warnings.simplefilter("error", RuntimeWarning)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=60),
    )
    try:
        for wrap in WRAPS:
            check_wrap(*wrap)
        check_mixed_precision()
        check_autocast()
        check_refused()
        dist.barrier()  # a process that closes while another still connects takes it down
    finally:
        dist.destroy_process_group()


def test_as_without_shards(tmp_path: Path) -> None:
    mp.spawn(work, args=(str(tmp_path),), nprocs=WORLD)
