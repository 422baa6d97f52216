"""What the two IGSR variants do over score distributions: the tables and the figure of docs/igsr.md.

    .venv/bin/python bench/igsr_figure.py        CPU seconds; the same output on every run

Rewards come from the reference with its defaults, G = 8 answers per prompt. Confidences do not depend on the
scores: each answer's mean NLL is drawn log-normal around 0.3 nats.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor

from raise_kernels.reference import Igsr, igsr_parts

G = 8
GROUPS = 200
VARIANTS = ("paper", "balanced")
FIGURE = Path(__file__).resolve().parents[1] / "docs" / "figures" / "igsr.svg"
COLOURS = {"paper": "#b5482a", "balanced": "#1f6f8b"}


def uniform(low: float, high: float) -> Callable[[Generator], Tensor]:
    return lambda draw: low + (high - low) * torch.rand(GROUPS, G, generator=draw, dtype=torch.float64)


def two_clusters(draw: Generator) -> Tensor:
    return torch.cat([uniform(0.21, 0.29)(draw)[:, : G // 2], uniform(0.71, 0.79)(draw)[:, G // 2 :]], dim=1)


def singletons(draw: Generator) -> Tensor:
    """One answer in each of the bins 1 to 8."""
    return 0.1 * torch.arange(1, G + 1) + uniform(0.01, 0.09)(draw)


def half_zero(draw: Generator) -> Tensor:
    scores = uniform(0.2, 0.8)(draw)
    scores[:, ::2] = 0.0
    return scores


# name -> draw -> scores [GROUPS, G]
DISTRIBUTIONS: dict[str, Callable[[Generator], Tensor]] = {
    "all right": uniform(1.0, 1.0),
    "all near 1": uniform(0.9, 1.0),
    "spread": uniform(0.0, 1.0),
    "two clusters": two_clusters,
    "singletons": singletons,
    "half zero": half_zero,
}


@dataclass(frozen=True)
class Outcome:
    """Rewards of some groups, with what made them; every tensor is [groups, G]."""

    score: Tensor
    nll: Tensor  # nats
    reward: Tensor
    bin: Tensor  # -1: in no bin
    change: Tensor  # what was added to the bin's median under the root

    def raised(self) -> float:
        """Share of the rows in a bin whose reward is above the bin's median: the bonus rate."""
        return float((self.change > 0)[self.bin >= 0].double().mean())

    def lowered(self) -> float:
        """Share of the rows in a bin whose reward is below the bin's median."""
        return float((self.change < 0)[self.bin >= 0].double().mean())

    def ranges(self) -> list[list[float]]:
        """Per group, per bin: largest minus smallest reward."""
        return [
            [float(r[b == k].max() - r[b == k].min()) for k in b[b >= 0].unique()]
            for r, b in zip(self.reward, self.bin, strict=True)
        ]

    def idle(self) -> float:
        """Share of groups in which confidence changed nothing: within each bin all rewards are equal."""
        ranges = self.ranges()
        return sum(not any(group) for group in ranges) / len(ranges)

    def range_within_bins(self) -> float:
        """Mean over groups of the widest bin's reward range."""
        ranges = self.ranges()
        return sum(max(group, default=0.0) for group in ranges) / len(ranges)


def rewards(score: Tensor, nll: Tensor, variant: str) -> Outcome:
    """IGSR of answers of one token each, whose NLL is then the answer's mean NLL. score, nll [groups, G]."""
    rows = torch.arange(score.numel() + 1)
    group = torch.arange(len(score)).repeat_interleave(score.shape[1])
    parts = igsr_parts(-nll.flatten(), rows, score.flatten(), group, Igsr(variant=variant))
    change = torch.where(parts.applied, parts.bonus, 0.0)
    shaped = (x.view_as(score) for x in (parts.nll, parts.reward, parts.bin, change))
    return Outcome(score, *shaped)


def outcomes() -> dict[tuple[str, str], Outcome]:
    """(distribution, variant) -> outcome; both variants see the same scores and confidences."""
    found = {}
    for seed, (name, scores) in enumerate(DISTRIBUTIONS.items()):
        draw = Generator().manual_seed(seed)
        score = scores(draw)
        nll = 0.3 * torch.exp(0.8 * torch.randn(GROUPS, G, generator=draw, dtype=torch.float64))
        found |= {(name, variant): rewards(score, nll, variant) for variant in VARIANTS}
    return found


def levels() -> tuple[Tensor, dict[str, Tensor]]:
    """Scores s, and per variant the reward range in a group of G answers that all score s."""
    level = torch.arange(1, 201, dtype=torch.float64) / 200
    nll = torch.linspace(0.1, 0.8, G, dtype=torch.float64).expand(len(level), G)
    score = level[:, None].expand(len(level), G)
    ranges = {}
    for variant in VARIANTS:
        reward = rewards(score.contiguous(), nll, variant).reward
        ranges[variant] = reward.amax(1) - reward.amin(1)
    return level, ranges


def threshold(gives: Callable[[float], bool], low: float, high: float) -> float:
    """Where `gives` turns between low and high, by bisection of what the operation really returns."""
    at_low = gives(low)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if gives(middle) == at_low else (low, middle)
    return low


def gives_bonus(below: list[float], above: list[float]) -> bool:
    """Does the paper form raise the most confident of the answers that score `below`?"""
    score = torch.tensor([below + above], dtype=torch.float64)
    nll = torch.linspace(0.1, 0.8, score.numel(), dtype=torch.float64)[None]
    return bool(rewards(score, nll, "paper").change[0, 0] > 0)


