"""`python -m torch_nnmath verify`."""

from __future__ import annotations

import argparse
import sys


def main(argv: list[str] | None = None) -> int:
    """Runs the command that is named; its options are its own."""
    parser = argparse.ArgumentParser(prog="python -m torch_nnmath", description=__doc__)
    parser.add_argument("command", choices=["verify"])
    parser.add_argument("options", nargs=argparse.REMAINDER, help="see `verify --help`")
    arguments = parser.parse_args(argv)
    from torch_nnmath import verify

    return verify.main(arguments.options)


if __name__ == "__main__":
    sys.exit(main())
