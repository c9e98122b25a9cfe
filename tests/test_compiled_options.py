"""Every public function and module, compiled with each of its options that are numbers."""

import functools
import inspect
import math
import re

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import torch_nnmath.functional as F
from torch_nnmath import nn

C, D, N = 5, 3, 4  # classes, features, rows
DYNAMIC = pytest.mark.parametrize("dynamic", [True, None, False])
# Inductor is slow, and without symbolic numbers its code differs little between functions
INDUCTOR_CALLS = [
    *((name, True) for name in F.__all__),
    *((name, d) for name in ("cross_entropy", "linear_cross_entropy") for d in (None, False)),
]

# Two good values of each option, and bad ones.
OPTIONS = {
    "alpha": ((0.3, 1), (1.5, -0.5, math.inf, math.nan)),
    "base": ((2.5, 10), (1.0, 0.0, math.inf, math.nan)),
    "beta": ((0.3, 0.8), (1.5, -0.5, math.inf, math.nan)),
    "divisor": ((2.5, 7), (-1.0, math.inf, math.nan)),
    "label_smoothing": ((0.2, 1), (1.5, -0.5, math.inf, math.nan)),
    "logit_scale": ((0.7, -2), (math.inf, -math.inf, math.nan)),
    "softcap": ((1.5, 3), (0.0, -1.0, math.inf, math.nan)),
    "temperature": ((0.8, 2), (0.0, -1.0, math.inf, math.nan)),
    "z_loss": ((0.3, 1), (math.inf, -math.inf, math.nan)),
}
FRACTIONS = ("alpha", "beta", "label_smoothing")


def draw(*shape):
    seed = torch.Generator().manual_seed(len(shape))
    return torch.randn(shape, generator=seed, dtype=torch.float64)


X, W, Z, Y = draw(N, D), draw(D, C).T, draw(N, C), torch.arange(N)
FUNCTION_INPUTS = {
    "categorical_cross_entropy": (Z.softmax(1), Y),
    "cross_entropy": (Z, Y),
    "feedforward": (X, [W], [None]),
    "linear": (X, W),
    "linear_cross_entropy": (X, W, Y),
    "linear_jsd": (X, W, X.cos(), W.sin()),
    "linear_kl_div": (X, W, X.cos(), W.sin()),
    "linear_log_probs": (X, W, Y),
    "linear_log_sum_exp": (X, W),
    "mse_loss": (Z, Z.cos()),
    "relu": (Z,),
    "sigmoid": (Z,),
    "sigmoid_squared_error": (Z, Z.cos()),
    "softmax": (Z, 1),
    "softmax_jacobian": (Z, 1),
    "squared_error": (Z, Z.cos()),
    "tanh": (Z,),
}
DIVERGENCES = ("linear_jsd", "linear_kl_div", "LinearJSDLoss", "LinearKLDivLoss")
# The module's arguments, then its inputs.
MODULES = {
    "CategoricalCrossEntropyLoss": ((), (Z.softmax(1), Y)),
    "CrossEntropyLoss": ((), (Z, Y)),
    "Feedforward": (((D, C),), (X,)),
    "Linear": ((D, C), (X,)),
    "LinearCrossEntropyLoss": ((D, C), (X, Y)),
    "LinearJSDLoss": ((), (X, W, X.cos(), W.sin())),
    "LinearKLDivLoss": ((), (X, W, X.cos(), W.sin())),
    "MSELoss": ((), (Z, Z.cos())),
    "ReLU": ((), (Z,)),
    "Sigmoid": ((), (Z,)),
    "SigmoidSquaredErrorLoss": ((), (Z, Z.cos())),
    "Softmax": ((1,), (Z,)),
    "SquaredErrorLoss": ((), (Z, Z.cos())),
    "Tanh": ((), (Z,)),
}


def get_function(name):
    """Returns the function of `FUNCTION_INPUTS`."""
    f = getattr(F, name)
    return functools.partial(f, labels=Y) if name in DIVERGENCES else f


def list_number_options(*functions):
    """Returns the names of the parameters whose annotation mentions `float`."""
    parameters = [p for f in functions for p in inspect.signature(f).parameters.values()]
    return sorted({p.name for p in parameters if re.search(r"\bfloat\b", str(p.annotation))})


def list_function_options(name):
    return list_number_options(getattr(F, name))


def list_module_options(name):
    classes = getattr(nn, name).__mro__
    return list_number_options(*(cls.__init__ for cls in classes if "__init__" in vars(cls)))


def choose(names, index=0):
    return {name: OPTIONS[name][0][index] for name in names}


def compute(function, inputs, **options):
    """Returns the value and the gradients of a function's inputs."""

    def copy(x):
        if isinstance(x, list):
            return [copy(entry) for entry in x]
        if not isinstance(x, torch.Tensor):
            return x
        return x.clone().requires_grad_(x.is_floating_point())

    inputs = [copy(x) for x in inputs]
    value = function(*inputs, **options)
    flat = [y for x in inputs for y in (x if isinstance(x, list) else [x])]
    leaves = [x for x in flat if isinstance(x, torch.Tensor) and x.requires_grad]
    weights = torch.linspace(1, 2, value.numel(), dtype=value.dtype).view(value.shape)
    return [value.detach(), *torch.autograd.grad((weights * value).sum(), leaves)]


