"""The command `raise-core`."""

import sys
from typing import Annotated

import tyro

from .config import DemoConfig
from .errors import UserError


def demo(config: Annotated[DemoConfig, tyro.conf.arg(name="")]) -> None:
    """Train a tiny video model from nothing and report what the rewards did (6 minutes on 2 cores)."""
    from .demo import run_demo  # heavy imports only when they are used

    run_demo(config)


def main() -> None:
    """Parse and run; what a user can mend is one line on stderr and exit status 2."""
    try:
        tyro.extras.subcommand_cli_from_dict(
            {"demo": demo}, prog="raise-core", config=(tyro.conf.FlagCreatePairsOff,)
        )
    except UserError as error:
        print(f"raise-core: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("raise-core: stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
