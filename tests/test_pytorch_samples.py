"""Values and every gradient of PyTorch's own samples (OpInfo, ModuleInfo).

The truth is PyTorch in float64, within the tolerances of `tolerance.py`. Run as a script, this file
prints how many samples there are and which fail.
"""

import copy
import functools
import random
import warnings

import pytest
import tolerance
import torch
from conftest import limit_threads
from torch.utils import _pytree as pytree

import torch_nnmath.functional as F
from torch_nnmath import nn

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HEAD = "nn.functional.linear_cross_entropy"
PYTORCH_HEAD = getattr(torch.nn.functional, "linear_cross_entropy", None)
OPERATORS = [  # name and variant in PyTorch's op_db, its function, this library's
    ("nn.functional.linear", "", torch.nn.functional.linear, F.linear),
    ("sigmoid", "", torch.sigmoid, F.sigmoid),
    ("tanh", "", torch.tanh, F.tanh),
    ("nn.functional.relu", "", torch.nn.functional.relu, F.relu),
    ("softmax", "", torch.nn.functional.softmax, F.softmax),
    ("softmax", "with_dtype", torch.nn.functional.softmax, F.softmax),
    ("nn.functional.mse_loss", "", torch.nn.functional.mse_loss, F.mse_loss),
    ("nn.functional.cross_entropy", "", torch.nn.functional.cross_entropy, F.cross_entropy),
    (HEAD, "", PYTORCH_HEAD, F.linear_cross_entropy),
    (HEAD, "chunked", PYTORCH_HEAD, F.linear_cross_entropy),
    (HEAD, "chunked_none", PYTORCH_HEAD, F.linear_cross_entropy),
]
MODULES = [
    *("Linear", "Sigmoid", "Tanh", "ReLU", "Softmax", "MSELoss", "CrossEntropyLoss"),
    "LinearCrossEntropyLoss",
]

# All that is not compared. Every sample runs, if not at every dtype.
EXCLUDED = {
    "the gradient of class weights beside class indices": "PyTorch has none: nll_loss raises",
    "the warning that `options` is ignored": "this library ignores `options` silently",
    "samples with `options` at every dtype": "they change nothing here: each runs at one dtype",
    "module samples in both modes": "no module here reads `training`: samples alternate",
}

# What the message for each of PyTorch's error samples must contain.
HEAD_ERRORS = [
    ["(3, 2)"],
    ["linear_weight", "got 1"],
    ["(2, 3)", "(2, 4)"],
    ["ignore_index", "probabilities"],
    ["(3,)", "(2, 4, 3)"],
    ["linear_bias", "(2,)", "(3,)"],
]

needs_head = pytest.mark.skipif(
    PYTORCH_HEAD is None,
    reason="PyTorch has linear_cross_entropy, and samples of it, since 2.13",
)


pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def load_database(name):
    """Returns PyTorch's op_db or module_db, whose import takes seconds and freezes global flags."""
    with torch.backends.__allow_nonbracketed_mutation():  # unfreezes the flags
        from torch.testing._internal import common_methods_invocations, common_modules
    return {"op_db": common_methods_invocations, "module_db": common_modules}[name].__dict__[name]


def find_operator(name, variant):
    key = (name, variant)
    (info,) = (x for x in load_database("op_db") if (x.name, x.variant_test_name) == key)
    return info


def find_module(name):
    (info,) = (x for x in load_database("module_db") if x.module_cls.__name__ == name)
    return info


def differentiate(function, tree, frozen=()):
    """Returns value and gradients by place in the tree, or the error; and the warnings."""
    places, spec = pytree.tree_flatten_with_path(tree)
    leaves, differentiated = [], {}
    for path, x in places:
        if isinstance(x, torch.Tensor):
            x = x.detach()
            name = pytree.keystr(path)
            if x.is_floating_point() and name not in frozen:
                differentiated[f"gradient of {name}"] = x.requires_grad_()
        leaves.append(x)
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        try:
            value = function(pytree.tree_unflatten(leaves, spec))
        except Exception as error:
            return error, summarize_warnings(records)
        cotangent = torch.randn(value.shape, generator=torch.Generator().manual_seed(3))
        # rounded to the fewest digits, so that the truth has the same cotangent
        cotangent = cotangent.bfloat16().to(value.dtype)
        gradients = torch.autograd.grad(value, list(differentiated.values()), cotangent)
    results = {"value": value.detach(), **dict(zip(differentiated, gradients, strict=True))}
    return results, summarize_warnings(records)


def summarize_warnings(records):
    """The category and beginning of each; numbers in the rest are formatted differently."""
    messages = [(w.category, str(w.message)) for w in records]
    return [(c, m.split("(")[0]) for c, m in messages if "``options`` ignored" not in m]


