"""`raise-core score`: completions of a file under other rewards, against the trainer's own scoring."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import raise_core as rc
from raise_trainer import cli, tiny
from raise_trainer.demo import save_model
from raise_trainer.errors import BadRow, UserError
from raise_trainer.method import Method
from raise_trainer.models import load_policy
from raise_trainer.prompts import PromptBuilder
from raise_trainer.rescore import find_rows, rank_correlation, score_file
from raise_trainer.rollout import Rollout
from raise_trainer.scoring import score
from raise_trainer.train_config import TrainConfig, check
from tests.budget import assert_exact

OPTIONS = ["A. red", "B. green"]
ROWS: list[dict[str, Any]] = [
    {"problem_id": "choice", "problem": "Colour?", "data_type": "text", "problem_type": "multiple choice",
     "options": OPTIONS, "solution": "<answer>B</answer>"},
    {"problem_id": 2, "problem": "Describe.", "data_type": "text", "problem_type": "free-form",
     "solution": "<answer>a red ring moves up</answer>"},
    {"problem_id": "lost", "problem": "What?", "data_type": "video", "problem_type": "multiple choice",
     "options": OPTIONS, "solution": "<answer>A</answer>", "path": "none.mp4"},
    {"problem_id": "broken", "problem": "What?", "data_type": "text", "problem_type": "multiple choice",
     "solution": "<answer>A</answer>"},
    {"problem_id": "other", "problem": "What?", "data_type": "text", "problem_type": "regression",
     "solution": "<answer>3</answer>"},
]  # fmt: skip
TEXTS: dict[Any, list[str]] = {
    "choice": ["<answer>B. green</answer>", "<answer>A. red</answer>", "<think>x</think><answer>B</answer>"],
    2: ["<answer>a red ring moves up</answer>", "<answer>the blue ring goes down</answer>", "no answer"],
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    processor = tiny.build_processor()
    save_model(tiny.build_model(processor, seed=0), processor, folder / "model")
    (folder / "rows.json").write_text(json.dumps(ROWS))
    return folder


def config(root: Path, **other: Any) -> TrainConfig:
    given = {
        "model": str(root / "model"), "data": root / "rows.json", "out": root / "run", "dtype": "float32",
        "template": "plain", "max_new_tokens": 28, "workers": 0, "gradient_checkpointing": False,
    }  # fmt: skip
    return check(given | other)


def write(file: Path, lines: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def written(root: Path, tmp_path: Path, lines: list[dict[str, Any]], **other: Any) -> tuple[Any, str]:
    said = io.StringIO()
    out = score_file(
        write(tmp_path / "c.jsonl", lines), config(root, **other), console=Console(file=said, width=150)
    )
    return [json.loads(line) for line in out.read_text().splitlines()], said.getvalue()


LINES = [{"id": i, "text": t, "reward": n / 8} for i, some in TEXTS.items() for n, t in enumerate(some)]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"reward": "accuracy"},
        {"confidence_share": 0.5, "bonus": {"format": 0.25}, "reward": "scre-igsr-balanced", "prompts": 1},
    ],
    ids=["scre-igsr", "accuracy", "mixed"],
)
def test_rewards_are_those_of_training(root: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    found, _ = written(root, tmp_path, LINES, **settings)
    made = config(root, **settings)
    policy = load_policy(made, torch.device("cpu"))
    policy.model.eval()
    builder, rows = (
        PromptBuilder.configured(policy.processor, made, max_length=300),
        find_rows(made, set(TEXTS)),
    )
    ids = [policy.tokenizer(line["text"], add_special_tokens=False)["input_ids"] for line in LINES]
    prompts = [builder(rows[i]) for i in TEXTS]  # type: ignore[arg-type]
    made_in = [[0], [1]] if made.prompts == 1 else [[0, 1]]  # prompts at a time, as the command takes them
    one = [
        score(
            Rollout([prompts[p] for p in some], [x for p in some for x in ids[3 * p : 3 * p + 3]], [], [],
                    [i for i in range(len(some)) for _ in range(3)]),
            rc.Scorer(policy.model), policy.tokenizer, replace(Method.of(made), group_size=3), eos=policy.eos,
        )
        for some in made_in
    ]  # fmt: skip
    assert [line["line"] for line in found] == [1, 2, 3, 4, 5, 6]
    assert [line["problem_type"] for line in found] == ["multiple choice"] * 3 + ["free-form"] * 3
    assert [line["reward_kind"] for line in found] == ["scre"] * 3 + ["igsr"] * 3
    for key, name in (("reward", "reward"), ("confidence", "confidence"), ("text_score", "score")):
        wanted = torch.cat([getattr(scored, name) for scored in one])
        assert_exact(torch.tensor([line[key] for line in found]), wanted, name=key)
    assert found[0]["reward"] > 0 == found[1]["reward"]


def test_token_ids_stand_before_text_and_steps_are_groups_of_their_own(root: Path, tmp_path: Path) -> None:
    tokenizer = tiny.build_tokenizer()
    ids = tokenizer(TEXTS[2][0], add_special_tokens=False)["input_ids"]
    lines = [
        {"id": 2, "step": 4, "token_ids": ids, "text": "something else"},
        {"id": 2, "step": 0, "text": TEXTS[2][1]},
        {"id": "choice", "step": 4, "text": TEXTS["choice"][0]},
        {"id": 2, "step": 4, "text": TEXTS[2][1]},
    ]
    found, _ = written(root, tmp_path, lines)
    assert [(line["line"], line["id"], line["step"]) for line in found] == [
        (1, 2, 4),
        (4, 2, 4),
        (2, 2, 0),
        (3, "choice", 4),
    ]
    assert found[0]["text_score"] > found[1]["text_score"] == found[2]["text_score"]
    assert all(line["old_reward"] is None for line in found)


def test_the_table_compares_with_the_old_rewards(root: Path, tmp_path: Path) -> None:
    found, said = written(root, tmp_path, LINES, reward="accuracy")
    rows = {
        line.split("│")[0].strip(): [x.strip() for x in line.split("│")[1:]] for line in said.splitlines()
    }
    assert (
        rows["all"][0] == "6" and rows["multiple choice"][1] == "0.6667" and rows["free-form"][4] == "0.1250"
    )
    agree = rank_correlation([line["reward"] for line in found], [line["old_reward"] for line in found])
    assert agree is not None and rows["all"][5] == f"{agree:+.3f}"


def test_what_cannot_be_used_is_named_and_left_out(root: Path, tmp_path: Path) -> None:
    lines = [
        *LINES[:1],
        {"id": "lost", "text": "a"},
        {"id": "broken", "text": "a"},
        {"id": "lost", "text": "b"},
    ]
    found, said = written(root, tmp_path, lines)
    assert [line["line"] for line in found] == [1]
    assert "3 completions are left out" in said and "none.mp4" in said and "without `options`" in said
    with pytest.raises(UserError, match=r"options|none\.mp4"):
        written(root, tmp_path, lines, on_bad_media="fail")
    found, said = written(root, tmp_path, lines[2:3])
    assert found == [] and "1 completions are left out" in said


@pytest.mark.parametrize(
    "lines, message",
    [
        ([], "no completion in it"),
        ([{"id": "none", "text": "a"}, {"id": 3, "text": "a"}], "data: 2 of 2 rows .* such as 3, 'none'"),
        ([{"id": 2, "token_ids": [1, 99999]}], "line 1: token 99999 is none of the model's"),
        ([{"id": 2, "token_ids": [-1]}], "line 1: token -1"),
        ([{"id": 2}], "line 1: .*neither `text` nor `token_ids`"),
    ],
)
def test_what_can_be_mended_is_named(root: Path, tmp_path: Path, lines: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        written(root, tmp_path, lines)


def test_rows_are_found_by_their_id(root: Path, tmp_path: Path) -> None:
    found = find_rows(config(root), {2, "broken"})
    assert found[2].problem == "Describe." and isinstance(found["broken"], BadRow)  # type: ignore[union-attr]
    numbered = write(tmp_path / "numbered.json", [])
    numbered.write_text(json.dumps([{k: v for k, v in row.items() if k != "problem_id"} for row in ROWS]))
    assert find_rows(config(root, data=numbered), {4})[4].problem_type == "regression"  # type: ignore[union-attr]
    with pytest.raises(UserError, match="two rows have the id 2"):
        find_rows(config(root, data=[root / "rows.json", numbered]), {2})


def test_a_file_is_not_written_over_itself(root: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "c.jsonl", LINES)
    with pytest.raises(UserError, match="is the file of completions"):
        score_file(file, config(root), out=tmp_path / "." / "c.jsonl")
    with pytest.raises(UserError, match=r"--out .*: cannot be written"):
        score_file(file, config(root), out=tmp_path / "none" / "s.jsonl", console=Console(file=io.StringIO()))


def test_the_command_takes_a_file_and_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr("raise_trainer.rescore.score_file", lambda *a, **k: calls.append((a, k)))
    settings = tmp_path / "config.yaml"
    settings.write_text("model: m\ndata: [a.jsonl]\nout: o\n")
    command = cli.COMMANDS["score"]
    assert command(["c.jsonl", str(settings), "reward=accuracy", "--out", "s.jsonl"]) == 0
    ((file, made), other) = calls[0]
    assert (file, made.reward, other) == (Path("c.jsonl"), "accuracy", {"out": Path("s.jsonl")})
    for given in ([str(settings)], ["a.jsonl", "b.jsonl", str(settings)]):
        with pytest.raises(UserError, match="files of completions"):
            command(given)


@pytest.mark.parametrize(
    "a, b, wanted",
    [
        ([1, 2, 3], [10, 20, 90], 1.0),
        ([1, 2, 3], [3, 2, 1], -1.0),
        ([1, 1, 2, 2], [5, 5, 7, 7], 1.0),
        ([1, 1, 2], [1, 2, 2], 0.5),
        ([1, 2], [3, 3], None),
        ([], [], None),
        ([1, float("nan")], [1, 2], None),
    ],
)
def test_rank_correlation(a: list[float], b: list[float], wanted: float | None) -> None:
    assert rank_correlation(a, b) == wanted
    with pytest.raises(ValueError, match="b: got"):
        rank_correlation([*a, 1], b)
