"""Putting this library's modules into a model that someone else wrote, and taking them out.

Only a module's class changes: parameters, buffers, hooks and names stay the very same objects. A
mark in its `__dict__`, which copies and pickles carry and a state dict does not, is for `unswap`.
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

_PAIRS: list[Any] = [(getattr(torch.nn, name, ()), getattr(nn, name)) for name in nn.__all__]
_OURS: dict[type, type] = {theirs: ours for theirs, ours in _PAIRS if issubclass(ours, theirs)}
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
    """Change PyTorch's modules in `model` for `torch_nnmath.nn`'s of the same name, in place.

    Linear, Sigmoid, Tanh, ReLU, Softmax, MSELoss, CrossEntropyLoss and LinearCrossEntropyLoss
    change, the model itself included. What is not exactly one of them stays: subclasses,
    parametrized, lazy, quantised and scripted modules, and a module whose instance has a `forward`
    of its own, which a change of class would not reach. What reads a module without calling it, as
    `torch.nn.TransformerEncoder` does on its fast path, goes on so. A second call changes what came
    in since. `torch.ao.quantization` looks for PyTorch's exact classes: unswap first.

    Args:
        model: any module. A module under several names is changed and reported once.
        include: which modules: a pattern of the qualified name as for `fnmatch` ("encoder.*", where
            * crosses dots; "" is the model itself), a class of PyTorch's or of ours, a predicate
            `(name, module) -> bool`, or a list or tuple of these, any of which may match; None is
            all. A module goes by any of its names. No match is no error: the report shows it.
        exclude: which modules not, said likewise; it wins over `include`.
        head: reserved for a fused head; "auto" and None both leave a Linear a Linear today.

    Raises TypeError for a `model` or selector that is none of these, ValueError for another `head`.

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
    return Report(Change(name, *_titles(type(module))) for module, name in chosen.items())


def unswap(model: Module) -> Report:
    """Change back, in place, what `swap` changed, and nothing else.

    Modules made from `torch_nnmath.nn`'s classes stay. A class made from ours after the swap, as by
    `torch.nn.utils.parametrize`, is made anew from PyTorch's; a `forward` kept bound stays ours.

    >>> model = torch.nn.Linear(4, 3)
    >>> report = swap(model)
    >>> unswap(model)
    (root)  torch_nnmath.nn.Linear  ->  torch.nn.Linear
    1 module changed
    """
    undone = dict(_THEIRS)
    changes = []
    for module, names in _named(model).items():
        ours = next((cls for cls in type(module).__mro__ if cls in _THEIRS), None)
        if vars(module).pop(_MARK, False) and ours is not None:
            module.__class__ = _undo(type(module), undone)
            changes.append(Change(names[0], *reversed(_titles(ours))))
    return Report(changes)


def _named(model: Module) -> dict[Module, list[str]]:
    if not isinstance(model, Module):
        raise TypeError(f"model must be a torch.nn.Module, got {model!r:.80}")
    named: dict[Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        named.setdefault(module, []).append(name)
    return named


def _predicate(argument: str, selector: Any) -> Callable[[str, Module], bool]:
    if isinstance(selector, list | tuple):
        parts = [_predicate(argument, part) for part in selector]
        return lambda name, module: any(part(name, module) for part in parts)
    if isinstance(selector, str):
        return lambda name, _: fnmatchcase(name, selector)
    if isinstance(selector, type) and issubclass(selector, Module):
        return lambda _, module: issubclass(_OURS[type(module)], selector)  # whose base is theirs
    if callable(selector) and not isinstance(selector, type | Module):
        return selector
    wanted = "a name pattern, a class of modules, a predicate of (name, module), or a list of these"
    raise TypeError(f"{argument} must be {wanted}, got {selector!r:.80}")


def _undo(cls: type, undone: dict[type, type]) -> type:
    """`cls`, or where it derives from a class of ours, its like derived from PyTorch's."""
    if cls not in undone:
        bases = tuple(_undo(base, undone) for base in cls.__bases__)
        body = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
        undone[cls] = cls if bases == cls.__bases__ else type(cls)(cls.__name__, bases, body)
    return undone[cls]


def _titles(ours: type) -> tuple[str, str]:
    return f"torch.nn.{ours.__name__}", f"torch_nnmath.nn.{ours.__name__}"
