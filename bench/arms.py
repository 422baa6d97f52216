"""The demo's comparison: one warm start per seed, then three ways to go on from it with equal compute.

    python -m bench arms --seeds 0 1 2      run and record
    python -m bench arms --report           table and figure of what is recorded

    warm start      where all begin
    more sft        supervised steps, as many as cost the floating-point operations of the GRPO run
    grpo accuracy   GRPO with the text score as reward: 0 or 1 on strict rows, ROUGE on open ones
    grpo scre-igsr  GRPO with confidence rewards

Everything else is the default configuration of `raise-core demo`, and the arms of a seed share data, warm
start,
prompt order and sampling seed.  Records go to bench/results/arms.jsonl; the table is printed from them.
"""

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import torch

from bench.record import RESULTS, provenance
from raise_trainer.config import DemoConfig
from raise_trainer.demo import Prepared, held_out, prepare, start, warm_start
from raise_trainer.json_lines import read_json_lines
from raise_trainer.logbook import Logbook
from raise_trainer.loop import run_grpo, run_sft
from raise_trainer.study.compute import operations

SHOWN = (
    "accuracy",
    "match",
    "accuracy_greedy",
    "match_greedy",
    "confidence",
    "accuracy_strict",
    "accuracy_open",
)
TRAINING = ("scre_differs_share", "igsr_bonus_share", "igsr_no_effect_share", "equal_groups_share")
COLOURS = {
    "warm start": "#555555",
    "more sft": "#c9a227",
    "grpo accuracy": "#c8553d",
    "grpo scre-igsr": "#2a7f62",
}
FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "arms.svg"
COUNTED_STEPS = 3  # steps whose operations are counted


def equal_sft_steps(model: Any, data: Prepared, config: DemoConfig) -> int:
    """Supervised steps that cost what `grpo_steps` GRPO steps cost, sampling and scoring included."""
    with tempfile.TemporaryDirectory() as folder:
        log, few = Logbook(Path(folder)), replace(config, grpo_steps=COUNTED_STEPS)
        grpo = operations(
            lambda: run_grpo(
                copy.deepcopy(model), data.train, data.processor.tokenizer, few, log,
                name="counted", sampling=data.sampling,
            )
        )  # fmt: skip
        sft = operations(
            lambda: run_sft(
                copy.deepcopy(model), data.supervised, config, log, name="counted", steps=COUNTED_STEPS
            )
        )
    return round(config.grpo_steps * grpo / sft)


def run_seed(seed: int, config: DemoConfig) -> list[dict[str, Any]]:
    """All four arms of one seed."""
    with tempfile.TemporaryDirectory() as folder:
        config, log = start(replace(config, seed=seed, out=Path(folder) / "run"))
        data = prepare(config, log)
        model = warm_start(data, config, log)
        records = [record(seed, "warm start", model, data, config, log)]
        steps = equal_sft_steps(model, data, config)
        more, begun = copy.deepcopy(model), time.monotonic()
        run_sft(more, data.supervised, config, log, name="more sft", steps=steps)
        spent = {"sft_steps": steps, "seconds": time.monotonic() - begun}
        records.append(record(seed, "more sft", more, data, config, log) | spent)
        for reward, arm in (("accuracy", "grpo accuracy"), ("scre-igsr", "grpo scre-igsr")):
            trained, chosen = copy.deepcopy(model), replace(config, reward=reward)
            begun = time.monotonic()
            run_grpo(
                trained, data.train, data.processor.tokenizer, chosen, log, name=arm, sampling=data.sampling
            )
            spent = {"seconds": time.monotonic() - begun}
            written = read_json_lines(log.out / "metrics.jsonl")
            steps_log = [line for _, line in written if line["stage"] == arm]
            means = {key: sum(r[key] for r in steps_log) / len(steps_log) for key in TRAINING}
            records.append(record(seed, arm, trained, data, chosen, log) | means | spent)
        return records


def record(
    seed: int, arm: str, model: Any, data: Prepared, config: DemoConfig, log: Logbook
) -> dict[str, Any]:
    """Held-out figures of one arm, with what they depend on."""
    figures = held_out(model, data, config, log, arm).figures
    return {"seed": seed, "arm": arm, **figures, "questions": len(data.test)}


def table(records: Sequence[dict[str, Any]]) -> str:
    """Means over seeds, and the change against the warm start, paired by seed: mean (smallest to largest)."""
    arms = list(dict.fromkeys(r["arm"] for r in records))
    by = {(r["arm"], r["seed"]): r for r in records}
    seeds = sorted({r["seed"] for r in records})
    lines = [f"| {len(seeds)} seeds | " + " | ".join(arms) + " |", "|---" * (len(arms) + 1) + "|"]
    for key in SHOWN:
        cells = []
        for arm in arms:
            values = [by[arm, s][key] for s in seeds]
            change = [by[arm, s][key] - by[arms[0], s][key] for s in seeds]
            cell = f"{sum(values) / len(values):.3f}"
            if arm != arms[0]:
                mean = sum(change) / len(change)
                cell += f" ({mean:+.3f}; {min(change):+.3f} to {max(change):+.3f})"
            cells.append(cell)
        lines.append(f"| {key.replace('_', ' ')} | " + " | ".join(cells) + " |")
    for key in (*TRAINING, "seconds"):
        cells = []
        for arm in arms:
            values = [by[arm, s][key] for s in seeds if key in by[arm, s]]
            cells.append(f"{sum(values) / len(values):.3f}" if values else "")
        lines.append(f"| {key.replace('_', ' ')} (training) | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy against Match: every seed's way from the warm start to the end of each arm."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    by = {(r["arm"], r["seed"]): r for r in records}
    style = {"svg.hashsalt": "raise-core", "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
        for arm, colour in COLOURS.items():
            points = [
                (r["accuracy"], r["match"], by["warm start", s]) for (a, s), r in by.items() if a == arm
            ]
            for accuracy, match, begin in points if arm != "warm start" else ():
                axis.plot(
                    [begin["accuracy"], accuracy],
                    [begin["match"], match],
                    color=colour,
                    alpha=0.35,
                    linewidth=1,
                )
            axis.scatter(
                [p[0] for p in points], [p[1] for p in points], color=colour, label=arm, s=42, zorder=3
            )
        axis.set_xlabel("held-out accuracy (8 samples a question, temperature 1)")
        axis.set_ylabel("Match: the answer follows from the chain")
        axis.legend(frameon=False, loc="lower left")
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def main(arguments: Sequence[str]) -> int:
    """Run the seeds asked for and add them to the results, or report on the results there are."""
    parser = argparse.ArgumentParser(prog="python -m bench arms", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=DemoConfig.threads)
    parser.add_argument("--smoke", action="store_true", help="sizes of seconds; nothing is written")
    parser.add_argument("--report", action="store_true", help="run nothing: table and figure of the results")
    chosen = parser.parse_args(arguments)
    if chosen.report:
        recorded = [json.loads(line) for line in (RESULTS / "arms.jsonl").read_text().splitlines()]
        FIGURE.parent.mkdir(exist_ok=True)
        draw(recorded, FIGURE)
        print(table(recorded))
        return 0
    RESULTS.mkdir(exist_ok=True)
    torch.set_num_threads(chosen.threads)
    made_from = provenance()
    records: list[dict[str, Any]] = []
    for seed in chosen.seeds:
        made = run_seed(seed, DemoConfig(threads=chosen.threads, smoke=chosen.smoke))
        records += [record | made_from for record in made]
        if not chosen.smoke:
            with (RESULTS / "arms.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(r) + "\n" for r in records[-len(made) :])
    print(table(records))
    return 0