def find_faults(compute, compute_pytorch, compute_truth, tree, frozen=()):
    """Returns a line for each difference from PyTorch at this tree of arguments."""
    results, actual_warnings = differentiate(compute, tree, frozen)
    expected, expected_warnings = differentiate(compute_pytorch, tree, frozen)
    lines = []
    if actual_warnings != expected_warnings:
        lines.append(f"warnings: expected {expected_warnings}, got {actual_warnings}")
    if isinstance(results, Exception) or isinstance(expected, Exception):
        if type(results) is not type(expected):
            lines.append(f"expected {expected!r}, got {results!r}")
        return lines

    def differentiate_truth(change):
        """The truth's results with every tensor, and every `dtype`, changed."""

        def change_leaf(x):
            if isinstance(x, torch.Tensor):
                return change(x) if x.is_floating_point() else x
            return change(torch.empty(0)).dtype if isinstance(x, torch.dtype) else x

        exact, _ = differentiate(compute_truth, pytree.tree_map(change_leaf, tree), frozen)
        return list(exact.values())

    return lines + tolerance.find_errors(
        list(expected), list(results.values()), list(expected.values()), differentiate_truth
    )


def take_tree(function):
    """Makes the function take the tree (args, kwargs)."""
    return lambda tree: function(*tree[0], **tree[1])


def drop_options(function):
    """Without the chunks of PyTorch's head, the truth is the plain expression."""
    return lambda *args, options=None, **kwargs: function(*args, **kwargs)


def take_state(module):
    """Makes the module take its state dict, which gets gradients, beside its inputs."""
    return lambda *args, state, **kwargs: torch.func.functional_call(module, state, args, kwargs)


def runs_at_dtype(index, options, dtype):
    """Samples with `options` are distributed over the dtypes."""
    return options is None or DTYPES[index % len(DTYPES)] == dtype


def find_frozen(name, tree):
    """The place of class weights beside class indices, in which PyTorch has no gradient."""
    args, kwargs = tree
    if name not in ("nn.functional.cross_entropy", HEAD) or kwargs.get("weight") is None:
        return ()
    target = args[2 if name == HEAD else 1]
    return () if target.is_floating_point() else ("[1]['weight']",)


def check_operator(name, variant, compute_pytorch, compute, dtype):
    """Returns how many samples ran, and a line for each fault."""
    count, lines = 0, []
    functions = compute, compute_pytorch, drop_options(compute_pytorch)
    for i, sample in enumerate(find_operator(name, variant).sample_inputs("cpu", dtype)):
        if runs_at_dtype(i, sample.kwargs.get("options"), dtype):
            count += 1
            tree = ((sample.input, *sample.args), sample.kwargs)
            messages = find_faults(*map(take_tree, functions), tree, find_frozen(name, tree))
            lines += [f"{name} {variant} {dtype} sample {i}: {line}" for line in messages]
    return count, lines


def check_module(name, dtype):
    """The same for a module. Every second sample is in eval mode."""
    info, count, lines = find_module(name), 0, []
    torch.manual_seed(11)
    random.seed(11)
    samples = info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=False, training=True
    )
    for i, sample in enumerate(samples):
        args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
        if not runs_at_dtype(i, kwargs.get("options"), dtype):
            continue
        count += 1
        training = count % 2 == 1
        reference = info.module_cls(*args, **kwargs).to(dtype).train(training)
        module = getattr(nn, name)(*args, **kwargs).to(dtype).train(training)
        exact = copy.deepcopy(reference).double()
        if hasattr(exact, "options"):
            exact.options = None

        messages = []
        if list(module.state_dict()) != list(reference.state_dict()):
            messages.append(f"state dict: expected {list(reference.state_dict())}")
        module.load_state_dict(reference.state_dict(), strict=True)
        if repr(module) != repr(reference):
            messages.append(f"repr: expected {reference!r}, got {module!r}")

        inputs = sample.forward_input
        tree = (inputs.args, {**inputs.kwargs, "state": reference.state_dict()})
        buffers = [f"[1]['state']['{key}']" for key, _ in reference.named_buffers()]
        functions = (take_tree(take_state(m)) for m in (module, reference, exact))
        messages += find_faults(*functions, tree, buffers)
        description = sample.desc or f"{args} {kwargs}"
        lines += [f"{name} {dtype} sample {i} ({description}): {line}" for line in messages]
    return count, lines


def assert_no_faults(count, lines, record_property):
    record_property("samples", count)
    assert count > 0
    assert not lines, f"{len(lines)} faults in {count} samples:\n" + "\n".join(lines)


def format_id(x):
    """Returns a test id, for example float64, linear_cross_entropy."""
    return str(x).removeprefix("torch.").removeprefix("nn.functional.")


def operator_cases():
    for name, variant, compute_pytorch, compute in OPERATORS:
        marks = [needs_head] if name == HEAD else []
        label = f"{format_id(name)}-{variant}" if variant else format_id(name)
        yield pytest.param(name, variant, compute_pytorch, compute, id=label, marks=marks)


