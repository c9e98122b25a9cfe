"""The checker on functions as users write them: nested, complex, random, near a singularity."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import Function

from torch_nnmath import testing
from torch_nnmath.testing import Verdict

torch_functional = torch.nn.functional
TRACING = {n for n in testing.TRANSFORMS if any(w in n for w in ("compile", "export", "make_fx"))}
EAGER = [name for name in testing.TRANSFORMS if name not in TRACING]
FIRST_ORDER = ["gradient", "forward mode", "jacrev"]


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def vector(*entries):
    return torch.tensor(entries, dtype=torch.float64)


def get_verdicts(report):
    return {row.transform: row.verdict for row in report}


# Nested and complex inputs and outputs


@dataclasses.dataclass
class Output:
    loss: torch.Tensor
    states: tuple = ()
    name: str = "output"


class ListSubclass(list):
    pass


class DictSubclass(dict):
    pass


NESTINGS = {
    "tuple in a list": lambda y: [y.new_zeros(2), (y,)],
    "dict": lambda y: {"loss": y, "count": 3},
    "dataclass": lambda y: Output(y),
    "dataclass in a dataclass": lambda y: Output(y.new_zeros(()), (Output(y), None)),
    "subclass of list": lambda y: ListSubclass([y]),
    "subclass of dict": lambda y: DictSubclass(loss=[y]),
    "complex": lambda y: torch.complex(y.new_ones(y.shape), y),
    "conjugate": lambda y: torch.complex(y, y).conj(),
}


@pytest.mark.parametrize("name", NESTINGS)
def test_gradient_of_nested_output_is_checked(name):
    nest = NESTINGS[name]
    transforms = EAGER if name in ("dataclass in a dataclass", "conjugate") else testing.QUICK
    testing.assert_right(lambda x: nest(x.sin()), draw(3), transforms=transforms)
    transforms = ["gradient", "forward mode"]
    report = testing.check(lambda x: nest(x.sin().detach() + 0 * x), draw(3), transforms=transforms)
    assert [row.verdict for row in report] == [Verdict.SILENT_ZERO] * 2


def test_output_of_transformers_is_checked():
    modeling_outputs = pytest.importorskip("transformers.modeling_outputs")

    def call(x):
        return modeling_outputs.CausalLMOutput(loss=x.square().sum(), hidden_states=(x.sin(), x))

    testing.assert_right(call, draw(3), transforms=testing.QUICK)


class LosesImaginaryGradient(Function):
    @staticmethod
    def forward(x):
        return torch.complex(x, x.square())

    @staticmethod
    def setup_context(ctx, inputs, y):
        pass

    @staticmethod
    def backward(ctx, dy):
        return dy.real


def test_lost_gradient_of_complex_output_is_wrong():
    report = testing.check(LosesImaginaryGradient, draw(3), transforms=["gradient", "jacrev"])
    assert [row.verdict for row in report] == [Verdict.WRONG] * 2


def test_fft_is_right():
    testing.assert_right(torch.fft.rfft, draw(2, 4), transforms=EAGER)


def multiply_nested(factors, options):
    x, (y, k) = factors
    return k * x * y + options["shift"]


def test_tensors_in_nested_inputs_are_differentiated():
    inputs = [[draw(3), (draw(3) + 3, 2)], {"shift": draw(3), "index": torch.tensor([0])}]
    testing.assert_right(multiply_nested, inputs, transforms=testing.QUICK)

    def detach_factor(factors, options):
        x, (y, k) = factors
        return multiply_nested([x, (y.detach(), k)], options)

    report = testing.check(detach_factor, inputs, transforms=["gradient"])
    assert report["gradient"].detail.startswith("the gradient of input 0[1][0] is 0")
    report = testing.check(detach_factor, inputs, reference=multiply_nested, transforms=["value"])
    assert report.right


def test_dataclass_input_must_be_registered():
    with pytest.raises(TypeError, match="Output: register it by torch"):
        testing.check(lambda output: output.loss, [Output(draw(3))])
    testing.check(lambda x, options: x * options.a, [draw(3), SimpleNamespace(a=2)], transforms=[])


# Outputs that are inputs

VIEWS = {
    "identity": lambda x: x,
    "identity beside sine": lambda x: (x, x.sin()),
    "contiguous": torch.Tensor.contiguous,
    "dropout in evaluation": nn.Dropout().eval(),
    "reshape": lambda x: x.reshape(-1),
}


@pytest.mark.parametrize("name", VIEWS)
def test_function_that_returns_its_input_is_right(name):
    transforms = testing.TRANSFORMS if name == "identity beside sine" else EAGER
    testing.assert_right(VIEWS[name], draw(3, 2), transforms=transforms)


# Random numbers and buffers


def drop_half(x):
    torch.manual_seed(1)
    return torch_functional.dropout(x, 0.5)


def drop_half_by_generator(x):
    generator = torch.Generator().manual_seed(1)
    return x * torch.empty_like(x).bernoulli_(0.5, generator=generator)


@pytest.mark.parametrize("function", [drop_half, drop_half_by_generator])
def test_random_numbers_under_vmap_are_a_limit_of_pytorch(function):
    state = torch.get_rng_state()
    verdicts = get_verdicts(testing.check(function, draw(8), transforms=[*EAGER, "make_fx"]))
    assert torch.equal(state, torch.get_rng_state())
    assert {*verdicts.values()} == {Verdict.RIGHT, Verdict.CANNOT, Verdict.NOT_APPLICABLE}
    assert verdicts["gradient"] == verdicts["second order"] == verdicts["jvp"] == Verdict.RIGHT
    assert verdicts["vmap"] == verdicts["per-sample gradients"] == Verdict.CANNOT


def test_wrong_gradient_of_random_function_is_found():
    def call(x):
        return drop_half(x) + x - x.detach()

    report = testing.check(call, draw(8), transforms=["gradient", "jvp"])
    assert [row.verdict for row in report] == [Verdict.WRONG] * 2


class RunningMean(nn.Module):
    """Subtracts a running mean, which each call updates before it reads it."""

    def __init__(self, is_detached=True):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.is_detached = is_detached

    def forward(self, x):
        self.mean.lerp_(x.detach().mean(), 0.5)
        return x.sin() + (0 * self.mean if self.is_detached else self.mean)


def test_module_with_running_statistics_is_right():
    verdicts = get_verdicts(testing.check(RunningMean(), draw(4, 3), transforms=EAGER))
    assert {*verdicts.values()} == {Verdict.RIGHT, Verdict.CANNOT, Verdict.NOT_APPLICABLE}
    cannot = {name for name, verdict in verdicts.items() if verdict == Verdict.CANNOT}
    beyond_pytorch = {name for name in EAGER if "vmap" in name}
    assert cannot == beyond_pytorch | {"per-sample gradients", "functionalize"}


def test_detached_statistics_in_the_value_are_wrong():
    """The same value at each call, since each starts from the module's own buffers."""
    report = testing.check(RunningMean(is_detached=False), draw(4, 3), transforms=["gradient"])
    assert report["gradient"].verdict == Verdict.WRONG


