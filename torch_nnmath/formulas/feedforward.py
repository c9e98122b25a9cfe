"""The feed-forward network, and its backward layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_nnmath.formulas._formula import Formula, save, sum_present
from torch_nnmath.formulas.affine import (
    apply_affine,
    compute_affine_gradients,
    compute_affine_tangent,
)
from torch_nnmath.formulas.relu import ReLU
from torch_nnmath.formulas.sigmoid import Sigmoid
from torch_nnmath.formulas.softmax import Softmax
from torch_nnmath.formulas.tanh import Tanh


class Activation(NamedTuple):
    """a = f(z) over the last axis, and `product(a, v)` = J v, J its symmetric Jacobian."""

    f: Callable[[Tensor], Tensor]
    product: Callable[[Tensor, Tensor], Tensor]


ACTIVATIONS = {
    "sigmoid": Activation(torch.sigmoid, Sigmoid.product),
    "tanh": Activation(torch.tanh, Tanh.product),
    "relu": Activation(torch.relu, ReLU.product),
    "softmax": Activation(lambda z: torch.softmax(z, -1), Softmax.product),
    "identity": Activation(lambda z: z, lambda a, v: v),
}


class Feedforward(Formula):
    r"""F10, F12: a^l = f(z^l), z^l = W^l a^{l-1} + b^l;  δ^l = J_f ((W^{l+1})ᵀ δ^{l+1} + da^l),
    dW^l = δ^l (a^{l-1})ᵀ,  db^l = δ^l. J_f is the Jacobian of f at z^l.

    The activations' names in a string, x (*, n_0), W^1 .. W^L (n_l, n_{l-1}), b^1 .. b^L (n_l) or
    None -> a^1 .. a^L. Every layer's activation is an output, since the backward reads them and is
    differentiated, too. da^l is the upstream gradient of a^l, None for hidden layers in a first
    backward.
    """

    @staticmethod
    def forward(activations: str, x: Tensor, *parameters: Tensor | None) -> Any:
        outputs, a = [], x
        for name, W, b in zip_layers(activations, parameters):
            a = ACTIVATIONS[name].f(apply_affine(a, W, b))
            outputs.append(a)
        return tuple(outputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, outputs: Any) -> None:
        activations, x, *parameters = inputs
        ctx.activations = activations.split()
        weights, biases = split_half(parameters)
        ctx.b_shapes = [None if b is None else b.shape for b in biases]
        ctx.set_materialize_grads(False)
        # the backward does not read an identity's output, which may be changed in place
        saved_outputs = outputs[:-1] if ctx.activations[-1] == "identity" else outputs
        save(ctx, *weights, x, *saved_outputs)

    @staticmethod
    def backward(ctx: Any, *das: Tensor | None) -> Any:
        weights, a = restore_layers(ctx)
        needs_weights, needs_biases = split_half(ctx.needs_input_grad[2:])
        dWs: list[Tensor | None] = [None] * len(weights)
        dbs: list[Tensor | None] = [None] * len(weights)
        dx = None  # (W^{l+1})ᵀ δ^{l+1}
        for l in reversed(range(len(weights))):
            needs_below = ctx.needs_input_grad[1] or any((*needs_weights[:l], *needs_biases[:l]))
            needs_gradient = (needs_below, needs_weights[l], needs_biases[l])
            da = sum_present(dx, das[l])
            if da is not None:
                dz = ACTIVATIONS[ctx.activations[l]].product(a[l + 1], da)
                W, b_shape = weights[l], ctx.b_shapes[l]
                dz = dz.to(W.dtype)  # under autocast softmax is in float32
                dx, dWs[l], dbs[l] = compute_affine_gradients(dz, a[l], W, b_shape, needs_gradient)
        return None, dx, *dWs, *dbs

    @staticmethod
    def tangent(ctx: Any, _: None, dx: Tensor | None, *dparameters: Tensor | None) -> Any:
        weights, a = restore_layers(ctx)
        dWs, dbs = split_half(dparameters)
        tangents, da = [], dx
        for l, W in enumerate(weights):
            shape = (*a[l].shape[:-1], W.shape[0])
            if any(d is not None for d in (da, dWs[l], dbs[l])):
                dz = compute_affine_tangent(a[l], W, da, dWs[l], dbs[l]).expand(shape)
                dz = dz if a[l + 1] is None else dz.to(a[l + 1].dtype)
                da = ACTIVATIONS[ctx.activations[l]].product(a[l + 1], dz)
            tangents.append(a[l].new_zeros(shape) if da is None else da)
        return tuple(tangents)


def restore_layers(ctx: Any) -> tuple[Any, Any]:
    """W^1 .. W^L, and a^0 = x, a^1 .. a^L (a^L is None if the backward does not need it)."""
    saved = ctx.saved_tensors  # read once: checkpointing cannot unpack them twice
    count = len(ctx.activations)
    return saved[:count], (*saved[count:], None)


def split_half(items: Any) -> tuple[Any, Any]:
    """The first and the second half of a sequence."""
    middle = len(items) // 2
    return items[:middle], items[middle:]


def zip_layers(activations: str, parameters: Any) -> Any:
    """(activation, W, b) of each layer."""
    return zip(activations.split(), *split_half(parameters), strict=True)
