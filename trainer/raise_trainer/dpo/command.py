"""`raise-core dpo`."""

import argparse
from collections.abc import Sequence

from ..train_config import as_yaml
from .config import load_dpo_config


def run_command(arguments: Sequence[str], about: str | None) -> int:
    """Run `raise-core dpo config.yaml key=value …`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="raise-core dpo", description=about)
    parser.add_argument("settings", nargs="*", metavar="config.yaml | key=value")
    parser.add_argument("--print-config", action="store_true", help="print every setting and stop")
    given = parser.parse_intermixed_args(arguments)
    config = load_dpo_config(given.settings)
    if given.print_config:
        print(as_yaml(config), end="")
        return 0
    from .run import run_dpo

    run_dpo(config)
    return 0
