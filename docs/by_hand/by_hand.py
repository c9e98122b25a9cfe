"""Works out every formula of the document for one example and a network of 2, 3 and 2 nodes.

It is a companion to *Neural Network Mathematics*, for reading with pen and paper. In the document's
order and notation it prints each formula, the arithmetic of one entry, and all entries, computed
in four ways:

    element    the formula with indices and sums      (`torch_nnmath.reference`, NumPy)
    matrix     the same with matrices                 (`torch_nnmath.reference`, NumPy)
    library    the value or gradient of `torch_nnmath`
    numerical  central differences, (f(x + h) - f(x - h)) / 2h, which use no derivative formula

Where the document has a slip (E1 to E17, docs/slips.md), it prints the printed formula, the correct
one and the effect of the slip. A picture, by_hand.png, shows the network with all activations,
weights and gradients, for both problems of the document.

    python docs/by_hand/by_hand.py
    python docs/by_hand/by_hand.py --section 5.1      # one section: 2, 5.1, 5.1.2, A, ...
    python docs/by_hand/by_hand.py --slips            # only the slips, as a table
    python docs/by_hand/by_hand.py --check            # exit status 1 if two columns disagree

It needs `pip install .`, and matplotlib for the picture, and takes a few seconds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from items import Quantity
from network import Network
from page import LEGEND, Formatter, Pages
from picture import draw
from sections import SECTIONS


def build_pages(section: str | None = None) -> Pages:
    """Computes the items of all sections, or of one section with its subsections."""
    n = Network()
    return [
        (s, list(s.items(n))) for s in SECTIONS if section is None or is_within(s.number, section)
    ]


def is_within(number: str, section: str) -> bool:
    return number == section or number.startswith(f"{section}.")


def find_errors(pages: Pages) -> list[str]:
    return [
        f"{section.number} {error}"
        for section, items in pages
        for item in items
        if not isinstance(item, str)
        for error in item.find_errors()
    ]


def print_check(pages: Pages) -> int:
    """Prints the errors and their count, and returns the exit status."""
    errors = find_errors(pages)
    quantities = [item for _, items in pages for item in items if isinstance(item, Quantity)]
    numbers = sum(np.size(quantity.columns["element"]) for quantity in quantities)
    print(*errors, sep="\n", end="\n" if errors else "")
    print(f"{numbers} numbers of {len(quantities)} quantities: {len(errors) or 'none'} wrong")
    return int(bool(errors))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Work out every formula of Neural Network Mathematics for one example and a "
        "network of 2, 3 and 2 nodes.",
        epilog=LEGEND.replace("`", "").replace("\n", " "),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--section", metavar="N", help="print one section, such as 2, 5.1 or A")
    parser.add_argument("--slips", action="store_true", help="print only the slips, as a table")
    parser.add_argument("--check", action="store_true", help="check that all columns agree")
    parser.add_argument("--digits", type=int, default=4, help="digits after the point, 1 to 15")
    parser.add_argument(
        "--out", type=Path, default=Path("by_hand_out"), help="output folder for the picture"
    )
    args = parser.parse_args(argv)
    numbers = [s.number for s in SECTIONS]
    if args.section and not any(is_within(number, args.section) for number in numbers):
        parser.error(f"--section must be one of {', '.join(numbers)}")
    if not 1 <= args.digits <= 15:
        parser.error("--digits must be from 1 to 15")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    formatter, pages = Formatter(args.digits), build_pages(args.section)
    if args.check:
        return print_check(pages)
    print(*(formatter.format_slips if args.slips else formatter.format_pages)(pages), sep="\n")
    if not args.slips and not args.section:
        args.out.mkdir(parents=True, exist_ok=True)
        picture = args.out / "by_hand.png"
        draw(Network(), Formatter(min(args.digits, 4))).savefig(picture, dpi=100)
        print(f"\npicture: {picture}")
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")  # for ∘ and δ, whatever the terminal's encoding
    sys.exit(main())
