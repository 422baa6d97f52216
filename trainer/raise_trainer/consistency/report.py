"""The tables and the page of `raise-core consistency`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib import pyplot as plt

from ..pages import STYLE, data_source, render
from .figures import DRAWINGS, draw_rewards, figures, save, told

if TYPE_CHECKING:
    from .run import Arm

Table = tuple[str, list[str], list[list[str]]]


def tables(arms: "Mapping[str, Arm]") -> list[Table]:
    """Title, header and rows of each table; the first two columns are text."""
    main = [
        [
            name,
            part.kind,
            str(part.answers),
            told(part.accuracy),
            told(part.answer),
            told(part.match),
            _why(part.why),
        ]
        for name, arm in arms.items()
        for part in arm.kinds
    ]
    confidence = [
        [name, of, str(found.answers), told(found.auroc), told(found.overlap), told(found.calibration_error)]
        for name, arm in arms.items()
        for of, found in (("answer's tokens", arm.analysis.answer), ("all tokens", arm.analysis.sequence))
    ]
    rewards = [
        [
            name,
            reward,
            str(d.groups),
            str(d.mixed),
            str(d.pairs),
            told(d.auroc),
            told(d.difference),
            told(d.spread),
        ]
        for name, arm in arms.items()
        for reward, d in arm.rewards.items()
    ]
    made: list[Table] = [
        ("Answer and Match", ["arm", "of", "answers", "score", "Answer", "Match", "no match"], main),
        ("Confidence", ["arm", "in", "answers", "AUROC", "overlap", "calibration error"], confidence),
    ]
    if rewards:
        header = ["arm", "reward", "groups", "mixed", "pairs", "AUROC", "difference", "spread"]
        made.append(("Rewards in all-right groups", header, rewards))
    return made


def _why(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items(), key=lambda x: -x[1])) or "–"


def write_page(out: Path, arms: "Mapping[str, Arm]", *, judge: str, threshold: float) -> Path:
    """Write consistency.html, and the drawings as files in `out`/figures; returns the page."""
    drawn = dict[str, dict[str, str]]()
    for name, arm in arms.items():
        files = figures(arm.analysis, out / "figures", prefix=f"{name.replace('/', '-')}-")
        drawings = [_source(file) for file in files if file.suffix == ".svg"]
        drawn[name] = dict(zip(DRAWINGS, drawings, strict=True))
    rewards = None
    if any(arm.rewards for arm in arms.values()):
        with plt.rc_context(STYLE):
            found = {name: arm.rewards for name, arm in arms.items()}
            rewards = _source(save(draw_rewards(found), out / "figures" / "rewards")[0])
    return render(
        "consistency.html",
        out / "consistency.html",
        arms=arms,
        judge=judge,
        threshold=threshold,
        tables=tables(arms),
        drawn=drawn,
        rewards=rewards,
    )


def _source(file: Path) -> str:
    return data_source(file.read_bytes(), "svg+xml")
