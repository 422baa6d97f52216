"""Templates are data: what they make of a row, and what is refused."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raise_core.chain import END, PROCEED, START, STEP_CLOSE, STEP_OPEN
from raise_trainer.errors import UserError
from raise_trainer.prompt_template import FOLDER, PromptTemplate, load_template
from raise_trainer.rows import PROBLEM_TYPES, Row

NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def row(
    kind: str = "multiple choice", problem: str = "Why {x}?", options: tuple[str, ...] = ("A. {tail}", "B. b")
) -> Row:
    options = options if kind == "multiple choice" else ()
    return Row(1, problem, "text", kind, options, "<answer>A</answer>", None, "")


def test_plain_is_the_question_alone() -> None:
    for kind in PROBLEM_TYPES:
        assert load_template("plain").render(row(kind)) == row(kind).question


@pytest.mark.parametrize("name", ["think", "video_r1"])
@pytest.mark.parametrize("kind", PROBLEM_TYPES)
def test_the_instruction_names_the_tags_and_ends_with_the_sentence_of_the_kind(name: str, kind: str) -> None:
    template = load_template(name)
    text = template.render(row(kind))
    assert text.startswith("Why {x}?") and text.endswith(template.tails[kind])
    assert ("A. {tail}\nB. b" in text) == (kind == "multiple choice") == ("Options:" in text)
    for tag in ("<think>", "</think>", "<answer>", "</answer>"):
        assert tag in text


def test_chain_of_step_names_the_tokens_of_the_chain() -> None:
    text = load_template("chain_of_step").render(row("numerical"))
    for token in (START, END, PROCEED, STEP_OPEN, STEP_CLOSE, "<answer>", "</answer>"):
        assert token in text
    assert text.startswith("Why {x}?") and text.endswith("The answer is one number.")


def test_video_r1_puts_its_options_straight_behind_the_problem() -> None:
    assert load_template("video_r1").render(row()).startswith("Why {x}?Options:\nA. {tail}\nB. b\n")


@given(problem=st.text(), option=st.text())
def test_what_a_row_holds_is_never_replaced(problem: str, option: str) -> None:
    template = PromptTemplate(
        "{question}|{options}|{tail}.", options="{options}", tails={"multiple choice": "T"}
    )
    for text in (problem, "{options}", "{tail}{question}"):
        assert template.render(row(problem=text, options=(option,))) == f"{text}|{option}|T."


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text('text: "Q: {question}"\nsystem: Be brief.\n')
    template = load_template(str(file))
    assert template.system == "Be brief." and template.render(row("OCR")) == "Q: Why {x}?"


BAD = {
    "expected the fields": "question: a",
    "expected the fields text": "- a",
    "holds no {question}": "text: hello",
    "`options` is int": 'text: "{question}"\noptions: 3',
    "`tails` is no list": 'text: "{question}"\ntails: [a]',
    "names 'essay'": 'text: "{question}"\ntails: {essay: long}',
    "not YAML": "text: [",
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_template_is_named(tmp_path: Path, message: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(BAD[message])
    with pytest.raises(UserError, match=message) as error:
        load_template(str(file))
    assert str(file) in str(error.value)


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'tink': expected one of chain_of_step, plain, think, video_r1"):
        load_template("tink")
    with pytest.raises(UserError, match=r"none\.yaml: No such file"):
        load_template(str(tmp_path / "none.yaml"))
