"""Saves and restores the marks and classes that `swap` sets in modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import Module

from torch_nnmath.deferred import HeadLog, get_mark, set_mark
from torch_nnmath.swapping import TORCH_CLASSES, unswap


class SwapState:
    """Remembers which modules of a model were swapped, and which were heads."""

    def __init__(self, model: Module):
        self._marks = {module: get_mark(module) for module in model.modules()}

    def restore_heads(self) -> None:
        """Makes those modules heads again that were heads before, with their logs."""
        for module, mark in self._marks.items():
            if isinstance(mark, HeadLog):
                set_mark(module, mark)

    def restore(self, model: Module) -> None:
        """Undoes later swaps, also of modules that were added since, and restores all marks."""
        for module in model.modules():
            if get_mark(module) and not self._marks.get(module):
                unswap(module)
        for module, mark in self._marks.items():
            if mark:
                set_mark(module, mark)


def use_pytorch_classes(model: Module) -> None:
    """Changes this library's modules to PyTorch's, in place, whether they were swapped or not.

    A module with options that PyTorch's class lacks stays.
    """
    unswap(model)
    for module in model.modules():
        if type(module) in TORCH_CLASSES and not has_own_options(module):
            module.__class__ = TORCH_CLASSES[type(module)]


def has_own_options(module: Any) -> bool:
    """Whether an option that PyTorch's class lacks, such as `base`, differs from its default."""
    options = module.get_own_options() if hasattr(module, "get_own_options") else {}
    return any(
        isinstance(value, Tensor) or value != getattr(type(module), name, 1.0)
        for name, value in options.items()
    )
