"""`report.html`: one self-contained page of a run, drawn from its records and its held-out answers."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from PIL import Image

from .config import DemoConfig
from .evaluate import HeldOut
from .logbook import Logbook
from .prompts import Prompt
from .world import task_of

matplotlib.use("Agg")
from matplotlib import pyplot as plt

INK, RIGHT, WRONG = "#1f3a5f", "#2a7f62", "#c8553d"
CURVES = (  # metric, title, unit on the axis
    ("reward_mean", "Reward", "mean over completions"),
    ("accuracy", "Accuracy", "share right"),
    ("match", "Match", "share that follow their chain"),
    ("completion_tokens_mean", "Length", "tokens"),
    ("entropy", "Entropy", "nats per token"),
    ("kl", "KL to the reference", "nats per token"),
)
WINDOW = 9  # steps in the running mean drawn over the raw curve
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "svg.hashsalt": "raise-core"}


def write_report(
    config: DemoConfig, log: Logbook, prompts: Sequence[Prompt], arms: Mapping[str, HeldOut]
) -> Path:
    """Write `report.html` into the run's folder and return its path.

    arms: name -> held-out answers, `eval_samples` per prompt in the order of `prompts`; the baseline first.
    """
    path = config.out / "report.html"
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("raise_trainer"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    with plt.rc_context(STYLE):
        figures = {"curves": _curves(log.records), "confidence": _confidence(arms)}
    summaries = {name: arm.figures for name, arm in arms.items()}
    page = environment.get_template("report.html").render(
        config=config,
        questions=len(prompts),
        summaries=summaries,
        headline=[key for key in next(iter(summaries.values())) if "/" not in key],
        tasks=sorted({task_of(p.row.data_source) for p in prompts}),
        figures=figures,
        samples=_samples(config, prompts, arms),
    )
    path.write_text(page, encoding="utf-8")
    return path


def _svg(figure: Any) -> str:
    """The drawing as an <img> source, so that the page needs no other file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _curves(records: Sequence[Mapping[str, Any]]) -> str:
    steps = [r for r in records if r["stage"] == "grpo"]
    figure, axes = plt.subplots(2, 3, figsize=(10, 4.6), layout="constrained")
    for axis, (key, title, unit) in zip(axes.flat, CURVES, strict=True):
        x = [r["step"] + 1 for r in steps]
        y = [r[key] for r in steps]
        axis.plot(x, y, color=INK, alpha=0.25, linewidth=1)
        axis.plot(x, _running_mean(y), color=INK, linewidth=1.8)
        axis.set_title(title, loc="left", fontweight="bold")
        axis.set_ylabel(unit)
        axis.set_xlabel("GRPO step")
    return _svg(figure)


def _running_mean(values: Sequence[float]) -> list[float]:
    half = WINDOW // 2
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(w) / len(w) for w in windows]


def _confidence(arms: Mapping[str, HeldOut]) -> str:
    figure, axes = plt.subplots(1, len(arms), figsize=(10, 2.8), layout="constrained", sharey=True)
    for axis, (name, arm) in zip(axes, arms.items(), strict=True):
        for right, colour, label in ((True, RIGHT, "right"), (False, WRONG, "wrong")):
            values = [a.confidence for a in arm.answered if a.right == right]
            axis.hist(
                values, bins=30, range=(0, 1), color=colour, alpha=0.6, label=f"{label} ({len(values)})"
            )
        axis.set_title(name, loc="left", fontweight="bold")
        axis.set_xlabel("answer confidence: geometric mean probability of its tokens")
        axis.legend(frameon=False)
    axes[0].set_ylabel("completions")
    return _svg(figure)


def _samples(
    config: DemoConfig, prompts: Sequence[Prompt], arms: Mapping[str, HeldOut]
) -> list[dict[str, Any]]:
    """One held-out question of every kind: its frames, and the first three completions of each arm."""
    first_of: dict[str, int] = {}
    for i, prompt in enumerate(prompts):
        first_of.setdefault(prompt.row.data_source, i)
    n = config.eval_samples
    return [
        {
            "prompt": prompts[i],
            "frames": _strip(prompts[i]),
            "solution": "; ".join(prompts[i].row.references) or prompts[i].row.solution,
            "arms": {name: arm.answered[i * n : i * n + min(3, n)] for name, arm in arms.items()},
        }
        for i in first_of.values()
    ]


def _strip(prompt: Prompt) -> str:
    """The sampled frames side by side, as an <img> source."""
    frames = prompt.thumbnails
    strip = frames.permute(1, 0, 2, 3).flatten(1, 2).numpy()  # [H, F*W, 3]
    buffer = io.BytesIO()
    Image.fromarray(strip).save(buffer, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
