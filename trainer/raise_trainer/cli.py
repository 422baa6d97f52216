"""The command `raise-core`."""

import sys
from typing import NoReturn

from .config import DemoConfig
from .errors import UserError


def demo(config: DemoConfig) -> None:
    """Train a tiny video model from nothing and report what the rewards did (minutes on 2 cores)."""
    from .demo import run_demo  # heavy imports only when they are used

    run_demo(config)


def main() -> None:
    """Parse and run; what a user can mend is one line on stderr and exit status 2."""
    try:
        import tyro

        tyro.extras.subcommand_cli_from_dict(
            {"demo": demo},
            prog="raise-core",
            config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
        )
    except UserError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        _fail(f"the package {error.name} is not installed; run: pip install 'raise-core[train]'")
    except KeyboardInterrupt:
        print("raise-core: stopped", file=sys.stderr)
        sys.exit(130)


def _fail(message: str) -> NoReturn:
    print(f"raise-core: error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
