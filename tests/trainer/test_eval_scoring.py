"""Both scorers on every fixture of benchmark_rows/, against scores computed by hand."""

import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raise_trainer.benchmarks.extraction import extract, extract_video_r1
from raise_trainer.benchmarks.load import load
from raise_trainer.benchmarks.number_words import first_number
from raise_trainer.benchmarks.official import relative_accuracy
from raise_trainer.benchmarks.questions import Question
from raise_trainer.benchmarks.scoring import grade

ROWS = Path(__file__).with_name("benchmark_rows")

# bench/id, output, reason, official, video_r1. An answer is put inside tags unless the output has some or
# begins with "=": then it is what follows.
CASES: list[tuple[str, str, str | None, float, float]] = [
    # A number: 4 chairs. An error of exactly 1/4 passes 6 thresholds by <=, 5 by <; of exactly 1/2 one, none.
    ("vsibench/0", "4", None, 1.0, 1.0),
    ("vsibench/0", "5", None, 0.6, 0.5),
    ("vsibench/0", "3", None, 0.6, 0.5),
    ("vsibench/0", "6", None, 0.1, 0.0),
    ("vsibench/0", "2", None, 0.1, 0.0),
    ("vsibench/0", "-4", None, 0.0, 0.0),
    ("vsibench/0", "4.0", None, 1.0, 1.0),
    ("vsibench/0", "four chairs", None, 1.0, 0.0),
    ("vsibench/0", "There are 4 chairs", None, 1.0, 0.0),
    ("vsibench/0", "twenty-one", None, 0.0, 0.0),
    ("vsibench/0", "4,0", None, 1.0, 0.0),  # the first number is 4; without commas it is 40
    ("vsibench/0", "none", "unparsable", 0.0, 0.0),
    ("vsibench/0", "nan", "unparsable", 0.0, 0.0),
    ("vsibench/0", " ", "empty", 0.0, 0.0),
    ("vsibench/0", "=", "missing", 0.0, 0.0),
    ("vsibench/0", "=4", "missing", 1.0, 1.0),
    ("vsibench/0", "=I count 4 of them.", "missing", 1.0, 0.0),
    ("vsibench/0", "=<think>one, two</think>4", "missing", 1.0, 0.0),
    ("vsibench/0", "=<think>I count 4", "missing", 0.0, 0.0),
    ("vsibench/0", "=<think>I count 4</think>", "missing", 0.0, 0.0),
    ("vsibench/0", "=<answer>4", "unclosed", 0.0, 0.0),
    ("vsibench/0", "=<answer>4</ans", "truncated", 0.0, 0.0),
    ("vsibench/0", "<answer>3</answer> or <answer>4</answer>", None, 1.0, 0.5),
    ("vsibench/0", "<answer>4</answer> or <answer>", None, 1.0, 1.0),
    # Units are not read: 2.0 m.
    ("vsibench/1", "2 m", None, 1.0, 0.0),
    ("vsibench/1", "200 cm", None, 0.0, 0.0),
    ("vsibench/1", "3", None, 0.1, 0.0),
    ("vsibench/2", "one hundred and twenty centimetres", None, 1.0, 0.0),
    ("vsibench/2", "150", None, 0.6, 0.5),
    ("vsibench/3", "20.5 square metres", None, 1.0, 0.0),
    ("vsibench/3", "twenty", None, 1.0, 0.0),  # an error of 1/41 is below all thresholds
    ("vsibench/4", "B. lamp", None, 1.0, 0.0),
    # Letters: A. left, B. right.
    ("vsibench/5", "A", None, 1.0, 1.0),
    ("vsibench/5", "A. left", None, 1.0, 0.0),
    ("vsibench/5", "(a)", None, 1.0, 0.0),
    ("vsibench/5", "**A.** left", None, 1.0, 0.0),
    ("vsibench/5", r"\boxed{A}", None, 1.0, 0.0),
    ("vsibench/5", r"**\boxed{\text{(A)}}**", None, 1.0, 0.0),
    ("vsibench/5", "A.left", None, 1.0, 0.0),
    ("vsibench/5", "A - Left.", None, 1.0, 0.0),
    ("vsibench/5", '"left"', None, 1.0, 0.0),
    ("vsibench/5", "A, right", "unparsable", 0.0, 0.0),  # the letter of one option, the text of another
    ("vsibench/5", "Q .", "unparsable", 0.0, 0.0),
    ("vsibench/5", r"\boxed{}", "unparsable", 0.0, 0.0),
    ("vsibench/5", "A\nbecause of the bed", None, 1.0, 0.0),
    ("vsibench/5", "left", None, 1.0, 0.0),
    ("vsibench/5", "B", None, 0.0, 0.0),
    ("vsibench/5", "A man stands there", "unparsable", 0.0, 0.0),
    ("vsibench/5", "Apparently to the left side", "unparsable", 0.0, 0.0),
    ("vsibench/5", "E", "unparsable", 0.0, 0.0),
    ("vsibench/5", "<answer>B</answer> no, <answer>A</answer>", None, 1.0, 0.0),
    ("vsibench/5", "<answer>A</answer> no, <answer>B</answer>", None, 0.0, 1.0),
    ("vsibench/5", "=A", "missing", 1.0, 1.0),
    ("vsibench/5", "=The answer is A.", "missing", 1.0, 0.0),
    ("vsibench/5", "=So the answer is A because the bed is on that side.", "missing", 1.0, 0.0),
    ("vsibench/5", "=Option B? No: the answer is (A)", "missing", 1.0, 0.0),
    ("vsibench/5", "=The answer is a man on the left", "unparsable", 0.0, 0.0),
    ("vsibench/6", "C", None, 1.0, 1.0),
    ("vsibench/7", "back-right", None, 1.0, 0.0),
    ("vsibench/8", "C. Turn Right", None, 1.0, 0.0),
    ("vsibench/9", "lamp, bed, sofa", None, 1.0, 0.0),
    # Open answers: held word for word, or a number to two decimals. Video-R1 scores them 0.
    ("videommmu/perception/dev_Art_Theory_1", "Goethe's", None, 1.0, 0.0),
    ("videommmu/comprehension/new_Physics_2", "A", None, 1.0, 1.0),
    ("videommmu/adaptation/validation_Math_3", "12.50 cm²", None, 1.0, 0.0),
    ("videommmu/adaptation/validation_Math_3", "12", None, 0.0, 0.0),
    ("videommmu/adaptation/validation_Public_Health_4", "It is a Case-Control  study.", None, 1.0, 0.0),
    ("videommmu/adaptation/validation_Public_Health_4", "case", None, 0.0, 0.0),
    ("videommmu/adaptation/validation_Economics_5", "D", None, 1.0, 1.0),
    ("videommmu/adaptation/validation_Economics_5", "Not shown", None, 0.0, 0.0),
    ("mmvu/validation_0", "a depth-first search (DFS), I think", None, 1.0, 0.0),
    ("mmvu/validation_0", "breadth-first search", None, 0.0, 0.0),
    ("mmvu/validation_1", "hydrogen", None, 1.0, 0.0),
    ("mmvu/validation_2", "1200 g", None, 1.0, 0.0),
    ("mmvu/validation_2", "about 1,200", None, 1.0, 0.0),
    ("mmvu/validation_2", "12,000", None, 0.0, 0.0),
    # Candidates that begin with the word "A".
    ("mvbench/action_sequence/0", "C", None, 1.0, 1.0),
    ("mvbench/object_shuffle/0", "A", None, 1.0, 1.0),
    ("mvbench/object_shuffle/1", "A dog runs", None, 1.0, 0.0),
    ("mvbench/object_shuffle/1", "A man walks", None, 0.0, 0.0),
    ("mvbench/object_shuffle/1", "A man", "unparsable", 0.0, 0.0),
    ("mvbench/episodic_reasoning/0", "D) hungry", None, 1.0, 0.0),
    ("tempcompass/multi-choice/0", "B", None, 1.0, 1.0),
    ("tempcompass/yes_no/0", "yes", None, 1.0, 1.0),
    ("tempcompass/yes_no/0", "Yes, it is.", None, 1.0, 0.0),
    ("tempcompass/yes_no/0", r"**\boxed{Yes}**", None, 1.0, 0.0),
    ("tempcompass/yes_no/0", "Yesterday", "unparsable", 0.0, 0.0),
    ("tempcompass/yes_no/1", "nothing", "unparsable", 0.0, 0.0),
    ("tempcompass/yes_no/1", "yes", None, 0.0, 0.0),
    ("tempcompass/caption_matching/0", "B", None, 1.0, 1.0),
    ("tempcompass/caption_matching/0", "Sentence B", None, 1.0, 0.0),
    ("tempcompass/caption_matching/0", "the car drives fast", None, 1.0, 0.0),
    ("tempcompass/caption_matching/0", "Sentence A: The car drives slowly.", None, 0.0, 0.0),
    ("tempcompass/caption_matching/0", "both", "unparsable", 0.0, 0.0),
    ("tempcompass/caption_matching/1", "1", None, 1.0, 1.0),
    ("tempcompass/caption_matching/1", "**Option 1**", None, 1.0, 0.0),
    ("tempcompass/caption_matching/1", "2", None, 0.0, 0.0),
    ("tempcompass/caption_matching/1", "Option 2", None, 0.0, 0.0),
    ("videomme/001-1", "C", None, 1.0, 1.0),
    ("videomme/001-2", "A man's island", None, 1.0, 0.0),
    ("videomme/301-1", "8", None, 1.0, 0.0),
    ("videomme/601-1", "C. 7.", None, 0.0, 0.0),
    # Video-R1's own rows.
    ("r1:vsibench/0", "5", None, 0.6, 0.5),
    ("r1:vsibench/1", "A", None, 1.0, 1.0),
    ("r1:mmvu/0", "B. hydrogen", None, 1.0, 0.0),
    ("r1:mmvu/1", "3.50", None, 1.0, 1.0),
    ("r1:mmvu/1", "3.5 g", None, 1.0, 0.0),
    ("r1:mmvu/1", "4", None, 0.0, 0.0),
    ("r1:mmvu/2", "a red ring", None, 1.0, 0.0),
    ("r1:mmvu/3", "exit", None, 1.0, 0.0),
]


