"""The part of docs/study.md on chains of steps: its tables, and the figure of its curves."""

import statistics as plain
from collections.abc import Sequence
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from ..pages import STYLE, running_mean
from . import tables
from .arms import OUTCOME, STEP_ARMS, Arm
from .records import Record, Results

PART, FIGURE = "chain-of-step", "study-steps"
NONE = "No run is recorded yet."
RESULTS = {  # metric: its column, and the decimals of a mean
    "accuracy": ("accuracy", 3), "accuracy_greedy": ("accuracy, greedy", 3),
    "true_steps": ("steps that are true", 3), "words_found": ("of three words, stated truly", 3),
}  # fmt: skip
SCORES = {
    "prm_reward": ("PRM reward (0.2 steps, 0.8 answer)", 3), "step_score": ("step score", 3),
    "answer_score": ("answer score", 3), "tokens": ("tokens", 1), "steps": ("steps", 2),
}  # fmt: skip
PRM = {
    "own_step_accuracy": "steps judged rightly", "own_good_found": "good steps called good",
    "own_bad_found": "bad steps called bad", "own_bad_share": "steps that are bad",
    "own_answer_accuracy": "answers judged rightly", "own_right_found": "right answers called right",
    "own_wrong_found": "wrong answers called wrong",
}  # fmt: skip
CURVES = {
    "accuracy": "accuracy", "step_score_mean": "step score", "answer_score_mean": "answer score",
    "completion_tokens_mean": "tokens of a completion", "steps_mean": "steps of a chain",
}  # fmt: skip
COLOURS = ("#555555", "#c8553d", "#c9a227", "#3d8fb8", "#2a7f62", "#1f3a5f", "#8a5ca8")
WINDOW = 5  # steps of the running mean, and of the columns of the table over training


def recorded(folder: Path) -> list[Record]:
    """The finished runs of a results folder; none where there is no such folder."""
    return Results(folder).records()


def part(folder: Path, figures: Path) -> str:
    """Tables and figure; figures: folder of the drawings, as the page links it."""
    records = recorded(folder)
    if not records:
        return NONE
    found = tables.Found(records)
    return "\n\n".join(
        [
            _settings(records, Results(folder).settings()),
            _table(found, RESULTS, "held-out questions"),
            _table(found, SCORES, "held-out questions"),
            _over_training(found),
            f"![Chain-of-Step]({figures.as_posix()}/{FIGURE}.svg)",
        ]
    )


def _arms(found: tables.Found, *, trained: bool = False) -> list[Arm]:
    return [a for a in found.arms(list(STEP_ARMS.values())) if a.kind == "grpo" or not trained]


def _settings(records: Sequence[Record], sizes: dict[str, object]) -> str:
    of = {r["seed"]: r["figures"]["prm"] for r in records}
    rates = (f"{title} " + ", ".join(f"{of[s][name]:.3f}" for s in sorted(of)) for name, title in PRM.items())
    lines = [
        "- " + ", ".join(f"{name} {value}" for name, value in sizes.items()),
        f"- the PRM on the warm start's chains of unseen videos, seeds {', '.join(map(str, sorted(of)))}: "
        + "; ".join(rates),
    ]
    return "\n".join([*lines, *tables.made_lines(records)])


def _table(found: tables.Found, metrics: dict[str, tuple[str, int]], first: str) -> str:
    """Means over seeds, each with the paired difference to the outcome's arm."""

    def cell(metric: str, digits: int) -> tables.Cell:
        def of(a: Arm) -> str:
            mean = plain.fmean(found.values(a.name, "held_out", metric))
            change = tables.difference(found.against(OUTCOME, a.name, "held_out", metric))
            return f"{mean:.{digits}f}" + (f" ({change})" if change else "")

        return of

    cells = [cell(metric, digits) for metric, (_, digits) in metrics.items()]
    return tables.table([title for title, _ in metrics.values()], _arms(found), cells, first)


def _curve(found: tables.Found, a: Arm, metric: str) -> list[float]:
    """Mean over seeds, step by step."""
    runs = [found.by[a.name, s]["curve"][metric] for s in found.seeds(a.name)]
    return [plain.fmean(values) for values in zip(*runs, strict=True)]


def _over_training(found: tables.Found) -> str:
    """Tokens and steps of a completion in the first steps of training, in the middle, in the last."""

    def cell(at: float) -> tables.Cell:
        def of(a: Arm) -> str:
            tokens, steps = (
                running_mean(_curve(found, a, m), WINDOW) for m in ("completion_tokens_mean", "steps_mean")
            )
            i = round(at * (len(tokens) - 1))
            return f"{tokens[i]:.1f} · {steps[i]:.2f}"

        return of

    head = {"at the start": 0.0, "a quarter": 0.25, "half": 0.5, "three quarters": 0.75, "at the end": 1.0}
    cells = [cell(at) for at in head.values()]
    return tables.table(list(head), _arms(found, trained=True), cells, "training: tokens · steps of a chain")


def draw(folder: Path, file: Path) -> None:
    """Curves of training by arm, and held-out accuracy against the share of the steps in the reward."""
    found = tables.Found(recorded(folder))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 3, figsize=(10, 5.6), layout="constrained")
        for (metric, unit), axis in zip(CURVES.items(), axes.flat[:-1], strict=True):
            for a, colour in zip(STEP_ARMS.values(), COLOURS, strict=True):
                if a in _arms(found, trained=True):
                    curve = running_mean(_curve(found, a, metric), WINDOW)
                    axis.plot(range(1, len(curve) + 1), curve, color=colour, label=a.title, linewidth=1.3)
            axis.set(xlabel="GRPO step", ylabel=unit)
        _shares(found, axes.flat[-1])
        handles, labels = axes.flat[0].get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(file, metadata={"Date": None})
        plt.close(figure)


def _shares(found: tables.Found, axis: Axes) -> None:
    """Every seed pale, the mean over seeds a line; levels of the warm start and the outcome."""
    for metric, colour, unit in (
        ("accuracy", "#222222", "accuracy"),
        ("true_steps", "#b5489a", "steps that are true"),
    ):
        swept = [a for a in _arms(found, trained=True) if set(a.method) == {"share"}]
        by = {a.method["share"]: found.values(a.name, "held_out", metric) for a in swept}
        for share, values in by.items():
            axis.scatter([share] * len(values), values, color=colour, alpha=0.35, s=14, linewidths=0)
        axis.plot(list(by), [plain.fmean(v) for v in by.values()], color=colour, marker="o", label=unit)
        for name, style in (("warm-start", ":"), (OUTCOME, "--")):
            if found.seeds(name):
                level = plain.fmean(found.values(name, "held_out", metric))
                axis.axhline(level, color=colour, linestyle=style, linewidth=1)
    axis.set_xlabel("share of the steps in the reward\n(dotted: warm start, dashed: outcome 0/1)")
    axis.set_ylabel("held-out questions")
    axis.legend(frameon=False, fontsize=8)
