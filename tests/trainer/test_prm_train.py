"""A tiny process reward model learns good steps from bad, is saved, resumed, and scores a file."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import raise_core as rc
from raise_core.chain import StepTokens
from raise_trainer import cli, tiny
from raise_trainer.chain_tokens import add_chain_tokens
from raise_trainer.data import Row
from raise_trainer.errors import BadRow, UserError
from raise_trainer.prm.chains import tagged_row
from raise_trainer.prm.score import Agreement, score_rows
from raise_trainer.prm.tokens import save_with_tokens
from raise_trainer.prm.train import prm_step, run_prm
from raise_trainer.rows import parse_row
from raise_trainer.train_config import TrainConfig, check
from raise_trainer.world import COLOURS
from tests.budget import (
    assert_as_exact_as_fp32,
    assert_equal_but_for_roundings,
    assert_within_error_budget,
)

COLOUR_NAMES = sorted(COLOURS)[:4]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def toy(number: int, rng: random.Random) -> dict[str, Any]:
    """A step is good where it says the colour that the problem names."""
    colour = rng.choice(COLOUR_NAMES)
    said = [colour if rng.random() < 0.5 else rng.choice(COLOUR_NAMES) for _ in range(3)]
    labels: list[Any] = ["good" if word == colour else "bad" for word in said]
    return {
        "problem_id": f"toy {number}",
        "problem": f" {colour}",
        "data_type": "text",
        "problem_type": "free-form",
        "solution": f"<answer>{colour}</answer>",
        "steps": [f" {word}" for word in said],
        "labels": labels,
    }


def rows(seed: int, count: int) -> list[Row]:
    rng = random.Random(seed)
    return [parse_row(i, toy(i, rng), Path(".")) for i in range(count)]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prm")
    processor = tiny.build_processor()
    model = tiny.build_model(processor, seed=0)
    model.save_pretrained(folder / "bare")
    processor.save_pretrained(folder / "bare")
    made = save_with_tokens(str(folder / "bare"), folder / "model")
    assert len(made.new) == 17
    return folder


def config(start: Path, **other: Any) -> TrainConfig:
    given = {
        "model": str(start / "model"), "out": start / "out", "dtype": "float32", "template": "plain",
        "gradient_checkpointing": False, "freeze_vision": True, "steps": 6, "prompts": 8, "save_every": 3,
        "lr": 1e-3, "workers": 0, "max_new_tokens": 200,
    }  # fmt: skip
    return check(given | other)


def test_it_learns_to_tell_good_steps_from_bad() -> None:
    processor = tiny.build_processor()
    model = tiny.build_model(processor, seed=0)
    tokenizer = processor.tokenizer
    add_chain_tokens(model, tokenizer)
    scorer = rc.StepScorer(rc.Scorer(model), tokenizer)
    tokens = StepTokens.of(tokenizer)

    def prompt(row: Row) -> dict[str, Any]:
        return {"input_ids": tokenizer(row.problem, return_tensors="pt")["input_ids"]}

    def judged(some: list[Row]) -> float:
        seen = Agreement()
        for row in some:
            chain, labels = tagged_row(row, tokenizer, tokens)
            with torch.no_grad():
                margins = scorer.margins([prompt(row)], [[chain]])
            seen.saw(torch.sigmoid(margins).tolist(), labels)
        return seen.right / seen.tags

    held_out, before = rows(99, 40), judged(rows(99, 40))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    figures = {}
    for step in range(60):
        some = rows(1000 + step, 16)
        figures = prm_step(
            scorer, optimizer, [prompt(r) for r in some], [tagged_row(r, tokenizer, tokens) for r in some]
        )
    assert before < 0.75 and judged(held_out) > 0.95
    assert figures["good_score"] > 0.8 > 0.2 > figures["bad_score"] and figures["step_accuracy"] > 0.9


def test_a_step_by_hand_and_in_pieces() -> None:
    """The loss is that of the formula, and the gradients of micro-batches add up to the whole step's."""
    processor = tiny.build_processor()
    tokenizer, one = processor.tokenizer, tiny.build_model(processor, seed=0)
    add_chain_tokens(one, tokenizer)
    some, found = rows(5, 6), list[torch.Tensor]()
    for micro, dtype in ((1 << 20, torch.float64), (1 << 20, torch.float32), (1, torch.float32)):
        model = copy.deepcopy(one).to(dtype)
        scorer = rc.StepScorer(rc.Scorer(model), tokenizer)
        inputs = [{"input_ids": tokenizer(r.problem, return_tensors="pt")["input_ids"]} for r in some]
        labelled = [tagged_row(r, tokenizer, scorer.tokens) for r in some]
        with torch.no_grad():
            d = scorer.margins(inputs, [[chain] for chain, _ in labelled])
        y = torch.tensor([t for _, targets in labelled for t in targets], dtype=d.dtype)
        want = torch.nn.functional.binary_cross_entropy_with_logits(d, y) * 2
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        figures = prm_step(scorer, optimizer, inputs, labelled, micro_tokens=micro)
        assert_as_exact_as_fp32(figures["loss"], float(want), name="loss")
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    oracle, peer, got = found
    assert_within_error_budget(got, oracle, peer, name="gradient")


