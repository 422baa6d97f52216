"""The command against a local server and a tiny model: figures by hand, failures, kill and resume."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raise_trainer import cli, tiny
from raise_trainer.consistency.arguments import parse
from raise_trainer.consistency.judging import ask_judge
from raise_trainer.consistency.records import read_answers, rows_of, scored_rewards
from raise_trainer.consistency.run import Arm, Settings, arm_names, judge_of, run_consistency
from raise_trainer.errors import UserError
from raise_trainer.logbook import Logbook
from tests.trainer.fake_chat import FakeChat

LINE = {
    "bench": "mmvu", "task": "t", "problem_type": "multiple choice", "solution": "<answer>B</answer>",
    "question": "What?\nOptions:\nA. red\nB. blue", "reason": None,
}  # fmt: skip


def line(number: int, chain: str, answer: str, p: float, sample: int = 0, **other: Any) -> dict[str, Any]:
    """An answer of one token of probability p."""
    text = (f"<think>{chain}</think>" if chain else "") + (f"<answer>{answer}</answer>" if answer else "")
    logp = math.log(p) if answer else None
    known = {"answer_p_mean": p, "answer_p_min": p} if answer else {}
    return LINE | {
        "id": str(number), "sample": sample, "video": f"v{number % 3}", "text": text,
        "answer_logp_mean": logp, "sequence_logp_mean": -0.5, **known, **other,
    }  # fmt: skip


def answers(folder: Path, *records: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "answers.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder / "answers.jsonl"


EIGHT = [
    line(0, "so B", "B", 0.9),
    line(1, "so A", "B", 0.6),  # right, but not from its chain
    line(2, "so A", "A", 0.5),
    line(3, "", "B", 0.7),  # no chain
    line(4, "so B", "", 0.5),  # no answer
    line(5, "so nothing", "B", 0.8),  # the judge gives none
    line(6, "so Q", "B", 0.8),  # nor one that can be read
    line(7, "x", "", 0.5, reason="bad_media"),
]


def by_chain(body: Any) -> str:
    """A judge that does as the chain says."""
    prompt = body["messages"][0]["content"]
    said = prompt.split("so ")[1].split()[0]
    return "I cannot say." if said == "nothing" else f"Well. <answer>{said}</answer>"


@pytest.fixture
def server() -> Iterator[FakeChat]:
    with FakeChat(by_chain) as fake:
        yield fake


def settings(server: FakeChat, file: Path, **other: Any) -> Settings:
    given: dict[str, Any] = {"judge": server.url, "judge_model": "j", "out": file.parent / "c", "retries": 0}
    return Settings(**{"files": (file,), "resamples": 20, **given, **other})


def only(arms: dict[str, Arm]) -> Arm:
    (arm,) = arms.values()
    return arm


def test_answer_and_match_by_hand(server: FakeChat, tmp_path: Path) -> None:
    file = answers(tmp_path / "eval", *EIGHT)
    arm = only(run_consistency(settings(server, file)))
    (found,) = arm.kinds
    assert (found.kind, found.answers) == ("mmvu", 8)
    assert found.accuracy.value == 5 / 8 and found.answer.value == 2 / 8 and found.match.value == 2 / 8
    assert found.why == {
        "differs": 1, "no_chain": 1, "unanswered": 2, "judge_unanswered": 1, "judge_unreadable": 1,
    }  # fmt: skip
    assert found.reasons == {"no_chain": 2, "missing": 1}
    assert arm.analysis.videos == 3 and arm.rewards == {}
    assert len(server.seen) == 4  # so B is one question, whoever asks it
    lines = [json.loads(one) for one in (tmp_path / "eval/c/judged.jsonl").read_text().splitlines()]
    assert [one["match"] for one in lines] == [True, False, True] + [False] * 5
    assert lines[5]["judge_reason"] == "missing" and lines[5]["judge_answer"] == ""
    told = json.loads((tmp_path / "eval/c/consistency.json").read_text())
    assert told["judge"] == "j" and told["arms"]["eval"]["kinds"][0]["match"]["value"] == 0.25
    page = (tmp_path / "eval/c/consistency.html").read_text()
    assert "0.250 [" in page and page.count("<img") == 3 and "judge_unanswered" in page
    drawn = sorted(path.name for path in (tmp_path / "eval/c/figures").iterdir())
    assert drawn == sorted(
        f"eval-{n}.{k}" for n in ("confidence", "reliability", "min_prob") for k in ("svg", "png")
    )


def test_rewards_in_groups_that_are_all_right(server: FakeChat, tmp_path: Path) -> None:
    """Group 0: the supported completion is the likelier one. Group 1 is not all right."""
    some = [
        line(0, "so B", "B", 0.9),
        line(0, "so A", "B", 0.5, 1),
        line(1, "so B", "B", 0.9),
        line(1, "so A", "A", 0.9, 1),
    ]
    file = answers(tmp_path / "eval", *some)
    found = only(run_consistency(settings(server, file))).rewards
    assert {name: (d.groups, d.mixed, d.pairs) for name, d in found.items()} == dict.fromkeys(
        ("0/1", "grpo-care", "rlpr", "scre"), (1, 1, 1)
    )
    assert [d.auroc.value for d in found.values()] == [0.5, 1.0, 1.0, 1.0]
    assert [d.difference.value for d in found.values()][:3] == [0.0, 0.5, 0.4]
    assert "rewards.svg" in {path.name for path in (tmp_path / "eval/c/figures").iterdir()}


def test_rewards_of_a_scored_file(server: FakeChat, tmp_path: Path) -> None:
    """A training run's folder; the reward of its third completion is not known."""
    row = {"problem_id": 3, "problem": "What?", "data_type": "text", "problem_type": "multiple choice",
           "options": ["A. red", "B. blue"], "solution": "<answer>B</answer>"}  # fmt: skip
    text = "<think>so {}</think><answer>B</answer>"
    some = [
        {"id": 3, "step": step, "text": text.format(said), "logp": [-0.1, p], "answer": [1, 2]}
        for step, said, p in ((0, "B", -0.5), (0, "A", -0.1), (1, "B", -0.1), (1, "A", -0.5))
    ]
    for name, records in (("completions", some), ("rows", [row])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    scored = [{"line": n, "id": 3, "step": 0, "reward": r} for n, r in ((1, 0.9), (2, 0.3), (4, 0.1))]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(r) + "\n" for r in scored))
    given = settings(
        server,
        tmp_path,
        out=tmp_path / "c",
        data=(tmp_path / "rows.jsonl",),
        rewards=(("x", tmp_path / "s.jsonl"),),
    )
    arm = only(run_consistency(given))
    assert (arm.rewards["x"].groups, arm.rewards["x"].auroc.value) == (1, 1.0)
    assert (arm.rewards["scre"].groups, arm.rewards["scre"].auroc.value) == (2, 0.5)
    assert arm.kinds[0].match.value == 0.5
    for line, said in (
        ({"line": 1, "id": 4, "reward": 1.0}, "of other rows"),
        ({"id": 3}, "line 1: is no line"),
    ):
        (tmp_path / "s.jsonl").write_text(json.dumps(line) + "\n")
        with pytest.raises(UserError, match=said):
            scored_rewards(tmp_path / "s.jsonl", read_answers(tmp_path, rows_of(given.data))[0])


