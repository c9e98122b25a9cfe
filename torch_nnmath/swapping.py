"""Putting this library's modules into a model that someone else wrote, and taking them out.

Only a module's class changes: parameters, buffers, hooks and names stay the very same objects. A
mark in its `__dict__`, which copies and pickles carry and a state dict does not, is for `unswap`;
that of a head, the Linear that makes logits, keeps account of what became of them.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeAlias

import torch
from torch.nn import Module

from torch_nnmath import nn
from torch_nnmath.deferred import HeadLog

__all__ = ["Change", "Report", "swap", "unswap"]

Selector: TypeAlias = "str | type[Module] | Callable[[str, Module], bool] | Sequence[Selector]"

_PAIRS: list[Any] = [(getattr(torch.nn, name, ()), getattr(nn, name)) for name in nn.__all__]
_OURS: dict[type, type] = {theirs: ours for theirs, ours in _PAIRS if issubclass(ours, theirs)}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}
_READERS: Any = (  # of a Linear's weight, which they do not call
    nn.LinearCrossEntropyLoss.__bases__[-1],  # PyTorch's, where it has one
    nn.Feedforward,
    torch.nn.MultiheadAttention,
)
_MARK = "_nnmath_swapped"  # True, or a head's HeadLog, which nn.Linear reads


class Change(NamedTuple):
    """One module: its name in the model ("" is the model itself), its class before and after."""

    name: str
    before: str
    after: str


class Report(tuple[Change, ...]):
    """What `swap` or `unswap` changed: a tuple of `Change`s that prints as a table.

    Attributes:
        heads: by name, each head's account, which goes on: how many losses were computed without
            logits, and by which operations logits had to be computed.
        left: by name, why a module of one of PyTorch's kinds was left as it was.
    """

    heads: dict[str, HeadLog]
    left: dict[str, str]

    def __new__(
        cls,
        changes: Iterable[Change] = (),
        heads: dict[str, HeadLog] | None = None,
        left: dict[str, str] | None = None,
    ) -> Report:
        report = super().__new__(cls, changes)
        report.heads, report.left = heads or {}, left or {}
        return report

    def __repr__(self) -> str:
        rows = [
            (name or "(root)", before, "->", after, "head" if name in self.heads else "")
            for name, before, after in self
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        lines.append(f"{len(self) or 'no'} module{'s' * (len(self) != 1)} changed")
        for why in dict.fromkeys(self.left.values()):
            names = [name or "(root)" for name, its in self.left.items() if its == why]
            more = [f"and {len(names) - 3} more"] if len(names) > 4 else []
            lines.append(
                f"left as it was: {', '.join([*names[:3], *more] if more else names)}: {why}"
            )
        rows_of = {name for name, _, _ in self}
        for name, log in self.heads.items():
            if log.fused or log.materialized or name not in rows_of:
                lines.append(repr(log))
        return "\n".join(lines)


def swap(
    model: Module,
    *,
    include: Selector | None = None,
    exclude: Selector | None = None,
    head: str | Module | None = "auto",
) -> Report:
    """Change PyTorch's modules in `model` for `torch_nnmath.nn`'s of the same name, in place.

    Linear, Sigmoid, Tanh, ReLU, Softmax, MSELoss, CrossEntropyLoss and LinearCrossEntropyLoss
    change, the model itself included. What is not exactly one of them stays: subclasses,
    parametrized, lazy, quantised and scripted modules, and a module whose instance has a `forward`
    of its own, which a change of class would not reach. What reads a module without calling it, as
    `torch.nn.TransformerEncoder` does on its fast path, goes on so. A second call changes what came
    in since. `torch.ao.quantization` looks for PyTorch's exact classes: unswap first.

    The head is the Linear that makes logits. It returns a tensor that computes them only if they
    are needed; a cross entropy of them, the model's own or the user's, does not need them and calls
    the fused head, `functional.linear_cross_entropy`, on the features: see `docs/swapping.md`.
    Under `torch.compile` of the whole model logits are plain: compile its body to keep the head.

    Args:
        model: any module. A module under several names is changed and reported once.
        include: which modules: a pattern of the qualified name as for `fnmatch` ("encoder.*", where
            * crosses dots; "" is the model itself), a class of PyTorch's or of ours, a predicate
            `(name, module) -> bool`, or a list or tuple of these, any of which may match; None is
            all. A module goes by any of its names. No match is no error: the report shows it.
        exclude: which modules not, said likewise; it wins over `include`.
        head: which Linear makes logits: its name or the module itself; None if none is to be taken
            for one. "auto" is every output embedding that a submodule declares by a method
            `get_output_embeddings()`; where none does, the last Linear of `model.modules()`.

    Raises TypeError for a `model`, selector or head that is none of these, ValueError for a head
    that is not in the model or no Linear that can be changed.

    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    >>> swap(model, exclude="0")
    1  torch.nn.ReLU    ->  torch_nnmath.nn.ReLU
    2  torch.nn.Linear  ->  torch_nnmath.nn.Linear  head
    2 modules changed
    """
    included = _predicate("include", "*" if include is None else include)
    excluded = _predicate("exclude", () if exclude is None else exclude)
    named = _named(model)
    chosen = {}
    for module, names in named.items():
        if _kind(module) is not None:
            matching = [name for name in names if included(name, module)]
            if matching and not any(excluded(name, module) for name in names):
                chosen[module] = matching[0]
    heads = _heads(head, named)
    left = {name: why for module, name in chosen.items() if (why := _obstacle(module))}
    if head == "auto":
        linears = [module for module in heads if isinstance(module, torch.nn.Linear)]
        others = [m for m in heads if not isinstance(m, torch.nn.Linear) and m not in chosen]
        left |= {named[m][0]: f"{_class(m)} is no torch.nn.Linear" for m in others}
        heads = [module for module in linears if module in chosen or _log(module) is not None]
    chosen |= {module: named[module][0] for module in heads if module not in chosen}
    changes = []  # made after the last predicate: one that raises leaves all as it was
    for module in named:
        name = chosen.get(module, "")
        if module in chosen and type(module) in _OURS and name not in left:
            changes.append(Change(name, *_titles(_OURS[type(module)])))
            module.__class__ = _OURS[type(module)]
            vars(module)[_MARK] = True
        is_head = any(module is each for each in heads)  # a module's own == may say anything
        _make_head(module, name, is_head and name not in left)
    logs = {}
    for module, names in named.items():
        if (log := _log(module)) is not None:
            log.name = chosen.get(module, names[0])  # of a copy, another than when it was made
            logs[log.name] = log
    return Report(changes, logs, left)


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
        _make_head(module, names[0], False)
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


def _kind(module: Module) -> type | None:
    """Of PyTorch's classes that we have the like of, the one that it is or derives from."""
    return next((theirs for theirs in _OURS if isinstance(module, theirs)), None)


