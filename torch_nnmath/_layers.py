"""The layers and activations, which `functional` exports."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from torch_nnmath import _check as check
from torch_nnmath import formulas
from torch_nnmath._precision import cast_for_product, is_autocast


@check.support_torch_function
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: input weightᵀ + bias (F1, F8).

    Args:
        input: (*, in_features).
        weight: (out_features, in_features), or (in_features).
        bias: (out_features), or () with a one-dimensional weight.

    Returns:
        (*, out_features), or (*) for a one-dimensional weight.

    Raises:
        RuntimeError: if shapes or dtypes do not fit together.
        TypeError: if an argument is complex or not a tensor.

    >>> linear(torch.ones(1, 2), torch.tensor([[1., 2.], [3., 4.]]))
    tensor([[3., 7.]])
    """
    check.real(input=input, weight=weight)
    if bias is not None:
        check.real(bias=bias)
    check.product("weight", input, weight, bias, dims=(1, 2))
    input, weight, bias = cast_for_product(input, weight, bias)
    if weight.dim() == 2:
        return formulas.Affine.evaluate(input, weight, bias)
    product = formulas.Affine.evaluate(input, weight.unsqueeze(0), None).squeeze(-1)
    return product if bias is None else product + bias


@check.support_torch_function
def sigmoid(input: Tensor) -> Tensor:
    """`torch.sigmoid`: 1/(1 + e^-input), elementwise (F6). Raises TypeError for complex input.

    >>> sigmoid(torch.tensor([0.]))
    tensor([0.5000])
    """
    check.real(input=input)
    return formulas.Sigmoid.evaluate(input)


@check.support_torch_function
def tanh(input: Tensor) -> Tensor:
    """`torch.tanh`, elementwise (F2). Raises TypeError for complex input.

    >>> tanh(torch.tensor([0.]))
    tensor([0.])
    """
    check.real(input=input)
    return formulas.Tanh.evaluate(input)


@check.support_torch_function
def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """`F.relu`: max(0, input), elementwise; nan stays nan, the derivative at 0 is 0 (F2).

    Raises TypeError for complex and RuntimeError for bool input. `inplace` overwrites the input.

    >>> relu(torch.tensor([-1., 2.]))
    tensor([0., 2.])
    """
    check.real(input=input)
    if inplace:
        check.writable(input)
    return formulas.relu_(input) if inplace else formulas.ReLU.evaluate(input)


@check.support_torch_function
def softmax(
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`F.softmax`: e^input / Σ e^input over `dim` (F7).

    Args:
        input: any shape.
        dim: the axis that sums to 1; None selects PyTorch's deprecated default, with a warning.
        dtype: if given, the input is cast to it first.

    Returns:
        The shape of the input.

    Raises:
        IndexError: if `dim` is out of range.
        NotImplementedError: if the input, after the cast, is of integer type.
        TypeError: if input is complex or not a tensor.

    >>> softmax(torch.tensor([0., 0.]), dim=0)
    tensor([0.5000, 0.5000])
    """
    check.real(input=input)
    if dim is None:
        dim = 0 if input.dim() in (0, 1, 3) else 1
        warnings.warn(
            "Implicit dimension choice for softmax has been deprecated. "
            "Change the call to include dim=X as an argument.",
            stacklevel=_stacklevel,
        )
    if dtype is None and input.is_cuda and is_autocast(input):
        dtype = torch.float32 if input.dtype != torch.float64 else None
    return formulas.Softmax.evaluate(input if dtype is None else input.to(dtype), dim)


@check.support_torch_function
def softmax_jacobian(input: Tensor, dim: int) -> Tensor:
    """The Jacobian of softmax as a matrix, diag(a) - a aᵀ (F17), for teaching and checking.

    Args:
        input: (*, n, *), the n at `dim`.

    Returns:
        The matrix of each vector, (*, *, n, n), with da_j/dz_k in row j, column k.

    Raises:
        IndexError: if `dim` is out of range, or input has no axis.
        TypeError: if input is complex or not a tensor.

    >>> softmax_jacobian(torch.tensor([0., 0.]), dim=0)
    tensor([[ 0.2500, -0.2500],
            [-0.2500,  0.2500]])
    """
    check.real(input=input)
    if input.dim() == 0:
        raise IndexError("softmax_jacobian needs an input with at least one axis, got shape ()")
    return formulas.softmax_jacobian(input, dim)


@check.support_torch_function
def feedforward(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    activation: str = "sigmoid",
    output_activation: str = "sigmoid",
) -> Tensor:
    """A feed-forward network as one function, its backward layer by layer (F10, F12).

    Args:
        input: (*, n_0).
        weights: matrices (n_1, n_0), (n_2, n_1), ...
        biases: for each weight a vector (n_1), (n_2), ... or None.
        activation: that of the hidden layers: "sigmoid", "tanh", "relu" or "identity".
        output_activation: that of the last layer: one of these, or "softmax" over the last axis.

    Returns:
        (*, n_L), the activation of the last layer.

    Raises:
        ValueError: for an unknown activation, no layer, or a number of biases other than that of
            weights.
        RuntimeError: if shapes or dtypes do not fit together.
        TypeError: if an argument is complex or not a tensor.

    >>> feedforward(torch.zeros(1, 3), [torch.ones(2, 3)], [None])
    tensor([[0.5000, 0.5000]])
    """
    weights, biases = list(weights), list(biases)
    names = list(formulas.ACTIVATIONS)
    check.network(input, weights, biases, activation, output_activation, names)
    input, *parameters = cast_for_product(input, *weights, *biases)
    # one string, since PyTorch derives no batching rule of a Function with a list as an argument
    activations = " ".join([activation] * (len(weights) - 1) + [output_activation])
    return formulas.Feedforward.evaluate(activations, input, *parameters)[-1]
