"""Labels from rollouts and from a judge behind a local server that fails in every way it can."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from raise_trainer import cli, tiny
from raise_trainer.errors import UserError
from raise_trainer.prm import label as label_module
from raise_trainer.prm.judge import Unreadable, messages_for, read_labels
from raise_trainer.prm.label import label_rows
from raise_trainer.prm.label_config import LabelConfig, load_label_config
from raise_trainer.prm.tokens import save_with_tokens
from raise_trainer.rollout import Rollout, draws
from raise_trainer.rows import parse_row
from tests.trainer.fake_chat import FakeChat

ROW = {
    "problem": "What is 2 + 3?", "data_type": "text", "problem_type": "numerical",
    "solution": "<answer>5</answer>", "steps": ["two and three", {"name": "sum", "thought": "is five"}],
}  # fmt: skip
GOOD_REPLY = '{"labels": ["good", "Neutral"]}'


@pytest.fixture
def server() -> Iterator[FakeChat]:
    with FakeChat(GOOD_REPLY) as fake:
        yield fake


@pytest.mark.parametrize(
    ("reply", "labels"),
    [
        (GOOD_REPLY, ["good", "neutral"]),
        ('I think {"labels": ["bad"]}, no: ```json\n{"labels": [" GOOD ", "bad"]}\n```', ["good", "bad"]),
    ],
)
def test_labels_of_a_reply(reply: str, labels: list[str]) -> None:
    assert read_labels(reply, 2) == labels


@pytest.mark.parametrize(
    "reply",
    ["", "good, bad", '{"labels": ["good"]}', '{"labels": ["good", "fine"]}', '{"labels": "good"}',
     '{"labels": [1, 2]}', '{"labels": ["good", "bad"', '{"label": []}'],
)  # fmt: skip
def test_what_cannot_be_read_is_not_guessed(reply: str) -> None:
    with pytest.raises(Unreadable):
        read_labels(reply, 2)


def test_what_a_judge_is_asked(tmp_path: Path) -> None:
    row = parse_row(0, ROW | {"answer": "5"}, tmp_path)
    system, user = messages_for(row)
    assert "3 labels" in system["content"] and "the answer itself" in system["content"]
    assert "Step 2: sum. is five" in user["content"] and "Answer: 5" in user["content"]
    (tmp_path / "a.png").write_bytes(b"pixels")
    seen = parse_row(0, ROW | {"data_type": "image", "path": "a.png"}, tmp_path)
    system, user = messages_for(seen)
    assert "the answer itself" not in system["content"]
    assert user["content"][0]["image_url"]["url"] == "data:image/png;base64,cGl4ZWxz"


def written(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def by_judge(server: FakeChat, folder: Path, **other: Any) -> LabelConfig:
    given = {
        "data": folder / "rows.jsonl", "out": folder / "out.jsonl", "by": "judge", "model": "j",
        "url": server.url, "retries": 0,
    }  # fmt: skip
    return load_label_config([f"{k}={v}" for k, v in (given | other).items()])


def test_rows_by_a_judge_go_on_where_they_stopped(server: FakeChat, tmp_path: Path) -> None:
    rows = [ROW | {"problem": f"{i}?", "row": "mine", "of": "x"} for i in range(5)] + [ROW | {"steps": []}]
    written(tmp_path / "rows.jsonl", rows)
    server.answers = [GOOD_REPLY, "no idea", GOOD_REPLY, (500, {}, b"")]
    with pytest.raises(UserError, match="status 500"):
        label_rows(by_judge(server, tmp_path))
    with (tmp_path / "out.jsonl").open("a") as file:
        file.write('{"row": 3, "of"')
    server.answers = [GOOD_REPLY]
    counts = label_rows(by_judge(server, tmp_path))
    assert counts == {"labelled": 2, "had": 2, "unreadable": 1, "left_out": 1}
    assert len(server.seen) == 4 + 2  # the reply that could not be read is in the cache
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == [0, 2, 3, 4]
    assert all(line["labels"] == ["good", "neutral"] and line["problem"] for line in lines)
    assert parse_row(0, lines[0], tmp_path).labels == (1.0, 0.5)
    written(tmp_path / "rows.jsonl", rows[:2])
    with pytest.raises(UserError, match="holds labels of other data"):
        label_rows(by_judge(server, tmp_path))
    with pytest.raises(UserError, match="no `steps`"):
        written(tmp_path / "rows.jsonl", rows[5:])
        label_rows(by_judge(server, tmp_path, out=tmp_path / "new.jsonl", on_bad_media="fail"))


def test_the_command(server: FakeChat, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    written(tmp_path / "rows.jsonl", [ROW])
    monkeypatch.setenv("MY_KEY", "k")
    pairs = [f"data={tmp_path}/rows.jsonl", f"out={tmp_path}/o.jsonl", "by=judge", "model=j",
             f"url={server.url}", "key_variable=MY_KEY"]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["raise-core", "prm", "label", *pairs])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0 and "1 labelled, 0 had, 0 unreadable" in capsys.readouterr().out
    assert server.seen[0][0]["Authorization"] == "Bearer k"
    monkeypatch.setattr("sys.argv", ["raise-core", "prm", "label", "--print-config", *pairs])
    with pytest.raises(SystemExit):
        cli.main()
    assert "rollouts: 16" in capsys.readouterr().out
    for wrong, said in (
        (["prm", "tell"], "known are tokens, train"),
        (["prm", "label", "by=judge"], "data: got"),
    ):
        monkeypatch.setattr("sys.argv", ["raise-core", *wrong])
        with pytest.raises(SystemExit):
            cli.main()
        assert said in capsys.readouterr().err
    with pytest.raises(UserError, match="by=judge needs the address"):
        load_label_config(pairs[:4])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("label")
    processor = tiny.build_processor()
    tiny.build_model(processor, seed=0).save_pretrained(folder / "bare")
    processor.save_pretrained(folder / "bare")
    save_with_tokens(str(folder / "bare"), folder / "model")
    return folder / "model"


def by_rollouts(model: Path, folder: Path, **other: Any) -> LabelConfig:
    given = {
        "data": folder / "rows.jsonl", "out": folder / "out.jsonl", "model": model, "rollouts": 4,
        "dtype": "float32", "template": "plain", "max_new_tokens": 5, "prompts": 2, "workers": 0,
    }  # fmt: skip
    return load_label_config([f"{k}={v}" for k, v in (given | other).items()])


def test_shares_of_rollouts_by_hand(model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The sampler is told what it finds: from step 1 one of four is right, from step 2 three."""
    said = {0: ["5", "4", "", "6"], 1: ["5", "5.0", "5", "1"]}
    asked: list[tuple[int, torch.Tensor]] = []
    tokenizer = tiny.build_tokenizer()

    def sampled(model: Any, prompts: Any, **options: Any) -> Rollout:
        found = []
        for i, prompt in enumerate(prompts):
            asked.append((int(prompt.inputs["input_ids"].shape[1]), options["draws"][4 * i : 4 * i + 4]))
            texts = [f"<answer>{x}</answer>" if x else "hm" for x in said[len(asked) - 1]]
            found += [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
        return Rollout(list(prompts), found, [], [], [i // 4 for i in range(len(found))])

    monkeypatch.setattr(label_module, "sample", sampled)
    written(tmp_path / "rows.jsonl", [ROW | {"answer": "5"}])
    assert label_rows(by_rollouts(model, tmp_path, prompts=1))["labelled"] == 1
    (line,) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert line["shares"] == line["labels"] == [0.25, 0.75, 1.0]
    assert asked[0][0] < asked[1][0]
    assert torch.equal(asked[1][1], draws(0, [(0, 1)], 4, 5))
    asked.clear()
    said[0] = ["4", "4", "", "6"]
    label_rows(by_rollouts(model, tmp_path, out=tmp_path / "new" / "hard.jsonl", labels="hard"))
    (line,) = map(json.loads, (tmp_path / "new" / "hard.jsonl").read_text().splitlines())
    assert line["labels"] == [0.0, 1.0, 1.0] and line["shares"] == [0.0, 0.75, 1.0]


def test_rollouts_of_a_model(model: Path, tmp_path: Path) -> None:
    written(tmp_path / "rows.jsonl", [ROW, ROW | {"steps": ["red " * 700]}])
    counts = label_rows(by_rollouts(model, tmp_path))
    assert counts == {"labelled": 1, "had": 0, "unreadable": 0, "left_out": 1}
    (line,) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert len(line["labels"]) == 2 and all(0 <= share <= 1 for share in line["shares"])
