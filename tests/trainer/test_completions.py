"""completions.jsonl: what is kept of a step, by token; torn and foreign lines."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import raise_core as rc
from raise_trainer import logbook, tiny
from raise_trainer.checkpoints import truncate_log
from raise_trainer.completions import (
    TAIL,
    Completion,
    prompt_text,
    read_completions,
    show_completions,
    token_texts,
    write_completions,
)
from raise_trainer.data import Row
from raise_trainer.errors import UserError
from raise_trainer.grpo import Outcome
from raise_trainer.logbook import QUIET_TABLE_SECONDS, Logbook
from raise_trainer.prompts import Prompt
from raise_trainer.rollout import Rollout
from raise_trainer.scoring import Scored

TEXTS = ("<think>a red ring</think><answer>B. green</answer><|im_end|>", "no tags at all")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.build_tokenizer()


def outcome(tokenizer: Any, texts: tuple[str, ...] = TEXTS) -> Outcome:
    """A step that sampled these texts for one prompt; token t of completion b has logp -(b + t / 8)."""
    ids = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
    row = Row(7, "What colour?", "text", "multiple choice", ("A. red", "B. green"), "B", None, "demo")
    prompt = Prompt(row, {"input_ids": torch.tensor([tokenizer("What colour?")["input_ids"]])}, None)
    logp = [torch.tensor([-(b + t / 8) for t in range(len(some))]) for b, some in enumerate(ids)]
    values = torch.arange(len(ids)) / 4
    scored = Scored(
        list(texts), values, rc.find_answer_spans(ids, tokenizer), values + 1, values / 2,
        torch.tensor([i[-1] != tokenizer.eos_token_id for i in ids]), torch.cat(logp), {},
    )  # fmt: skip
    rollout = Rollout([prompt], ids, logp, [-x / 2 for x in logp], [0] * len(ids))
    return Outcome(rollout, scored, values - 0.5, {})


def test_every_field_comes_back(tokenizer: Any, tmp_path: Path) -> None:
    made = outcome(tokenizer)
    written = write_completions(tmp_path, 3, made, tokenizer)
    got = [completion for _, completion in read_completions(tmp_path / "completions.jsonl")]
    assert got == written and [c.text for c in got] == list(TEXTS)
    first, second = got
    assert (first.id, first.step, first.problem_type, first.prompt) == (
        7,
        3,
        "multiple choice",
        "What colour?",
    )
    assert first.token_ids == made.rollout.completions[0] and "".join(first.tokens) == TEXTS[0]
    assert first.answer is not None and "".join(first.tokens[slice(*first.answer)]).strip(">< ") == "B. green"
    assert first.logp == made.rollout.logp[0].tolist() and first.entropy == [-x / 2 for x in first.logp]
    assert (second.answer, second.answer_missing) == (None, "missing")
    assert (second.text_score, second.confidence, second.reward, second.advantage) == (
        0.25,
        0.125,
        1.25,
        -0.25,
    )
    assert not first.truncated and second.truncated


def test_only_so_many_are_kept_and_lines_add_up(tokenizer: Any, tmp_path: Path) -> None:
    made = outcome(tokenizer)
    for step in range(3):
        assert len(write_completions(tmp_path, step, made, tokenizer, most=1)) == 1
    assert [(n, c.step) for n, c in read_completions(tmp_path / "completions.jsonl")] == [
        (1, 0),
        (2, 1),
        (3, 2),
    ]
    nothing = Outcome(Rollout([], [], [], [], []), None, torch.zeros(0), {})
    assert write_completions(tmp_path, 4, nothing, tokenizer) == []
    with pytest.raises(ValueError, match="most: got -1"):
        write_completions(tmp_path, 0, made, tokenizer, most=-1)


def test_a_resumed_run_cuts_them_like_its_metrics(tokenizer: Any, tmp_path: Path) -> None:
    for step in (0, 10, 20):
        write_completions(tmp_path, step, outcome(tokenizer), tokenizer)
    file = tmp_path / "completions.jsonl"
    assert truncate_log(file, 15) == 2
    assert [c.step for _, c in read_completions(file)] == [0, 0, 10, 10]


def test_a_torn_last_line_is_left_out(tokenizer: Any, tmp_path: Path) -> None:
    write_completions(tmp_path, 0, outcome(tokenizer), tokenizer)
    file = tmp_path / "completions.jsonl"
    whole = file.read_bytes()
    for cut in (1, 2, len(whole.splitlines()[-1]) // 2):
        file.write_bytes(whole[:-cut])
        assert len(list(read_completions(file))) == (2 if cut == 1 else 1)


@pytest.mark.parametrize(
    "line, message",
    [
        ("[1, 2]", "line 2: got '\\[1, 2\\]', wanted one JSON object"),
        ('{"id": 1, "te', "line 2: got .*, wanted one JSON object"),
        ('{"text": "a"}', "line 2: id: Field required; wanted `id`"),
        ('{"id": true, "text": "a"}', "line 2: id"),
        ('{"id": 1}', "neither `text` nor `token_ids`"),
        ('{"id": 1, "token_ids": ["a"]}', "line 2: token_ids.0"),
    ],
)
def test_another_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "c.jsonl"
    file.write_text('{"id": 1, "text": "a", "note": "unknown keys are passed over"}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        list(read_completions(file))
    with pytest.raises(UserError, match=r"none\.jsonl: No such file"):
        list(read_completions(tmp_path / "none.jsonl"))


@pytest.mark.parametrize("text", ["naïve 🎥 — 東京\n\n x", "", "<|im_end|>", "a\ufffdb"])
def test_tokens_write_the_text(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "".join(token_texts(ids, tokenizer)) == text and len(token_texts(ids, tokenizer)) == len(ids)


def test_half_a_character_is_shown_as_broken(tokenizer: Any) -> None:
    ids = tokenizer("🎥", add_special_tokens=False)["input_ids"]
    assert len(ids) > 1 and token_texts(ids[:-1], tokenizer)[-1].endswith("\ufffd")


def test_a_run_of_placeholders_is_written_once(tokenizer: Any) -> None:
    pad = tokenizer.convert_tokens_to_ids("<|video_pad|>")
    word = tokenizer("a aa", add_special_tokens=False)["input_ids"]
    assert prompt_text([*word, *[pad] * 300, *word], tokenizer) == "a aa<|video_pad|>×300a aa"


def test_the_lines_are_readable_json(tokenizer: Any, tmp_path: Path) -> None:
    write_completions(tmp_path, 0, outcome(tokenizer, ("<answer>é</answer>",)), tokenizer)
    text = (tmp_path / "completions.jsonl").read_text(encoding="utf-8")
    assert "é" in text and json.loads(text)["answer_missing"] is None


def test_the_console_shows_the_end_of_each_completion(tmp_path: Path) -> None:
    said = io.StringIO()
    log = Logbook(tmp_path, Console(file=said, width=400))
    show_completions(log, [])
    assert said.getvalue() == ""
    asked = {"id": "a", "step": 4, "question": "What [red]colour?\nOptions:\nA. blue"}
    answer = {"tokens": ["<answer>", " B. ", "green", "</answer>"], "answer": (1, 3)}
    long = Completion(**asked, text="x" * 300 + "[bold]end", reward=0.5, **answer)
    short = Completion(**asked, text="short", text_score=1.0, answer_missing="unclosed")
    show_completions(log, [long, short, Completion(id=2, question="another", text="not shown")])
    title, _, _, first, second, *rest = said.getvalue().splitlines()
    assert title.strip() == "step 5, row a: What [red]colour? Options: A. blue" and rest == []
    assert "…" + "x" * (TAIL - 9) + "[bold]end" in first and "B. green" in first and "0.50" in first
    assert [cell.strip() for cell in second.split("│")] == ["short", "(unclosed)", "1.00", "–", "–", "–"]


def test_tables_are_seldom_where_there_is_no_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(logbook.time, "monotonic", lambda: clock[0])
    drawn = Logbook(tmp_path, Console(file=io.StringIO(), force_terminal=True))
    plain, silent = Logbook(tmp_path, Console(file=io.StringIO())), Logbook(tmp_path, silent=True)
    due = []
    for clock[0] in (0.0, 1.0, QUIET_TABLE_SECONDS - 1, QUIET_TABLE_SECONDS, QUIET_TABLE_SECONDS + 1):
        due.append([log.may_show_completions() for log in (drawn, plain, silent)])
    assert due == [[True, first, False] for first in (True, False, False, True, False)]
