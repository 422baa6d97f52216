"""`raise-core search`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError


def run_command(arguments: Sequence[str], about: str | None) -> int:
    """Run `raise-core search MODEL --prm FOLDER --data FILE …`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="raise-core search", description=about)
    parser.add_argument("model", metavar="MODEL", help="that writes chains: Hugging Face id or folder")
    parser.add_argument("settings", nargs="*", metavar="config.yaml | key=value", help="as in training")
    parser.add_argument("--prm", required=True, metavar="FOLDER", help="process reward model")
    parser.add_argument("--data", required=True, metavar="FILE", help="questions (docs/data.md)")
    parser.add_argument("--root", type=Path, metavar="FOLDER", help="of its media; that of FILE if not given")
    parser.add_argument("--n", nargs="+", type=int, default=[1, 2, 4, 8, 16], help="numbers of samples")
    parser.add_argument("--keep", type=int, default=1, help="beams that step beam search keeps (1)")
    parser.add_argument("--step-share", type=float, default=0.2, help="of the steps in the reward (0.2)")
    parser.add_argument("--out", type=Path, default=Path("search.jsonl"), help="answers, a line a question")
    parser.add_argument("--figure", type=Path, help="accuracy against N; OUT.svg when not given")
    given = parser.parse_intermixed_args(arguments)
    counts = sorted(set(given.n))
    if counts[0] < 1:
        raise UserError(f"--n {counts[0]}: expected 1 or more")
    if given.keep < 1:
        raise UserError(f"--keep {given.keep}: expected 1 or more")
    if not 0 <= given.step_share <= 1:
        raise UserError(f"--step-share {given.step_share}: expected a number from 0 to 1")
    figure = given.figure or given.out.with_suffix(".svg")
    if figure.suffix not in (".svg", ".png") or figure.resolve() == given.out.resolve():
        raise UserError(f"--figure {figure}: expected a file of its own that ends in .svg or .png")
    from .run import Search, run_search

    run_search(
        Search(
            model=given.model, prm=given.prm, data=given.data, out=given.out, counts=tuple(counts),
            keep=given.keep, step_share=given.step_share, settings=tuple(given.settings), root=given.root,
        ),
        figure=figure,
    )  # fmt: skip
    return 0
