"""Replaces PyTorch's modules in an existing model by this library's, and restores them.

Only a module's class changes: parameters, buffers, hooks and names stay the very same objects. A
mark in each changed module (`torch_nnmath.deferred.mark`) tells `unswap` what to restore. A head is
the Linear that computes logits. Its mark is the `HeadLog` that counts what happened to them.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeAlias

import torch
from torch.nn import Module

from torch_nnmath import nn
from torch_nnmath.deferred import (
    HeadLog,
    get_head_log,
    get_mark,
    has_few_classes,
    set_mark,
    track_optimizers,
)

__all__ = ["Change", "Report", "swap", "unswap"]

Selector: TypeAlias = "str | type[Module] | Callable[[str, Module], bool] | Sequence[Selector]"
NamesByModule: TypeAlias = dict[Module, list[str]]

_PAIRS: list[Any] = [(getattr(torch.nn, name, ()), getattr(nn, name)) for name in nn.__all__]
NNMATH_CLASSES: dict[type, type] = {
    torch_class: nnmath_class
    for torch_class, nnmath_class in _PAIRS
    if issubclass(nnmath_class, torch_class)
}
TORCH_CLASSES = {nnmath_class: torch_class for torch_class, nnmath_class in NNMATH_CLASSES.items()}

# Modules that read a Linear's weight without calling the Linear.
_WEIGHT_READERS: Any = (
    nn.LinearCrossEntropyLoss.__bases__[-1],  # PyTorch's class, where it has one
    nn.Feedforward,
    torch.nn.MultiheadAttention,
)


class Change(NamedTuple):
    """One module: its name in the model ("" is the model itself), its class before and after."""

    name: str
    before: str
    after: str


class Report(tuple[Change, ...]):
    """What `swap` or `unswap` changed: a tuple of `Change`s that prints as a table.

    Attributes:
        heads: the log of each head by its name. The logs keep counting: how many losses were
            computed without logits, and which operations computed logits.
        left: by name, the reason why a module of one of PyTorch's classes was left unchanged.
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
        for reason in dict.fromkeys(self.left.values()):
            names = [name or "(root)" for name, other in self.left.items() if other == reason]
            if len(names) > 4:
                names = [*names[:3], f"and {len(names) - 3} more"]
            lines.append(f"left as it was: {', '.join(names)}: {reason}")
        changed_names = {change.name for change in self}
        for name, log in self.heads.items():
            if log.fused or log.reduced or log.materialized or name not in changed_names:
                lines.append(repr(log))
        return "\n".join(lines)


