"""The arguments of `raise-core consistency`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    from .run import Settings

DESCRIPTION = (
    "A text-only judge answers each question from its chain of thought: is it right (Answer), and is it the "
    "original answer (Match)? And what do confidence and the rewards know of that? docs/consistency.md"
)


def parser() -> argparse.ArgumentParser:
    """What the command takes."""
    made = argparse.ArgumentParser(prog="raise-core consistency", description=DESCRIPTION)
    add = made.add_argument
    add(
        "files",
        nargs="+",
        type=Path,
        metavar="ANSWERS.jsonl",
        help="of raise-core eval, or completions.jsonl of a training run, or the folder; each is an arm",
    )
    judge = "Hugging Face id or folder of a causal model, or an OpenAI-compatible address up to /v1"
    add("--judge", required=True, metavar="MODEL|URL", help=judge)
    add("--judge-model", default="", metavar="NAME", help="of the model at that address")
    rows = "rows that a training run's completions are of; may be given again"
    add("--data", action="append", default=[], type=Path, metavar="FILE", help=rows)
    scored = "a reward of the completions, in a file of raise-core score; may be given again"
    add("--rewards", action="append", default=[], metavar="NAME=FILE", help=scored)
    add("--out", type=Path, help="folder; consistency beside the first file")
    threshold = "text score from which on an answer is right, and two answers in words are one (0.5)"
    add("--threshold", type=float, default=0.5, help=threshold)
    add("--max-new-tokens", type=int, default=256, help="longest reply of the judge, in tokens (256)")
    add("--batch", type=int, default=16, help="prompts at a time, of a model (16)")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of a model's weights")
    add("--parallel", type=int, default=8, help="requests at a time, to a server (8)")
    add("--timeout", type=float, default=120.0, help="seconds that one try of a request may take (120)")
    add("--retries", type=int, default=5, help="further tries of a request (5)")
    key = "environment variable with the server's key (OPENAI_API_KEY)"
    add("--key-variable", default="OPENAI_API_KEY", metavar="NAME", help=key)
    add("--resamples", type=int, default=1000, help="of the videos, for the intervals; 0: none (1000)")
    return made


def parse(arguments: Sequence[str]) -> "Settings":
    """The command's settings. UserError for a number that cannot be."""
    from .run import Settings

    given = parser().parse_args(arguments)
    for name, least in (
        ("max_new_tokens", 1),
        ("batch", 1),
        ("parallel", 1),
        ("retries", 0),
        ("resamples", 0),
    ):
        if getattr(given, name) < least:
            option = name.replace("_", "-")
            raise UserError(f"--{option} {getattr(given, name)}: expected {least} or more")
    if not 0 < given.threshold <= 1:
        raise UserError(f"--threshold {given.threshold}: expected a number above 0, at most 1")
    if not 0 < given.timeout < float("inf"):
        raise UserError(f"--timeout {given.timeout}: expected seconds, a finite number above 0")
    pairs = [one.partition("=") for one in given.rewards]
    if wrong := [
        one for one, (name, _, file) in zip(given.rewards, pairs, strict=True) if not name or not file
    ]:
        raise UserError(f"--rewards {wrong[0]}: expected NAME=FILE, such as rlpr=completions.scored.jsonl")
    values = vars(given) | {
        "files": tuple(given.files),
        "data": tuple(given.data),
        "rewards": tuple((name, Path(file)) for name, _, file in pairs),
    }
    return Settings(**values | {"out": given.out or _beside(given.files[0]) / "consistency"})


def _beside(file: Path) -> Path:
    return file if file.is_dir() else file.parent


def run_command(arguments: Sequence[str]) -> int:
    """Run `raise-core consistency …`; returns the exit status."""
    settings = parse(arguments)
    from .run import run_consistency

    run_consistency(settings)
    return 0
