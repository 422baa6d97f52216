"""A run under FSDP2 on 2 processes goes on there bit for bit, and on 1 process with the same weights."""

from __future__ import annotations

import random
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch import multiprocessing as mp

import raise_core as rc
from raise_core.reference_store import reshard
from raise_trainer.checkpoints import Checkpoints, SaveFailed, StepGuard, TrainingState, graceful_stop, ranks
from tests.budget import assert_exact
from tests.tiny_models import text_model

WORLD = 2


def build(sharded: bool, kind: str) -> TrainingState:
    """A tied model of which some rows divide by no 2; bf16 or with a LoRA adapter where asked."""
    rank = ranks.rank()
    torch.manual_seed(rank)
    random.seed(rank)
    np.random.seed(rank)
    model = text_model("Llama", vocab_size=201, tie_word_embeddings=kind != "adapter", attention_dropout=0.2)
    layers = model.model.layers
    if kind == "bf16":
        model = model.bfloat16()
    if kind == "adapter":
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=["q_proj"]))
    if sharded:
        from torch.distributed.fsdp import fully_shard

        for part in (*layers, model):
            fully_shard(part)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    how = {"adapter": {"how": "swap"}, "fp32": {"offload": "cpu"}, "bf16": {}}[kind]
    reference = rc.EmaReference(model, every=1, decay=0.9, **how)  # type: ignore[arg-type]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    streams = {"data": random.Random(3), "own": torch.Generator().manual_seed(rank)}
    return TrainingState(model, optimizer, schedule, reference, generators=streams, config={"a": 1})


def go_on(state: TrainingState, steps: int) -> list[Any]:
    seen = []
    for _ in range(steps):
        first = state.generators["data"].randrange(100)  # type: ignore[union-attr]
        own = torch.randint(2, 100, (2, 4), generator=state.generators["own"])  # type: ignore[arg-type]
        ids = (own + first + ranks.rank()) % 190
        loss = state.model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.scheduler.step()  # type: ignore[union-attr]
        state.step += 1
        assert state.reference is not None
        state.reference.update(state.model, state.step)
        with state.reference.active() as scored:
            score = scored(input_ids=ids, labels=ids).loss.item()
        seen.append((loss.item(), score, first, random.random(), np.random.rand()))
    return seen


def everything(state: TrainingState) -> dict[str, Tensor]:
    """Weights, optimizer and reference, whole: the same names with and without shards."""
    from raise_trainer.checkpoints.optimizer_state import optimizer_tree, reference_tree
    from raise_trainer.checkpoints.trees import flatten

    reshard(state.model)
    assert state.reference is not None
    tree = {
        "model": dict(state.model.named_parameters()),
        "optimizer": optimizer_tree(state.model, state.optimizer),
        "reference": reference_tree(state.reference),
    }
    return {name: ranks.whole(tensor).clone() for name, tensor in flatten(tree)[1].items()}


def assert_same(got: TrainingState, wanted: dict[str, Tensor]) -> None:
    state = everything(got)
    assert state.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert_exact(state[name], tensor, name=name)


def check_resume(kind: str, place: Path) -> None:
    """Save on 2, go on, resume on 2: equal. Rank 1 has no such folder, so it reads nothing."""
    state = build(True, kind)
    go_on(state, 2)
    hidden = place if dist.get_rank() == 0 else Path("/nowhere")
    Checkpoints(hidden).save(state, 2)
    saved = everything(state)
    if dist.get_rank() == 0:
        torch.save(saved, place / "saved.pt")
    wanted = go_on(state, 3)
    other = build(True, kind)
    go_on(other, 1)
    resumed = Checkpoints(hidden).resume(other)
    assert resumed is not None and resumed.step == 2
    assert_same(other, saved)
    assert go_on(other, 3) == wanted
    assert_same(other, everything(state))


def check_from_one(place: Path, saved: dict[str, Tensor]) -> None:
    """What 1 process without shards saved, 2 with shards read; only the shared stream is the same on both."""
    state = build(True, "bf16")
    Checkpoints(place).resume(state)
    assert_same(state, saved)
    draws = [random.random(), np.random.rand(), torch.rand(()).item()]
    everyone = ranks.gather((draws, state.generators["data"].random()))
    assert all(a != b for a, b in zip(everyone[0][0], everyone[1][0], strict=True))
    assert everyone[0][1] == everyone[1][1]
    Checkpoints(place).resume(state)
    assert [random.random(), np.random.rand(), torch.rand(()).item()] == draws


def check_failures(place: Path) -> None:
    """A failure on rank 0 is every rank's, and none waits; one rank's signal or NaN is every rank's."""
    import os
    import signal

    state = build(True, "bf16")
    checkpoints = Checkpoints(place)
    before = checkpoints.latest()
    if dist.get_rank() == 0:
        import raise_trainer.checkpoints.files as files

        original = files.Writer._open
        files.Writer._open = broken  # type: ignore[method-assign,assignment]
    with pytest.raises(SaveFailed, match=r"No space left on device; it needs about \d+ bytes"):
        checkpoints.save(state, 9)
    if dist.get_rank() == 0:
        files.Writer._open = original  # type: ignore[method-assign]
    assert checkpoints.latest() == before
    state.counters["tokens"] = dist.get_rank()
    with pytest.raises(ValueError, match="state: counters differ between the processes"):
        checkpoints.save(state, 9)
    assert checkpoints.latest() == before
    with graceful_stop() as stop:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed() and stop.asked == (dist.get_rank() == 1)
    said: list[str] = []
    guard = StepGuard(place / "bad", say=said.append)
    assert not guard.good(1, loss=float("nan") if dist.get_rank() == 1 else 0.0)
    dist.barrier()
    assert [path.name for path in (place / "bad").iterdir()] == ["bad-step-1-rank-1"] and len(said) == 1
    with pytest.raises(ValueError, match="has 1 parameter groups, but 2"):
        ranks.share(lambda: (_ for _ in ()).throw(ValueError("has 1 parameter groups, but 2")))


def broken(self: Any, name: str) -> Any:
    import errno
    import os

    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=120),
    )
    try:
        for kind in ("bf16", "fp32", "adapter"):
            place = Path(folder) / kind
            place.mkdir(exist_ok=True)
            check_resume(kind, place)
        one = Path(folder) / "one"
        check_from_one(one, torch.load(one / "saved.pt"))
        check_failures(one)
        dist.barrier()  # a process that closes while another still connects takes it down
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_on_two_processes_and_from_and_to_one(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    alone = build(False, "bf16")
    go_on(alone, 2)
    Checkpoints(tmp_path / "one").save(alone, 2)
    torch.save(everything(alone), tmp_path / "one/saved.pt")
    mp.spawn(work, args=(str(tmp_path),), nprocs=WORLD)
    for kind in ("bf16", "fp32", "adapter"):
        other = build(False, kind)
        go_on(other, 1)
        resumed = Checkpoints(tmp_path / kind).resume(other)
        assert resumed is not None and resumed.step == 2
        assert_same(other, torch.load(tmp_path / kind / "saved.pt"))
        go_on(other, 1)
    from transformers import AutoModelForCausalLM

    place = tmp_path / "fp32/save-00001-step-2/model"
    loaded = AutoModelForCausalLM.from_pretrained(place)
    wanted = torch.load(tmp_path / "fp32/saved.pt")
    for name, weight in loaded.named_parameters():
        assert_exact(weight.detach(), wanted[f"model/{name}"], name=name)
