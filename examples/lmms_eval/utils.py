"""lmms-eval tasks that prompt, read answers and score as `raise-core eval` does.

Written for lmms-eval 0.7.2 (75571cf): `process_results(doc, results)` gets a row and a list with one output,
`doc_to_text(doc, lmms_eval_specific_kwargs)` gives the prompt, an aggregation gets the list of one metric's
values. Not run with lmms-eval; the tests call these functions as it does.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from raise_trainer.benchmarks.load import BENCHMARKS
from raise_trainer.benchmarks.questions import Question, question
from raise_trainer.benchmarks.scoring import SCORERS, grade
from raise_trainer.errors import BadRow
from raise_trainer.prompt_template import load_template

Doc = Mapping[str, Any]


def _question(bench: str, label: str, doc: Doc) -> Question:
    """A published row as a question; where its video lies is lmms-eval's to know. BadRow."""
    return question(BENCHMARKS[bench].draft(doc, label, 0, Path()), Path(), 0, bench)


def _text(bench: str, label: str = "") -> Callable[..., str]:
    def doc_to_text(doc: Doc, lmms_eval_specific_kwargs: Mapping[str, Any] | None = None) -> str:
        name = (lmms_eval_specific_kwargs or {}).get("template", "think")
        try:
            return load_template(name).render(_question(bench, label, doc))
        except BadRow:  # it scores 0; an error would end the run
            return str(doc.get("question"))

    return doc_to_text


def _results(bench: str, label: str = "") -> Callable[[Doc, Sequence[str]], dict[str, Any]]:
    def process_results(doc: Doc, results: Sequence[str]) -> dict[str, Any]:
        """For each metric a value with score, task, group, video and reason; a bad row scores 0."""
        try:
            row = _question(bench, label, doc)
        except BadRow:
            about = {"task": BENCHMARKS[bench].task_of(doc, label), "video": "", "reason": "bad_row"}
            scores = dict.fromkeys(SCORERS, 0.0)
        else:
            graded = grade(row, results[0])
            about = {"task": row.task, "video": row.video, "reason": graded.reason}
            scores = graded.scores
        about["group"] = BENCHMARKS[bench].group(str(about["task"]))
        by_scorer = {name: {"score": score, **about} for name, score in scores.items()}
        return {
            f"{name}_{mean}": by_scorer[name] for name in SCORERS for mean in ("sample_mean", "macro_mean")
        }

    return process_results


def sample_mean(results: Sequence[Mapping[str, Any]]) -> float:
    """Mean over questions, in [0, 1]; unanswered ones count."""
    return fmean(one["score"] for one in results)


def macro_mean(results: Sequence[Mapping[str, Any]]) -> float:
    """Mean over groups of the mean of their tasks' means, in [0, 1]."""
    tasks: dict[tuple[str, str], list[float]] = {}
    for one in results:
        tasks.setdefault((one["group"], one["task"]), []).append(one["score"])
    groups: dict[str, list[float]] = {}
    for (group, _), scores in tasks.items():
        groups.setdefault(group, []).append(fmean(scores))
    return fmean(fmean(means) for means in groups.values())


vsibench_text, vsibench_results = _text("vsibench"), _results("vsibench")
videomme_text, videomme_results = _text("videomme"), _results("videomme")
mmvu_text, mmvu_results = _text("mmvu"), _results("mmvu")
perception_text, perception_results = _text("videommmu", "perception"), _results("videommmu", "perception")
comprehension_text = _text("videommmu", "comprehension")
comprehension_results = _results("videommmu", "comprehension")
adaptation_text, adaptation_results = _text("videommmu", "adaptation"), _results("videommmu", "adaptation")
multi_choice_text, multi_choice_results = (
    _text("tempcompass", "multi-choice"),
    _results("tempcompass", "multi-choice"),
)
yes_no_text, yes_no_results = _text("tempcompass", "yes_no"), _results("tempcompass", "yes_no")
caption_text, caption_results = (
    _text("tempcompass", "caption_matching"),
    _results("tempcompass", "caption_matching"),
)