# Points near a singularity or a kink


def compute_entropy(p):
    return -(p * p.log()).sum()


NEAR_SINGULARITY = {
    "log": (torch.log, vector(1e-6, 1, 0.3)),
    "log of small entries only": (torch.log, vector(1e-6, 2e-6)),
    "sqrt": (torch.sqrt, vector(1e-4, 1, 0.3)),
    "rsqrt": (torch.rsqrt, vector(1e-5, 1)),
    "entropy": (compute_entropy, vector(4e-6, 0.3, 0.7)),
    "sine of a tiny entry": (lambda x: 1 + x.sin(), vector(1e-9, 1)),
    "large constant": (lambda x: 1e5 + x.sin(), vector(1e-9, 1)),
    "masked": (lambda x: x.masked_fill(x > 0.5, -torch.inf).softmax(0), vector(0.1, 1, 0.3)),
}


@pytest.mark.parametrize("name", NEAR_SINGULARITY)
def test_function_near_singularity_is_right(name):
    function, x = NEAR_SINGULARITY[name]
    testing.assert_right(function, x, transforms=EAGER)


class InexactLog(Function):
    """The logarithm, whose gradient has a relative error of 1e-7."""

    @staticmethod
    def forward(x):
        return x.log()

    @staticmethod
    def setup_context(ctx, inputs, y):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return dy / x * (1 + 1e-7)


