"""The demo in steps: its data by hand, and every stage in a run of seconds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import raise_core as rc
from raise_core.chain import STEP_TAG
from raise_trainer import cli, tiny, world
from raise_trainer.chain_tokens import add_chain_tokens
from raise_trainer.demo_prm import Words, own_lesson
from raise_trainer.errors import UserError
from raise_trainer.evaluate import judge
from raise_trainer.prm.chains import chain_text
from raise_trainer.prompts import Prompt
from raise_trainer.rows import Row
from raise_trainer.step_world import (
    CHAINS,
    MISTAKEN,
    PARTS,
    SLIP,
    answer_of,
    judged_steps,
    labels,
    mistaken,
    slipped,
    steps_of,
    supervised,
    write_step_dataset,
)

TRUTH = ("red", "ring", "left")


def test_labels_and_text() -> None:
    said = ("yellow", "ring", "left")
    assert labels(TRUTH, said, said) == [0.0, 1.0, 1.0, 0.0]
    assert labels(TRUTH, said, TRUTH) == [0.0, 1.0, 1.0, 1.0]
    written = supervised(said)
    whole = written["process"] + written["solution"]
    assert whole == chain_text(steps_of(said), answer_of(said))
    chain = rc.parse_chain(whole)
    assert chain.well_formed and [step.thought for step in chain.steps] == [
        "the colour is yellow", "the shape is a ring", "it moves left"
    ]  # fmt: skip
    row = Row(1, "?", "video", "free-form", (), f"<answer>{answer_of(TRUTH)}</answer>", None, "demo/describe")
    assert judge(row, whole)[0] is False and judge(row, supervised(TRUTH)["solution"])[0] is True


def test_a_step_is_good_once() -> None:
    colour, ring, left = steps_of(("yellow", "ring", "left"))
    empty = rc.Step("", "who knows", "")
    assert judged_steps([colour, ring, ring, empty, left], TRUTH) == [
        (False, "red"), (True, "ring"), (False, "ring"), (False, None), (True, "left")
    ]  # fmt: skip
    assert judged_steps([], TRUTH) == []


def test_lessons_of_own_chains() -> None:
    processor = tiny.build_processor()
    tokenizer = processor.tokenizer
    add_chain_tokens(tiny.build_model(processor, seed=0), tokenizer)
    row = Row(1, "?", "video", "free-form", (), f"<answer>{answer_of(TRUTH)}</answer>", None, "demo/describe")
    prompt, words = Prompt(row, {}, None), Words(tokenizer)

    def lesson(text: str) -> Any:
        return own_lesson(prompt, tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer, words)

    def named(one: Any) -> list[tuple[str, str]]:
        return [
            (tokenizer.decode(one.chain.ids[at]).strip(), tokenizer.decode(t).strip()) for at, t in one.true
        ]

    said = supervised(("red", "square", "left"))
    made = lesson(said["process"] + said["solution"])
    assert made.labels == (1.0, 0.0, 1.0, 0.0)  # the answer follows the steps, and is wrong
    assert len(made.chain.positions) == 4
    steps = [(STEP_TAG, word) for word in TRUTH]
    assert named(made) == [*steps, ("red", "red"), ("square", "ring"), ("left", "left")]
    cut = lesson(said["process"])  # no answer, so no tag of one
    assert cut.labels == (1.0, 0.0, 1.0) and named(cut) == steps
    assert lesson("the colour is red") is None


def test_mistakes_have_their_shares() -> None:
    rng = random.Random(0)
    assert slipped(rng, TRUTH, 0.0) == TRUTH
    for word, other, (_, _, values) in zip(TRUTH, slipped(rng, TRUTH, 1.0), PARTS, strict=True):
        assert other != word and other in values
    rings = [mistaken(rng, TRUTH) for _ in range(2000)]
    others = [mistaken(rng, ("red", "cross", "left")) for _ in range(2000)]
    share = sum(words[0] == MISTAKEN["red"] for words in rings) / 2000
    assert 0.5 < share < 0.62  # 0.6, of which SLIP go on to another colour, and a few slips that end there
    wrong = sum(words[0] != "red" for words in others) / 2000
    assert abs(wrong - SLIP) < 0.03


def test_data(tmp_path: Path) -> None:
    write_step_dataset(tmp_path, train_videos=3, test_videos=2, seed=0, advance=lambda n=1: None)
    rows: dict[str, list[dict[str, Any]]] = {
        n: json.loads((tmp_path / f"{n}.json").read_text()) for n in ("sft", "prm", "train", "test")
    }
    assert [len(rows[n]) for n in rows] == [3, 3 * CHAINS, 3, 2]
    assert all((tmp_path / row["path"]).is_file() for some in rows.values() for row in some)
    for row in rows["prm"]:
        truth = world.answer_claim("describe", rc.parse_chain(row["solution"]).answer, ())
        assert truth is not None
        words = [step["thought"].split()[-1] for step in row["steps"]]
        assert row["labels"][:3] == [float(a == b) for a, b in zip(words, truth, strict=True)]
        assert row["labels"][3] == float(world.answer_claim("describe", row["answer"], ()) == truth)


def test_every_stage_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    out = tmp_path / "run"
    try:
        assert cli.COMMANDS["demo-steps"](["--out", str(out), "--smoke"]) == 0
    finally:
        torch.set_num_threads(threads)
    assert "step beam search" in capsys.readouterr().out
    assert {"sft", "prm", "dpo", "search.svg", "search.jsonl", "pairs-1.jsonl"} <= {
        p.name for p in out.iterdir()
    }
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    stages = {line["stage"] for line in lines}
    assert {"look", "warm start", "prm", "pairs", "evaluate"} <= stages
    assert all(line["naming"] > 0 for line in lines if line["stage"] == "prm" and "loss" in line)
    evaluated = [line["model"] for line in lines if line["stage"] == "evaluate"]
    assert evaluated == ["warm start", "DPO round 1"]
    with pytest.raises(UserError, match="holds no sft"):
        cli.COMMANDS["demo-steps"](["--out", str(tmp_path / "b"), "--smoke", "--start", str(tmp_path)])