def swap(
    model: Module,
    *,
    include: Selector | None = None,
    exclude: Selector | None = None,
    head: str | Module | None = "auto",
) -> Report:
    """Replaces PyTorch's modules in `model` by `torch_nnmath.nn`'s of the same name, in place.

    Linear, Sigmoid, Tanh, ReLU, Softmax, MSELoss, CrossEntropyLoss and LinearCrossEntropyLoss
    are replaced, also if the model itself is one, or if FSDP2 wraps it. A module that is not
    exactly one of them is left unchanged: subclasses, parametrized, lazy, quantised and scripted
    modules, and a module whose instance has a `forward` of its own, which would override the
    class's. A module that reads another one's weight without calling it, as
    `torch.nn.TransformerEncoder` does on its fast path, keeps doing so. A second call replaces
    modules that were added since. `torch.ao.quantization` looks for PyTorch's exact classes: unswap
    first.

    The head is the Linear that computes logits. It returns deferred logits, a tensor whose values
    are computed only if an operation needs them. A cross entropy, in the model or outside of it,
    needs no values: it calls the fused head, `functional.linear_cross_entropy`, on the features.
    The page Swap (docs/swapping.md) has the details. `torch.compile` breaks its graph at the head
    and keeps the fused head; with `fullgraph=True` logits are computed as usual.

    Args:
        model: any module. A module under several names is replaced and reported once.
        include: modules to replace: a pattern of `fnmatch` for qualified names ("encoder.*", where
            * matches dots, too; "" is the model itself), a class of PyTorch or of this library, a
            predicate `(name, module) -> bool`, or a list or tuple of these, any of which may match;
            None is all. Any of a module's names may match. If nothing matches, the report is empty.
        exclude: modules to leave, in the same forms; it takes precedence over `include`.
        head: the Linear that computes logits: its name or the module itself; None for no head.
            "auto" keeps the heads that the model has. If it has none, the heads are the output
            embeddings that submodules declare by a method `get_output_embeddings()`; if none does,
            the last Linear of `model.modules()`. Of a module that is no Linear itself, such as one
            with an adapter, the heads are the Linears in it that have the most outputs. Logits of a
            head that "auto" chose are plain where deferring them would make the model slower: below
            16 MiB, or with fewer than two classes for each feature. A named head defers logits of
            any size.

    Returns:
        the changes, the logs of the heads, and the modules left unchanged, each with the reason.

    Raises:
        TypeError: for a `model`, selector or head of another type.
        ValueError: for a head that is not in the model, or is not a Linear that can be replaced.

    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    >>> swap(model, exclude="0")
    1  torch.nn.ReLU    ->  torch_nnmath.nn.ReLU
    2  torch.nn.Linear  ->  torch_nnmath.nn.Linear  head
    2 modules changed
    """
    is_included = _make_predicate("include", "*" if include is None else include)
    is_excluded = _make_predicate("exclude", () if exclude is None else exclude)
    names_by_module = _collect_names(model)
    selected_names: dict[Module, str] = {}
    for module, names in names_by_module.items():
        if _find_torch_class(module) is not None:
            matching_names = [name for name in names if is_included(name, module)]
            if matching_names and not any(is_excluded(name, module) for name in names):
                selected_names[module] = matching_names[0]
    heads = _find_heads(head, names_by_module)
    left = {name: reason for m, name in selected_names.items() if (reason := _find_obstacle(m))}
    if head == "auto":
        for module in heads:
            if not isinstance(module, torch.nn.Linear) and module not in selected_names:
                left[names_by_module[module][0]] = (
                    f"{_full_name(type(module))} is not a torch.nn.Linear"
                )
        heads = [m for m in heads if isinstance(m, torch.nn.Linear)]
        heads = [m for m in heads if m in selected_names or get_head_log(m) is not None]
    selected_names |= {m: names_by_module[m][0] for m in heads if m not in selected_names}
    # Changes start after all predicates were called: one that raises leaves the model unchanged.
    changes = []
    class_copies = dict(NNMATH_CLASSES)
    for module in names_by_module:
        name = selected_names.get(module, "")
        torch_class = _find_torch_base(type(module))
        if module in selected_names and torch_class is not None and name not in left:
            changes.append(Change(name, *_public_names(NNMATH_CLASSES[torch_class])))
            module.__class__ = _replace_bases(type(module), class_copies)
            set_mark(module, True)
        is_head = any(module is m for m in heads)  # not `in`: a module may override ==
        _set_head(module, name, is_head and name not in left)
        if is_head and head != "auto" and (log := get_head_log(module)) is not None:
            log.is_named = True
    logs = {}
    for module, names in names_by_module.items():
        if (log := get_head_log(module)) is not None:
            # The log of a copied module still has the original's name.
            log.name = selected_names.get(module, names[0])
            logs[log.name] = log
    return Report(changes, logs, left)


