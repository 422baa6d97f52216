"""GRPO steps under FSDP2, 2 processes: as one process without shards, whatever each of them holds."""

from __future__ import annotations

import os
import warnings
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import distributed as dist
from torch import multiprocessing as mp

import raise_core as rc
from raise_core.scoring.backbone import Backbone
from raise_trainer import grpo as grpo_module
from raise_trainer import tiny
from raise_trainer.checkpoints.optimizer_state import reference_tree
from raise_trainer.checkpoints.ranks import whole
from raise_trainer.data import Row
from raise_trainer.errors import UserError
from raise_trainer.grpo import Grpo
from raise_trainer.method import Method
from raise_trainer.models import _with_lora
from raise_trainer.prompts import Prompt, PromptBuilder
from raise_trainer.rollout import draws
from raise_trainer.sharded import FSDP2, check_launch, shard, sharded
from tests.budget import assert_as_exact_as_fp32
from tests.trainer.test_grpo import parity, questions, write_clips

G, LONGEST, STEPS = 3, 8, 2
LAUNCH = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "false"}
# The first three prompts are videos, the last two text. Whose they are: process 0 has the others.
MIXED, NONE, TEXT = (1, 3), (), (3, 4)
CASES: dict[str, dict[str, Any]] = {
    "unlike numbers of passes, groups cut up": {"second": MIXED, "micro_tokens": 60},
    "one has no prompt": {"second": NONE, "loss": "grpo", "freed": True},
    "one has text alone": {"second": TEXT, "updates": 2, "kl": 0.1, "scale": "batch"},
    "frozen tower, checkpointing": {"second": MIXED, "frozen": True, "checkpointing": True, "freed": True},
    "adapters": {"second": MIXED, "lora": True, "reference": "ema"},
    "no packing": {"second": MIXED, "plain": True},
}


@cache
def rows(folder: Path) -> tuple[Any, list[Prompt]]:
    """A processor; three questions on videos and two without. Once in each process."""
    processor = tiny.build_processor()
    builder = PromptBuilder(processor, frames=8, max_length=400)
    answer = "<answer>1</answer>"
    text = [Row(f"text {i}", f"How many? {i}", "text", "numerical", (), answer, None, "x") for i in range(2)]
    return processor, [*questions(folder, processor)[:3], *(builder(row) for row in text)]


def run(folder: Path, mine: list[int], case: dict[str, Any]) -> dict[str, Any]:
    """Some steps of a random fp64 model on these prompts; its weights, reference and figures after them."""
    grpo_module.score = parity
    if case.get("plain"):
        Backbone._why_plain = lambda self: "its attention is another"  # type: ignore[method-assign]
    other = {k: v for k, v in case.items() if k in {"micro_tokens", "loss", "updates", "kl", "scale"}}
    processor, every = rows(folder)
    tokenizer, figures = processor.tokenizer, []
    model = tiny.build_model(processor, seed=0).double()
    model.model.visual.requires_grad_(not (case.get("frozen") or case.get("lora")))
    if case.get("checkpointing"):
        model.activation_checkpointing_enable({"use_reentrant": False})
    if case.get("lora"):
        torch.manual_seed(0)
        model = _with_lora(model, 2, model.model.visual).double()
    shard(model)
    reference = rc.EmaReference(model, every=1, decay=0.5)
    method = Method(**{"group_size": G, "max_new_tokens": LONGEST, **other})
    grpo = Grpo(
        model, reference, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
        tokenizer, method,
        eos=[tokenizer.eos_token_id], suppress=tokenizer.convert_tokens_to_ids(list(tiny.MEDIA)),
    )  # fmt: skip
    for step in range(STEPS):
        taken = draws(0, [(step, i) for i in mine], G, LONGEST)
        figures.append(grpo.step([every[i] for i in mine], taken, step * method.updates).figures)
    averages = {k: whole(t).clone() for k, t in reference_tree(reference).items() if k.startswith("weight.")}
    weights = {k: whole(p).clone() for k, p in model.named_parameters() if p.requires_grad}
    return {"weights": weights, "averages": averages, "figures": figures}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    try:
        for name, case in CASES.items():
            os.environ |= LAUNCH | {"FSDP_RESHARD_AFTER_FORWARD": str(bool(case.get("freed"))).lower()}
            mine = [i for i in range(5) if (i in case["second"]) == bool(rank)]
            torch.save(run(Path(folder), mine, case), f"{folder}/{name} {rank}.pt")
        dist.barrier()  # a process that closes while another still connects takes it down
    finally:
        dist.destroy_process_group()


def test_two_processes_with_shards_are_one_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpo_module, "score", grpo_module.score)
    monkeypatch.setattr(Backbone, "_why_plain", Backbone._why_plain)
    warnings.simplefilter("ignore")  # what cannot be packed is said
    write_clips(tmp_path)
    mp.spawn(work, args=(str(tmp_path),), nprocs=2)
    for name, case in CASES.items():
        alone = run(tmp_path, list(range(5)), {k: v for k, v in case.items() if k != "micro_tokens"})
        for rank in range(2):
            got = torch.load(tmp_path / f"{name} {rank}.pt", weights_only=True)
            for part in ("weights", "averages"):
                assert got[part].keys() == alone[part].keys()
                for key, weight in alone[part].items():
                    off = float((got[part][key] - weight).abs().max())  # the model's norms are fp32
                    assert_as_exact_as_fp32(off, 0.0, name=f"{name} {rank} {key}")
            for one, both in zip(alone["figures"], got["figures"], strict=True):
                assert one.keys() == both.keys()
                for key, value in one.items():
                    assert_as_exact_as_fp32(both[key], value, name=f"{name} {key}")
        assert max(f["grad_norm"] for f in alone["figures"]) > 0, "nothing was learned: no test"


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, r"DEEPSPEED.*use FSDP2.*fsdp2_8gpu.yaml.*ZeRO-2.*ZeRO-3"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "MEGATRON_LM; use FSDP2"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP version 1, wanted fsdp_version: 2"),
        (LAUNCH | {"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params: true.*wanted false"),
        (LAUNCH | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "each process loads the weights"),
    ],
)
def test_a_launch_that_a_run_cannot_have_is_refused(
    given: dict[str, str], match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", given)
    with pytest.raises(UserError, match=match):
        check_launch()


def test_the_example_launches_what_a_run_can_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its settings under the names that accelerate gives them; one process shares nothing out."""
    given = yaml.safe_load((Path(__file__).resolve().parents[2] / FSDP2).read_text())["fsdp_config"]
    told = {name.upper(): str(value).lower() for name, value in given.items()}
    monkeypatch.setattr(os, "environ", {"ACCELERATE_USE_FSDP": "true"} | told)
    check_launch()
    assert (os.environ["FSDP_VERSION"], os.environ["FSDP_RESHARD_AFTER_FORWARD"]) == ("2", "false")
    assert not sharded(shard(tiny.build_model(tiny.build_processor(), seed=0)))
