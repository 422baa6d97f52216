"""Means, intervals and votes, against values computed by hand and a plain bootstrap."""

import io
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from raise_trainer.benchmarks.answers import (
    Answer,
    AnswerFile,
    check_settings,
    read_answers,
)
from raise_trainer.benchmarks.load import load
from raise_trainer.benchmarks.page import lines, note, show, write
from raise_trainer.benchmarks.results import majority, means_of, summarise
from raise_trainer.benchmarks.settings import EvalSettings
from raise_trainer.errors import UserError
from tests.budget import assert_at_most, assert_equal_but_for_roundings

ROWS = Path(__file__).with_name("benchmark_rows")
SETTINGS = EvalSettings(model="m", bench=("vsibench",), data=ROWS, out=Path("o"))


def answer(row_id: str, task: str = "t", video: str = "v", score: float = 0.0, **other: Any) -> Answer:
    given: dict[str, Any] = {
        "bench": "vsibench", "id": row_id, "sample": 0, "task": task, "video": video,
        "problem_type": "regression", "question": "?", "solution": "4", "text": "", "prediction": "x",
        "vote": "x", "reason": None, "detail": "", "scores": {"video_r1": score / 2, "official": score},
        "tokens": 3, "truncated": False,
    }  # fmt: skip
    return Answer(**given | other)


def close(actual: object, wanted: object) -> None:
    """Up to the roundings of sums in another order."""
    a, w = (torch.tensor(np.asarray(x, float)) for x in (actual, wanted))
    assert_equal_but_for_roundings(a, w, name="mean")


def test_vsi_bench_macro_mean_averages_directions_first() -> None:
    loaded = load("vsibench", ROWS)
    # the ten question types in the order of the file; directions are numbers 5, 6, 7
    scores = [1.0, 0.5, 0.0, 0.25, 1.0, 1.0, 0.0, 0.5, 0.0, 1.0]
    given = {
        (a.bench, a.id, 0): a
        for a in (answer(i.id, i.task, i.video, s) for i, s in zip(loaded.items, scores, strict=True))
    }
    found = summarise(loaded, given, 1, ("official", "video_r1"))
    close(found.sample_mean["official"].mean, 5.25 / 10)
    close(found.macro_mean["official"].mean, (1 + 0.5 + 0 + 0.25 + 1 + 0.5 + 0 + 1) / 8)
    close(found.macro_mean["video_r1"].mean, 4.25 / 16)
    assert (found.questions, found.videos, len(found.tasks), found.answered) == (10, 4, 10, 1.0)
    assert found.votes == {} and found.unusable == []


def test_a_macro_mean_over_other_tasks_than_the_eight_is_said_to_be_one() -> None:
    """Video-R1's rows may name no question type; the figure is then not VSI-Bench's."""
    for folder, said in ((ROWS / "video_r1", "Its macro mean is over 1"), (ROWS, "")):
        loaded = load("vsibench", folder)
        given = {(a.bench, a.id, 0): a for a in (answer(i.id, i.task, i.video) for i in loaded.items)}
        text = note(summarise(loaded, given, 1, ("official",)))
        assert said in text and ("macro" in text) == bool(said)


def test_what_has_no_answer_stays_in_every_denominator() -> None:
    loaded = load("vsibench", ROWS, limit=4)
    answers = [answer(i.id, "t", f"v{i.id}", 1.0) for i in loaded.items]
    answers[1] = replace(answers[1], reason="empty", vote="", prediction="", scores=_zero())
    answers[2] = replace(
        answers[2], reason="bad_media", vote="", prediction="", scores=_zero(), detail="gone"
    )
    found = summarise(loaded, {a.key: a for a in answers}, 1, ("official",))
    assert found.sample_mean["official"].mean == found.macro_mean["official"].mean == 0.5
    assert found.answered == 0.5 and found.tasks[0].answered == 0.5
    assert found.unusable == [{"id": "2", "reason": "bad_media", "detail": "gone"}]
    with pytest.raises(KeyError):
        summarise(loaded, {a.key: a for a in answers[1:]}, 1, ("official",))


def _zero() -> dict[str, float]:
    return {"video_r1": 0.0, "official": 0.0}


@pytest.mark.parametrize(
    ("votes", "winner"),
    [
        ("B", 0),
        ("ABB", 1),
        ("AB", 0),  # a tie: the one that came first
        ("BAAB", 0),
        (" AB", 1),  # the first could not be read
        ("  ", 0),  # none could
        ("CABAB", 1),
    ],
)
def test_the_majority_and_its_ties(votes: str, winner: int) -> None:
    answers = [answer("0", sample=s, vote=v.strip()) for s, v in enumerate(votes)]
    assert majority(answers).sample == winner


