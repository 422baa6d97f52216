"""Preference rounds on a tiny model: pairs, the step, a whole run that is stopped and goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

import raise_core as rc
from raise_trainer import cli, tiny
from raise_trainer.chain_judge import Judged
from raise_trainer.dpo.config import DpoConfig, load_dpo_config
from raise_trainer.dpo.paths import round_rows
from raise_trainer.dpo.run import run_dpo, training_of
from raise_trainer.dpo.step import Pair, best_and_worst, dpo_step
from raise_trainer.errors import UserError
from raise_trainer.models import load_policy
from tests.budget import assert_as_exact_as_fp32, assert_within_error_budget, close_to
from tests.tiny_models import text_model
from tests.trainer import chain_world


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def judged(reward: float, answered: bool = True) -> Judged:
    return Judged(rc.StepScores((reward,), reward if answered else None, (3,)), reward)


def test_best_and_worst() -> None:
    ids = [[1], [2], [3], []]
    scores = [judged(0.5), judged(0.9, answered=False), judged(0.75), judged(0.0)]
    assert best_and_worst(ids, scores, 0.1) == (2, 0)  # only an answer is chosen, an empty path is no path
    assert best_and_worst(ids, scores, 0.25) == (2, 0)
    assert best_and_worst(ids, scores, 0.5) is None
    assert best_and_worst(ids[:2], [judged(0.4)] * 2, 0.0) is None
    assert best_and_worst(ids[:1], [judged(0.4, answered=False)], 0.0) is None
    assert best_and_worst([[1], [1]], [judged(0.4), judged(0.40001)], 0.0) is None
    unread = Judged(rc.StepScores((), None, ()), 0.0, fits=False)  # beyond the PRM's context
    assert best_and_worst(ids[:3], [judged(0.5), unread, judged(0.75)], 0.1) == (2, 0)
    assert best_and_worst(ids[:2], [judged(0.5), unread], 0.1) is None


def logps(model: Any, pair: Pair) -> list[float]:
    (found,) = rc.Scorer(model).token_stats([pair.inputs], [pair.completions])
    return [s.logp.sum().item() for s in found if s.logp is not None]


def test_a_step_prefers_the_chosen_one() -> None:
    model = text_model("Llama").train()
    inputs = {"input_ids": torch.tensor([[3, 4, 5]])}
    pair = Pair(inputs, [7, 8, 9], [7, 10])
    reference = rc.FrozenReference(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    before = logps(model, pair)
    scorer, confidant = rc.Scorer(model), rc.Scorer(reference.model)

    def step(**other: Any) -> dict[str, float]:
        given = {"beta": 0.1, "nll_weight": 0.0} | other
        return dpo_step(scorer, confidant, reference, optimizer, [pair, pair], **given)

    first = step()
    assert_as_exact_as_fp32(first["loss"], 0.6931471805599453, name="at the reference")
    assert first["accuracy"] == 0.0 and first["margin"] == 0.0
    after = logps(model, pair)
    assert after[0] - after[1] > before[0] - before[1]
    second = step(nll_weight=1.0, micro_tokens=1)
    assert second["margin"] > 0 and second["accuracy"] == 1.0
    assert_as_exact_as_fp32(second["nll"], -after[0] / 3, name="per token")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chain_world.make(tmp_path_factory.mktemp("dpo"))


def config(world: Path, out: Path, **other: Any) -> DpoConfig:
    given: dict[str, Any] = {
        "model": str(world / "model"), "prm": str(world / "prm"), "data": str(world / "data.json"),
        "out": out, "rounds": 2, "paths": 4, "min_gap": 0.0, "pairs": 2, "lr": 1e-4, "dtype": "float32",
        "template": "plain", "max_new_tokens": chain_world.LONGEST, "prompts": 4, "workers": 0,
        "gradient_checkpointing": False, "save_every": 1,
    }  # fmt: skip
    return DpoConfig(**(given | other))


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_run_is_stopped_and_goes_on(world: Path, tmp_path: Path, capsys: Any) -> None:
    whole = run_dpo(config(world, tmp_path / "whole"))
    assert whole is not None and (whole / "model.safetensors").is_file()
    first = tmp_path / "whole/round-1"
    paths, counts = lines(first / "paths.jsonl"), json.loads((first / "pairs.json").read_text())
    assert [p["row"] for p in paths] == list(range(6)) and counts["questions"] == 6
    pairs = lines(first / "pairs-0.jsonl")
    assert counts["pairs"] == len(pairs) > 0
    for pair in pairs:
        (path,) = [p for p in paths if p["problem_id"] == pair["problem_id"]]
        assert len(path["rewards"]) == 4
        assert path["rewards"][path["best"]] == max(
            r for r, a in zip(path["rewards"], path["answer_scores"], strict=True) if a is not None
        )
        assert pair["gap"] == path["rewards"][path["best"]] - min(path["rewards"]) > 0
    assert "pairs of 6 questions" in capsys.readouterr().out

    # Killed while sampling the first round, once more before its training was done, and moved.
    again = config(world, tmp_path / "again", rounds=1)
    run_dpo(again)
    part = tmp_path / "again/round-1"
    (part / "pairs.json").unlink()
    (part / "pairs-0.jsonl").unlink()
    text = (part / "paths.jsonl").read_text().splitlines(keepends=True)
    (part / "paths.jsonl").write_text("".join(text[:3]) + text[3][:20])
    for kept in sorted((part / "train/checkpoints").iterdir())[1:]:
        shutil.rmtree(kept)
    shutil.move(tmp_path / "again", tmp_path / "moved")
    part = tmp_path / "moved/round-1"
    more = run_dpo(config(world, tmp_path / "moved"))
    assert more is not None and "goes on after step 2 from" in capsys.readouterr().out
    assert (part / "pairs-0.jsonl").read_bytes() == (first / "pairs-0.jsonl").read_bytes()
    assert (more / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_rows_of_two_files_may_share_an_id(world: Path, tmp_path: Path, monkeypatch: Any) -> None:
    for name, numbers in (("a", (0, 1)), ("b", (2, 3))):
        rows = [chain_world.question(n) for n in numbers]
        for row in rows:
            del row["problem_id"]  # then it is the row's number in its file
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    seen = list[tuple[list[int], list[int], list[int]]]()

    def step(*given: Any, **other: Any) -> dict[str, float]:
        seen.extend((p.inputs["input_ids"].flatten().tolist(), p.chosen, p.rejected) for p in given[4])
        return dpo_step(*given, **other)

    monkeypatch.setattr("raise_trainer.dpo.run.dpo_step", step)
    both = tuple(str(tmp_path / f"{name}.json") for name in "ab")
    assert run_dpo(config(world, tmp_path / "out", data=both, rounds=1)) is not None
    made = [p for i in (0, 1) for p in lines(tmp_path / f"out/round-1/pairs-{i}.jsonl")]
    assert [p["problem_id"] for p in made] == [0, 1, 0, 1]
    assert {(tuple(c), tuple(r)) for _, c, r in seen} == {
        (tuple(p["chosen"]), tuple(p["rejected"])) for p in made
    }
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    for prompt, chosen, _ in seen:
        (row,) = [p for p in made if p["problem"] in tokenizer.decode(prompt)]
        assert row["chosen"] == chosen


def test_rounds_of_adapters(world: Path, tmp_path: Path) -> None:
    out = run_dpo(config(world, tmp_path / "out", lora_rank=2, start="last", lr=1e-2))
    assert out is not None and not (out / "model.safetensors").exists()
    (first,) = (tmp_path / "out/round-1/train/checkpoints").glob("*-step-3")
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        first / "model"
    )  # the second round began where the first one ended
    name = "layers.0.self_attn.q_proj"

    def stored(file: Path, end: str) -> torch.Tensor:
        (found,) = [x.double() for n, x in load_file(file).items() if n.endswith(end) and "visual" not in n]
        return found

    want = stored(world / "model/model.safetensors", f"{name}.weight")
    for folder in (first / "model", out):
        a, b = (stored(folder / "adapter_model.safetensors", f"{name}.lora_{x}.weight") for x in "AB")
        assert b.any()
        want = want + 2.0 * b @ a  # lora_alpha is twice the rank
    training = config(world, tmp_path).training(model=str(out))
    found = load_policy(training, torch.device("cpu")).model
    assert all(p.requires_grad for p in found.model.language_model.parameters())
    got = found.get_submodule(f"model.language_model.{name}").weight
    assert_within_error_budget(got, want, close_to(want), name="both rounds' adapters")
    (out / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"adapter_config\.json names no base model"):
        load_policy(training, torch.device("cpu"))


def test_refusals(world: Path, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(UserError, match=r"no pair to learn from; lower min_gap, .* in another `out`"):
        run_dpo(config(world, tmp_path / "wide", min_gap=1.5))
    counts = json.loads((tmp_path / "wide/round-1/pairs.json").read_text())
    assert counts["pairs"] == 0 and counts["close"] + counts["no_answer"] == 6
    with pytest.raises(UserError, match=r"its run has min_gap=1\.5"):
        run_dpo(config(world, tmp_path / "wide"))
    (tmp_path / "bad.json").write_text(json.dumps([{"problem_id": "x7"}, chain_world.question(0)]))
    with pytest.raises(UserError, match=r"2 questions cannot be used .first row x7: .*mend the data"):
        run_dpo(config(world, tmp_path / "bad", data=(str(tmp_path / "bad.json"),), max_new_tokens=10_000))
    said = capsys.readouterr().out
    assert "left out: row x7" in said and "left out: row q0: the prompt has" in said
    with pytest.raises(UserError, match="no path has an answer that the PRM can read; raise max_new_tokens"):
        run_dpo(config(world, tmp_path / "short", max_new_tokens=2))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("x")
    with pytest.raises(UserError, match="holds something that is no run"):
        run_dpo(config(world, tmp_path / "other"))
    with pytest.raises(UserError, match="paths: got 1"):
        load_dpo_config(["model=m", "prm=p", "data=d.json", "out=o", "paths=1"])
    with pytest.raises(UserError, match="did you mean 'min_gap'"):
        load_dpo_config(["model=m", "prm=p", "data=d.json", "out=o", "mingap=1"])


def test_rows_of_a_round(world: Path, tmp_path: Path) -> None:
    some = config(world, tmp_path, rows=4)
    one, two = round_rows(some, 1, 10), round_rows(some, 2, 10)
    assert len(one) == len(two) == 4 and not set(one) & set(two)
    assert round_rows(config(world, tmp_path), 3, 5) == [0, 1, 2, 3, 4]


def test_steps_of_a_round(world: Path, tmp_path: Path) -> None:
    def made(count: int, **other: Any) -> tuple[int, int]:
        training = training_of(config(world, tmp_path, **other), "m", tmp_path, count)
        return training.prompts, training.steps

    (tmp_path / "pairs-0.jsonl").write_text("{}\n")
    assert made(40, pairs=32) == (32, 2) and made(64, pairs=32, epochs=2) == (32, 4)
    assert made(5, pairs=32) == (5, 1) and made(5, pairs=32, epochs=3) == (15, 1)


def test_settings_of_a_folder(world: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no pair"):
        run_dpo(config(world, tmp_path, max_new_tokens=2))
    file = tmp_path / "config.yaml"
    kept = [line for line in file.read_text().splitlines() if not line.startswith("epochs")]
    file.write_text("\n".join(kept))  # as of a version that had no such setting
    with pytest.raises(UserError, match="its run has epochs=1, this one 2"):
        run_dpo(config(world, tmp_path, max_new_tokens=2, epochs=2))
    with pytest.raises(UserError, match="no pair"):
        run_dpo(config(world, tmp_path, max_new_tokens=2))
    file.write_text("model: [")
    with pytest.raises(UserError, match=r"config\.yaml: not YAML"):
        run_dpo(config(world, tmp_path, max_new_tokens=2))


def test_settings_are_printed(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert tiny.CONTEXT > chain_world.LONGEST
    given = ["model=m", "prm=p", "data=d.json", "out=o", "--print-config"]
    assert cli.COMMANDS["dpo"](given) == 0
    assert "min_gap: 0.1" in capsys.readouterr().out
