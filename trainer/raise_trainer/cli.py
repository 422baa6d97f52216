"""The command `raise-core`."""

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from .errors import UserError

USAGE = "usage: raise-core COMMAND … ; raise-core COMMAND --help says more\n\n"


def _demo(arguments: Sequence[str]) -> int:
    """train a tiny video model from nothing and report what the rewards did (minutes on 2 cores)"""
    import tyro

    from .config import DemoConfig

    def demo(config: DemoConfig) -> None:
        """Train a tiny video model from nothing and report what the rewards did (minutes on 2 cores)."""
        from .demo import run_demo  # heavy imports only when they are used

        run_demo(config)

    tyro.cli(
        demo,
        prog="raise-core demo",
        args=list(arguments),
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
    )
    return 0


def _demo_steps(arguments: Sequence[str]) -> int:
    """the same world in steps: chains, a PRM that judges them, search and preference rounds (minutes)"""
    import tyro

    from .steps_config import StepsConfig

    def demo_steps(config: StepsConfig) -> None:
        """Train a tiny video model to reason in steps, and a reward model to judge them; search, and DPO."""
        from .demo_steps import run_demo_steps

        run_demo_steps(config)

    tyro.cli(
        demo_steps,
        prog="raise-core demo-steps",
        args=list(arguments),
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
    )
    return 0


def _train(arguments: Sequence[str]) -> int:
    """GRPO with confidence rewards: config.yaml key=value …"""
    return _training("train", _train, arguments)


def _sft(arguments: Sequence[str]) -> int:
    """supervised warm start on the rows' chains, with the same settings: config.yaml key=value …"""
    return _training("sft", _sft, arguments)


def _training(name: str, command: Callable[..., int], arguments: Sequence[str]) -> int:
    parser = _settings_parser(name, command)
    parser.add_argument("--print-config", action="store_true", help="print every setting and stop")
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="go on from a checkpoint although settings or data have changed since",
    )
    given = parser.parse_intermixed_args(arguments)
    config = _config(given.settings)
    if given.print_config:
        from .train_config import as_yaml

        print(as_yaml(config), end="")
        return 0
    from . import train

    run = train.run_train if name == "train" else train.run_sft
    run(config, accept_changes=given.accept_changes)
    return 0


def _check_data(arguments: Sequence[str]) -> int:
    """read every row a run would use, count them and list what is refused: config.yaml key=value …"""
    parser = _settings_parser("check-data", _check_data)
    parser.add_argument(
        "--media",
        choices=("none", "exists", "decode", "prompts"),
        default="exists",
        help="look for the media files (default), not at all, decode each, or build every prompt",
    )
    parser.add_argument("--refused", type=Path, default=Path("refused.json"), help="list of refused rows")
    given = parser.parse_intermixed_args(arguments)
    config = _config(given.settings)
    from .check_data import check_data

    return 1 if check_data(config, media=given.media, refused=given.refused) else 0


def _score(arguments: Sequence[str]) -> int:
    """rewards of a file of completions under other settings, no training: completions.jsonl config.yaml …"""
    parser = _settings_parser("score", _score, "completions.jsonl | config.yaml | key=value")
    parser.add_argument(
        "--out",
        type=Path,
        help="file of the new scores; FILE.scored.jsonl beside the completions' FILE.jsonl",
    )
    given = parser.parse_intermixed_args(arguments)
    files = [one for one in given.settings if Path(one).suffix == ".jsonl" and "=" not in one]
    if len(files) != 1:
        raise UserError(f"got {len(files)} files of completions (*.jsonl), wanted 1 before the settings")
    config = _config([one for one in given.settings if one != files[0]])
    from .rescore import score_file

    score_file(Path(files[0]), config, out=given.out)
    return 0


