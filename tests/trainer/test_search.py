"""Search over chains: votes by hand, beam search, a file of answers that is gone on with, the command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import raise_core as rc
from raise_core.spans import STEP_CLOSE
from raise_trainer import cli
from raise_trainer.chain_judge import ChainJudge, Judged
from raise_trainer.errors import UserError
from raise_trainer.prompts import PromptBuilder
from raise_trainer.rows import Row, parse_row
from raise_trainer.search.beam import Generation, beam_search
from raise_trainer.search.run import Search, run_search
from raise_trainer.search.votes import accuracy, answer_key, best, curves, majority, tokens
from tests.budget import assert_as_exact_as_fp32
from tests.trainer import chain_world, media_cases


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def drawn(key: str | None, value: float, reward: float, tokens: int = 10) -> dict[str, Any]:
    return {"key": key, "value": value, "reward": reward, "tokens": tokens}


RECORD = {
    "samples": [drawn("a", 0.0, 0.2), drawn("b", 1.0, 0.9), drawn("a", 0.0, 0.3), drawn(None, 0.0, 0.5, 30)],
    "beams": {"2": {"value": 1.0, "tokens": 25}},
}


def test_votes_by_hand() -> None:
    samples = RECORD["samples"]
    assert isinstance(samples, list)
    assert majority(samples, [1.0] * 4) == 0 and best(samples) == 1
    assert majority(samples, [s["reward"] for s in samples]) == 1  # 0.9 against 0.2 + 0.3
    assert majority([drawn(None, 0, 0), drawn("b", 1, 0)], [5.0, 0.0]) == 1
    assert majority([drawn(None, 0, 0)] * 2, [1.0, 1.0]) == 0
    assert majority(samples[:2], [1.0, 1.0]) == 0  # of equals the first


def test_accuracy_by_hand() -> None:
    got = {m: [accuracy(RECORD, m, n) for n in (1, 2, 4)] for m in ("pass", "vote", "best", "weighted")}
    assert got == {
        "pass": [0.25, 0.5, 1.0], "vote": [0.25, 0.0, 0.0], "best": [0.25, 0.5, 1.0],
        "weighted": [0.25, 0.5, 1.0],
    }  # fmt: skip
    assert (accuracy(RECORD, "beam", 2), accuracy(RECORD, "beam", 4)) == (1.0, None)
    assert accuracy(RECORD, "pass", 8) is None
    assert [tokens(RECORD, "pass", n) for n in (1, 2, 4)] == [15.0, 30.0, 60.0]
    assert accuracy(RECORD, "pass", 3) == 1.0 and tokens(RECORD, "pass", 3) == 30.0  # the fourth is left over
    points = curves([RECORD, RECORD], (2, 8))
    assert {p["method"] for p in points} == {"pass", "vote", "best", "weighted", "beam"}
    assert all(p["n"] == 2 and p["standard_error"] == 0.0 and p["questions"] == 2 for p in points)


def row(kind: str, options: tuple[str, ...] = ()) -> Row:
    return Row(1, "?", "text", kind, options, "<answer>A</answer>", None, "")


@pytest.mark.parametrize(
    ("kind", "answers", "key"),
    [
        ("multiple choice", ["B", "b", "B. blue", "(B)", "blue"], "B"),
        ("numerical", ["4", "4.0", " 4.00 ", "+4"], "4"),
        ("numerical", ["1,000", "1000.0", "1e3"], "1000"),
        ("numerical", ["50 %", "50%", "50 percent"], "50 %"),
        ("free-form", ["1,2"], "1,2"),  # a list, not 12
        ("free-form", ["12345678901"], "12345678901"),
        ("free-form", ["A  Red ring", "a red\nring"], "a red ring"),
        ("free-form", ["", " "], None),
    ],
)
def test_one_spelling_of_an_answer(kind: str, answers: list[str], key: str | None) -> None:
    options = ("A. red", "B. blue") if kind == "multiple choice" else ()
    for answer in answers:
        assert answer_key(row(kind, options), f"<answer>{answer}</answer>") == key, answer


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chain_world.make(tmp_path_factory.mktemp("search"), questions=4)


@pytest.fixture(scope="module")
def how(world: Path) -> tuple[Generation, ChainJudge, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(world / "model")
    tokenizer = processor.tokenizer
    policy, prm = (AutoModelForImageTextToText.from_pretrained(world / n).eval() for n in ("model", "prm"))
    generation = Generation(
        policy, tokenizer, chain_world.LONGEST, [tokenizer.eos_token_id], [],
        tokenizer.convert_tokens_to_ids(STEP_CLOSE),
    )  # fmt: skip
    return generation, ChainJudge(prm, tokenizer), PromptBuilder(processor, frames=2, max_length=200)


def assert_same(found: Any, want: Any, name: str) -> None:
    """Equal, numbers but for the roundings of another batch."""
    if isinstance(want, float):
        assert_as_exact_as_fp32(found, want, name=name)
    elif isinstance(want, (list, dict)):
        keys = list(want) if isinstance(want, dict) else range(len(want))
        assert type(found) is type(want) and len(found) == len(want), name
        for key in keys:
            assert_same(found[key], want[key], f"{name}.{key}")
    else:
        assert found == want, name


def test_beam_search(how: tuple[Generation, ChainJudge, Any]) -> None:
    generation, judge, builder = how
    prompts = [builder(parse_row(i, chain_world.question(i), Path("."))) for i in range(3)]
    found = beam_search(generation, judge, prompts, [0, 1, 2], 4, keep=2)
    alone = beam_search(generation, judge, prompts[1:2], [1], 4, keep=2)
    (beam, sampled), (same, as_many) = found[1], alone[0]  # a question's beams hang on its own draws
    assert beam.ids == same.ids and sampled == as_many
    for prompt, (beam, sampled) in zip(prompts, found, strict=True):
        assert beam.ended and beam.judged is not None and len(beam.ids) <= sampled
        ((again,),) = judge([prompt.inputs], [[list(beam.ids)]])
        assert beam.judged.reward == beam.rank
        assert_same(again.reward, beam.rank, "reward")
    single = beam_search(generation, judge, prompts, [0, 1, 2], 1)
    assert all(tokens == len(beam.ids) for beam, tokens in single)


def test_the_best_whole_chain_counts(how: tuple[Generation, ChainJudge, Any]) -> None:
    """Though chains that go on are preferred to it, which the PRM below likes best whatever they say."""
    generation, judge, builder = how
    generation = replace(generation, max_new_tokens=40, temperature=1.8)
    seen = list[float]()

    class Fond:
        features = judge.features

        def __call__(self, inputs: Any, groups: Any, features: Any = None) -> list[list[Judged]]:
            made = []
            for ids in groups[0]:
                whole = ids[-1] != generation.step_close or len(ids) == 40
                reward = (len(ids) * 7919 % 97) / 100  # any number below that of an open chain
                made.append(Judged(rc.StepScores((0.99,), None, (1,)), reward))
                seen.extend([reward] * whole)
            return [made]

    fond: Any = Fond()
    better = 0
    for i in range(4):
        seen.clear()
        prompt = builder(parse_row(i, chain_world.question(i), Path(".")))
        ((beam, _),) = beam_search(generation, fond, [prompt], [i], 6)
        assert beam.ended and beam.rank == max(seen)
        better += len(seen) > 1 and seen[-1] < max(seen)
    assert better  # than the last one, in some question


def test_tokens_of_a_question_do_not_hang_on_the_batch(how: tuple[Generation, ChainJudge, Any]) -> None:
    generation, judge, builder = how
    generation = replace(generation, max_new_tokens=40, temperature=1.8)  # beams of many lengths, cut off
    prompts = [builder(parse_row(i, chain_world.question(i), Path("."))) for i in range(4)]
    found = beam_search(generation, judge, prompts, [0, 1, 2, 3], 4, keep=2)
    for i, (beam, sampled) in enumerate(found):
        ((same, as_many),) = beam_search(generation, judge, prompts[i : i + 1], [i], 4, keep=2)
        assert beam.ids == same.ids and sampled == as_many


def test_beam_search_without_room(how: tuple[Generation, ChainJudge, Any]) -> None:
    generation, judge, builder = how
    prompt = builder(parse_row(0, chain_world.question(0), Path(".")))
    ((beam, sampled),) = beam_search(replace(generation, max_new_tokens=5), judge, [prompt], [0], 3)
    assert len(beam.ids) <= 5 and beam.ended and sampled <= 15
    assert beam.judged is not None and beam.judged.scores.answer is None


def search(world: Path, out: Path, **other: Any) -> Search:
    settings = ("template=plain", "dtype=float32", f"max_new_tokens={chain_world.LONGEST}", "workers=0")
    given: dict[str, Any] = {
        "model": str(world / "model"), "prm": str(world / "prm"), "data": str(world / "data.json"),
        "out": out, "counts": (1, 2), "settings": (*settings, "prompts=3"),
    }  # fmt: skip
    return Search(**(given | other))


def test_a_search_goes_on_where_it_stopped(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    points = run_search(search(world, out), figure=tmp_path / "curve.svg")
    assert {(p["method"], p["n"]) for p in points} == {
        (m, n) for m in ("pass", "vote", "best", "weighted", "beam") for n in (1, 2)
    }
    assert all(p["questions"] == 4 for p in points) and (tmp_path / "curve.svg").stat().st_size > 1000
    lines = out.read_bytes().splitlines(keepends=True)
    assert [json.loads(line)["row"] for line in lines] == [0, 1, 2, 3]
    assert len(json.loads(lines[0])["samples"]) == 2
    out.write_bytes(lines[0] + lines[1][:30])
    assert_same(run_search(search(world, out)), points, "points")  # draws are a row's own
    again = out.read_bytes().splitlines(keepends=True)
    assert again[0] == lines[0]
    assert_same([json.loads(line) for line in again], [json.loads(line) for line in lines], "lines")
    with pytest.raises(UserError, match="line 1 is of other data, models or settings"):
        run_search(search(world, out, keep=2))


def test_the_command(world: Path, tmp_path: Path, capsys: Any) -> None:
    given = [
        str(world / "model"), "--prm", str(world / "prm"), "--data", str(world / "data.json"), "--n", "1",
        "--out", str(tmp_path / "a.jsonl"), "template=plain", "dtype=float32", "workers=0",
        f"max_new_tokens={chain_world.LONGEST}",
    ]  # fmt: skip
    assert cli.COMMANDS["search"](given) == 0
    said = capsys.readouterr().out
    assert "self-consistency" in said and (tmp_path / "a.svg").is_file()
    wrong = (
        ("--n", "0"), ("--keep", "0"), ("--step-share", "1.5"), ("--figure", "a.txt"),
        ("--figure", str(tmp_path / "a.jsonl")),
    )  # fmt: skip
    for flag, value in wrong:
        with pytest.raises(UserError, match=flag):
            cli.COMMANDS["search"]([*given, flag, value])


def test_media_of_another_folder_are_kept_decoded(world: Path, tmp_path: Path) -> None:
    media = tmp_path / "media"
    media.mkdir()
    media_cases.write(media / "a.mp4", media_cases.pictures(4, 32, 32))
    row = chain_world.question(0) | {"data_type": "video", "path": "a.mp4"}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    given = {"data": str(tmp_path / "rows.json"), "counts": (1,)}
    with pytest.raises(UserError, match=r"a\.mp4"):
        wanted = (*search(world, tmp_path).settings, "on_bad_media=fail")
        run_search(search(world, tmp_path / "none.jsonl", **given, settings=wanted))
    kept = (*search(world, tmp_path).settings, f"frame_cache={tmp_path / 'cache'}", "frames=2")
    run_search(search(world, tmp_path / "a.jsonl", **given, root=media, settings=kept))
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 1
    assert any(one.is_file() for one in (tmp_path / "cache").rglob("*"))