@cache
def questions(name: str) -> dict[str, Question]:
    bench = name.removeprefix("r1:")
    loaded = load(bench, ROWS if bench == name else ROWS / "video_r1")
    return {item.id: item for item in loaded.items if isinstance(item, Question)}


def output(text: str) -> str:
    if text.startswith("="):
        return text[1:]
    return text if "<answer>" in text else f"<think>hm</think>\n<answer>{text}</answer>"


@pytest.mark.parametrize(("where", "said", "reason", "official", "video_r1"), CASES)
def test_scores_are_those_computed_by_hand(
    where: str, said: str, reason: str | None, official: float, video_r1: float
) -> None:
    name, _, row_id = where.partition("/")
    graded = grade(questions(name)[row_id], output(said))
    assert (graded.reason, graded.scores) == (
        reason,
        {"video_r1": video_r1, "official": official},
    )


def test_every_question_of_the_fixtures_has_a_case() -> None:
    names = ("vsibench", "videommmu", "mmvu", "mvbench", "tempcompass", "videomme", "r1:vsibench", "r1:mmvu")
    assert {f"{name}/{row_id}" for name in names for row_id in questions(name)} == {c[0] for c in CASES}


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("three hundred and twenty-one", 321.0),
        ("two thousand five hundred", 2500.0),
        ("a hundred", 100.0),
        ("one apple, room 2", 1.0),
        ("room 2, one apple", 2.0),
        ("Seven.", 7.0),
        ("1,000", 1.0),
        ("about -3.25 m", -3.25),
        ("someone", None),
        ("", None),
    ],
)
def test_the_first_number_of_a_text(text: str, number: float | None) -> None:
    assert first_number(text) == number


