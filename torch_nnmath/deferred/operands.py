"""The operands of a head's product, as deferred logits keep them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_nnmath._precision import cast_for_product, find_weight_dtype
from torch_nnmath.formulas.affine import compute_affine_gradients
from torch_nnmath.kernels.dispatch import has_dtensor


class Operands(NamedTuple):
    """The operands of a head's product.

    Autocast's casts belong here, since the loss may be computed outside of the autocast region. The
    weight is rounded for each product anew, so that no copy is kept and its gradient is not
    rounded.
    """

    features: Tensor
    weight: Tensor
    bias: Tensor | None
    weight_dtype: torch.dtype | None  # to which the weight is rounded

    def round_weight(self) -> Operands:
        """The operands with the rounded weight."""
        W, dtype = self.weight, self.weight_dtype
        return self._replace(weight=W if dtype is None else W.to(dtype), weight_dtype=None)

    def list_tensors(self) -> list[Tensor]:
        """The tensors whose versions tell of a change: for a DTensor, its local part."""
        tensors: list[Any] = [x for x in self if isinstance(x, Tensor)]
        with torch.no_grad():
            return tensors + [x.to_local() for x in tensors if has_dtensor(x)]

    def compute_logits(self) -> Tensor:
        """F1, without a derivative."""
        x, W, b, _ = self.round_weight()
        if has_dtensor(W):
            from torch_nnmath.deferred import split

            return split.compute_logits(x, W, b)
        return torch.nn.functional.linear(x, W, b)


def find_gradient_rule(x: Tensor, W: Tensor) -> Callable[..., Any]:
    """The function of (dz, x, W, b_shape, needs_gradient) that computes F8."""
    if has_dtensor(W):
        from torch_nnmath.deferred import split

        return functools.partial(split.compute_gradients, split.make_sharding(W, x.shape[:-1]))
    return compute_affine_gradients


def is_freed(x: Tensor, shape: torch.Size) -> bool:
    """Whether x, of this shape, has lost its memory: FSDP frees the storage, ZeRO-3 the shape."""
    return x.shape != shape or bool(x.numel() and x.untyped_storage().nbytes() == 0)


def make_operands(input: Tensor, weight: Tensor, bias: Tensor | None) -> Operands | None:
    """Returns the operands of the product; None if they cannot be kept.

    Inference tensors have no version that would tell of a change: they are copied. A weight is too
    large for a copy. PyTorch raises an error for inference tensors where the product requires grad.
    """
    given_tensors = [x for x in (input, weight, bias) if x is not None]
    weight_dtype = find_weight_dtype(weight)
    is_any_inference = any(x.is_inference() for x in given_tensors)
    if not is_any_inference and not torch.is_inference_mode_enabled():
        features, bias = cast_for_product(input, bias)
        return Operands(features, weight, bias, weight_dtype)
    if torch.is_grad_enabled() and any(x.requires_grad for x in given_tensors):
        return None
    with torch.no_grad(), set_inference_mode(False):
        if weight.is_inference():
            return None
        copies = (_copy_inference_tensor(x) for x in cast_for_product(input, bias))
        features, bias = copies
        assert features is not None
        return Operands(features, weight, bias, weight_dtype)


def set_inference_mode(enabled: bool) -> AbstractContextManager[Any]:
    """Turns inference mode on or off.

    It changes nothing if the mode is set already: below autograd, turning the mode off turns
    autograd on.
    """
    is_set = torch.is_inference_mode_enabled() == enabled
    return contextlib.nullcontext() if is_set else torch.inference_mode(enabled)


def _copy_inference_tensor(x: Tensor | None) -> Tensor | None:
    return x if x is None or not x.is_inference() else x.clone()


def are_operands_of_head(operands: Operands) -> bool:
    """Whether the product is defined and has rows and several classes.

    If it is undefined, `functional.linear` raises PyTorch's error.
    """
    features, weight, bias, weight_dtype = operands
    kinds = {(features.dtype, features.device), (weight_dtype or weight.dtype, weight.device)}
    if bias is not None:
        kinds.add((bias.dtype, bias.device))
    return (
        len(kinds) == 1
        and features.is_floating_point()
        and features.dim() > 0
        and features.numel() > 0
        and weight.dim() == 2
        and features.shape[-1] == weight.shape[1]
        and weight.shape[0] > 1
    )
