"""The checker at many entries: few evaluations, and the same verdicts as at few entries."""

import pytest
import torch
from torch import nn
from torch.autograd import Function
from torch.nn.attention import SDPBackend, sdpa_kernel

from torch_nnmath import testing
from torch_nnmath.testing import Verdict

ENTRIES = 100


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Cube(Function):
    """x³ with errors in one entry of the first and of the second derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, first_error, second_error):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, y):
        x, *ctx.errors = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        first, second = (1 + error * (torch.arange(len(x)) == 7) for error in ctx.errors)
        x0 = x.detach()
        return dy * (3 * x0**2 * first + 6 * x0 * second * (x - x0)), None, None

    @staticmethod
    def jvp(ctx, dx, *_):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * dx


def average_cubes(x, *errors):
    return Cube.apply(x, *errors).mean()


LARGE = draw(ENTRIES).index_fill(0, torch.tensor(7), 2.0)
FIRST_ORDER = ["gradient", "retained graph", "jacrev", "vmap(grad)", "per-sample gradients"]


def test_wrong_entry_among_many_is_found():
    verdicts = [Verdict.WRONG] * len(FIRST_ORDER)
    for error in (1.0, 1e-7):
        report = testing.check(average_cubes, [LARGE, error, 0.0], transforms=FIRST_ORDER)
        assert [row.verdict for row in report] == verdicts, report
        report = testing.check(
            average_cubes, [LARGE, 0.0, 1000 * error], transforms=["second order"]
        )
        assert report["second order"].verdict == Verdict.WRONG
    transforms = [*FIRST_ORDER, "forward mode", "jacfwd"]
    testing.assert_right(average_cubes, [LARGE, 0.0, 0.0], transforms=transforms)


def test_right_tangent_is_right_beside_wrong_gradient_of_many_entries():
    transforms = ["forward mode", "jacfwd", "jvp"]
    testing.assert_right(average_cubes, [LARGE, 1.0, 0.0], transforms=transforms)


class WithoutBackward(Function):
    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, y):
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx, dx):
        (x,) = ctx.saved_tensors
        return dx * x.cos()


def test_function_of_many_entries_without_backward_has_exact_values():
    transforms = ["gradient", "forward mode", "jvp"]
    report = testing.check(WithoutBackward, draw(80), transforms=transforms)
    assert [row.verdict for row in report] == [Verdict.RAISES, Verdict.RIGHT, Verdict.RIGHT]


def test_kink_among_many_entries_has_no_truth():
    x = LARGE.index_fill(0, torch.tensor(3), 0.0)
    report = testing.check(lambda x: x.relu().sum(), x, transforms=["gradient", "second order"])
    assert [row.verdict for row in report] == [Verdict.UNKNOWN] * 2


@pytest.mark.parametrize("name", ["reference", "surrogate"])
def test_exact_values_of_many_entries_are_those_of_the_other_function(name):
    transforms = ["gradient", "second order", "jvp"]
    options = {name: lambda x: 2 * x.sin().sum(), "transforms": transforms}
    report = testing.check(lambda x: x.sin().sum(), LARGE, **options)
    assert [row.verdict for row in report] == [Verdict.WRONG] * 3
    options[name] = lambda x: x.sin().sum()
    testing.assert_right(lambda x: x.sin().sum(), LARGE, **options)


def test_quick_check_of_layer_needs_few_evaluations():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    count, entries = 0, sum(p.numel() for p in layer.parameters())

    def count_call(*_):
        nonlocal count
        count += 1

    layer.register_forward_pre_hook(count_call)
    transforms = [name for name in testing.QUICK if name not in ("compile", "hessian")]
    with sdpa_kernel(SDPBackend.MATH):
        report = testing.check(layer, draw(2, 3, 8), transforms=transforms)
    assert all(row.verdict is not Verdict.UNKNOWN for row in report), report
    faults = {row.transform for row in report if row.verdict.is_fault}
    assert faults <= {"reverse over forward"}, report  # of PyTorch's layer_norm
    assert entries == 600
    assert count < 6 * entries  # along each entry, first order alone would need 24
