"""Putting this library's modules into a model that someone else wrote, and taking them out.

A module changes by its class alone, so its parameters, buffers, hooks and names stay the very same
objects. A mark in the instance's `__dict__` says that `swap` changed it: copies and pickles carry
it, a state dict does not, and `unswap` takes it off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeAlias

import torch
from torch.nn import Module

from torch_nnmath import nn

__all__ = ["Change", "Report", "swap", "unswap"]

Selector: TypeAlias = "str | type[Module] | Callable[[str, Module], bool] | Sequence[Selector]"

_NAMES = ["Linear", "Sigmoid", "Tanh", "ReLU", "Softmax", "MSELoss", "CrossEntropyLoss"]
_NAMES += ["LinearCrossEntropyLoss"] * hasattr(torch.nn, "LinearCrossEntropyLoss")
_OURS: dict[type, type] = {getattr(torch.nn, name): getattr(nn, name) for name in _NAMES}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}
_MARK = "_nnmath_swapped"


class Change(NamedTuple):
    """One module: its name in the model ("" is the model itself), its class before and after."""

    name: str
    before: str
    after: str


class Report(tuple[Change, ...]):
    """What `swap` or `unswap` changed: a tuple of `Change`s that prints as a table."""

    def __repr__(self) -> str:
        rows = [(name or "(root)", before, "->", after) for name, before, after in self]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join([*lines, f"{len(self) or 'no'} module{'s' * (len(self) != 1)} changed"])


def swap(
    model: Module,
    *,
    include: Selector | None = None,
    exclude: Selector | None = None,
    head: str | None = "auto",
) -> Report:
    """Change PyTorch's modules in `model` for `torch_nnmath.nn`'s, in place.

    Linear, Sigmoid, Tanh, ReLU, Softmax, MSELoss, CrossEntropyLoss and LinearCrossEntropyLoss
    change, wherever they are in the model or where they are the model. What is not exactly one of
    them stays: subclasses, parametrized, lazy, quantised and scripted modules, and a module with a
    `forward` of its own on the instance, which a change of class would not reach. What owns a
    module and computes without calling it, as the fast path of `torch.nn.TransformerEncoderLayer`
    does, goes on so. A second call changes what has come in since. Quantise
    (`torch.ao.quantization`) an unswapped model: that, too, looks for PyTorch's exact classes.

    Args:
        model: any module. A shared one is changed and reported once.
        include: which modules: a pattern of the qualified name as for `fnmatch` ("encoder.*", where
            * crosses dots; "" is the model itself), a class of PyTorch's or of ours, a predicate
            `(name, module) -> bool` asked about the modules that could change, or a list or tuple
            of these, any of which may match; None is all. What matches nothing changes nothing, as
            the report shows, without a warning. A shared module goes by any of its names.
        exclude: which modules not, said likewise; it wins over `include`.
        head: reserved. "auto" and None are the same today: every Linear becomes a Linear.

    Raises:
        TypeError: `model` is not a module, or `include` or `exclude` none of the above.
        ValueError: `head` is neither "auto" nor None.

    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    >>> swap(model, exclude="2")
    0  torch.nn.Linear  ->  torch_nnmath.nn.Linear
    1  torch.nn.ReLU    ->  torch_nnmath.nn.ReLU
    2 modules changed
    """
    if head not in ("auto", None):
        raise ValueError(f'head must be "auto" or None, got {head!r}')
    included = _predicate("include", "*" if include is None else include)
    excluded = _predicate("exclude", () if exclude is None else exclude)
    chosen = {}
    for module, names in _named(model).items():
        if type(module) in _OURS and "forward" not in vars(module):
            matching = [name for name in names if included(name, module)]
            if matching and not any(excluded(name, module) for name in names):
                chosen[module] = matching[0]
    for module in chosen:  # after the last predicate, so that one that raises leaves all as it was
        module.__class__ = _OURS[type(module)]
        vars(module)[_MARK] = True
    return Report(
        Change(name, _title(_THEIRS[type(module)]), _title(type(module)))
        for module, name in chosen.items()
    )


def unswap(model: Module) -> Report:
    """Change back, in place, what `swap` changed, and nothing else.

    Modules that were made from `torch_nnmath.nn`'s classes stay. A class that was made from ours
    after the swap, as `torch.nn.utils.parametrize` does, is made anew from PyTorch's. A bound
    `forward` that someone kept meanwhile is still ours.

    Raises:
        TypeError: `model` is not a module.

    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU())
    >>> report = swap(model)
    >>> unswap(model)
    0  torch_nnmath.nn.Linear  ->  torch.nn.Linear
    1  torch_nnmath.nn.ReLU    ->  torch.nn.ReLU
    2 modules changed
    """
    undone = dict(_THEIRS)
    changes = []
    for module, names in _named(model).items():
        ours = next((cls for cls in type(module).__mro__ if cls in _THEIRS), None)
        if vars(module).pop(_MARK, False) and ours is not None:
            module.__class__ = _undo(type(module), undone)
            changes.append(Change(names[0], _title(ours), _title(_THEIRS[ours])))
    return Report(changes)


def _named(model: Module) -> dict[Module, list[str]]:
    """Every module once, in order, with all its names."""
    if not isinstance(model, Module):
        raise TypeError(f"model must be a torch.nn.Module, got {_kind(model)}")
    named: dict[Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        named.setdefault(module, []).append(name)
    return named


def _predicate(argument: str, selector: Any) -> Callable[[str, Module], bool]:
    if isinstance(selector, list | tuple):
        parts = [_predicate(argument, part) for part in selector]
        return lambda name, module: any(part(name, module) for part in parts)
    if isinstance(selector, str):
        return lambda name, module: fnmatchcase(name, selector)
    if isinstance(selector, type) and issubclass(selector, Module):
        # Ours derives from PyTorch's, so that this one question answers for both.
        return lambda name, module: issubclass(_OURS[type(module)], selector)
    if callable(selector) and not isinstance(selector, type | Module):
        return selector
    raise TypeError(
        f"{argument} must be a name pattern, a class of modules, a predicate (name, module) -> "
        f"bool, or a list or tuple of these, got {_kind(selector)}"
    )


def _undo(cls: type, undone: dict[type, type]) -> type:
    """`cls`, or where it derives from a class of ours, its like derived from PyTorch's."""
    if cls not in undone:
        bases = tuple(_undo(base, undone) for base in cls.__bases__)
        body = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
        undone[cls] = cls if bases == cls.__bases__ else type(cls)(cls.__name__, bases, body)
    return undone[cls]


def _title(cls: type) -> str:
    return f"{'torch_nnmath' if cls in _THEIRS else 'torch'}.nn.{cls.__name__}"


def _kind(found: object) -> str:
    return f"the class {found.__name__}" if isinstance(found, type) else type(found).__name__