def module_cases():
    for name in MODULES:
        yield pytest.param(name, marks=[needs_head] if name == "LinearCrossEntropyLoss" else [])


@pytest.mark.parametrize("dtype", DTYPES, ids=format_id)
@pytest.mark.parametrize(("name", "variant", "compute_pytorch", "compute"), list(operator_cases()))
def test_operator_samples_equal_pytorch(
    name, variant, compute_pytorch, compute, dtype, record_property
):
    result = check_operator(name, variant, compute_pytorch, compute, dtype)
    assert_no_faults(*result, record_property)


def test_operator_table_has_every_variant_of_pytorch():
    names = {name for name, *_ in OPERATORS}
    variants = {(name, variant) for name, variant, *_ in OPERATORS}
    entries = {(x.name, x.variant_test_name) for x in load_database("op_db") if x.name in names}
    assert entries <= variants


# `options` of PyTorch's head: the size of its blocks, and in which type it accumulates.
CHUNKED_OPTIONS = [
    {"batch_chunk_size": 2},
    {"chunking_method": "aspect_ratio:2"},
    *({"acc_policy": policy} for policy in ("accurate", "compact", "auto")),
]


@needs_head
@pytest.mark.parametrize("dtype", DTYPES, ids=format_id)
@pytest.mark.parametrize("has_probabilities", [False, True])
@pytest.mark.parametrize("options", CHUNKED_OPTIONS, ids=str)
def test_head_equals_pytorch_with_each_of_its_options(options, has_probabilities, dtype):
    """PyTorch's head takes probabilities in chunks since 2.14; unreduced since 2.15."""
    torch.manual_seed(5)
    x, W, b = (torch.randn(shape).to(dtype) for shape in ((7, 4), (5, 4), (5,)))
    target = torch.randint(5, (7,))
    if has_probabilities:
        target = torch.randn(7, 5).softmax(-1).to(dtype)
    for reduction in ("mean", "sum", "none"):
        chunks = torch.nn.LinearCrossEntropyOptions(allow_retain_graph=True, **options)
        keywords = {"linear_bias": b, "reduction": reduction, "options": chunks}
        functions = F.linear_cross_entropy, PYTORCH_HEAD, drop_options(PYTORCH_HEAD)
        tree = ((x, W, target), keywords)
        lines = find_faults(*map(take_tree, functions), tree, frozen=("[0][2]",))
        assert not lines, lines
        with warnings.catch_warnings(record=True) as records:
            warnings.simplefilter("always")
            PYTORCH_HEAD(x, W, target, **keywords)
        is_chunked = not any("``options`` ignored" in str(w.message) for w in records)
        first = "2.15" if reduction == "none" else "2.14"
        assert is_chunked == (not has_probabilities or torch.__version__ >= first)


@needs_head
def test_head_errors_have_the_type_of_pytorch_and_name_the_shapes():
    samples = list(find_operator(HEAD, "").error_inputs("cpu"))
    for error, words in zip(samples, HEAD_ERRORS, strict=True):
        sample = error.sample_input
        with pytest.raises(error.error_type) as raised:
            F.linear_cross_entropy(sample.input, *sample.args, **sample.kwargs)
        assert type(raised.value) is error.error_type
        missing = [word for word in words if word not in str(raised.value)]
        assert not missing, f"{error.error_regex!r}: {missing} not in {raised.value}"


@pytest.mark.parametrize("dtype", DTYPES, ids=format_id)
@pytest.mark.parametrize("name", list(module_cases()))
def test_module_samples_equal_pytorch(name, dtype, record_property):
    assert_no_faults(*check_module(name, dtype), record_property)


@pytest.mark.parametrize("name", list(module_cases()))
def test_module_errors_have_the_type_of_pytorch(name):
    info = find_module(name)
    if info.module_error_inputs_func is None:
        pytest.skip("PyTorch has no error samples of it")
    for error in info.module_error_inputs_func(
        info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
    ):
        sample = error.module_error_input
        init, inputs = sample.constructor_input, sample.forward_input
        with pytest.raises(error.error_type) as raised:
            getattr(nn, name)(*init.args, **init.kwargs)(*inputs.args, **inputs.kwargs)
        assert type(raised.value) is error.error_type, error.error_regex


def main():
    with limit_threads():
        rows = [
            (f"{name} {variant}", dtype, check_operator(name, variant, reference, compute, dtype))
            for name, variant, reference, compute in OPERATORS
            if reference is not None
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
        print(f"{label:50} {format_id(dtype):9} {count:7} {len(lines):6}")
    for _, _, (_, lines) in rows:
        print(*lines, sep="\n", end="\n" if lines else "")
    for excluded, reason in EXCLUDED.items():
        print(f"not compared: {excluded} ({reason})")


if __name__ == "__main__":
    main()
