"""How the tests run the examples: as modules, found as Python finds them when it runs one."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


@contextmanager
def scripts(*names: str) -> Iterator[list[ModuleType]]:
    """On one thread, and gone afterwards, with what a test changed in them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sys.path.insert(0, str(EXAMPLES))
    try:
        yield [importlib.import_module(name) for name in names]
    finally:
        for name in names:
            sys.modules.pop(name, None)
        sys.path.remove(str(EXAMPLES))
        torch.set_num_threads(threads)
