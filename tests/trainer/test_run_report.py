"""`raise-core report`: one page of several runs, whole or partial, that needs no other file."""

import base64
import json
import re
import shutil
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from raise_trainer import cli
from raise_trainer.completions import Completion
from raise_trainer.errors import UserError
from raise_trainer.heat_map import DARKEST, chosen, draw
from raise_trainer.run_figures import curves, last_mean, window
from raise_trainer.run_files import differing, read_runs
from raise_trainer.run_report import MOST_LEFT_OUT, report_runs
from raise_trainer.train_config import as_yaml, check

STEPS = 30


def write_lines(file: Path, records: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def completion(row: int, step: int, reward: float, **other: Any) -> dict[str, Any]:
    return {
        "id": row, "step": step, "prompt": "Why <b>?</b>", "text": "<answer>a\n</answer>",
        "tokens": ["<answer>", "a", "\n", "", "</answer>"], "logp": [-0.5, -2.5, -9.0, float("nan"), 0.0],
        "entropy": [0.1, 1.5, 9.0, 0.0, 0.0], "answer": [1, 2], "reward": reward, "advantage": reward - 0.5,
        "text_score": 1.0, "confidence": 0.25,
    } | other  # fmt: skip


def write_run(folder: Path, *, kind: str = "train", **settings: Any) -> Path:
    """The files of a run of 30 steps, with all there may be."""
    folder.mkdir(parents=True)
    given = {"model": "m", "data": "a.json", "out": folder, "steps": STEPS} | settings
    (folder / "config.yaml").write_text(f"# raise-core {kind}\n{as_yaml(check(given))}")
    metrics: list[dict[str, Any]] = []
    for step in range(STEPS):
        metrics.append(
            {"stage": "train", "step": step, "reward_mean": step / STEPS, "text_score_mean": 0.5,
             "confidence_mean": 0.4, "completion_tokens_mean": 20.0, "entropy": 1.0, "kl": 0.0, "loss": 0.1,
             "grad_norm": float("inf") if step == 4 else 1.0} | ({"skipped": 1.0} if step == 4 else {})
        )  # fmt: skip
        if step % 10 == 9:
            metrics.append({"stage": "evaluate", "step": step, "text_score_mean": 0.3 + (step == 19) / 10})
    write_lines(folder / "metrics.jsonl", metrics)
    times = {
        "decode": 0.5,
        "rollout": 2.0,
        "score": 0.5,
        "update": 1.0,
        "tokens_per_s": 120.0,
        "peak_gib": 3.5,
    }
    write_lines(
        folder / "timings.jsonl",
        [{"stage": "step", "step": s} | times for s in range(2)]
        + [{"stage": "train", "units": 2, "seconds": 9}],
    )
    bad = {"id": "lost", "path": "/v/none.mp4", "reason": "none.mp4: no <such> file", "time": "t"}
    write_lines(folder / "quarantine.jsonl", [bad])
    write_lines(folder / "quarantine-1.jsonl", [bad | {"id": "unsolved", "path": ""}])
    rewards = ((1, 0.5), (1, 0.5), (2, 0.0), (2, 1.0))
    write_lines(
        folder / "completions.jsonl",
        [completion(row, step, reward) for step in (0, 29) for row, reward in rewards],
    )
    return folder


def cells(page: str, table: str) -> list[list[str]]:
    """The texts of a table's cells, by row."""
    (body,) = re.findall(rf'<table class="{table}">(.*?)</table>', page, re.DOTALL)
    rows = re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL)
    return [
        [unescape(re.sub(r"<.*?>", "", cell)).strip() for cell in re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row)]
        for row in rows
    ]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    return [
        write_run(root / "slow", lr=1e-6),
        write_run(root / "fast", lr=1e-5, clip=[0.2, 0.28], kind="sft"),
    ]


@pytest.fixture(scope="module")
def page(two: list[Path]) -> str:
    return report_runs(two).read_text()


def test_the_page_needs_no_other_file_and_text_is_escaped(page: str, two: list[Path]) -> None:
    assert (two[0] / "report.html").is_file() and not (two[1] / "report.html").exists()
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "<script" not in page and "url(" not in page
    assert page.count("data:image/svg+xml") == 2
    assert "<b>?</b>" not in page and "Why &lt;b&gt;?&lt;/b&gt;" in page and "no &lt;such&gt; file" in page