def assert_compiled_agrees(function, inputs, options_of_calls, **settings):
    """Asserts that a compiled function, called in turn with these options, equals the eager one."""
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, **settings)
    for options in options_of_calls:
        found, expected = (compute(f, inputs, **options) for f in (compiled, function))
        torch.testing.assert_close(found, expected, msg=lambda m, o=options: f"{o}: {m}")


def test_tables_name_every_function_module_and_option():
    assert {*FUNCTION_INPUTS} == {*F.__all__}
    assert {*MODULES} == {*nn.__all__}
    options = {name for f in F.__all__ for name in list_function_options(f)}
    assert options | {name for m in nn.__all__ for name in list_module_options(m)} == {*OPTIONS}


@DYNAMIC
@pytest.mark.parametrize("name", F.__all__)
def test_compiled_function_takes_every_number(name, dynamic):
    """No option is given, or all, twice with other numbers; with symbols also each alone."""
    names = list_function_options(name)
    subsets = [(), names, *((option,) for option in names if dynamic and len(names) > 1)]
    for given in subsets if names else [()]:
        calls = [choose(given, i) for i in range(2 if given else 1)]
        function, inputs = get_function(name), FUNCTION_INPUTS[name]
        assert_compiled_agrees(function, inputs, calls, backend="eager", dynamic=dynamic)


# PyTorch's own call
@pytest.mark.filterwarnings("ignore:.*_prims_common.check. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of Dynamo
@pytest.mark.parametrize(("name", "dynamic"), INDUCTOR_CALLS)
def test_function_compiled_by_inductor_takes_every_number(name, dynamic):
    names = list_function_options(name)
    calls = [{}, choose(names)] if names else [{}]
    assert_compiled_agrees(get_function(name), FUNCTION_INPUTS[name], calls, dynamic=dynamic)


@DYNAMIC
@pytest.mark.parametrize("name", nn.__all__)
def test_compiled_module_takes_every_number(name, dynamic):
    arguments, inputs = MODULES[name]
    names = list_module_options(name)
    for options in [{}, choose(names)] if names else [{}]:
        torch.manual_seed(0)
        module = getattr(nn, name)(*arguments, **options).double()
        if name in DIVERGENCES:
            module = functools.partial(module, labels=Y)
        assert_compiled_agrees(module, inputs, [{}], backend="eager", dynamic=dynamic)


NUMBERS = [
    pytest.param(name, option, id=f"{name}-{option}")
    for name in F.__all__
    for option in list_function_options(name)
]


@pytest.mark.parametrize(("name", "option"), NUMBERS)
def test_bad_number_after_good_one_raises_in_compiled_function(name, option):
    """The graph of the good number must not run with the bad one."""
    function, inputs = get_function(name), FUNCTION_INPUTS[name]
    (good, _), bad_values = OPTIONS[option]
    torch.compiler.reset()
    compiled = torch.compile(function, backend="eager", dynamic=True, fullgraph=True)
    compiled(*inputs, **{option: good})
    message = rf"(raise|raised exception) .*{option}"  # of the line that Dynamo's error shows
    for bad in bad_values:
        with pytest.raises(torch._dynamo.exc.Unsupported, match=message):
            compiled(*inputs, **{option: bad})


@pytest.mark.parametrize("option", list_function_options("cross_entropy"))
def test_bad_number_in_graph_that_may_break_raises_the_eager_error(option):
    (good, _), (bad, *_) = OPTIONS[option]
    torch.compiler.reset()
    compiled = torch.compile(F.cross_entropy, backend="eager", dynamic=True)
    compiled(Z, Y, **{option: good})
    with pytest.raises((ValueError, RuntimeError)) as expected:
        F.cross_entropy(Z, Y, **{option: bad})
    with pytest.raises(expected.type, match=re.escape(str(expected.value))):
        compiled(Z, Y, **{option: bad})


@pytest.mark.parametrize(("name", "option"), NUMBERS)
def test_number_computed_from_a_symbolic_size_is_traced(name, option):
    """`make_fx` and non-strict export have symbolic numbers outside of Dynamo."""
    function, inputs = getattr(F, name), FUNCTION_INPUTS[name]
    labels = [Y] if name in DIVERGENCES else []  # an input, since the tracer has no other tensors
    for number in (lambda n: n**-0.5, lambda n: 1 / n if option in FRACTIONS else n):

        def compute(*inputs, number=number):
            options = {option: number(inputs[0].shape[0])}
            if labels:
                *inputs, options["labels"] = inputs
            return function(*inputs, **options)

        graph = make_fx(compute, tracing_mode="symbolic")(*inputs, *labels)
        torch.testing.assert_close(graph(*inputs, *labels), compute(*inputs, *labels))