@pytest.mark.parametrize(
    ("got", "wanted", "accuracy"),
    [
        (0.0, 0.0, 1.0),
        (1e-9, 0.0, 0.0),
        (0.0, 3.0, 0.0),
        (float("inf"), 3.0, 0.0),
        (1.0, 2.0, 0.1),
    ],
)
def test_relative_accuracy_at_its_edges(got: float, wanted: float, accuracy: float) -> None:
    assert relative_accuracy(got, wanted) == accuracy


@pytest.mark.parametrize(
    ("solution", "said", "score"),
    [
        ("2e-1", "2e-1", 1.0),
        ("2e-1", "0.2 m", 1.0),
        ("1500", "about 1.5E+3 joules", 1.0),
        ("1500", "1.5", 0.0),
        ("\u22125", "\u22125", 1.0),
        ("-5", "\u22125 V", 1.0),
        ("5", "\u22125", 0.0),
        ("$1,200", "1200 dollars", 1.0),
        ("50%", "50 per cent", 1.0),
        (".5", "0.50", 1.0),
        ("0.5", ".5 kg", 1.0),
        ("2", "2e", 1.0),
        ("1.234", "1.23", 1.0),
        ("1.24", "1.23", 0.0),
    ],
)
def test_numbers_of_open_questions(solution: str, said: str, score: float) -> None:
    """The solution itself always counts, as written; 2e-1 and a true minus sign did not."""
    question = replace(questions("mmvu")["validation_2"], solution=f"<answer>{solution}</answer>")
    assert grade(question, output(said)).scores["official"] == score
    assert grade(question, output(solution)).scores["official"] == 1.0


OPEN, CLOSE = "<answer>", "</answer>"


@given(st.lists(st.sampled_from([OPEN, CLOSE, " ", "\n", "A", "<", "answer>"]), max_size=8).map("".join))
def test_video_r1_reads_what_its_regular_expression_finds(output: str) -> None:
    found = re.search(r"<answer>\s*(.*?)\s*</answer>", output, re.DOTALL)
    assert extract_video_r1(output) == ((found[1].strip() if found else "") or output)


@pytest.mark.parametrize(
    "said", [OPEN + "\n" * 100_000, "The answer" + " " * 100_000 + "is here", "answer\n \n" * 30_000 + "x"]
)
def test_blanks_without_end_are_scored_in_no_time(said: str) -> None:
    """Each was minutes or hours: the time grew with the cube of the blanks."""
    for row in ("0", "5"):
        assert grade(questions("vsibench")[row], said).scores == {"video_r1": 0.0, "official": 0.0}


@given(st.text(alphabet="<>/answerthik AB.,14-\n", max_size=80))
def test_no_output_raises_and_scores_stay_between_0_and_1(text: str) -> None:
    for name in ("vsibench", "tempcompass", "mmvu"):
        for question in questions(name).values():
            graded = grade(question, text)
            assert all(0 <= score <= 1 for score in graded.scores.values())
            assert graded.prediction == extract(text).text
            assert graded.vote or graded.scores["official"] == 0
