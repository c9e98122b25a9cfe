"""The feed-forward network, and its backward layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_nnmath.formulas._formula import Formula, save, sum_present
from torch_nnmath.formulas.affine import affine_gradients, affine_tangent, affine_value
from torch_nnmath.formulas.relu import ReLU
from torch_nnmath.formulas.sigmoid import Sigmoid
from torch_nnmath.formulas.softmax import Softmax
from torch_nnmath.formulas.tanh import Tanh


class Activation(NamedTuple):
    """a = f(z) over the last axis, and the product J v of its symmetric Jacobian from a and v."""

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
    r"""F10, F12: a^l = f(W^l a^{l-1} + b^l);  δ^l = ((W^{l+1})ᵀ δ^{l+1} + da^l) ∘ f'(z^l),
    dW^l = δ^l (a^{l-1})ᵀ,  db^l = δ^l.

    The activations' names in a string, x (*, n_0), W^1 .. W^L (n_l, n_{l-1}), b^1 .. b^L (n_l) or
    None -> a^1 .. a^L.
    Every layer's activation is an output, so that a derivative of the backward, which reads them,
    finds its way; da^l is the gradient that comes to a^l from outside (None but for the last).
    """

    @staticmethod
    def forward(activations: str, x: Tensor, *parameters: Tensor | None) -> Any:
        outputs, a = [], x
        for name, W, b in layers(activations, parameters):
            a = ACTIVATIONS[name].f(affine_value(a, W, b))
            outputs.append(a)
        return tuple(outputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, outputs: Any) -> None:
        activations, x, *parameters = inputs
        ctx.activations = activations.split()
        weights, biases = halves(parameters)
        ctx.b_shapes = [None if b is None else b.shape for b in biases]
        ctx.set_materialize_grads(False)
        # an identity's product does not read its output, which may then be changed in place
        read = outputs[:-1] if ctx.activations[-1] == "identity" else outputs
        save(ctx, *weights, x, *read)

    @staticmethod
    def backward(ctx: Any, *das: Tensor | None) -> Any:
        weights, a = weights_and_activations(ctx)
        needs_weights, needs_biases = halves(ctx.needs_input_grad[2:])
        dWs: list[Tensor | None] = [None] * len(weights)
        dbs: list[Tensor | None] = [None] * len(weights)
        dx = None  # (W^{l+1})ᵀ δ^{l+1}: what the layer above sends down
        for l in reversed(range(len(weights))):
            needs_below = ctx.needs_input_grad[1] or any((*needs_weights[:l], *needs_biases[:l]))
            needs = (needs_below, needs_weights[l], needs_biases[l])
            da = sum_present(dx, das[l])
            if da is not None:
                dz = ACTIVATIONS[ctx.activations[l]].product(a[l + 1], da)
                dz = dz.to(weights[l].dtype)  # autocast takes a softmax to float32
                dx, dWs[l], dbs[l] = affine_gradients(dz, a[l], weights[l], ctx.b_shapes[l], needs)
        return None, dx, *dWs, *dbs

    @staticmethod
    def tangent(ctx: Any, _: None, dx: Tensor | None, *dparameters: Tensor | None) -> Any:
        weights, a = weights_and_activations(ctx)
        dWs, dbs = halves(dparameters)
        tangents, da = [], dx
        for l, W in enumerate(weights):
            shape = (*a[l].shape[:-1], W.shape[0])
            if any(d is not None for d in (da, dWs[l], dbs[l])):
                dz = affine_tangent(a[l], W, da, dWs[l], dbs[l]).expand(shape)
                dz = dz if a[l + 1] is None else dz.to(a[l + 1].dtype)
                da = ACTIVATIONS[ctx.activations[l]].product(a[l + 1], dz)
            tangents.append(a[l].new_zeros(shape) if da is None else da)
        return tuple(tangents)


def weights_and_activations(ctx: Any) -> tuple[Any, Any]:
    """W^1 .. W^L, and a^0 = x, a^1 .. a^L (None for one that nothing reads)."""
    saved = ctx.saved_tensors  # read once: checkpointing makes them again for each reading
    count = len(ctx.activations)
    return saved[:count], (*saved[count:], None)


def halves(items: Any) -> tuple[Any, Any]:
    """The first half and the second."""
    middle = len(items) // 2
    return items[:middle], items[middle:]


def layers(activations: str, parameters: Any) -> Any:
    """(activation, W, b) of each layer."""
    return zip(activations.split(), *halves(parameters), strict=True)
