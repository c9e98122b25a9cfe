"""Helpers to test the repository's scripts, imported as modules or run as commands."""

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
DOCS = ROOT / "docs"
TOOLS = ROOT / "tools"


@contextmanager
def import_scripts(*names: str, folder: Path = EXAMPLES) -> Iterator[list[ModuleType]]:
    """Imports scripts of a folder, with PyTorch on one thread.

    On exit all modules of the folder are forgotten, with any attribute that a test replaced.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sys.path.insert(0, str(folder))
    known = set(sys.modules)
    try:
        yield [importlib.import_module(name) for name in names]
    finally:
        for name in set(sys.modules) - known:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
                del sys.modules[name]
        sys.path.remove(str(folder))
        torch.set_num_threads(threads)


def run_script(
    script: Path, *arguments: str, folder: Path, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Runs a script as a command in `folder`; it must succeed without warnings."""
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=folder,
        # The package need not be installed.
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return done


def list_files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def has_ink(image: np.ndarray) -> bool:
    """Whether an RGB image shows something on a white page."""
    return bool(0.02 < (image.min(-1) < 0.9).mean() < 0.5)


def split_quarters(image: np.ndarray) -> list[np.ndarray]:
    height, width = image.shape[:2]
    return [
        image[y : y + height // 2, x : x + width // 2]
        for y in (0, height // 2)
        for x in (0, width // 2)
    ]