def test_inexact_gradient_near_singularity_is_wrong():
    report = testing.check(InexactLog, vector(1e-6, 1, 0.3), transforms=["gradient"])
    assert report["gradient"].verdict == Verdict.WRONG


def test_wrong_gradient_near_singularity_fails_gradcheck():
    def double_gradient(x):
        return 2 * x.log() - x.log().detach()

    transforms = ["gradcheck", "gradgradcheck", "second order", "third order"]
    report = testing.check(double_gradient, vector(1e-6, 1), transforms=transforms)
    assert report["gradcheck"].verdict == report["second order"].verdict == Verdict.WRONG
    assert report["third order"].verdict == Verdict.WRONG


WITHOUT_TRUTH = {
    "kink of relu": (torch.relu, vector(0, 1, 0.3)),
    "kink of abs": (torch.abs, vector(0, 1, 0.3)),
    "kink of maximum": (lambda x: x.max(), vector(1, 1, 0.3)),
    "sqrt of 0": (torch.sqrt, vector(0, 1, 0.3)),
    "infinite output": (lambda x: x.masked_fill(x > 0.5, -torch.inf), vector(0.1, 1, 0.3)),
    "float32 inside": (lambda x: x.float().sin().double(), vector(0.4, 1, 0.3)),
}


@pytest.mark.parametrize("name", WITHOUT_TRUTH)
def test_function_without_numerical_derivative_is_unknown(name):
    function, x = WITHOUT_TRUTH[name]
    report = testing.check(function, x, transforms=EAGER)
    verdicts = get_verdicts(report)
    allowed = {Verdict.RIGHT, Verdict.UNKNOWN, Verdict.NOT_APPLICABLE}
    assert {*verdicts.values()} <= allowed, report
    assert verdicts["gradient"] == verdicts["jvp"] == verdicts["vmap(grad)"] == Verdict.UNKNOWN
    assert not report.right
    with pytest.raises(AssertionError, match="truth unknown: numerical differentiation of order"):
        report.raise_on_failure()


def test_fault_is_reported_before_unknown_truth():
    def add_one_in_inference_mode(x):
        return x.relu() + torch.is_inference_mode_enabled()

    transforms = ["gradient", "inference mode"]
    report = testing.check(add_one_in_inference_mode, vector(0, 1), transforms=transforms)
    assert [row.verdict for row in report] == [Verdict.UNKNOWN, Verdict.WRONG]
    with pytest.raises(AssertionError, match="inference mode: wrong"):
        report.raise_on_failure()


# Limits of PyTorch's own operators


class Recurrent(nn.Module):
    """A module of a user, with a module of PyTorch that has no batching rule."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(2, 2)

    def forward(self, x, state):
        return self.lstm(x, state)


def branch_on_value(x):
    return x * 2 if x.sum() > 0 else x * 3


@pytest.mark.parametrize("module", [nn.LSTM(2, 2), Recurrent()])
def test_lstm_with_state_has_no_fault(module):
    states = (draw(1, 2, 2), draw(1, 2, 2) / 2)
    names = ["gradient", "second order", "jvp", "vmap", "grad(vmap)"]
    if isinstance(module, nn.LSTM):
        names = EAGER
    report = testing.check(module, [draw(2, 2, 2), states], transforms=names)
    assert report.right, report
    verdicts = get_verdicts(report)
    assert verdicts["gradient"] == verdicts["second order"] == verdicts["jvp"] == Verdict.RIGHT
    assert verdicts["vmap"] == Verdict.CANNOT
    assert "Batching rule not implemented for aten::lstm" in report["vmap"].detail


def test_missing_derivative_of_operator_is_a_limit_of_pytorch():
    def embed(indices, weight):
        return torch_functional.embedding_bag(indices[None], weight).sin()

    report = testing.check(embed, [torch.tensor([0, 1, 1]), draw(3, 2)], transforms=EAGER)
    assert report.right, report
    assert report["jvp"].verdict == report["second order"].verdict == Verdict.CANNOT


def test_error_of_user_function_is_a_fault():
    report = testing.check(branch_on_value, draw(3), transforms=["gradient", "vmap"])
    assert [row.verdict for row in report] == [Verdict.RIGHT, Verdict.RAISES]


# Declared gradients


class StraightThrough(Function):
    """Rounds; the declared gradient is that of the identity."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.round()

    @staticmethod
    def setup_context(ctx, inputs, y):
        pass

    @staticmethod
    def backward(ctx, dy):
        return dy.clone()

    @staticmethod
    def jvp(ctx, dx):
        return dx.clone()


