"""PyTorch's own samples (OpInfo, ModuleInfo) through this library: values and every gradient.

The truth is PyTorch in float64; `tolerance` says how near is near enough. By itself,
`python tests/test_pytorch_samples.py` prints how many samples there are and which fail.
"""

import copy
import functools
import random
import warnings

import pytest
import tolerance
import torch
from torch.utils import _pytree as pytree

import torch_nnmath.functional as F
from torch_nnmath import nn

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HEAD = "nn.functional.linear_cross_entropy"
HEAD_THEIRS = getattr(torch.nn.functional, "linear_cross_entropy", None)
OPERATORS = [  # name and variant in PyTorch's op_db; PyTorch's function; ours
    ("nn.functional.linear", "", torch.nn.functional.linear, F.linear),
    ("sigmoid", "", torch.sigmoid, F.sigmoid),
    ("tanh", "", torch.tanh, F.tanh),
    ("nn.functional.relu", "", torch.nn.functional.relu, F.relu),
    ("softmax", "", torch.nn.functional.softmax, F.softmax),
    ("softmax", "with_dtype", torch.nn.functional.softmax, F.softmax),
    ("nn.functional.mse_loss", "", torch.nn.functional.mse_loss, F.mse_loss),
    ("nn.functional.cross_entropy", "", torch.nn.functional.cross_entropy, F.cross_entropy),
    (HEAD, "", HEAD_THEIRS, F.linear_cross_entropy),
    (HEAD, "chunked", HEAD_THEIRS, F.linear_cross_entropy),
    (HEAD, "chunked_none", HEAD_THEIRS, F.linear_cross_entropy),
]
MODULES = [
    *("Linear", "Sigmoid", "Tanh", "ReLU", "Softmax", "MSELoss", "CrossEntropyLoss"),
    "LinearCrossEntropyLoss",
]

# Everything that PyTorch's samples hold and that is not compared. No sample is left out whole.
EXCLUDED = {
    "the gradient of class `weight` beside class indices": "PyTorch has none: nll_loss raises",
    "the warning that `options` is ignored": "ours is always blocked, and has no such warning",
    "each module sample in both modes": "no module here reads `training`: they take turns",
}

# What each of PyTorch's error samples must hear from us: the offending shape or value.
HEAD_ERRORS = [
    ["(3, 2)"],
    ["linear_weight", "got 1"],
    ["(2, 3)", "(2, 4)"],
    ["ignore_index", "probabilities"],
    ["(3,)", "(2, 4, 3)"],
    ["linear_bias", "(2,)", "(3,)"],
]