def _report(arguments: Sequence[str]) -> int:
    """compare runs in one page: curves, settings that differ, time, rows left out, completions by token"""
    parser = argparse.ArgumentParser(prog="raise-core report", description=_report.__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the `out` folder of a run")
    parser.add_argument("--out", type=Path, help="the page; report.html in the first run's folder")
    given = parser.parse_args(arguments)
    from .run_report import report_runs

    print(f"Report: {report_runs(given.runs, given.out)}")
    return 0


def _doctor(arguments: Sequence[str]) -> int:
    """versions, GPU, kernels and decoders here, what is missing and the command that mends it"""
    argparse.ArgumentParser(prog="raise-core doctor", description=_doctor.__doc__).parse_args(arguments)
    from .doctor import run_doctor

    run_doctor()
    return 0


def _prm(arguments: Sequence[str]) -> int:
    """process reward models: tokens | train | label | score"""
    from .prm.command import run_command

    return run_command(arguments)


def _dpo(arguments: Sequence[str]) -> int:
    """rounds of preference optimisation on a PRM's best and worst paths: config.yaml key=value …"""
    from .dpo.command import run_command

    return run_command(arguments, _dpo.__doc__)


def _search(arguments: Sequence[str]) -> int:
    """answers out of N chains by votes, a PRM and step beam search: MODEL --prm FOLDER --data FILE …"""
    from .search.command import run_command

    return run_command(arguments, _search.__doc__)


def _study(arguments: Sequence[str]) -> int:
    """published rewards compared on the demo world, paired by seed, at equal compute; tables and figures"""
    from .study.command import run_command

    return run_command(arguments)


def _eval(arguments: Sequence[str]) -> int:
    """video benchmarks in a local folder: MODEL --bench NAME … --data FOLDER"""
    from .benchmarks.command import run_command

    return run_command(arguments)


def _consistency(arguments: Sequence[str]) -> int:
    """do answers follow from their chains, and does confidence say so: ANSWERS.jsonl --judge MODEL|URL"""
    from .consistency.arguments import run_command

    return run_command(arguments)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "demo": _demo,
    "demo-steps": _demo_steps,
    "train": _train,
    "sft": _sft,
    "check-data": _check_data,
    "score": _score,
    "eval": _eval,
    "prm": _prm,
    "dpo": _dpo,
    "search": _search,
    "consistency": _consistency,
    "report": _report,
    "study": _study,
    "doctor": _doctor,
}


def _settings_parser(
    name: str, command: Callable[..., int], given: str = "config.yaml | key=value"
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"raise-core {name}",
        description=command.__doc__,
        epilog="raise-core train config.yaml --print-config prints every setting with what it means",
    )
    parser.add_argument("settings", nargs="*", metavar=given, help="settings, the last wins")
    return parser


def _config(settings: Sequence[str]) -> Any:
    """The settings of one YAML file and of `key=value` pairs, in any order."""
    from .train_config import load

    files = [one for one in settings if "=" not in one]
    if len(files) > 1:
        raise UserError(f"{files[1]!r}: a second file; give one YAML file, and changes to it as key=value")
    return load(Path(files[0]) if files else None, [one for one in settings if "=" in one])


def _listing() -> str:
    width = max(map(len, COMMANDS))
    return USAGE + "".join(f"  {name:<{width}}  {run.__doc__}\n" for name, run in COMMANDS.items())


def main() -> None:
    """Parse and run; what a user can mend is one line on stderr and exit status 2."""
    name, arguments = (sys.argv[1:2] or ["--help"])[0], sys.argv[2:]
    if name in ("-h", "--help"):
        print(_listing(), end="")
        return
    try:
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, 1)
            raise UserError(
                f"unknown command {name!r}; "
                + (f"did you mean {near[0]!r}?" if near else f"known are {', '.join(COMMANDS)}")
            )
        status = COMMANDS[name](arguments)
    except UserError as error:
        _fail(str(error))
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError):
            _fail(f"the package {error.name} is not installed; run: pip install -e '.[train]'")
        if "pip install" not in str(error):
            raise
        _fail(str(error))
    except KeyboardInterrupt:
        print("raise-core: stopped", file=sys.stderr)
        sys.exit(130)
    sys.exit(status)


def _fail(message: str) -> NoReturn:
    print(f"raise-core: error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