def asked(given: Settings) -> list[str]:
    """The judge's replies to all chains; no figures."""
    given.out.mkdir(exist_ok=True)
    some, _ = read_answers(given.files[0], {})
    return sorted(ask_judge(some, judge_of(given), Logbook(given.out))[0].values())


def test_a_command_that_failed_goes_on(server: FakeChat, tmp_path: Path) -> None:
    file = answers(tmp_path / "eval", *(line(i, f"so {i}", "B", 0.9) for i in range(6)))
    given = settings(server, file, parallel=1)
    server.answers = [by_chain, by_chain, (500, {}, b"down")]
    with pytest.raises(UserError, match="status 500: down, after 1 tries; run again to go on"):
        asked(given)
    with (tmp_path / "eval/c/replies.jsonl").open("a") as kept:
        kept.write('{"question": "to')
    server.answers = [by_chain]
    before = len(server.seen)
    want = [f"Well. <answer>{i}</answer>" for i in range(6)]
    assert asked(given) == want and len(server.seen) == before + 4
    assert asked(given) == want and len(server.seen) == before + 4  # nothing is asked twice


def test_a_prompt_that_the_server_refuses_is_not_asked_and_the_others_are(
    server: FakeChat, tmp_path: Path
) -> None:
    """Too long for its context, say. Where it takes none, something else is wrong, and the command stops."""

    def refusing(body: Any) -> Any:
        return (400, {}, b"context length") if "so Q" in body["messages"][0]["content"] else by_chain(body)

    file = answers(tmp_path / "eval", *(line(i, f"so {c}", "B", 0.9) for i, c in enumerate("BQB")))
    server.answers = [refusing]
    for _ in range(2):  # also where all the others are known already
        found = only(run_consistency(settings(server, file))).kinds[0]
        assert found.why == {"not_asked": 1} and found.match.value == 2 / 3
    server.answers = [(400, {}, b"no such option")]
    wanted = "none of the 2 prompts: judge .* status 400: no such option; mend that"
    with pytest.raises(UserError, match=wanted):
        run_consistency(settings(server, file, out=tmp_path / "other"))