def test_several_samples_are_averaged_and_voted_on() -> None:
    loaded = load("vsibench", ROWS, limit=2)
    said = {"0": [(0, "3"), (1, "4"), (1, "4")], "1": [(0, "1"), (1, "2"), (0, "")]}
    answers = [
        answer(row, video=row, score=s, sample=n, vote=v)
        for row, some in said.items()
        for n, (s, v) in enumerate(some)
    ]
    found = summarise(loaded, {a.key: a for a in answers}, 3, ("official",))
    close(found.sample_mean["official"].mean, (2 / 3 + 1 / 3) / 2)
    assert found.votes["official"].mean == 0.5  # 4 wins; of 1 and 2 the first
    close(found.answered, 5 / 6)


def plain_bootstrap(values: Any, tasks: Any, videos: Any, resamples: int, seed: int) -> Any:
    """The same draws, resampled row by row."""
    names, clusters = list(dict.fromkeys(tasks)), list(dict.fromkeys(videos))
    source, found = np.random.default_rng(seed), []
    drawn = source.integers(0, len(clusters), (resamples, len(clusters)))
    for draw in drawn:
        rows = [
            (v, t)
            for c in draw
            for v, t, video in zip(values, tasks, videos, strict=True)
            if video == clusters[c]
        ]
        by_task = [[v for v, t in rows if t == name] for name in names]
        found.append((np.mean([v for v, _ in rows]), np.mean([np.mean(s) for s in by_task if s])))
    return np.quantile(np.array(found), [0.025, 0.975], axis=0)


def test_intervals_are_those_of_resampled_videos() -> None:
    source = np.random.default_rng(3)
    n, resamples = 40, 100
    values = source.integers(0, 2, n).astype(float)
    tasks, videos = [f"t{i % 3}" for i in range(n)], [f"v{i}" for i in source.integers(0, 9, n)]
    found = means_of(values, tasks, videos, resamples=resamples, seed=5)
    wanted = plain_bootstrap(values, tasks, videos, resamples, 5)
    got = [[found.sample.low, found.macro.low], [found.sample.high, found.macro.high]]
    close(got, wanted)
    again = means_of(values, tasks, videos, resamples=resamples, seed=5)
    assert again == found
    assert found.sample.low is not None and found.sample.low < found.sample.mean


def test_questions_of_one_video_do_not_make_the_interval_narrow() -> None:
    """100 questions about 4 videos, each all right or all wrong: as wide as 4 answers."""
    values = np.repeat([1.0, 0.0, 1.0, 0.0], 25)
    clustered = means_of(values, ["t"] * 100, [f"v{i // 25}" for i in range(100)]).sample
    alone = means_of(values, ["t"] * 100, [f"v{i}" for i in range(100)]).sample
    assert (clustered.low, clustered.high) == (0.0, 1.0)
    assert alone.low is not None and alone.high is not None and 0.35 < alone.low < alone.high < 0.65


def test_one_video_has_no_interval_and_equal_values_have_one_of_no_width() -> None:
    assert means_of(np.array([1.0, 0.0]), ["a", "b"], ["v", "v"]).sample.low is None
    same = means_of(np.array([1.0, 1.0]), ["a", "a"], ["v", "w"])
    assert (same.sample.low, same.macro.high, same.tasks["a"].low) == (1.0, 1.0, 1.0)


def test_a_task_about_one_video_has_no_interval() -> None:
    """Resampled videos bring all of its questions or none: each mean is the same, which says nothing."""
    found = means_of(np.array([1.0, 0.0, 1.0, 0.0]), ["a", "a", "b", "b"], ["v", "v", "v", "w"])
    assert (found.tasks["a"].mean, found.tasks["a"].low, found.tasks["a"].high) == (0.5, None, None)
    assert (found.tasks["b"].low, found.tasks["b"].high) == (0.0, 1.0)
    assert found.macro.low is not None and found.sample.low is not None


ROW = st.tuples(st.floats(0, 1), st.sampled_from("ab"), st.sampled_from("xyz"))


