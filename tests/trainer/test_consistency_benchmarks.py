"""Every question of every benchmark, back from the line that an evaluation writes of its answer."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from raise_trainer.benchmarks.answers import Answer
from raise_trainer.benchmarks.load import BENCHMARKS, load
from raise_trainer.benchmarks.questions import Question
from raise_trainer.benchmarks.scoring import grade
from raise_trainer.consistency.match import disagreement, score_of
from raise_trainer.consistency.records import read_answers

ROWS = Path(__file__).parent / "benchmark_rows"
SAID = ("B", "(A) no", "the answer is C.", "yes", "Sentence A", "3", "about two metres", "0.5", "nothing")


def answered(item: Question, text: str, sample: int) -> Answer:
    graded = grade(item, text)
    return Answer(
        bench=item.bench, id=item.id, sample=sample, task=item.task, video=item.video,
        problem_type=item.problem_type, question=item.question, solution=item.solution, text=text,
        prediction=graded.prediction, vote=graded.vote, reason=graded.reason, detail="", scores=graded.scores,
        tokens=3, truncated=False, answer_p_mean=0.5, answer_p_min=0.25, answer_logp_mean=-1.0,
        sequence_logp_mean=-2.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "folder"),
    [*((name, ROWS) for name in BENCHMARKS), ("mmvu", ROWS / "video_r1"), ("vsibench", ROWS / "video_r1")],
)
def test_questions_come_back(name: str, folder: Path, tmp_path: Path) -> None:
    items = [item for item in load(name, folder).items if isinstance(item, Question)]
    assert items
    written = [answered(i, f"<answer>{text}</answer>", n) for i in items for n, text in enumerate(SAID)]
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(asdict(one)) + "\n" for one in written))
    found, left_out = read_answers(file, {})
    assert not left_out and len(found) == len(written)
    of = {item.id: item for item in items}
    for one, line in zip(found, written, strict=True):
        item, row = of[line.id], one.row
        assert isinstance(row, Question)
        assert (row.rule, row.options, row.question) == (item.rule, item.options, item.question)
        assert one.score == line.scores["official"] and one.answer == line.prediction
        assert one.video == item.video and one.confidence.min_p == 0.25
        for text in SAID:
            assert (
                score_of(row, f"<answer>{text}</answer>")
                == grade(item, f"<answer>{text}</answer>").scores["official"]
            )
            assert disagreement(row, line.prediction, text) == disagreement(item, line.prediction, text)
