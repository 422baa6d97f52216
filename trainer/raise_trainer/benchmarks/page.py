"""Results on the console, as JSON, and as a page that needs no other file."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..pages import render
from .load import BENCHMARKS
from .results import Result
from .settings import EvalSettings

VSI_TASKS = 8
MOST_UNUSABLE = 200  # listed on the page


def lines(result: Result) -> Iterator[tuple[str, str, str, list[str]]]:
    """Rows of a benchmark's table: name, questions, share answered, and the figures by column."""
    for task in result.tasks:
        figures = [*task.scores.values(), *task.votes.values()]
        yield task.task, str(task.questions), f"{task.answered:.1%}", list(map(str, figures))
    count = str(result.questions)
    for name, means, votes in (
        ("all questions (sample mean)", result.sample_mean, result.votes),
        ("all tasks (macro mean)", result.macro_mean, result.macro_votes),
    ):
        yield name, count, f"{result.answered:.1%}", list(map(str, [*means.values(), *votes.values()]))


def columns(result: Result) -> list[str]:
    """Names of the columns of figures: scorers, then scorers of the majority's answer."""
    return [*result.sample_mean, *(f"{name}, majority of {result.samples}" for name in result.votes)]


def note(result: Result) -> str:
    """What a reader of the figures has to know."""
    form = "the published files" if result.source == "published" else f"Video-R1's eval_{result.bench}.json"
    parts = [
        f"{result.questions} questions about {result.videos} videos, from {form}.",
        f"{result.untagged:.1%} of the outputs without an answer inside tags, {result.truncated:.1%} cut at "
        f"the limit, {len(result.unusable)} questions could not be asked and score 0.",
    ]
    groups = len({BENCHMARKS[result.bench].group(task.task) for task in result.tasks})
    if result.bench == "vsibench" and groups != VSI_TASKS:
        parts.append(
            f"Its macro mean is over {groups} tasks, VSI-Bench's over {VSI_TASKS}: do not compare them."
        )
    if result.missing:
        parts.append(f"No file for {', '.join(result.missing)}: the means are without them.")
    return " ".join(parts)


def show(results: Sequence[Result], console: Console | None = None) -> None:
    """A table for each benchmark."""
    console = console or Console(highlight=False)
    for result in results:
        table = Table(title=Text(f"{result.title}"), title_justify="left", show_edge=False)
        for i, name in enumerate(("task", "questions", "answered", *columns(result))):
            table.add_column(name, justify="right" if i else "left", overflow="fold")
        for name, count, answered, figures in lines(result):
            table.add_row(*map(Text, (name, count, answered, *figures)))
        console.print(table)
        console.print(note(result), markup=False, soft_wrap=True)


def write(settings: EvalSettings, results: Sequence[Result]) -> Path:
    """results.json and results.html in the evaluation's folder; returns the page."""
    made = {
        "model": settings.model, "frames": settings.frames, "pixels": settings.pixels,
        "template": settings.template, "temperature": settings.temperature, "samples": settings.samples,
        "max_new_tokens": settings.max_new_tokens, "seed": settings.seed, "limit": settings.limit,
        "dtype": settings.dtype, "attention": settings.attention,
    }  # fmt: skip
    text = json.dumps({"settings": made, "results": [r.as_json() for r in results]}, indent=1)
    (settings.out / "results.json").write_text(text + "\n", encoding="utf-8")
    shown = [
        {
            "title": result.title, "note": note(result), "columns": columns(result),
            "lines": list(lines(result)), "unusable": result.unusable[:MOST_UNUSABLE],
            "left": max(len(result.unusable) - MOST_UNUSABLE, 0),
        }
        for result in results
    ]  # fmt: skip
    return render("eval.html", settings.out / "results.html", settings=made, results=shown)
