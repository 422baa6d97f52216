"""Chains, answers and their agreement, by hand; lines of evaluations and of training runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from raise_trainer.benchmarks.questions import Question
from raise_trainer.consistency.judges import judge_prompt
from raise_trainer.consistency.match import answer_of, chain_of, chosen_option, disagreement, score_of
from raise_trainer.consistency.records import read_answers, rows_of
from raise_trainer.errors import UserError
from raise_trainer.rows import Row, parse_row
from tests.budget import assert_as_exact_as_a_double

OPTIONS = ["A. red", "B. light blue", "C. green"]


def row(kind: str, solution: str, **other: Any) -> Row:
    given = {"problem": "What?", "data_type": "text", "problem_type": kind, "solution": solution}
    return parse_row(7, given | ({"options": OPTIONS} if kind == "multiple choice" else {}) | other, Path())


@pytest.mark.parametrize(
    ("text", "chain"),
    [
        ("<think> it is red </think><answer>A</answer>", "it is red"),
        ("<think>a</think><think>b</think><answer>A</answer><think>c</think>", "b"),
        ("it is red</think>\n<answer>A</answer>", "it is red"),  # the prompt ended with <think>
        ("<think>red</think> A", "red"),
        ("<think>never ends <answer>A</answer>", ""),
        ("<think> </think><answer>A</answer>", ""),
        ("it is red. <answer>A</answer>", ""),
        ("<answer>A</answer><think>too late</think>", ""),
        ("", ""),
    ],
)
def test_chains(text: str, chain: str) -> None:
    assert chain_of(text) == chain


@pytest.mark.parametrize(
    ("answer", "letter"),
    [("B", "B"), ("(b)", "B"), ("B. red", "B"), ("Light  BLUE", "B"), ("B. light blue", "B"),
     ("A ball", None), ("D", None), ("blue", None), ("", None)],
)  # fmt: skip
def test_options(answer: str, letter: str | None) -> None:
    assert chosen_option(answer, tuple(OPTIONS)) == letter


def test_options_without_letters_and_no_options() -> None:
    assert chosen_option("green", ("red", "green")) == "B" == chosen_option("B", ("red", "green"))
    assert chosen_option("Z", ()) == "Z" and chosen_option("red", ()) is None


@pytest.mark.parametrize(
    ("kind", "original", "judged", "why"),
    [
        ("multiple choice", "B", "light blue", None),
        ("multiple choice", "B", "(C)", "differs"),
        ("multiple choice", "Z", "B", "unreadable"),
        ("multiple choice", "B", "either", "judge_unreadable"),
        ("numerical", "3.50", "3.5 m", None),
        ("numerical", "3.5", "3.51", "differs"),
        ("numerical", "3 m", "3 km", "differs"),
        ("numerical", "0.0123", "0.0124", "differs"),  # two significant digits: 0.012 for both would match
        ("regression", "many", "3", "unreadable"),
        ("regression", "3", "many", "judge_unreadable"),
        ("regression", "1,000", "1000", None),
        ("free-form", "A red  Ball", "a red ball", None),
        ("free-form", "Мяч", "мяч", None),  # ROUGE knows no such letters
        ("free-form", "a red ball", "a blue cube", "differs"),
        ("free-form", "10", "10.00", None),
        ("free-form", "10", "11", "differs"),
        ("OCR", "EXIT 12 NORTH", "EXIT 12 SOUTH", None),  # one word of three is wrong: 2/3
        ("OCR", "EXIT 12 NORTH", "STOP", "differs"),
    ],
)
def test_agreement(kind: str, original: str, judged: str, why: str | None) -> None:
    solution = {"multiple choice": "A", "numerical": "1", "regression": "1"}.get(kind, "x")
    if original == "0.0123":
        assert disagreement(row(kind, solution), "0.0123", "0.0121") is None
        judged = "0.0131"
    assert disagreement(row(kind, solution), original, judged) == why


def test_the_threshold_counts_itself() -> None:
    words = row("OCR", "x")
    assert disagreement(words, "one two", "one") is None  # a score of exactly a half
    assert disagreement(words, "one two", "one", threshold=0.51) == "differs"


def question(kind: str, rule: Any, solution: str, **other: Any) -> Question:
    made = row(kind, solution, **other)
    values = {name: getattr(made, name) for name in Row.__dataclass_fields__}
    return Question(**values, bench="b", rule=rule, r1_kind=kind)


def test_answers_of_a_benchmark_are_read_by_its_rule() -> None:
    asked = question("multiple choice", "choice", "B")
    assert (
        answer_of(asked, "B") == ("B", None) and answer_of(row("multiple choice", "B"), "B")[1] == "missing"
    )
    assert answer_of(asked, "<think>x")[1] == "missing"
    assert disagreement(asked, "The answer is B.", "B") is None
    assert disagreement(asked, "B", "C") == "differs"
    counted = question("regression", "number", "4")
    assert disagreement(counted, "about 3 metres", "three") is None
    assert disagreement(counted, "about 3 metres", "4") == "differs"
    assert disagreement(counted, "none at all", "4") == "unreadable"
    assert score_of(counted, "<answer>4</answer>") == 1.0
    said = question("free-form", "yes_no", "yes")
    assert disagreement(said, "Yes, it does", "yes") is None and disagreement(said, "yes", "no") == "differs"
    assert disagreement(said, "yes", "maybe") == "judge_unreadable"


def test_the_judge_sees_question_options_and_chain_alone() -> None:
    text = judge_prompt(row("multiple choice", "A"), "braces {form} and {question} stay")
    assert "What?\nOptions:\nA. red\nB. light blue" in text and "letter of one option" in text
    assert "braces {form} and {question} stay" in text


EVALUATED = {
    "bench": "mmvu", "id": "7", "sample": 0, "task": "t", "video": "v.mp4", "problem_type": "multiple choice",
    "question": "What?\nOptions:\nA. red\nor so\nB. blue", "solution": "<answer>B</answer>",
    "text": "<think>it is blue</think><answer>B</answer>", "reason": None, "answer_p_mean": 0.5,
    "answer_p_min": 0.5, "answer_logp_mean": math.log(0.5), "sequence_logp_mean": math.log(0.25),
}  # fmt: skip


def lines(file: Path, *records: dict[str, Any]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def test_lines_of_an_evaluation(tmp_path: Path) -> None:
    bad = {"reason": "bad_media", "text": "", "id": "8", "question": "", "solution": "", "problem_type": ""}
    none = {name: None for name in EVALUATED if name.startswith(("answer", "sequence"))}
    file = lines(
        tmp_path / "answers.jsonl",
        EVALUATED | {"text": "the first of two"},
        EVALUATED | {"sample": 1, "text": "A", "answer_p_min": 0.4},
        EVALUATED | bad | none,
        EVALUATED | {"id": "9", "solution": "Q", "problem_type": "regression"},
        EVALUATED,  # again: the last line of a sample counts
    )
    (first, second, unasked), left_out = read_answers(file, {})
    assert first.line == 5 and first.row is not None and first.row.options == ("A. red\nor so", "B. blue")
    assert (first.answer, first.chain, first.right, first.is_gold, first.video) == (
        "B", "it is blue", True, True, "v.mp4",
    )  # fmt: skip
    assert first.confidence.logp == (math.log(0.5),)
    assert_as_exact_as_a_double(first.confidence.sequence or 0, 0.25, name="sequence")
    assert (second.answer, second.right, second.confidence.logp) == ("A", False, None)
    assert first.group == second.group != unasked.group
    assert unasked.row is None and not unasked.right and unasked.confidence.answer is None
    assert sum(left_out.values()) == 1 and "cannot be read as regression" in next(iter(left_out))


def test_a_question_that_could_be_asked_once_counts(tmp_path: Path) -> None:
    """As in the evaluation's own table: a later line of a video that was gone does not take its place."""
    gone = EVALUATED | {"reason": "bad_media", "text": ""}
    for some, answer in (((EVALUATED, gone), "B"), ((gone, EVALUATED), "B"), ((gone, gone), "")):
        (found,), _ = read_answers(lines(tmp_path / "answers.jsonl", *some), {})
        assert found.answer == answer and (found.row is None) == (answer == "")