def test_neutral_steps_draw_the_score_to_a_half() -> None:
    margins = torch.tensor([2.0, -3.0], dtype=torch.float64, requires_grad=True)
    half = torch.full((2,), 0.5, dtype=torch.float64)
    (slope,) = torch.autograd.grad(rc.step_loss(margins, half, 2), margins)
    # d/dd of -2 / 2 * [log s + log(1 - s)] / 2 = s - 1/2
    assert_equal_but_for_roundings(slope, torch.sigmoid(margins.detach()) - 0.5, name="neutral")
    (slope,) = torch.autograd.grad(rc.step_loss(margins, torch.ones(2).double(), 1), margins)
    assert_equal_but_for_roundings(slope, -2 * torch.sigmoid(-margins.detach()), name="good")
    far = torch.tensor([-200.0], requires_grad=True)
    loss = rc.step_loss(far, torch.ones(1), 1)
    assert loss == 400.0 and torch.autograd.grad(loss, far)[0] == -2.0
    with pytest.raises(ValueError, match=r"targets\[0\]: got 1.5"):
        rc.step_loss(far, torch.tensor([1.5]), 1)
    with pytest.raises(ValueError, match="wanted the same"):
        rc.step_loss(far, torch.ones(2), 1)


def written(file: Path, some: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    return file


def test_a_run_that_goes_on_and_leaves_bad_rows_out(start: Path) -> None:
    rng = random.Random(3)
    given = [toy(i, rng) for i in range(20)]
    given[4]["labels"] = []
    given[7]["steps"][0] = "<|reasoning_end|>"
    given[9]["steps"][0] = " red" * 300
    data = written(start / "rows.jsonl", given)
    whole = run_prm(config(start, data=data, out=start / "whole"))
    run_prm(config(start, data=data, out=start / "part", steps=3))
    part = run_prm(config(start, data=data, out=start / "part", steps=6))
    kept = [line for line in (whole / "metrics.jsonl").read_text().splitlines() if '"train"' in line]
    assert len(kept) == 6
    # the learning rate of the shorter run is another, so only what does not depend on it is the same
    lines = [json.loads(x) for x in (part / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == list(range(6)) and all("step_accuracy" in x for x in lines)
    assert (part / "config.yaml").read_text().startswith("# raise-core prm")
    bad = [json.loads(x)["reason"] for x in (whole / "quarantine.jsonl").read_text().splitlines()]
    assert {True} == {
        any(w in text for w in ("no `labels`", "remove it", "max_new_tokens is 200")) for text in bad
    }
    assert len(set(bad)) == 3


def test_scores_of_a_file(start: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    rng = random.Random(8)
    given = [toy(i, rng) | {"answer": COLOUR_NAMES[0]} for i in range(5)]
    given[1]["steps"] = []
    given[1]["labels"] = []
    given[2]["steps"][0] = " red" * 600
    data = written(start / "scored.jsonl", given)
    argv = ["raise-core", "prm", "score", str(data), f"model={start / 'model'}", "dtype=float32",
            "template=plain", "prompts=2", "workers=0"]  # fmt: skip
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    said = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "row toy 1: no `steps`" in said and "context has 512" in said and "3 of 5 chains" in said
    lines = [json.loads(x) for x in (start / "scored.scores.jsonl").read_text().splitlines()]
    assert [x["row"] for x in lines] == [0, 3, 4]
    for x in lines:
        assert len(x["step_scores"]) == 3 and 0 < x["answer_score"] < 1
        want = 0.2 * sum(x["step_scores"]) / 3 + 0.8 * x["answer_score"]
        assert_as_exact_as_fp32(x["reward"], want, name="reward")
    with pytest.raises(UserError, match="row toy 1: no `steps`"):
        score_rows(config(start, data=data, on_bad_media="fail"), out=start / "none.jsonl")
    with pytest.raises(UserError, match="is a file of rows"):
        score_rows(config(start, data=data), out=data)


def test_scores_that_are_not_finite_are_left_out_by_row(start: Path, monkeypatch: Any) -> None:
    real, data = (
        rc.StepScorer.margins,
        written(start / "odd.jsonl", [toy(i, random.Random(i)) for i in (0, 1)]),
    )

    def overflown(self: Any, *args: Any) -> torch.Tensor:
        """As half precision may: the second of six tags has no result."""
        return real(self, *args).index_fill(0, torch.tensor([1]), math.nan)

    monkeypatch.setattr(rc.StepScorer, "margins", overflown)
    out = start / "new" / "folder" / "scores.jsonl"
    found = score_rows(config(start, data=data), out=out)
    assert [json.loads(line)["row"] for line in out.read_text().splitlines()] == [1] and found.tags == 3
    (said,) = found.left_out
    assert said.startswith("row toy 0: a score is not finite")
    with pytest.raises(UserError, match="row toy 0: a score is not finite"):
        score_rows(config(start, data=data, on_bad_media="fail"), out=out)


def test_a_model_without_the_tokens_is_refused_with_the_command(start: Path) -> None:
    data = written(start / "few.jsonl", [toy(0, random.Random(0))])
    with pytest.raises(UserError, match="raise-core prm tokens MODEL FOLDER"):
        run_prm(config(start, data=data, model=str(start / "bare"), out=start / "no"))
    with pytest.raises(UserError, match="holds files already"):
        save_with_tokens(str(start / "bare"), start / "model")
    with pytest.raises(UserError, match="eval_data"):
        run_prm(config(start, data=data, eval_data=data, out=start / "no2"))


def test_the_commands(start: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    data = written(start / "train.jsonl", [toy(i, random.Random(i)) for i in range(4)])
    pairs = [f"model={start / 'via'}", f"data={data}", f"out={start / 'cli'}", "dtype=float32", "steps=1",
             "prompts=2", "workers=0", "template=plain", "max_new_tokens=200"]  # fmt: skip
    said = []
    for arguments in (
        ["tokens", str(start / "bare"), str(start / "via")],
        ["train", *pairs],
        ["train", "--print-config", *pairs],
        ["--help"],
    ):
        monkeypatch.setattr("sys.argv", ["raise-core", "prm", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 0
        said.append(capsys.readouterr().out)
    assert "17 tokens added" in said[0] and "steps: 1\n" in said[2] and "label steps" in said[3]
    assert json.loads((start / "cli" / "metrics.jsonl").read_text())["loss"] > 0


def test_agreement_counts_what_is_not_neutral() -> None:
    seen = Agreement()
    seen.saw([0.9, 0.2, 0.7, 0.5, 0.1], [1.0, 1.0, 0.5, 0.0, 0.25])
    assert (seen.right, seen.tags) == (2, 4)


BASE = toy(0, random.Random(0))


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"steps": [{"name": "a"}]}, r"row toy 0: steps\[0\] is"),
        ({"steps": [" "]}, r"steps\[0\]"),
        ({"steps": 5}, r"steps\[0\] is '5'"),
        ({"labels": ["good"]}, "1 labels for 3 steps, expected 3$"),
        ({"labels": ["good"] * 4}, "4 labels for 3 steps"),
        ({"labels": ["good"] * 2, "answer": "x"}, "expected 3, or 4 with the answer's"),
        ({"labels": ["good", "fine", "bad"]}, r"labels\[1\] is 'fine'"),
        ({"labels": [1, 2, 0]}, r"labels\[1\] is 2"),
        ({"labels": [True, 1, 0]}, r"labels\[0\] is True"),
        ({"labels": "good"}, "str labels"),
        ({"answer": 4}, "`answer` is int"),
    ],
)
def test_wrong_steps_and_labels_are_refused_by_row(changed: dict[str, Any], match: str) -> None:
    with pytest.raises(BadRow, match=match):
        parse_row(0, BASE | changed, Path("."))


def test_rows_with_steps() -> None:
    given = BASE | {
        "steps": ["a", {"name": "n", "thought": "t"}],
        "labels": ["neutral", 0.25, 1],
        "answer": "b ",
    }
    row = parse_row(0, given, Path("."))
    assert row.steps == (rc.Step("", "a"), rc.Step("n", "t")) and row.labels == (0.5, 0.25, 1.0)
    tokenizer = tiny.build_processor().tokenizer
    add_chain_tokens(tiny.build_model(tiny.build_processor(), seed=0), tokenizer)
    chain, targets = tagged_row(row, tokenizer, StepTokens.of(tokenizer))
    assert len(chain.positions) == 3 and targets == row.labels
    unanswered = parse_row(0, given | {"labels": ["neutral", 0.25]}, Path("."))
    chain, targets = tagged_row(unanswered, tokenizer, StepTokens.of(tokenizer))
    assert len(chain.positions) == 2 and targets == (0.5, 0.25)
    with pytest.raises(BadRow, match="no `labels`"):
        tagged_row(parse_row(0, given | {"labels": []}, Path(".")), tokenizer, StepTokens.of(tokenizer))
