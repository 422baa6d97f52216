"""docs/study.md: prose written by hand, around tables and figures that are filled in from the results.

A generated part stands between `<!-- results: NAME -->` and `<!-- end -->`; everything else is left alone. A
page that is not there yet is begun with a heading for each part.
"""

import re
from pathlib import Path

from ..errors import UserError
from . import tables
from .records import Results

PART = re.compile(r"(<!-- results: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
HEADINGS = {
    "settings": "What was run",
    "accuracy": "Main table: accuracy",
    "gains": "Against the warm start",
    "consistency": "Consistency table",
    "match": "Match",
    "answer": "Answer",
    "confidence": "Confidence",
    "smallest": "The smallest difference that could have been seen",
    "tasks": "By kind of question",
    "compute": "Compute",
    "exploratory": "Exploratory",
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
    """Fill in the page from a results folder and draw its figures beside it, in `figures/`.

    UserError without results, for an unknown part, and for a page that has no part at all.
    """
    from .figures import FIGURES

    results = Results(folder)
    made = parts(results, Path("figures"))
    text = page.read_text(encoding="utf-8") if page.exists() else _skeleton()
    named = [match[2] for match in PART.finditer(text)]
    for name in named:
        if name not in made:
            raise UserError(f"{page}: part {name!r} is unknown; known are {', '.join(made)}")
    if not named:
        raise UserError(f"{page}: has no `<!-- results: NAME -->` to fill in; name another page")
    text = PART.sub(lambda match: f"{match[1]}\n{made[match[2]]}\n\n{match[3]}", text)
    try:
        (page.parent / "figures").mkdir(parents=True, exist_ok=True)
        for name, draw in FIGURES.items():
            draw(tables.Found(results.records()), page.parent / "figures" / f"{name}.svg")
        page.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{page}: cannot be written ({error.strerror}); name another page") from None
    return page


def _skeleton() -> str:
    made = [f"## {title}\n\n<!-- results: {name} -->\n<!-- end -->\n" for name, title in HEADINGS.items()]
    return "# The study in miniature\n\n" + "\n".join(made)
