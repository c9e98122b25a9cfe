"""What a row of the catalogue consists of, and functions that the rows share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torch_nnmath.reference import Forms

EXAMPLES = 5  # in a batch; unlike any other size, so that swapped dimensions raise an error
CLASSES = 3

Kind = Literal["real", "signed", "positive", "log_probability", "class", "label"]


class Input(NamedTuple):
    """An input of one example, or one that all examples share.

    Kinds of real numbers: "real", "positive", "signed", which keeps away from 0, and
    "log_probability", of a class that two others like it leave some mass. A "class" is a class
    index. So is a "label", except that the first example's is -100, which is ignored.
    """

    shape: tuple[int, ...]
    kind: Kind = "real"
    shared: bool = False

    def draw(self, rng: np.random.Generator) -> np.ndarray[Any, Any]:
        """Returns random numbers: for a batch of examples, or one array if shared."""
        shape = self.shape if self.shared else (EXAMPLES, *self.shape)
        if self.kind in ("class", "label"):
            y = rng.integers(0, CLASSES, shape)
            if self.kind == "label":
                y[0] = -100
            return y
        if self.kind == "positive":
            return rng.uniform(0.2, 1.2, shape)
        if self.kind == "log_probability":
            return rng.uniform(-3, -1.2, shape)
        if self.kind == "signed":
            return rng.uniform(0.2, 1.2, shape) * rng.choice([-1.0, 1.0], shape)
        return rng.normal(size=shape)


@dataclass(frozen=True)
class Sample:
    """A call and its inputs.

    The inputs are a batch of examples; the call returns a value for each, or their sum or mean. If
    all inputs are shared, there is one example.
    """

    call: Callable[..., Tensor]
    inputs: Mapping[str, Input]
    name: str = ""

    def draw(self, seed: int = 0, device: str = "cpu") -> tuple[Tensor, ...]:
        """Returns a tensor for each input: float64 that requires gradients, or class indices."""
        rng = np.random.default_rng(seed)
        tensors = (torch.tensor(spec.draw(rng), device=device) for spec in self.inputs.values())
        return tuple(x.requires_grad_(x.is_floating_point()) for x in tensors)

    def on(self, device: str) -> Callable[..., Tensor]:
        """Returns the call; if it is a module, a copy of it on the device."""
        if isinstance(self.call, torch.nn.Module):
            return copy.deepcopy(self.call).to(device)
        return self.call

    @property
    def is_batch(self) -> bool:
        """Whether the inputs are a batch of examples."""
        return not all(spec.shared for spec in self.inputs.values())


@dataclass(frozen=True, kw_only=True)
class Row:
    """A formula.

    `slips` are the document's slips that the formula corrects (docs/slips.md). `options` are the
    arguments with which the reference forms compute the first sample.
    """

    ids: tuple[str, ...]
    section: str
    title: str
    function: type[torch.autograd.Function]
    reference: Forms
    samples: tuple[Sample, ...]
    slips: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The ids and the title."""
        return f"{' '.join(self.ids)} {self.title}"


# Inputs


def vector(n: int, kind: Kind = "real") -> Input:
    return Input((n,), kind)


def layer(n_in: int, n_out: int, suffix: str = "") -> dict[str, Input]:
    """Returns weight and bias of a linear layer."""
    return {
        f"W{suffix}": Input((n_out, n_in), shared=True),
        f"b{suffix}": Input((n_out,), shared=True),
    }


# Calls with positional tensors only


def per_example(loss: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    return partial(loss, reduction="none", **options)


def make_module(
    make: Callable[..., torch.nn.Module], *sizes: Any, **options: Any
) -> torch.nn.Module:
    """Returns a module in float64, always with the same parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(*sizes, **options).double()