def _is_of(module: Module, cls: type[Module]) -> bool:
    kind = _kind(module)
    return kind is not None and issubclass(_OURS[kind], cls)  # ours derives from theirs


def _obstacle(module: Module) -> str | None:
    """Why a change of class would not do for it."""
    if "forward" in vars(module):
        return "its instance has a forward of its own"
    if type(module) in _OURS or isinstance(module, tuple(_THEIRS)):
        return None
    return f"{_class(module)} is a class of its own"


def _class(module: Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _heads(head: Any, named: dict[Module, list[str]]) -> list[Module]:
    """The modules that are to be heads: what is asked for, or what there is, or by the rule."""
    if head is None:
        return []
    if isinstance(head, str) and head == "auto":
        there = [module for module in named if _log(module) is not None]
        return there or _declared(named) or _last(named)
    if isinstance(head, str):
        of_name = {name: module for module, names in named.items() for name in names}
        if head not in of_name:
            close = difflib.get_close_matches(head, of_name, 3, 0.3)
            likely = f"; near it are {', '.join(map(repr, close))}" if close else ""
            raise ValueError(f"head: the model has no module named {head!r}{likely}")
        module = of_name[head]
    elif isinstance(head, Module):
        module = head
        if module not in named:
            raise ValueError(f"head: this {type(module).__name__} is not in the model")
    else:
        raise TypeError(f'head must be a name, a module, "auto" or None, got {head!r:.80}')
    why = _obstacle(module)
    if not isinstance(module, torch.nn.Linear):
        raise ValueError(f"head must be a torch.nn.Linear, got {head!r:.80}: {type(module)}")
    if why:
        raise ValueError(f"head {named[module][0]!r} cannot be changed: {why}")
    return [module]


def _declared(named: dict[Module, list[str]]) -> list[Module]:
    """The output embeddings that modules speak of. One that is no Linear is no head."""
    found = []
    for module in named:
        try:
            found.append(module.get_output_embeddings())  # type: ignore[operator]
        except (AttributeError, NotImplementedError, TypeError):  # has none, or asks for arguments
            continue
    return [module for module in dict.fromkeys(found) if module in named]


def _last(named: dict[Module, list[str]]) -> list[Module]:
    """The last Linear that may be called."""
    inside = {m for reader in named if isinstance(reader, _READERS) for m in reader.modules()}
    linears = [m for m in named if isinstance(m, torch.nn.Linear) and m not in inside]
    return [*linears[-1:]]


def _log(module: Module) -> HeadLog | None:
    mark = vars(module).get(_MARK)
    return mark if isinstance(mark, HeadLog) else None


def _make_head(module: Module, name: str, is_head: bool) -> None:
    """Makes a Linear of ours a head, or no longer one; whose class was changed remains marked."""
    marks, log = vars(module), _log(module)
    if is_head and log is None:
        marks[_MARK] = HeadLog(name, is_swapped=_MARK in marks)
    elif log is not None and not is_head:
        del marks[_MARK]
        if log.is_swapped:
            marks[_MARK] = True


def _predicate(argument: str, selector: Any) -> Callable[[str, Module], bool]:
    if isinstance(selector, list | tuple):
        parts = [_predicate(argument, part) for part in selector]
        return lambda name, module: any(part(name, module) for part in parts)
    if isinstance(selector, str):
        return lambda name, _: fnmatchcase(name, selector)
    if isinstance(selector, type) and issubclass(selector, Module):
        return lambda _, module: _is_of(module, selector)
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
