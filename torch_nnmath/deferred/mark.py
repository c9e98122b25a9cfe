"""The mark that `swap` sets on a module: True, or the `HeadLog` if the module is a head.

It is in the module's `__dict__`, so that copies and pickles carry it and a state dict does not.
"""

from __future__ import annotations

from torch.nn import Module

from torch_nnmath.deferred.log import HeadLog

ATTRIBUTE = "_nnmath_swapped"


def get_mark(module: Module) -> HeadLog | bool:
    """Returns the module's mark; False if it has none."""
    mark: HeadLog | bool = module.__dict__.get(ATTRIBUTE, False)
    return mark


def set_mark(module: Module, mark: HeadLog | bool) -> None:
    """Marks the module; False removes the mark."""
    if mark is False:
        module.__dict__.pop(ATTRIBUTE, None)
    else:
        module.__dict__[ATTRIBUTE] = mark


def get_head_log(module: Module) -> HeadLog | None:
    """Returns the log of a head; None for any other module."""
    mark = get_mark(module)
    return mark if isinstance(mark, HeadLog) else None