def unswap(model: Module) -> Report:
    """Restores, in place, the classes that `swap` replaced, and no others.

    Modules constructed from `torch_nnmath.nn`'s classes stay. A class derived from one of these
    after the swap, as by `torch.nn.utils.parametrize`, is derived anew from PyTorch's. A bound
    method `forward` that was stored elsewhere still runs this library's code.

    Raises:
        TypeError: for a `model` that is not a module.

    >>> model = torch.nn.Linear(4, 3)
    >>> report = swap(model)
    >>> unswap(model)
    (root)  torch_nnmath.nn.Linear  ->  torch.nn.Linear
    1 module changed
    """
    class_copies = dict(TORCH_CLASSES)
    changes = []
    for module, names in _collect_names(model).items():
        _set_head(module, names[0], False)
        nnmath_class = next((cls for cls in type(module).__mro__ if cls in TORCH_CLASSES), None)
        if get_mark(module) and nnmath_class is not None:
            module.__class__ = _replace_bases(type(module), class_copies)
            changes.append(Change(names[0], *reversed(_public_names(nnmath_class))))
        set_mark(module, False)
    return Report(changes)


def _collect_names(model: Module) -> NamesByModule:
    if not isinstance(model, Module):
        raise TypeError(f"model must be a torch.nn.Module, got {model!r:.80}")
    names_by_module: NamesByModule = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names_by_module.setdefault(module, []).append(name)
    return names_by_module


def _find_torch_class(module: Module) -> type | None:
    """Returns the replaceable class of PyTorch that the module is an instance of."""
    return next((cls for cls in NNMATH_CLASSES if isinstance(module, cls)), None)


def _find_torch_base(cls: type) -> type | None:
    """Returns the class of PyTorch that this class is, but for what FSDP2 adds to it."""
    if cls in NNMATH_CLASSES:
        return cls
    first_base, *bases = cls.__bases__
    is_wrapped = first_base.__module__.startswith("torch.distributed.fsdp")
    return next((base for base in bases if is_wrapped and base in NNMATH_CLASSES), None)


def _find_obstacle(module: Module) -> str | None:
    """Returns the reason why the module's class cannot be replaced, if any."""
    if "forward" in vars(module):
        return "its instance has a forward of its own"
    if _find_torch_base(type(module)) is not None or isinstance(module, tuple(TORCH_CLASSES)):
        return None
    return f"{_full_name(type(module))} is a class of its own"


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _find_heads(head: Any, names_by_module: NamesByModule) -> list[Module]:
    """Returns the modules to make heads, as the argument `head` of `swap` says."""
    if head is None:
        return []
    if isinstance(head, str) and head == "auto":
        groups = [_find_terms(m, is_auto=True) for m in _find_declared_heads(names_by_module)]
        existing_heads = [module for module in names_by_module if get_head_log(module) is not None]
        if existing_heads:  # with adapters that were added since
            groups = [g for g in groups if any(m is head for m in g for head in existing_heads)]
            return [*dict.fromkeys((*existing_heads, *itertools.chain(*groups)))]
        return [*itertools.chain(*groups)] or _find_last_linear(names_by_module)
    if isinstance(head, str):
        module_by_name = {
            name: module for module, names in names_by_module.items() for name in names
        }
        if head not in module_by_name:
            matches = difflib.get_close_matches(head, module_by_name, 3, 0.3)
            hint = f"; similar names are {', '.join(map(repr, matches))}" if matches else ""
            raise ValueError(f"head: the model has no module named {head!r}{hint}")
        module = module_by_name[head]
    elif isinstance(head, Module):
        module = head
        if module not in names_by_module:
            raise ValueError(f"head: this {type(module).__name__} is not in the model")
    else:
        raise TypeError(f'head must be a name, a module, "auto" or None, got {head!r:.80}')
    terms = _find_terms(module, is_auto=False)
    for term in terms:
        if not isinstance(term, torch.nn.Linear):
            raise ValueError(f"head must be a torch.nn.Linear, got {head!r:.80}: {type(term)}")
        if reason := _find_obstacle(term):
            raise ValueError(f"head {names_by_module[term][0]!r} cannot be changed: {reason}")
    return terms