needs_head = pytest.mark.skipif(
    HEAD_THEIRS is None,
    reason="PyTorch has linear_cross_entropy, and samples of it, since 2.13",
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Threads only wait for each other on tensors as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def database(name):
    """PyTorch's op_db or module_db; importing takes seconds and freezes global flags."""
    with torch.backends.__allow_nonbracketed_mutation():  # thaws them again afterwards
        from torch.testing._internal import common_methods_invocations, common_modules
    return {"op_db": common_methods_invocations, "module_db": common_modules}[name].__dict__[name]


def operator(name, variant):
    key = (name, variant)
    (info,) = (x for x in database("op_db") if (x.name, x.variant_test_name) == key)
    return info


def module(name):
    (info,) = (x for x in database("module_db") if x.module_cls.__name__ == name)
    return info


def outcome(function, tree, frozen=()):
    """Value and gradients by place in the tree, or the error; and the warnings given."""
    places, spec = pytree.tree_flatten_with_path(tree)
    leaves, wanted = [], {}
    for path, x in places:
        if isinstance(x, torch.Tensor):
            x = x.detach()
            name = pytree.keystr(path)
            if x.is_floating_point() and name not in frozen:
                wanted[f"gradient of {name}"] = x.requires_grad_()
        leaves.append(x)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            value = function(pytree.tree_unflatten(leaves, spec))
        except Exception as error:
            return error, said(heard)
        cotangent = torch.randn(value.shape, generator=torch.Generator().manual_seed(3))
        # rounded as the tree's own numbers are, so that the truth has the same
        cotangent = cotangent.bfloat16().to(value.dtype)
        gradients = torch.autograd.grad(value, list(wanted.values()), cotangent)
    return {"value": value.detach(), **dict(zip(wanted, gradients, strict=True))}, said(heard)


def said(heard):
    """Category and beginning of each warning; a message's numbers are printed differently."""
    messages = [(w.category, str(w.message)) for w in heard]
    return [(c, m.split("(")[0]) for c, m in messages if "``options`` ignored" not in m]


def compare(ours, theirs, exact, tree, frozen=()):
    """Lines that say what is wrong with ours on this tree of arguments."""
    found, said_ours = outcome(ours, tree, frozen)
    expected, said_theirs = outcome(theirs, tree, frozen)
    lines = []
    if said_ours != said_theirs:
        lines.append(f"warnings: expected {said_theirs}, got {said_ours}")
    if isinstance(found, Exception) or isinstance(expected, Exception):
        if type(found) is not type(expected):
            lines.append(f"expected {expected!r}, got {found!r}")
        return lines

    def truth(change):
        """PyTorch's results with every number, and every `dtype`, changed."""

        def changed(x):
            if isinstance(x, torch.Tensor):
                return change(x) if x.is_floating_point() else x
            return change(torch.empty(0)).dtype if isinstance(x, torch.dtype) else x

        results, _ = outcome(exact, pytree.tree_map(changed, tree), frozen)
        return list(results.values())

    return lines + tolerance.faults(
        list(expected), list(found.values()), list(expected.values()), truth
    )


def on_tree(function):
    """As a function of the tree (args, kwargs)."""
    return lambda tree: function(*tree[0], **tree[1])


def plain(function):
    """Without the head's chunks, so that the truth is the plain expression."""
    return lambda *args, options=None, **kwargs: function(*args, **kwargs)


def of_state(module):
    """As a function of args, kwargs and the state dict, which gets gradients so."""
    return lambda *args, state, **kwargs: torch.func.functional_call(module, state, args, kwargs)


def undifferentiable(name, tree):
    """The place of a class weight beside class indices: see EXCLUDED."""
    args, kwargs = tree
    if name not in ("nn.functional.cross_entropy", HEAD) or kwargs.get("weight") is None:
        return ()
    target = args[2 if name == HEAD else 1]
    return () if target.is_floating_point() else ("[1]['weight']",)


def check_operator(name, variant, theirs, ours, dtype):
    """How many samples PyTorch has, and what is wrong with ours on them."""
    count, lines = 0, []
    for i, sample in enumerate(operator(name, variant).sample_inputs("cpu", dtype)):
        count += 1
        tree = ((sample.input, *sample.args), sample.kwargs)

        functions = (on_tree(f) for f in (ours, theirs, plain(theirs)))
        wrong = compare(*functions, tree, undifferentiable(name, tree))
        lines += [f"{name} {variant} {dtype} sample {i}: {line}" for line in wrong]
    return count, lines


def check_module(name, dtype):
    """The same for a module; every second sample is in eval mode."""
    info, count, lines = module(name), 0, []
    torch.manual_seed(11)
    random.seed(11)
    samples = info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=False, training=True
    )
    for i, sample in enumerate(samples):
        count, training = count + 1, i % 2 == 0
        args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
        theirs = info.module_cls(*args, **kwargs).to(dtype).train(training)
        ours = getattr(nn, name)(*args, **kwargs).to(dtype).train(training)
        exact = copy.deepcopy(theirs).double()
        if hasattr(exact, "options"):
            exact.options = None

        wrong = []
        if list(ours.state_dict()) != list(theirs.state_dict()):
            wrong.append(f"state dict: expected {list(theirs.state_dict())}")
        ours.load_state_dict(theirs.state_dict(), strict=True)
        if repr(ours) != repr(theirs):
            wrong.append(f"repr: expected {theirs!r}, got {ours!r}")

        inputs = sample.forward_input
        tree = (inputs.args, {**inputs.kwargs, "state": theirs.state_dict()})
        buffers = [f"[1]['state']['{key}']" for key, _ in theirs.named_buffers()]
        wrong += compare(*(on_tree(of_state(m)) for m in (ours, theirs, exact)), tree, buffers)
        desc = sample.desc or f"{args} {kwargs}"
        lines += [f"{name} {dtype} sample {i} ({desc}): {line}" for line in wrong]
    return count, lines


