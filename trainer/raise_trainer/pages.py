"""What the pages of a demo run and of `raise-core report` share: templates, drawings, style."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from .errors import UserError

INK, RIGHT, WRONG = "#1f3a5f", "#2a7f62", "#c8553d"
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "svg.hashsalt": "raise-core"}


def svg(figure: Any) -> str:
    """The drawing as an <img> source, so that the page needs no other file; the figure is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    return data_source(buffer.getvalue(), "svg+xml")


def data_source(image: bytes, kind: str) -> str:
    """The bytes of an image as an <img> source; kind: "png", "svg+xml"."""
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of the `window` (odd) values around each; fewer at both ends."""
    half = window // 2
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(w) / len(w) for w in windows]


def render(template: str, path: Path, **values: Any) -> Path:
    """Fill a page of `templates/` and write it; text is escaped. UserError where it cannot be written."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("raise_trainer"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template(template).render(**values)
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); name another file") from None
    return path