def _find_terms(module: Module, *, is_auto: bool) -> list[Module]:
    """Returns the Linears whose sum a head is: itself, or those in it with the most outputs.

    A Linear with an adapter has two. Where the widest has so few classes that `auto` leaves its
    logits plain, those of the adapter stay plain, too. The module itself is returned if it is a
    list, or has no Linear, or another matrix: then it is no Linear with adapters.
    """
    linears = [m for m in module.modules() if isinstance(m, torch.nn.Linear)]
    others = [m for m in module.modules() if not isinstance(m, torch.nn.Linear)]
    has_other_matrix = any(p.dim() > 1 for m in others for p in m.parameters(recurse=False))
    if not linears or has_other_matrix or isinstance(module, torch.nn.ModuleList):
        return [module]
    most_outputs = max(m.out_features for m in linears)
    terms = [m for m in linears if m.out_features == most_outputs]
    widest = max(terms, key=lambda m: m.in_features)
    return [widest] if is_auto and has_few_classes(widest.weight) else [*terms]


def _find_declared_heads(names_by_module: NamesByModule) -> list[Module]:
    """Returns the output embeddings that modules declare, whether they are a Linear or not."""
    output_embeddings = []
    for module in names_by_module:
        try:
            output_embeddings.append(module.get_output_embeddings())  # type: ignore[operator]
        except (AttributeError, NotImplementedError, TypeError):  # not a method without arguments
            continue
    return [module for module in dict.fromkeys(output_embeddings) if module in names_by_module]


def _find_last_linear(names_by_module: NamesByModule) -> list[Module]:
    """Returns a list of the last Linear that is called; an empty one if there is none."""
    readers = [module for module in names_by_module if isinstance(module, _WEIGHT_READERS)]
    uncalled_modules = {module for reader in readers for module in reader.modules()}
    linears = [
        m for m in names_by_module if isinstance(m, torch.nn.Linear) and m not in uncalled_modules
    ]
    return [*linears[-1:]]


def _set_head(module: Module, name: str, is_head: bool) -> None:
    """Makes a Linear of this library a head or an ordinary layer; it stays marked if swapped."""
    log = get_head_log(module)
    if is_head and log is None:
        track_optimizers()
        set_mark(module, HeadLog(name, is_swapped=bool(get_mark(module))))
    elif log is not None and not is_head:
        set_mark(module, log.is_swapped)


def _make_predicate(argument: str, selector: Any) -> Callable[[str, Module], bool]:
    if isinstance(selector, list | tuple):
        parts = [_make_predicate(argument, part) for part in selector]
        return lambda name, module: any(part(name, module) for part in parts)
    if isinstance(selector, str):
        return lambda name, _: fnmatchcase(name, selector)
    if isinstance(selector, type) and issubclass(selector, Module):
        return lambda _, module: _is_instance(module, selector)
    if callable(selector) and not isinstance(selector, type | Module):
        return selector
    forms = "a name pattern, a class of modules, a predicate of (name, module), or a list of these"
    raise TypeError(f"{argument} must be {forms}, got {selector!r:.80}")


def _is_instance(module: Module, cls: type[Module]) -> bool:
    """Whether a class of PyTorch or of this library selects a module of either."""
    torch_class = _find_torch_class(module)
    # This library's class derives from PyTorch's, so either may be `cls`.
    return torch_class is not None and issubclass(NNMATH_CLASSES[torch_class], cls)


def _replace_bases(cls: type, class_copies: dict[type, type]) -> type:
    """Returns `cls`, or its copy with other bases if `class_copies` has one of them.

    `class_copies` maps classes to their copies, so that modules of one class still share a class.
    """
    if cls not in class_copies:
        bases = tuple(_replace_bases(base, class_copies) for base in cls.__bases__)
        body = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
        class_copies[cls] = cls if bases == cls.__bases__ else type(cls)(cls.__name__, bases, body)
    return class_copies[cls]


def _public_names(nnmath_class: type) -> tuple[str, str]:
    """Returns the names of PyTorch's and of this library's class."""
    name = nnmath_class.__name__
    return f"torch.nn.{name}", f"torch_nnmath.nn.{name}"