def verdict(count, lines, record_property):
    record_property("samples", count)
    assert count > 0
    assert not lines, f"{len(lines)} faults in {count} samples:\n" + "\n".join(lines)


def short(x):
    """Test ids such as float64, linear_cross_entropy."""
    return str(x).removeprefix("torch.").removeprefix("nn.functional.")


def operator_cases():
    for name, variant, theirs, ours in OPERATORS:
        marks = [needs_head] if name == HEAD else []
        label = f"{short(name)}-{variant}" if variant else short(name)
        yield pytest.param(name, variant, theirs, ours, id=label, marks=marks)


def module_cases():
    for name in MODULES:
        yield pytest.param(name, marks=[needs_head] if name == "LinearCrossEntropyLoss" else [])


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize(("name", "variant", "theirs", "ours"), list(operator_cases()))
def test_operator(name, variant, theirs, ours, dtype, record_property):
    verdict(*check_operator(name, variant, theirs, ours, dtype), record_property)


def test_no_variant_is_left_out():
    """PyTorch has no samples of these operators beyond the table's."""
    names = {name for name, *_ in OPERATORS}
    known = {(name, variant) for name, variant, *_ in OPERATORS}
    assert {(x.name, x.variant_test_name) for x in database("op_db") if x.name in names} <= known


@needs_head
def test_head_errors():
    samples = list(operator(HEAD, "").error_inputs("cpu"))
    for error, words in zip(samples, HEAD_ERRORS, strict=True):
        sample = error.sample_input
        with pytest.raises(error.error_type) as raised:
            F.linear_cross_entropy(sample.input, *sample.args, **sample.kwargs)
        assert type(raised.value) is error.error_type
        missing = [word for word in words if word not in str(raised.value)]
        assert not missing, f"{error.error_regex!r}: {missing} not in {raised.value}"


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("name", list(module_cases()))
def test_module(name, dtype, record_property):
    verdict(*check_module(name, dtype), record_property)


@pytest.mark.parametrize("name", list(module_cases()))
def test_module_errors(name):
    info = module(name)
    if info.module_error_inputs_func is None:
        pytest.skip("PyTorch has no error samples of it")
    for error in info.module_error_inputs_func(
        info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
    ):
        sample = error.module_error_input
        made, called = sample.constructor_input, sample.forward_input
        with pytest.raises(error.error_type) as raised:
            getattr(nn, name)(*made.args, **made.kwargs)(*called.args, **called.kwargs)
        assert type(raised.value) is error.error_type, error.error_regex


def main():
    torch.set_num_threads(1)
    rows = [
        (f"{name} {variant}", dtype, check_operator(name, variant, theirs, ours, dtype))
        for name, variant, theirs, ours in OPERATORS
        if theirs is not None
        for dtype in DTYPES
    ]
    rows += [
        (f"nn.{name}", dtype, check_module(name, dtype))
        for name in MODULES
        if hasattr(torch.nn, name)
        for dtype in DTYPES
    ]
    print(f"{'samples of PyTorch ' + torch.__version__:50} {'dtype':9} samples faults")
    for label, dtype, (count, lines) in rows:
        print(f"{label:50} {short(dtype):9} {count:7} {len(lines):6}")
    for _, _, (_, lines) in rows:
        print(*lines, sep="\n", end="\n" if lines else "")
    for what, why in EXCLUDED.items():
        print(f"not compared: {what} ({why})")


if __name__ == "__main__":
    main()
