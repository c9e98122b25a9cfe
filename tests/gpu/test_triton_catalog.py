"""Every formula of the catalogue in float32 through Triton's kernels, against float64.

CPU tensors take the path of GPU tensors of any size: operators run in Triton's interpreter, and the
head's products in float32. The truth is the same call in float64, where formulas are computed as
they are written and agree with the reference (`verify`).
"""

from __future__ import annotations

from typing import Any

import gpu_helpers
import pytest
import torch
from torch import Tensor

from torch_nnmath.catalog import CATALOG, Sample
from torch_nnmath.kernels.gpu import rows, rows_second_order

pytestmark = [
    pytest.mark.triton,
    gpu_helpers.needs_triton,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of numpy, for entries that are masked
]
EPSILON = 32 * 2.0**-23  # relative to the largest entry

HEAD = {"head", "head_second_order"}
KERNELS = {  # those that a row's samples reach
    "tanh": {"tanh_product"},
    "relu": {"relu_product"},
    "squared error": {"squared_error"},
    "sigmoid": {"sigmoid_product"},
    "softmax": {"softmax_product"},
    "softmax's Jacobian": {"softmax_product"},
    "affine, sigmoid, squared error": {"sigmoid_squared_error"},
    "feed-forward network": {
        "sigmoid_product",
        "tanh_product",
        "relu_product",
        "softmax_product",
    },
    "softmax, cross entropy": {"cross_entropy", "log_softmax_product"},
    "affine, softmax, cross entropy": HEAD,
    "soft cap": {"tanh_product"},
    "z-loss": {"z_loss", "log_sum_exp", "log_softmax_product", "cross_entropy"},
    "entropy of softmax": {"entropy", "log_softmax_product", *HEAD},
    "log-probability of a class": HEAD,
    "scaled and capped head with z-loss": {
        "z_loss",
        "log_sum_exp",
        "log_softmax_product",
        "cross_entropy",
        "tanh_product",
        *HEAD,
    },
    "cost of weighted rows": {
        "z_loss",
        "log_sum_exp",
        "log_softmax_product",
        "cross_entropy",
        *HEAD,
    },
}


def compute_results(sample: Sample, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    """The value, its tangent and gradients, and the gradients of these along a direction."""
    call: Any = sample.on("cpu")
    if isinstance(call, torch.nn.Module):
        call.to(dtype)
    leaves = [x.detach().to(dtype).requires_grad_() if x.is_floating_point() else x for x in inputs]
    places = [i for i, x in enumerate(leaves) if x.is_floating_point()]
    differentiable = [leaves[i] for i in places]
    directions = [draw_like(x, i) for i, x in zip(places, differentiable, strict=True)]

    def compute(*changed: Tensor) -> Tensor:
        arguments = list(leaves)
        for i, x in zip(places, changed, strict=True):
            arguments[i] = x
        return call(*arguments)

    value = compute(*differentiable)
    cotangent = draw_like(value, len(inputs))
    gradients = torch.autograd.grad(value, differentiable, cotangent)
    _, tangent = torch.func.jvp(
        compute, tuple(x.detach() for x in differentiable), tuple(directions)
    )
    value = compute(*differentiable)
    differentiable_gradients = torch.autograd.grad(
        value, differentiable, cotangent, create_graph=True
    )
    pairs = zip(differentiable_gradients, directions, strict=True)
    change = sum((dx * direction).sum() for dx, direction in pairs)
    second = tuple(map(torch.zeros_like, differentiable))
    if change.requires_grad:
        second = torch.autograd.grad(change, differentiable, materialize_grads=True)
    tangent = tangent.to(dtype)  # PyTorch's of `number * scalar` is float64
    results = [value, tangent, *gradients, *differentiable_gradients, *second]
    return [x.detach() for x in results]


def draw_like(x: Tensor, seed: int) -> Tensor:
    """Numbers that float32 represents."""
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x.dtype)


def check(results: list[Tensor], truth: list[Tensor]) -> None:
    for i, (result, expected) in enumerate(zip(results, truth, strict=True)):
        assert (result.shape, result.dtype) == (expected.shape, torch.float32)
        error = (result - expected).abs().max()
        assert error <= EPSILON * expected.abs().max().clamp(min=1), (i, result, expected)


@pytest.mark.parametrize("row", CATALOG, ids=lambda row: row.name)
def test_first_and_second_order_through_triton(row, monkeypatch):
    samples = [
        (sample, [x.float() if x.is_floating_point() else x for x in sample.draw()])
        for sample in row.samples
    ]
    truth = [compute_results(sample, inputs, torch.float64) for sample, inputs in samples]
    for module in (rows, rows_second_order):  # the head's in PyTorch operations
        monkeypatch.setattr(module, "process_rows", None)
    kernel_names = gpu_helpers.select_like_a_gpu(monkeypatch)
    with gpu_helpers.route_operators(monkeypatch):
        for (sample, inputs), expected in zip(samples, truth, strict=True):
            check(compute_results(sample, inputs, torch.float32), expected)
    assert {*kernel_names} == KERNELS.get(row.title, set())