def test_the_summary_has_a_line_for_each_run(page: str) -> None:
    head, slow, fast = cells(page, "summary")
    last = sum(range(STEPS - 9, STEPS)) / 9 / STEPS
    figures = dict(zip(head, slow, strict=True))
    assert figures["reward"] == f"{last:.3f}" and figures["steps"] == "30" and figures["steps skipped"] == "1"
    assert figures["best evaluation"] == "0.400 after step 20" and figures["rows left out"] == "2"
    assert (slow[:2], fast[:2]) == (["slow", "train"], ["fast", "sft"])


def test_only_settings_that_differ_are_compared(page: str, two: list[Path]) -> None:
    assert cells(page, "settings") == [
        ["setting", "slow", "fast"],
        ["clip", "[0.2, 0.2]", "[0.2, 0.28]"],
        ["lr", "1e-06", "1e-05"],
    ]
    assert differing(read_runs(two[:1])) == {}


def test_time_is_shared_out_over_phases(page: str) -> None:
    _, *rows = cells(page, "costs")
    shown = {name: values for name, *values in rows}
    assert shown["rollout"] == ["2.000 s (50%)"] * 2 and shown["all phases"] == ["4.000 s"] * 2
    assert shown["tokens/s"] == ["120.0"] * 2 and shown["peak memory"] == ["3.50 GiB"] * 2


def test_throughput_and_memory_are_drawn_over_the_steps(two: list[Path], tmp_path: Path) -> None:
    """Of a step that a resumed run repeated, what its last time took; lines of other stages have no step."""
    run = shutil.copytree(two[0], tmp_path / "run")
    (whole,) = read_runs([run])
    assert whole.cost("tokens_per_s") == ([1, 2], [120.0, 120.0]) and whole.cost("peak_gib")[1] == [3.5, 3.5]
    without = curves([whole])
    again = {"stage": "step", "step": 1, "tokens_per_s": 80.0, "peak_gib": 4.0}
    with (run / "timings.jsonl").open("a") as file:
        file.write(json.dumps(again) + "\n")
    (repeated,) = read_runs([run])
    assert repeated.cost("tokens_per_s") == ([1, 2], [120.0, 80.0]) and repeated.cost("none") == ([], [])
    drawn = curves([repeated])
    assert drawn is not None and drawn != without
    texts = base64.b64decode(drawn.partition(",")[2]).decode()
    assert "<!-- Throughput -->" in texts and "<!-- Memory -->" in texts and "<!-- Reward -->" in texts


def test_rows_left_out_are_listed_with_their_reasons(page: str) -> None:
    assert page.count("none.mp4: no &lt;such&gt; file") == 4 and "unsolved" in page
    assert "slow: 2 entries" in page


def test_the_heat_map_colours_tokens_and_outlines_the_answer(page: str) -> None:
    found = re.findall(r'--l:([\d.]+);--e:([\d.]+)" title="([^"]*)">([^<]*)</span>', page)
    low, spread, note, text = found[1]
    assert (float(low), float(spread), text) == (2.5 / DARKEST["logp"], 1.5 / DARKEST["entropy"], "a")
    assert unescape(note) == (
        "token 1, 'a'; log-probability -2.500 nats, probability 0.082; entropy 1.500 nats"
    )
    assert [text for *_, text in found[2:4]] == ["↵\n", "·"]
    answers = re.findall(r'<span class="answer"><span class="t"[^>]*>([^<]*)</span></span>', page)
    assert set(answers) == {"a"} and len(answers) == len(found) // 5
    assert "reward <b>1.000</b>" in page and "advantage 0.500" in page


def test_the_prompt_with_the_most_different_rewards_is_chosen() -> None:
    made = [Completion(**completion(r, s, x)) for s in (0, 5, 9) for r, x in ((1, 0.5), (2, 0.0), (2, 1.0))]
    cases = chosen(made)
    assert [(case.step, case.row_id, case.of) for case in cases] == [(0, 2, 2), (9, 2, 2)]
    assert [d.completion.reward for d in cases[0].drawn] == [1.0, 0.0]
    many = [Completion(**completion(1, 0, i)) for i in range(8)]
    (case,) = chosen(many)
    assert [d.completion.reward for d in case.drawn] == [7, 6, 1, 0] and case.of == 8
    assert chosen([]) == []


def test_completions_without_tokens_or_answer_are_text() -> None:
    bare = draw(Completion(id=1, text="a"))
    assert [t.text for t in bare.before] == ["a"] and not bare.answer
    unanswered = draw(Completion(**completion(1, 0, 0.0, answer=None)))
    assert len(unanswered.before) == 5 and not unanswered.answer and not unanswered.after
    assert (unanswered.before[2].low, unanswered.before[2].spread) == (1.0, 1.0)  # beyond the scale
    assert unanswered.before[3].low == 1.0  # NaN


