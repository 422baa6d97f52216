"""`raise-core prm tokens | train | label | score`."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import UserError
from ..train_config import TrainConfig, as_yaml, load


def _settings(given: Sequence[str], **fixed: object) -> TrainConfig:
    files = [one for one in given if "=" not in one]
    if len(files) > 1:
        raise UserError(f"{files[1]!r}: a second file; give one YAML file, and changes to it as key=value")
    pairs = [one for one in given if "=" in one]
    return load(Path(files[0]) if files else None, [*pairs, *(f"{k}={v}" for k, v in fixed.items())])


def _tokens(arguments: Sequence[str]) -> int:
    """add the chain's tokens to a model and save it: MODEL FOLDER"""
    parser = argparse.ArgumentParser(prog="raise-core prm tokens", description=_tokens.__doc__)
    parser.add_argument("model", metavar="MODEL", help="Hugging Face id, or folder")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="where model and tokenizer are saved")
    given = parser.parse_args(arguments)
    from .tokens import save_with_tokens

    made = save_with_tokens(given.model, given.folder)
    print(f"{given.folder}: {len(made.new)} tokens added, ids {list(made.new)}")
    return 0


def _train(arguments: Sequence[str]) -> int:
    """train on rows with steps and labels, with the settings of sft: config.yaml key=value …"""
    parser = argparse.ArgumentParser(prog="raise-core prm train", description=_train.__doc__)
    parser.add_argument("settings", nargs="*", metavar="config.yaml | key=value")
    parser.add_argument("--print-config", action="store_true", help="print every setting and stop")
    given = parser.parse_intermixed_args(arguments)
    config = _settings(given.settings)
    if given.print_config:
        print(as_yaml(config), end="")
        return 0
    from .train import run_prm

    run_prm(config)
    return 0


def _score(arguments: Sequence[str]) -> int:
    """score the steps of a file of rows: FILE config.yaml model=PRM key=value …"""
    parser = argparse.ArgumentParser(prog="raise-core prm score", description=_score.__doc__)
    parser.add_argument("file", type=Path, metavar="FILE", help="rows with steps (docs/data.md)")
    parser.add_argument("settings", nargs="*", metavar="config.yaml | key=value")
    parser.add_argument("--out", type=Path, help="file of the scores; FILE.scores.jsonl when not given")
    parser.add_argument("--step-share", type=float, default=0.2, help="of the steps in the reward (0.2)")
    given = parser.parse_intermixed_args(arguments)
    if not 0 <= given.step_share <= 1:
        raise UserError(f"--step-share {given.step_share}: expected a number from 0 to 1")
    out = given.out or given.file.with_suffix(".scores.jsonl")
    from .score import score_rows

    score_rows(
        _settings(given.settings, data=given.file, out=out.parent), out=out, step_share=given.step_share
    )
    return 0


def _label(arguments: Sequence[str]) -> int:
    """label steps by rollouts or by a judge: config.yaml key=value …"""
    parser = argparse.ArgumentParser(prog="raise-core prm label", description=_label.__doc__)
    parser.add_argument("settings", nargs="*", metavar="config.yaml | key=value")
    parser.add_argument("--print-config", action="store_true", help="print every setting and stop")
    given = parser.parse_intermixed_args(arguments)
    from .label import label_rows
    from .label_config import load_label_config

    config = load_label_config(given.settings)
    if given.print_config:
        print(as_yaml(config), end="")
        return 0
    label_rows(config)
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "tokens": _tokens,
    "train": _train,
    "label": _label,
    "score": _score,
}


def run_command(arguments: Sequence[str]) -> int:
    """Run `raise-core prm …`; returns the exit status."""
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print("usage: raise-core prm COMMAND …\n")
        for command, run in COMMANDS.items():
            print(f"  {command:<7} {run.__doc__}")
        return 0
    if name not in COMMANDS:
        raise UserError(f"unknown command prm {name!r}; known are {', '.join(COMMANDS)}")
    return COMMANDS[name](arguments[1:])