def test_every_number_of_vsi_bench_has_its_rule(tmp_path: Path) -> None:
    """Video-R1's files may call it numerical; its evaluation takes the relative error all the same."""
    record = EVALUATED | {"problem_type": "numerical", "question": "How many?", "solution": "10"}
    text = "<think>nine</think><answer>9.2 of 12</answer>"
    for bench, rule, score in (("vsibench", "number", 0.9), ("mmvu", "open", 0.0)):
        (found,), _ = read_answers(
            lines(tmp_path / f"{bench}.jsonl", record | {"bench": bench, "text": text}), {}
        )
        assert isinstance(found.row, Question) and found.row.rule == rule
        assert round(found.score, 6) == score


def test_lines_of_a_training_run(tmp_path: Path) -> None:
    rows = lines(
        tmp_path / "rows.jsonl",
        {"problem_id": 3, "problem": "How many?", "data_type": "video", "path": "../v.mp4",
         "problem_type": "numerical", "solution": "<answer>4</answer>"},
        {"problem_id": 4, "problem": ""},
    )  # fmt: skip
    sampled = {
        "id": 3, "step": 2, "text": "<think>four</think><answer>4.0</answer><eos>",
        "logp": [-1.0, -0.5, -3.0], "answer": [1, 2],
    }  # fmt: skip
    file = lines(
        tmp_path / "completions.jsonl", sampled, sampled | {"answer": None, "text": "four"},
        sampled | {"id": 4}, sampled | {"id": 5}, sampled | {"answer": [1, 4]},
    )  # fmt: skip
    (one, other), left_out = read_answers(file, rows_of([rows]))
    assert (one.answer, one.chain, one.right, one.is_gold, one.video) == (
        "4.0",
        "four",
        True,
        False,
        "../v.mp4",
    )
    assert one.confidence.logp == (-0.5,) and one.group == other.group == (3, 2)
    assert_as_exact_as_a_double(one.confidence.sequence or 0, math.exp(-1.5), name="sequence")
    assert (other.answer, other.confidence.answer) == ("", None)
    assert [reason.split(":")[0] for reason in left_out] == ["row 4", "row 5", "row 3"]
    with pytest.raises(UserError, match="line 1: text: Field required"):  # tokens alone are no text to read
        read_answers(lines(tmp_path / "ids.jsonl", {"id": 3, "token_ids": [1]}), rows_of([rows]))
    with pytest.raises(UserError, match="two rows have the id 3"):
        rows_of([rows, rows])


@pytest.mark.parametrize(
    ("record", "said"),
    [(EVALUATED | {"answer_p_mean": 1.5}, "answer_p_mean"),
     (EVALUATED | {"sequence_logp_mean": math.nan}, "logp"),
     ({"bench": "mmvu"}, "id: Field required"), ({"id": 1, "text": "", "logp": [0.5]}, r"logp\.0")],
)  # fmt: skip
def test_lines_that_are_neither_are_refused_by_number(record: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"line 2: .*{said}"):
        read_answers(lines(tmp_path / "a.jsonl", EVALUATED, record), {})
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="no answer in it"):
        read_answers(tmp_path / "empty.jsonl", {})
