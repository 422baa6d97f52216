"""Five kinds of question: expected scores written out, bounds on any text, and a bound on the time."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raise_core import graders
from raise_core.verify import KINDS, MAX_CHARACTERS, Verdict, canonical_kind, verify, verify_details
from tests.budget import assert_as_exact_as_a_double


def tagged(answer: str) -> str:
    return f"<think>\nsome <b>thought</b>\n</think>\n<answer>{answer}</answer>"


CHOICES = {
    **dict.fromkeys(
        ["B", "b", "(B)", "( b )", "B.", "B)", "b) red", "B. red", "B: red", "(B) red", " B \n"], 1.0
    ),
    **dict.fromkeys(
        ["A", "(A)", "A. red", "Blue", "Bob.", "AB", "B red", "B.C", "the B", "B and C", "B, C", ""], 0.0
    ),
    **dict.fromkeys(["\x00", "B\x00", "(B", "🅱", "В"], 0.0),  # the last one is Cyrillic
}


@pytest.mark.parametrize("answer", CHOICES)
@pytest.mark.parametrize("solution", ["B", "<answer>B</answer>", "<answer> (B) </answer>", "B. red", "b"])
def test_multiple_choice(answer: str, solution: str) -> None:
    assert verify("multiple_choice", tagged(answer), solution) == CHOICES[answer]


def test_multiple_choice_by_text() -> None:
    assert verify("multiple_choice", tagged("Blue  ball"), "blue ball") == 1.0
    assert verify("multiple_choice", tagged("red ball"), "blue ball") == 0.0
    assert verify_details("multiple_choice", tagged("B"), " ").reason == "bad_solution"


NUMBERS = {
    # answer, solution: equal?
    **{
        pair: 1.0
        for pair in [
            *[
                ("1,000", "1000"),
                ("1000", "1,000"),
                ("12,345,678.5", "12345678.5"),
                ("3.50", "3.5"),
                ("3", "3.0"),
            ],
            *[
                ("-2e3", "-2000"),
                ("+4", "4"),
                (".5", "0.5"),
                ("5.", "5"),
                ("\u22127", "-7"),
                ("$5", "5"),
                ("0", "-0"),
            ],
            *[
                ("50%", "50"),
                ("50 %", "50%"),
                ("50 percent", "50%"),
                ("3 m", "3"),
                ("12 km/h", "12 KM/H"),
                ("5°", "5"),
            ],
            *[("3.14", "3.14159"), ("0.012", "0.0121"), ("1e3", "1000.001"), ("2 apples.", "2")],
        ]
    },
    **{
        pair: 0.0
        for pair in [
            *[("3", "4"), ("3.5", "35"), ("3.15", "3.14"), ("-3", "3"), ("50%", "0.5"), ("3 m", "3 cm")],
            *[("0.001", "0.004"), ("0.0", "0.004"), ("1e-9", "2e-9")],
        ]
    },
}


@pytest.mark.parametrize(("answer", "solution"), NUMBERS)
def test_numerical(answer: str, solution: str) -> None:
    verdict = verify_details("numerical", tagged(answer), f"<answer>{solution}</answer>")
    assert (verdict.score, verdict.reason) == (NUMBERS[answer, solution], None)


@pytest.mark.parametrize(
    "text",
    [
        "nan",
        "NaN",
        "inf",
        "-inf",
        "infinity",
        "1e999",
        "9" * 400,
        "1,00",
        "1,0000",
        "1 000",
        "3 or 4",
        "about 3",
        "three",
    ]
    + [
        "x",
        ".",
        "-",
        "e5",
        "%",
        "$",
        ",",
        "3\x00",
        "\x00",
        "3\n4",
        "0x10",
        "1_000",
        "٣",
        "²",
        "--3",
        "3..",
        "1.2.3",
    ],
)
@pytest.mark.parametrize("kind", ["numerical", "regression"])
def test_what_is_no_number(kind: str, text: str) -> None:
    assert verify_details(kind, tagged(text), "3") == Verdict(0.0, text, "unparsable", False)
    assert verify_details(kind, tagged("3"), text) == Verdict(0.0, "3", "bad_solution", False)


@pytest.mark.parametrize(
    ("answer", "solution", "score"),
    [("10", "10", 1.0), ("7.5", "10", 0.75), ("12.5", "10", 0.75), ("-10", "10", 0.0), ("1e300", "10", 0.0)]
    + [
        ("0", "0", 1.0),
        ("-0.0", "0", 1.0),
        ("0.1", "0", 0.0),
        ("1.7e308", "-1.7e308", 0.0),
        ("5 m", "5 cm", 0.0),
    ],
)
def test_regression(answer: str, solution: str, score: float) -> None:
    assert verify("regression", tagged(answer), solution) == score


@pytest.mark.parametrize(
    ("answer", "solution", "score"),
    [
        ("a b c d", "a b c d", 1.0),
        ("a b c", "a b c d", 0.75),
        ("a  b\nc\td", " a b c d", 1.0),
        ("A b c d", "a b c d", 0.75),
    ]
    + [("x y z w v u", "a b", 0.0), ("a b", ["x", "a b", "a"], 1.0), ("a b c d", ["a b c", "a b c x"], 0.75)],
)
def test_ocr(answer: str, solution: str | list[str], score: float) -> None:
    assert verify("ocr", tagged(answer), solution) == score


def test_free_form_is_the_mean_over_references() -> None:
    answer = "the ball moves left"
    assert verify("free_form", tagged(answer), answer) == 1.0
    assert verify("free_form", tagged("left"), "left") == 2 / 3
    assert verify("free_form", tagged("The BALLS, moving left!"), "balls moving left") < 1.0
    assert verify("free_form", tagged("moved"), "moving") == verify(
        "free_form", tagged("moved"), "moved"
    )  # stemmed
    assert verify("free_form", tagged(answer), ["zzz", answer]) == 0.5
    assert verify("free_form", tagged(answer), ["zzz", "", answer]) == 0.5
    # Unigrams 2/2 and 2/4, bigrams 1/1 and 1/3, longest 2/2 and 2/4: F = 2/3, 1/2, 2/3.
    score = verify("free_form", tagged("the ball"), answer)
    assert_as_exact_as_a_double(score, (2 / 3 + 1 / 2 + 2 / 3) / 3, name="F")


def test_free_form_agrees_with_rouge_score() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    answer, solution = "a red square then moves to the right side", "the red squares moved right, then left"
    expected = sum(score.fmeasure for score in scorer.score(solution, answer).values()) / 3
    assert verify("free_form", tagged(answer), solution) == expected


@pytest.mark.parametrize("kind", ["ocr", "free_form"])
def test_references_without_words(kind: str) -> None:
    for solution in ("", "  ", "<answer> </answer>", [], ["", " "]):
        assert verify_details(kind, tagged("a"), solution).reason == "bad_solution"
    assert verify(kind, tagged("。、"), "ball") == 0.0


@pytest.mark.parametrize(
    ("text", "reason"),
    [("", "missing"), ("B", "missing"), ("<answer>B", "unclosed"), ("<answer>B</ans", "truncated")]
    + [("<answer> \n </answer>", "empty"), ("<answer>B</answer><answer></answer>", "empty")],
)
@pytest.mark.parametrize("kind", KINDS)
def test_no_answer_scores_zero_with_the_reason_of_the_span(kind: str, text: str, reason: str) -> None:
    assert verify_details(kind, text, "B") == Verdict(0.0, "", reason, False)


def test_the_last_complete_answer_counts() -> None:
    assert verify("multiple_choice", "<answer>A</answer> no <answer>B</answer>", "B") == 1.0
    assert verify("multiple_choice", "<answer>A<answer>B</answer></answer>", "B") == 1.0
    assert verify("multiple_choice", "<answer>B</answer> or <answer>A", "B") == 1.0


@pytest.mark.parametrize(
    ("spelling", "kind"),
    [
        ("multiple choice", "multiple_choice"),
        ("free-form", "free_form"),
        ("OCR", "ocr"),
        (" Numerical ", "numerical"),
    ]
    + [(kind, kind) for kind in KINDS],
)
def test_spellings(spelling: str, kind: str) -> None:
    assert canonical_kind(spelling) == kind
    assert verify(spelling, tagged("3"), "3") == verify(kind, tagged("3"), "3") > 0.0


def test_wrong_arguments() -> None:
    for unknown in ("essay", "", "multiple  choice", None):
        with pytest.raises(
            ValueError, match=r"kind: got .*, wanted one of multiple_choice, numerical, regression, ocr"
        ):
            verify(unknown, tagged("B"), "B")
    with pytest.raises(TypeError, match="completion_text: got list, wanted str"):
        verify("ocr", ["B"], "B")
    for wrong in (3, None, ["a", 3], {"a": 1}):
        with pytest.raises(TypeError, match="solution: got "):
            verify("ocr", tagged("B"), wrong)
    with pytest.raises(ValueError, match="solution: got 2 references, wanted one for kind 'numerical'"):
        verify("numerical", tagged("B"), ["1", "2"])


@pytest.mark.parametrize(("kind", "module"), [("free_form", "rouge_score.rouge_scorer"), ("ocr", "jiwer")])
def test_a_missing_package_is_named(kind: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    for loader in (graders._rouge, graders._word_error_rate):
        loader.cache_clear()
    with pytest.raises(ImportError, match=r"pip install -e '.\[train\]'"):
        verify(kind, tagged("a"), "a")
    assert verify("numerical", tagged("3"), "3") == 1.0


ANY_TEXT = st.one_of(
    st.text(max_size=40),
    st.text(alphabet="0123456789.,+-eE%$ ()ABab\x00\u2212", max_size=12),
    st.lists(
        st.sampled_from(["<answer>", "</answer>", "B", "3", " ", "the ball", "</ans", "\ud800"]), max_size=8
    ).map("".join),
)


@given(kind=st.sampled_from(KINDS), text=ANY_TEXT, solution=ANY_TEXT, wrap=st.booleans())
def test_score_is_in_the_unit_interval_on_any_text(kind: str, text: str, solution: str, wrap: bool) -> None:
    verdict = verify_details(kind, tagged(text) if wrap else text, solution)
    assert 0.0 <= verdict.score <= 1.0
    assert isinstance(verdict.score, float)
    assert verdict.reason is None or verdict.score == 0.0
    assert verdict == verify_details(kind, tagged(text) if wrap else text, solution)


@given(
    value=st.floats(-1e308, 1e308),
    form=st.sampled_from(["{!r}", "{:.3e}", "{:f}", "{:,.2f}"]),
)
def test_a_number_in_any_format_is_read_back(value: float, form: str) -> None:
    text = form.format(value)
    number = graders.parse_number(text)
    assert number is not None and number.value == float(text.replace(",", "")) and number.unit == ""
    assert verify("numerical", tagged(text), text) == verify("regression", tagged(text), text) == 1.0


SIZE = 10_000_000
HUGE = {
    "words": tagged("ball left " * (SIZE // 10)),
    "letters": tagged("a " * (SIZE // 2)),
    "digits": tagged("1" * SIZE),
    "thousands": tagged("1,111" * (SIZE // 5)),
    "number, spaces": tagged("$1" + " " * SIZE + "x"),
    "spaces": " " * SIZE,
    "blank answer": tagged(" " * SIZE),
    "open tags": "<answer>" * (SIZE // 8),
    "close tags": "</answer>" * (SIZE // 9),
    "half tags": "<answer" * (SIZE // 7),
    "empty pairs": "<answer></answer>" * (SIZE // 17),
    "brackets": tagged("(" * SIZE),
}


@pytest.mark.parametrize("case", HUGE)
@pytest.mark.parametrize("kind", KINDS)
def test_ten_megabytes_return_at_once(kind: str, case: str) -> None:
    solution = "3" if kind in ("numerical", "regression") else "the ball moves to the left side"
    verify(kind, tagged("3"), solution)  # imports
    begin = time.perf_counter()
    verdict = verify_details(kind, HUGE[case], solution)
    assert time.perf_counter() - begin < 0.5  # milliseconds on an idle machine
    assert verdict.cut == (verdict.reason not in ("missing", "unclosed", "truncated", "empty"))
    assert len(verdict.answer) <= MAX_CHARACTERS


def test_cut_is_said() -> None:
    edge = "a" * MAX_CHARACTERS
    assert not verify_details("ocr", tagged(edge), edge).cut
    assert verify_details("ocr", tagged(edge + "a"), "a") == Verdict(0.0, edge, None, True)
    assert verify_details("ocr", tagged("a"), edge + "a").cut
    assert verify("ocr", tagged(edge + " b"), edge) == verify("ocr", tagged(edge), edge + " b") == 1.0


def test_importing_loads_neither_rouge_nor_jiwer() -> None:
    code = "import sys, raise_core.verify; print({'rouge_score', 'jiwer', 'nltk'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
