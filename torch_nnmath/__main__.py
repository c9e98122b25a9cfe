"""The commands `verify`, which checks every formula, `bench`, which measures them, and `race`."""

from __future__ import annotations

import argparse
import importlib
import sys


def main(argv: list[str] | None = None) -> int:
    """Runs the given command with the remaining arguments and returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m torch_nnmath", description=__doc__)
    parser.add_argument("command", choices=["verify", "bench", "race"])
    parser.add_argument(
        "options",
        nargs=argparse.REMAINDER,
        help="see the --help of each command",
    )
    arguments = parser.parse_args(argv)
    return importlib.import_module(f"torch_nnmath.{arguments.command}").main(arguments.options)


if __name__ == "__main__":
    sys.exit(main())