@given(st.lists(ROW, min_size=1, max_size=20))
def test_an_interval_holds_only_means_that_can_be(rows: list[tuple[float, str, str]]) -> None:
    values, tasks, videos = (list(column) for column in zip(*rows, strict=True))
    found = means_of(np.array(values), tasks, videos, resamples=50)
    for one in (found.sample, found.macro, *found.tasks.values()):
        known = [one.mean] if one.low is None or one.high is None else [one.low, one.mean, one.high]
        for figure in known:
            assert_at_most(torch.tensor(figure, dtype=torch.float64), max(values), name="mean")
            assert_at_most(torch.tensor(min(values), dtype=torch.float64), figure, name="mean")
        assert known[0] <= known[-1]


def test_answers_come_back_as_they_were_written_and_a_torn_line_is_dropped(tmp_path: Path) -> None:
    file = AnswerFile(tmp_path)
    written = [answer("0"), answer("0", sample=1, answer_p_min=0.25), answer("1", text="ä\n")]
    file.append(written[:2])
    AnswerFile(tmp_path, 1).append(written[2:])
    assert list(read_answers(tmp_path).values()) == written
    whole = file.file.read_bytes()
    for cut in (1, 30, len(whole.splitlines(keepends=True)[1]) - 1):
        file.file.write_bytes(whole[:-cut])
        again = AnswerFile(tmp_path)
        assert [a.key for a in read_answers(tmp_path).values()] == [written[0].key, written[2].key]
        again.append([written[1]])
        assert set(read_answers(tmp_path)) == {a.key for a in written}


def test_of_two_answers_the_later_counts_but_none_that_could_not_be_asked(tmp_path: Path) -> None:
    bad, good, better = answer("0", reason="bad_media"), answer("0"), answer("0", score=1.0)
    AnswerFile(tmp_path, 1).append([bad])
    AnswerFile(tmp_path).append([good, better])
    assert list(read_answers(tmp_path).values()) == [better]


def test_a_file_of_other_records_is_named(tmp_path: Path) -> None:
    record = asdict(answer("0"))
    del record["vote"]
    (tmp_path / "answers.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(UserError, match=r"answers\.jsonl, line 1: .*fields vote"):
        read_answers(tmp_path)


def test_a_folder_keeps_to_its_settings(tmp_path: Path) -> None:
    out = tmp_path / "run"
    check_settings(out, {"frames": 16, "data/mmvu": 1})
    check_settings(out, {"frames": 16, "data/vsibench": 2})
    with pytest.raises(UserError, match="frames was 16, is 32"):
        check_settings(out, {"frames": 32})
    with pytest.raises(UserError, match="data/mmvu was 1, is 3"):
        check_settings(out, {"frames": 16, "data/mmvu": 3})
    with pytest.raises(UserError, match="no evaluation"):
        check_settings(tmp_path, {"frames": 16})
    (out / "settings.json").write_text("[]")
    with pytest.raises(UserError, match="holds list, expected an object"):
        check_settings(out, {"frames": 16})
    (out / "settings.json").unlink()
    (out / "settings.tmp").write_text("{half")
    check_settings(out, {"frames": 16})
    assert json.loads((out / "settings.json").read_text()) == {"frames": 16}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"samples": 2}, "--samples 2 at temperature 0"),
        ({"samples": 0, "temperature": 1.0}, "--samples 0"),
        ({"batch": 0}, "--batch 0"),
        ({"temperature": -1.0}, "--temperature -1"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"temperature": float("inf")}, "--temperature inf"),
        ({"frames": 1}, "--frames 1: expected at least 2"),
        ({"limit": 0}, "--limit 0"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        replace(SETTINGS, **changes)


def test_the_page_and_the_json_have_every_figure(tmp_path: Path) -> None:
    loaded = load("mvbench", ROWS)
    answers = [
        answer(i.id, i.task, i.video, 1.0, bench="mvbench", sample=s, reason="bad_media" if n == 1 else None,
               detail="<gone> & lost")
        for n, i in enumerate(loaded.items) for s in range(2)
    ]  # fmt: skip
    result = summarise(loaded, {a.key: a for a in answers}, 2, ("video_r1", "official"))
    page = write(replace(SETTINGS, out=tmp_path, samples=2, temperature=0.5), [result]).read_text()
    assert "MVBench" in page and "&lt;gone&gt;" in page and "majority of 2" in page
    for name, _, _, figures in lines(result):
        assert name in page and all(figure in page for figure in figures)
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["settings"]["samples"] == 2
    assert written["results"][0]["macro_mean"]["official"]["mean"] == 1.0
    assert written["results"][0]["tasks"][0]["scores"]["video_r1"]["mean"] == 0.5
    said = io.StringIO()
    show([result], Console(file=said, width=200))
    assert "all tasks (macro mean)" in said.getvalue() and "No file for action_prediction" in said.getvalue()
