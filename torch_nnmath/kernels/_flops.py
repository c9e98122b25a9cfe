"""How many floating-point operations an operator takes, for `torch.utils.flop_counter`.

By its convention only matrix products count, two operations for each multiplication and addition.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

COUNTER = "torch.utils.flop_counter"

_formulas: dict[str, Callable[..., int]] = {}  # by the operator's name


def count_nothing(*_args: Any, out_shape: Any = None) -> int:
    """The FLOP of an operator without a product."""
    return 0


def register_flop_formula(name: str, formula: Callable[..., int]) -> None:
    """Registers the FLOP formula of `torch.ops.torch_nnmath.<name>`.

    It gets the operator's arguments, a tensor's shape in place of the tensor. PyTorch's counter
    imports Triton, so it is not imported here: until something imports it, the formula waits.
    """
    if COUNTER in sys.modules:
        _hand_on(sys.modules[COUNTER], name, formula)
    else:
        _formulas[name] = formula


def _hand_on(counter: ModuleType, name: str, formula: Callable[..., int]) -> None:
    counter.register_flop_formula(getattr(torch.ops.torch_nnmath, name))(formula)


class _CounterFinder(importlib.abc.MetaPathFinder):
    """Finds the counter's module as usual, and registers the formulas after its execution."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                while _formulas:
                    _hand_on(module, *_formulas.popitem())

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if COUNTER not in sys.modules:
    sys.meta_path.insert(0, _CounterFinder())
