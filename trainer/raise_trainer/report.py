"""`report.html`: one self-contained page of a run, drawn from its records and its held-out answers."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from PIL import Image

from .config import DemoConfig
from .evaluate import HeldOut
from .json_lines import read_json_lines
from .logbook import Logbook
from .pages import INK, RIGHT, STYLE, WRONG, data_source, render, running_mean, svg
from .prompts import Prompt
from .world import task_of

CURVES = (  # metric, title, unit on the axis
    ("reward_mean", "Reward", "mean over completions"),
    ("accuracy", "Accuracy", "share right"),
    ("match", "Match", "share that follow their chain"),
    ("completion_tokens_mean", "Length", "tokens"),
    ("entropy", "Entropy", "nats per token"),
    ("kl", "KL to the reference", "nats per token"),
)
WINDOW = 9  # steps in the running mean drawn over the raw curve


def write_report(
    config: DemoConfig, log: Logbook, prompts: Sequence[Prompt], arms: Mapping[str, HeldOut]
) -> Path:
    """Write `report.html` into the run's folder and return its path.

    arms: name -> held-out answers, `eval_samples` per prompt in the order of `prompts`; the baseline first.
    """
    with plt.rc_context(STYLE):
        figures = {
            "curves": _curves([record for _, record in read_json_lines(log.out / "metrics.jsonl")]),
            "confidence": _confidence(arms),
        }
    summaries = {name: arm.figures for name, arm in arms.items()}
    return render(
        "report.html",
        config.out / "report.html",
        config=config,
        questions=len(prompts),
        summaries=summaries,
        headline=[key for key in next(iter(summaries.values())) if "/" not in key],
        tasks=sorted({task_of(p.row.data_source) for p in prompts}),
        figures=figures,
        samples=_samples(config, prompts, arms),
    )


def _curves(records: Sequence[Mapping[str, Any]]) -> str:
    steps = [r for r in records if r["stage"] == "grpo"]
    figure, axes = plt.subplots(2, 3, figsize=(10, 4.6), layout="constrained")
    for axis, (key, title, unit) in zip(axes.flat, CURVES, strict=True):
        x = [r["step"] + 1 for r in steps]
        y = [r[key] for r in steps]
        axis.plot(x, y, color=INK, alpha=0.25, linewidth=1)
        axis.plot(x, running_mean(y, WINDOW), color=INK, linewidth=1.8)
        axis.set_title(title, loc="left", fontweight="bold")
        axis.set_ylabel(unit)
        axis.set_xlabel("GRPO step")
    return svg(figure)


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
    return svg(figure)


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
    return data_source(buffer.getvalue(), "png")
