"""docs/study.md: prose written by hand, around tables and figures that are filled in from the results.

A generated part stands between `<!-- results: NAME -->` and `<!-- end -->`; everything else is left alone. A
page that is not there yet is begun with a heading for each part.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from ..errors import UserError
from . import tables
from .records import Results

Draw = Callable[[Path], None]
PART = re.compile(r"(<!-- results: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
HEADINGS = {
    "settings": "What was run",
    "accuracy": "Main table: accuracy",
    "gains": "Against the warm start",
    "consistency": "Consistency table",
    "rivals": "Between the rewards that ask for confidence",
    "match": "Match",
    "answer": "Answer",
    "confidence": "Confidence",
    "smallest": "The smallest difference that could have been seen",
    "tasks": "By kind of question",
    "compute": "Compute",
    "exploratory": "Exploratory",
    "chain-of-step": "Chain-of-Step",
    "study-accuracy-match": "Accuracy against Match",
    "study-training": "Training",
}


def parts(results: Results, figures: Path) -> dict[str, str]:
    """Every generated part by name; figures: folder of the drawings, as the page links it."""
    records, sizes = results.records(), results.settings()
    if not records:
        raise UserError(f"--results {results.folder}: no run is finished yet")
    found = tables.Found(records)
    made = {metric: tables.metric_table(found, metric) for metric in tables.METRICS}
    return {
        "settings": tables.settings(records, sizes),
        **made,
        "gains": tables.gains(found),
        "consistency": tables.consistency(found),
        "rivals": tables.rivals(found),
        "smallest": tables.smallest(found),
        "tasks": tables.tasks(found),
        "compute": tables.compute(found, results.operations()),
        "exploratory": tables.exploratory(found) or "No exploratory run is recorded yet.",
        **{
            name: f"![{HEADINGS[name]}]({figures.as_posix()}/{name}.svg)"
            for name in ("study-accuracy-match", "study-training")
        },
    }


def write_page(folder: Path, page: Path) -> Path:
    """Fill in the page from a results folder, and that of the same name with `-steps` if it is there.

    UserError without results, for an unknown part, and for a page that has no part at all.
    """
    from .figures import FIGURES

    results, (text, draw) = Results(folder), steps_part(folder.with_name(f"{folder.name}-steps"))
    made = parts(results, Path("figures")) | text
    found = tables.Found(results.records())
    return fill(page, made, {name: partial(one, found) for name, one in FIGURES.items()} | draw)


def write_steps(folder: Path, page: Path) -> Path:
    """Fill in the part on chains of steps alone, from its own results folder."""
    return fill(page, *steps_part(folder))


def steps_part(folder: Path) -> tuple[dict[str, str], dict[str, Draw]]:
    """The part on chains of steps, and its figure where a run is recorded."""
    from . import steps_page

    drawn: dict[str, Draw] = {}
    if steps_page.recorded(folder):
        drawn[steps_page.FIGURE] = partial(steps_page.draw, folder)
    return {steps_page.PART: steps_page.part(folder, Path("figures"))}, drawn


def fill(page: Path, made: Mapping[str, str], drawings: Mapping[str, Draw]) -> Path:
    """Put these parts into a page, and draw its figures beside it, in `figures/`; other parts stay.

    UserError for an unknown part, and for a page that has no part at all.
    """
    text = page.read_text(encoding="utf-8") if page.exists() else _skeleton()
    named = [match[2] for match in PART.finditer(text)]
    for name in named:
        if name not in HEADINGS:
            raise UserError(f"{page}: part {name!r} is unknown; known are {', '.join(HEADINGS)}")
    if not named:
        raise UserError(f"{page}: has no `<!-- results: NAME -->` to fill in; name another page")

    def filled(match: re.Match[str]) -> str:
        return f"{match[1]}\n{made[match[2]]}\n\n{match[3]}" if match[2] in made else match[0]

    text = PART.sub(filled, text)
    try:
        (page.parent / "figures").mkdir(parents=True, exist_ok=True)
        for name, draw in drawings.items():
            draw(page.parent / "figures" / f"{name}.svg")
        page.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{page}: cannot be written ({error.strerror}); name another page") from None
    return page


def _skeleton() -> str:
    made = [f"## {title}\n\n<!-- results: {name} -->\n<!-- end -->\n" for name, title in HEADINGS.items()]
    return "# The study in miniature\n\n" + "\n".join(made)