@pytest.mark.parametrize(
    "kept", ["config.yaml", "metrics.jsonl", "timings.jsonl", "completions.jsonl", "none"]
)
def test_partial_runs_are_shown(two: list[Path], tmp_path: Path, kept: str) -> None:
    """A run with one file alone, or with its first line half written; beside a whole one."""
    part = tmp_path / "part"
    part.mkdir()
    if kept == "none":
        shutil.copy(two[0] / "config.yaml", part)
        (part / "metrics.jsonl").write_text('{"stage": "train", "st')
    else:
        shutil.copy(two[0] / kept, part)
    for runs in ([part], [part, two[1]]):
        page = report_runs(runs, tmp_path / "page.html").read_text()
        assert "part" in page and not re.search(r"(src|href)=\"(?!data:)", page)
        assert ("No step is recorded yet" in page) == (len(runs) == 1 and kept != "metrics.jsonl")


def test_one_line_is_enough(two: list[Path], tmp_path: Path) -> None:
    part = tmp_path / "part"
    part.mkdir()
    first = (two[0] / "metrics.jsonl").read_text().splitlines()[0]
    (part / "metrics.jsonl").write_text(first + '\n{"torn')
    page = report_runs([part]).read_text()
    assert dict(zip(*cells(page, "summary"), strict=True))["steps"] == "1"


def test_more_rows_left_out_than_a_page_takes_are_counted(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_lines(
        run / "quarantine.jsonl",
        [{"id": i, "path": "", "reason": "r"} for i in range(MOST_LEFT_OUT + 3)],
    )
    (run / "quarantine-1.jsonl").unlink()
    page = report_runs([run]).read_text()
    assert f"{MOST_LEFT_OUT + 3} entries" in page and "and 3 more" in page
    assert len(cells(page, "left-out")) == MOST_LEFT_OUT + 1


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a/run"), write_run(tmp_path / "b/run"), write_run(tmp_path / "$x$_{")]
    assert [run.name for run in read_runs(runs)] == [str(runs[0]), str(runs[1]), "$x$_{"]
    report_runs(runs)
    with pytest.raises(UserError, match="given twice"):
        report_runs([runs[0], runs[0]])


def test_a_demo_run_keeps_its_own_page(tmp_path: Path) -> None:
    demo = tmp_path / "demo"
    demo.mkdir()
    (demo / "config.json").write_text(json.dumps({"reward": "accuracy"}))
    write_lines(demo / "metrics.jsonl", [{"stage": "grpo", "step": 0, "reward_mean": 0.5}])
    with pytest.raises(UserError, match=r"has the demo's own report.html; name another file with --out"):
        report_runs([demo])
    assert cells(report_runs([demo], tmp_path / "p.html").read_text(), "summary")[1][1:4] == [
        "demo",
        "1",
        "0.500",
    ]


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no such folder; name the `out` folder"),
        ({}, "no run, it has neither config.yaml nor metrics.jsonl"),
        ({"metrics.jsonl": "[]\n"}, r"metrics.jsonl, line 1: got '\[\]', wanted one JSON object"),
        ({"config.yaml": "a: [\n"}, "its settings cannot be read"),
        ({"config.yaml": "- a\n"}, "its settings are list"),
        ({"completions.jsonl": '{"text": "a"}\n'}, "line 1: id"),
    ],
)  # fmt: skip
def test_what_is_no_run_is_named(tmp_path: Path, content: dict[str, str] | None, message: str) -> None:
    folder = tmp_path / "run"
    if content is not None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)
    with pytest.raises(UserError, match=message):
        report_runs([folder])


def test_the_command_writes_where_it_is_told(
    two: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    assert cli.COMMANDS["report"]([*map(str, two), "--out", str(out)]) == 0
    assert out.is_file() and str(out) in capsys.readouterr().out
    with pytest.raises(UserError, match="cannot be written"):
        cli.COMMANDS["report"]([str(two[0]), "--out", str(tmp_path / "none" / "page.html")])


def test_means_of_the_last_steps_pass_over_what_is_not_finite() -> None:
    assert last_mean([]) is None and last_mean([float("nan")]) is None
    assert last_mean([9.0, *[1.0] * 8, float("inf"), 10.0]) == 2.0
    assert (window(3), window(200), window(1000)) == (9, 11, 51)
