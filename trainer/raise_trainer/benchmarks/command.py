"""`raise-core eval MODEL --bench NAME… --data FOLDER`."""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from .settings import NAMES, SCORERS, EvalSettings


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="raise-core eval",
        description="Ask a model the questions of benchmarks in a local folder, and score the answers. "
        "Killed and run again with the same --out, it goes on. docs/evaluate.md says what is read.",
    )
    default = {f.name: f.default for f in fields(EvalSettings)}
    add = parser.add_argument
    add("model", metavar="MODEL", help="Hugging Face id, or folder")
    add("--bench", nargs="+", required=True, metavar="NAME", choices=[*NAMES, "all"],
        help=f"{', '.join(NAMES)}, or all")  # fmt: skip
    add("--data", type=Path, required=True, metavar="FOLDER",
        help="holds a folder for each benchmark, or is the one of a single benchmark")  # fmt: skip
    add("--out", type=Path, metavar="DIR", help="answers and results; runs/eval-MODEL-FRAMES when not given")
    add("--source", choices=("auto", "published", "video_r1"), default="auto",
        help="the published files, Video-R1's eval_NAME.json, or what is there (auto)")  # fmt: skip
    add("--scorer", choices=list(SCORERS), default="both", help="which scores are reported (both)")
    whole = {
        "frames": "frames of a video, spread evenly: 16, 32 or 64 in the papers",
        "pixels": "most pixels of a frame",
        "samples": "answers to each question; more than one also gives the majority's",
        "max_new_tokens": "longest answer, in tokens",
        "seed": "of the sampling",
        "batch": "answers that grow side by side",
        "workers": "processes that decode",
    }
    for name, text in whole.items():
        flag = f"--{name.replace('_', '-')}"
        add(flag, type=int, default=default[name], metavar="N", help=f"{text} (%(default)s)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (%(default)s)")
    add("--template", default=default["template"], help="prompt template, by name or path (%(default)s)")
    add("--dtype", choices=("bfloat16", "float32"), default=default["dtype"], help="(%(default)s)")
    add("--attention", choices=("sdpa", "eager", "flash"), default=default["attention"], help="(%(default)s)")
    add("--limit", type=int, metavar="N", help="the first N rows of each benchmark only")
    add("--retry", action="store_true", help="ask again what could not be asked before")
    return parser


def settings_of(arguments: Sequence[str]) -> EvalSettings:
    """The settings that the arguments stand for. UserError for values that cannot be."""
    given = vars(_parser().parse_args(arguments))
    names = dict.fromkeys(given.pop("bench"))
    given["bench"] = NAMES if "all" in names else tuple(names)
    if given["out"] is None:
        given["out"] = Path("runs") / f"eval-{_called(given['model'])}-{given['frames']}"
    return EvalSettings(**given)


def _called(model: str) -> str:
    """Of a Hugging Face id its last part; of a folder the last two that tell one checkpoint from another."""
    parts = [
        part for part in Path(model).parts if part not in ("/", ".", "..", "runs", "checkpoints", "model")
    ]
    return "-".join(parts[-2:] if Path(model).is_dir() else parts[-1:]) or "model"


def run_command(arguments: Sequence[str]) -> int:
    """Run `raise-core eval …`; returns the exit status."""
    from .. import ranks
    from .page import show, write
    from .run import evaluate

    settings = settings_of(arguments)
    results = evaluate(settings)
    if ranks.rank() == 0:
        show(results)
        page = write(settings, results)
        print(f"Results: {settings.out / 'results.json'}, {page}")
    return 0