class Reversal(StraightThrough):
    """The identity; the declared gradient is that of -2 x."""

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return -2 * dy

    @staticmethod
    def jvp(ctx, dx):
        return -2 * dx


def identity(x):
    return x


def reverse(x):
    return -2 * x


def round_by_detach(x):
    return x + (x.round() - x).detach()


@pytest.mark.parametrize(
    ("function", "surrogate"),
    [(StraightThrough, identity), (round_by_detach, identity), (Reversal, reverse)],
)
def test_declared_gradient_is_checked(function, surrogate):
    transforms = [name for name in EAGER if name != "forward over forward"]  # beyond PyTorch
    x = draw(3, 2)
    testing.assert_right(function, x, surrogate=surrogate, transforms=transforms)
    assert not testing.check(function, x, transforms=["gradient"]).right
    for wrong in (lambda x: 2 * surrogate(x), lambda x: surrogate(x) + 1e-3 * x.square()):
        report = testing.check(function, x, surrogate=wrong, transforms=FIRST_ORDER)
        assert [row.verdict for row in report] == [Verdict.WRONG] * 3


def test_value_of_function_with_declared_gradient_is_that_of_reference():
    options = {"surrogate": identity, "transforms": ["value", "gradient", "gradcheck"]}
    report = testing.check(StraightThrough, draw(3), reference=torch.round, **options)
    assert [row.verdict for row in report] == ["right", "right", "not applicable"]
    report = testing.check(StraightThrough, draw(3), reference=torch.floor, **options)
    assert [row.verdict for row in report] == ["wrong", "right", "not applicable"]


def test_surrogate_must_fit_the_function():
    report = testing.check(
        StraightThrough, draw(3), surrogate=lambda x: x.sum(), transforms=["gradient"]
    )
    assert report["gradient"].detail == "the surrogate returns tensors of shapes [()]"
    with pytest.raises(TypeError, match="the surrogate of a module must be a module"):
        testing.check(nn.Linear(3, 2), draw(3, 3), surrogate=identity)


# Cost


def test_quick_check_differentiates_at_few_points():
    """At four points: the inputs, two other members of a batch, and another sample."""
    count = 0

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(draw(10))

        def forward(self, x):
            nonlocal count
            count += 1
            return (self.weight.sin() * x).sum()

    transforms = ["gradient", "autocast bfloat16", "vmap(grad)", "per-sample gradients"]
    testing.assert_right(Scale(), draw(10), transforms=transforms)
    evaluations_for_each_entry = 8
    assert count < 4.5 * evaluations_for_each_entry * 20


class WithoutTangent(Function):
    """x², right but without a jvp."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g


@pytest.mark.parametrize(
    "function",
    [WithoutTangent, WithoutTangent.apply, lambda x: WithoutTangent.apply(x)],
    ids=["class", "apply", "call"],
)
def test_missing_tangent_is_the_functions_fault_however_it_is_given(function):
    report = testing.check(function, [draw(3)], transforms=["gradient", "forward mode"])
    assert [row.verdict for row in report] == [Verdict.RIGHT, Verdict.RAISES]
    assert not report.right