def test_half_a_character_in_a_reply_is_kept_as_text(server: FakeChat, tmp_path: Path) -> None:
    content = b'{"choices": [{"message": {"content": "\\ud83d <answer>B</answer>"}}]}'
    file = answers(tmp_path / "eval", line(0, "so B", "B", 0.9))
    server.answers = [content]
    for _ in range(2):
        assert only(run_consistency(settings(server, file))).kinds[0].match.value == 1.0
    assert len(server.seen) == 1


KILLED = """
import sys
from raise_trainer.cli import main
sys.argv = ["raise-core", "consistency", *sys.argv[1:]]
main()
"""


def test_a_killed_command_goes_on(server: FakeChat, tmp_path: Path) -> None:
    """The process is killed while the server holds the fourth answer back."""
    file = answers(tmp_path / "eval", *(line(i, f"so B {i}", "B", 0.9) for i in range(5)))
    held = threading.Event()
    server.answers = [by_chain, by_chain, by_chain, held]
    command = [
        sys.executable,
        "-c",
        KILLED,
        str(file),
        "--judge",
        server.url,
        "--judge-model",
        "j",
        "--parallel",
        "1",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while len(server.seen) < 4:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.communicate()
    held.set()
    server.answers = [by_chain]
    assert len(asked(settings(server, file, out=file.parent / "consistency"))) == 5
    assert len(server.seen) == 4 + 2


def test_a_model_as_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights say nothing that can be read: that is counted, and asked for once."""
    processor = tiny.build_processor()
    tiny.build_model(processor, seed=0).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    some = [line(0, "so B", "B", 0.9), line(1, "so A <|im_end|>", "B", 0.9), line(2, "red " * 600, "B", 0.9)]
    some.append(line(3, "so A", "A", 0.9))
    file = answers(tmp_path / "eval", *some)
    given = Settings(
        (file,), str(tmp_path / "model"), tmp_path / "c", max_new_tokens=4, batch=3, dtype="float32"
    )
    first = only(run_consistency(given))
    assert first.kinds[0].why == {"judge_unanswered": 2, "not_asked": 2}
    assert first.kinds[0].match.value == first.kinds[0].answer.value == 0.0
    monkeypatch.setattr("raise_trainer.models.load_policy", None)  # no model is loaded for what is known
    answers(tmp_path / "eval", some[0], some[3])
    assert len(asked(given)) == 2


def test_the_command(server: FakeChat, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    files = [answers(tmp_path / "one", *EIGHT)]
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    given = [*map(str, files), "--judge", server.url, "--judge-model", "j", "--resamples", "5"]
    monkeypatch.setattr("sys.argv", ["raise-core", "consistency", *given])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    out = capsys.readouterr().out
    assert stopped.value.code == 0 and "Answer and Match" in out and "4/4" in out
    assert server.seen[0][0]["Authorization"] == "Bearer secret-key"
    for path in (tmp_path / "one" / "consistency").rglob("*"):
        assert not path.is_file() or b"secret-key" not in path.read_bytes()
    assert "secret-key" not in out


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--batch", "0"], "--batch 0"), (["--max-new-tokens", "0"], "--max-new-tokens 0"),
     (["--threshold", "nan"], "--threshold nan"), (["--timeout", "0"], "--timeout 0"),
     (["--timeout", "inf"], "--timeout inf"),
     (["--rewards", "rlpr"], "expected NAME=FILE")],
)  # fmt: skip
def test_wrong_arguments(options: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse(["a.jsonl", "--judge", "m", *options])
    assert parse(["x/a.jsonl", "--judge", "m"]).out == Path("x/consistency")


def test_arms_have_names(server: FakeChat, tmp_path: Path) -> None:
    a, b = tmp_path / "x" / "a.jsonl", tmp_path / "x" / "b.jsonl"
    assert list(arm_names([a])) == ["x"] and list(arm_names([a, b])) == ["x/a", "x/b"]
    with pytest.raises(UserError, match="both would be called"):
        arm_names([a, tmp_path / "y" / "x" / "a.jsonl"])
    assert list(arm_names([tmp_path])) == [tmp_path.name]
    with pytest.raises(UserError, match=r"neither answers\.jsonl nor"):
        read_answers(tmp_path, {})
    with pytest.raises(UserError, match="there are several"):
        run_consistency(settings(server, a, files=(a, b), rewards=(("x", a),)))
    with pytest.raises(UserError, match="name one with --judge-model"):
        run_consistency(settings(server, answers(tmp_path / "eval", *EIGHT), judge_model=""))
    with pytest.raises(UserError, match="none of its answers can be used; row 1: is in no file of --data"):
        run_consistency(settings(server, answers(tmp_path / "t", {"id": 1, "text": "x"})))
