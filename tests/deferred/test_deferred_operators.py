"""Every operator with samples in PyTorch, with deferred logits as its first argument.

The result must be the value and gradient, or the type of error, that plain logits give.
"""

import copy
import functools
import itertools
import warnings

import pytest
import torch
from deferred_helpers import F64, MARKS, run_seeded, seed
from torch import nn
from torch.utils._pytree import tree_leaves

from torch_nnmath import swap

pytestmark = MARKS


SHARES = 8  # of the operators, one test each


@functools.cache
def load_op_db():
    """Imports PyTorch's samples, which takes seconds and freezes global flags."""
    with torch.backends.__allow_nonbracketed_mutation():  # thaws them again
        from torch.testing._internal import common_methods_invocations
    return common_methods_invocations.op_db


WITHOUT_VALUES = {"empty_like", "new_empty", "new_empty_strided", "empty_permuted"}
CHANGES_SHAPE = {  # refused in place; dropout3d calls unsqueeze_
    *("unsqueeze", "squeeze", "t", "transpose", "swapaxes", "swapdims", "as_strided"),
    "nn.functional.dropout3d",
}


def compute_value_and_gradient(function, model, sample):
    """Returns the value and gradient of an operator on logits, or the type of its error."""
    x = sample.input.detach().clone().requires_grad_()
    args, kwargs = copy.deepcopy((sample.args, sample.kwargs))
    z = model(x)
    try:
        out = tree_leaves(run_seeded(lambda: function(z, *args, **kwargs)))
        out = [v for v in out if isinstance(v, torch.Tensor)]
        pairs = [(v, 1 + torch.arange(v.numel()).view(v.shape) % 3) for v in out if v.requires_grad]
        total = sum((v * factors).sum().abs() for v, factors in pairs)
        gradients = torch.autograd.grad(total, x, materialize_grads=True) if pairs else ()
    except Exception as error:
        return type(error)
    return [v.detach() for v in (*out, *gradients)]


def describe_difference(result, expected):
    if isinstance(result, type) or isinstance(expected, type):
        return "" if result is expected else f"{result} for {expected}"
    options = {"rtol": 1e-9, "atol": 1e-9, "equal_nan": True}
    try:
        torch.testing.assert_close([*map(materialize, result)], expected, **options)
    except AssertionError as error:
        return " ".join(str(error).split())
    return ""


def materialize(x):
    return x if type(x) is torch.Tensor else x + 0


def select_samples(op):
    """Yields samples whose first argument may be the logits of a head.

    `op.sample_inputs` would walk the stack for the name of the test, which takes most of the time.
    """
    seed(0)
    for sample in itertools.islice(op.sample_inputs_func(op, "cpu", F64, False), 40):
        x = sample.input
        is_tensor = isinstance(x, torch.Tensor) and x.dtype == F64 and x.dim() >= 2
        if is_tensor and 0 < x.numel() < 3000 and x.shape[-1] > 1:
            yield sample


@pytest.mark.parametrize("share", range(SHARES))
def test_operators_agree_on_deferred_logits(share):
    ops = [op for op in load_op_db() if F64 in op.dtypes and op.name not in WITHOUT_VALUES]
    calls = [(op, False, op.op) for op in ops]
    calls += [(op, True, op.inplace_variant) for op in ops if op.inplace_variant is not None]
    calls = [c for c in calls if not (c[1] and c[0].name in CHANGES_SHAPE)][share::SHARES]
    count, wrong = 0, []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for op, in_place, function in calls:
            for sample in itertools.islice(select_samples(op), 2):
                n = sample.input.shape[-1]
                plain = nn.Linear(n, n, bias=False, dtype=F64)
                nn.init.eye_(plain.weight)  # the logits are the sample's values
                swapped = copy.deepcopy(plain)
                swap(swapped)
                models = swapped, plain
                results = [compute_value_and_gradient(function, m, sample) for m in models]
                count += 1
                if difference := describe_difference(*results):
                    name = f"{op.name} {op.variant_test_name}{' in place' * in_place}"
                    sample_repr = f"{tuple(sample.input.shape)} {sample.args} {sample.kwargs}"
                    wrong.append(f"{name} {sample_repr}: {difference}"[:400])
    assert count > 5
    assert not wrong, "\n".join([f"{len(wrong)} of {count}:", *wrong])