def least_gap(n: int) -> float:
    """Distance to the next median at which the most confident of a bin's n answers starts to get a bonus."""
    return threshold(lambda gap: gives_bonus([0.3] * n, [0.3 + gap]), 0.1, 0.6)


def highest_level() -> float:
    """Highest score at which the paper form still ranks G equal answers."""
    return threshold(lambda level: gives_bonus([level] * G, []), 0.5, 1.0)


def tables(found: dict[tuple[str, str], Outcome]) -> str:
    """The three tables, in Markdown."""
    lines = [
        f"| scores (G = {G}, {GROUPS} groups) | variant | raised | lowered | confidence changed nothing "
        "| range within a bin | mean reward |",
        "|---|---|---|---|---|---|---|",
    ]
    for (name, variant), seen in found.items():
        shares = (seen.raised(), seen.lowered(), seen.idle())
        numbers = [*(f"{100 * share:.1f} %" for share in shares), f"{seen.range_within_bins():.3f}"]
        lines.append(f"| {name} | {variant} | {' | '.join(numbers)} | {seen.reward.mean():.3f} |")

    level, ranges = levels()
    shown = [20, 60, 100, 140, 160, 180, 190, 200]
    lines += ["", f"| all {G} scores equal | " + " | ".join(f"{level[i - 1]:.2f}" for i in shown) + " |"]
    lines += ["|---" * (len(shown) + 1) + "|"]
    for variant in VARIANTS:
        lines.append(
            f"| {variant}: range | " + " | ".join(f"{ranges[variant][i - 1]:.3f}" for i in shown) + " |"
        )

    sizes = (1, 2, 4, 8, 16)
    lines += ["", "| answers in the bin | " + " | ".join(map(str, sizes)) + " |", "|---" * 6 + "|"]
    lines.append("| least gap for a bonus | " + " | ".join(f"{least_gap(n):.3f}" for n in sizes) + " |")
    lines += [
        "",
        f"Highest score at which the paper form still ranks {G} equal answers: {highest_level():.3f}",
    ]
    return "\n".join(lines)


def draw_groups(axes, found: dict[tuple[str, str], Outcome]) -> None:
    """One group of each distribution: score and reward against confidence, coloured by bin. axes [2, 6]."""
    import matplotlib.pyplot as plt

    colour = plt.get_cmap("viridis")
    for row, variant in enumerate(VARIANTS):
        for column, name in enumerate(DISTRIBUTIONS):
            axis, seen = axes[row][column], found[name, variant]
            score, nll, reward, bins = (x[0] for x in (seen.score, seen.nll, seen.reward, seen.bin))
            for k in bins[bins >= 0].unique():
                inside = bins == k
                median = score[inside].quantile(0.5)
                axis.axhline(float(median), color=colour(float(k) / 10), lw=0.8, alpha=0.6)
            axis.vlines(nll, score, reward, color="#999999", lw=0.8)
            axis.scatter(nll, score, s=22, facecolors="none", edgecolors="#777777", lw=0.8)
            axis.scatter(nll, reward, s=22, color=[colour(max(float(k), 0) / 10) for k in bins], zorder=3)
            axis.set_xscale("log")
            axis.set_xlim(0.03, 3)
            axis.set_ylim(-0.04, 1.06)
            axis.minorticks_off()
            axis.tick_params(labelbottom=row == 1, labelleft=column == 0)
            if row == 0:
                axis.set_title(name)
            else:
                axis.set_xlabel("mean NLL e [nats]")
            if column == 0:
                axis.set_ylabel(f"{variant}\nreward")


def draw_summary(left, right, found: dict[tuple[str, str], Outcome]) -> None:
    """Left: groups in which confidence changed nothing. Right: what it can change among equal scores."""
    for side, variant in ((-0.2, "paper"), (0.2, "balanced")):
        heights = [100 * found[name, variant].idle() for name in DISTRIBUTIONS]
        places = [i + side for i in range(len(heights))]
        bars = left.bar(places, heights, width=0.38, color=COLOURS[variant], label=variant)
        left.bar_label(bars, fmt="%.1f", fontsize=7)
    left.set_xticks(range(len(DISTRIBUTIONS)), DISTRIBUTIONS)
    left.set_ylim(0, 118)
    left.set_ylabel("% of groups")
    left.set_title("groups in which confidence changed nothing")
    left.legend(loc="upper left", bbox_to_anchor=(0.4, 0.95))

    level, ranges = levels()
    for variant in VARIANTS:
        right.plot(level, ranges[variant], color=COLOURS[variant], label=variant)
    right.set_xlabel(f"text score of all {G} answers")
    right.set_ylabel("reward, largest - smallest")
    right.set_title("what confidence can change in a group of equal scores")
    right.legend()


def draw(path: Path, found: dict[tuple[str, str], Outcome]) -> None:
    """The figure, byte for byte the same for one matplotlib version (SVG)."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style = {"svg.hashsalt": "igsr", "svg.fonttype": "none", "font.size": 9, "axes.titlesize": 10}
    with mpl.rc_context(style):
        figure = Figure(figsize=(13, 8.2), layout="constrained")
        grid = figure.add_gridspec(3, 6)
        axes = [[figure.add_subplot(grid[row, column]) for column in range(6)] for row in range(2)]
        draw_groups(axes, found)
        draw_summary(figure.add_subplot(grid[2, :3]), figure.add_subplot(grid[2, 3:]), found)
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, metadata=metadata, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw what the IGSR variants do, and print the tables.")
    parser.add_argument("--out", type=Path, default=FIGURE, help="the figure to write (.svg or .png)")
    options = parser.parse_args(arguments)
    found = outcomes()
    draw(options.out, found)
    print(tables(found))


if __name__ == "__main__":
    main()
