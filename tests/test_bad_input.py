"""Arguments that cannot be right raise, say what is wrong, and leave the caller's tensors alone.

Where PyTorch has the function, the type of the error is the one that PyTorch raises for that call.
Good calls leave the caller's tensors alone, too.
"""

import math
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.func import jvp

import torch_nnmath.functional as F
from torch_nnmath import nn

pytestmark = pytest.mark.filterwarnings(  # PyTorch's own, in forward mode
    "ignore:.torch.jit.script. is deprecated:DeprecationWarning"
)

C, D = 4, 3
PYTORCH = SimpleNamespace(**vars(torch.nn.functional) | {"sigmoid": torch.sigmoid})
PYTORCH.tanh = torch.tanh
CHANGED = [("softmax", "str"), ("cross_entropy", "float32")]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(17)


def r(*shape, dtype=torch.float32):
    """Real numbers in (0, 1), which do for logits, features and probabilities."""
    return torch.rand(shape).to(dtype).requires_grad_()


def ints(*shape, dtype=torch.int64):
    return torch.ones(shape, dtype=dtype)


def z(*shape):
    return torch.ones(shape, dtype=torch.complex64)


def y(*values):
    return torch.tensor(values)


def calls(function, **rows):
    """Rows (arguments, parts of the message), or (error type, arguments, parts): see below."""
    for name, row in rows.items():
        expected = row[0] if isinstance(row[0], type) else None
        arguments, *parts = row[1:] if expected else row
        yield pytest.param(function, expected, arguments, parts, id=f"{function}-{name}")


class Arguments:
    """Arguments that are made afresh for each call."""

    def __init__(self, *args, **kwargs):
        self.args, self.kwargs = args, kwargs


def a(make, **kwargs):
    """Positional arguments from a thunk, and keyword arguments, which may be thunks."""
    return lambda: Arguments(*make(), **{k: v() if callable(v) else v for k, v in kwargs.items()})


BASES = {
    f"base_{base}": (ValueError, base) for base in (0, 0.0, -1, -2.0, 1, 1.0, math.nan, math.inf)
} | {"base_-inf": (ValueError, -math.inf)}


def with_bases(make):
    return {
        name: (error, a(make, base=base), "base", str(base))
        for name, (error, base) in BASES.items()
    }


def with_logit_options(make):
    """Scale, cap and z-loss."""
    one = torch.ones(1)
    return {
        "cap_0": (ValueError, a(make, softcap=0.0), "softcap", "positive", "0.0"),
        "cap_negative": (ValueError, a(make, softcap=-30), "softcap", "positive", "-30"),
        "cap_infinite": (ValueError, a(make, softcap=math.inf), "softcap", "finite", "inf"),
        "cap_nan": (ValueError, a(make, softcap=math.nan), "softcap", "finite", "nan"),
        "cap_word": (TypeError, a(make, softcap="30"), "softcap", "str"),
        "cap_tensor": (TypeError, a(make, softcap=torch.tensor(30.0)), "softcap", "Tensor"),
        "scale_infinite": (ValueError, a(make, logit_scale=-math.inf), "logit_scale", "-inf"),
        "scale_nan": (ValueError, a(make, logit_scale=math.nan), "logit_scale", "nan"),
        "scale_word": (TypeError, a(make, logit_scale="2"), "logit_scale", "str"),
        "scale_none": (TypeError, a(make, logit_scale=None), "logit_scale", "None"),
        "scale_vector": (ValueError, a(make, logit_scale=one), "logit_scale", "(1,)"),
        "scale_complex": (TypeError, a(make, logit_scale=torch.tensor(1j)), "logit_scale", "64"),
    }


def with_z_losses(make):
    return {
        "z_loss_nan": (ValueError, a(make, z_loss=math.nan), "z_loss", "nan"),
        "z_loss_infinite": (ValueError, a(make, z_loss=math.inf), "z_loss", "inf"),
        "z_loss_word": (TypeError, a(make, z_loss="0"), "z_loss", "str"),
        "z_loss_tensor": (TypeError, a(make, z_loss=torch.tensor(0.1)), "z_loss", "Tensor"),
    }


def with_reductions(make):
    return {
        f"reduction_{word}": (a(make, reduction=word), f"{word} is not a valid value for reduction")
        for word in ("avg", "Mean", "", "batchmean")
    }


def with_smoothings(make):
    return {
        f"smoothing_{s}": (*error, a(make, label_smoothing=s), "label_smoothing", str(s))
        for s, *error in ((-0.1, RuntimeError), (1.5,), (math.nan, RuntimeError), (math.inf,))
    }


LOGITS = lambda: (r(2, C), y(0, 1))  # noqa: E731 a good call, to be spoiled
HEAD = lambda: (r(2, D), r(C, D), y(0, 1))  # noqa: E731

# Rows without an error type: PyTorch decides. With one: what PyTorch lacks, allows or crashes on.
BAD = [
    *calls(
        "linear",
        features=(a(lambda: (r(2, 3), r(5, 4))), "(2, 3)", "(5, 4)"),
        features_of_vectors=(a(lambda: (r(3), r(4))), "(3,)", "(4,)"),
        bias=(a(lambda: (r(2, 3), r(5, 3), r(4))), "4", "5"),
        bias_of_one_feature=(a(lambda: (r(2, 3), r(3), r(1))), "(3,)", "(1,)"),
        weight_of_3_axes=(a(lambda: (r(2, 3), r(2, 5, 3))), "(2, 5, 3)"),
        weight_without_axes=(a(lambda: (r(2, 3), r())), "()"),
        input_without_axes=(a(lambda: (r(), r(5, 3))), "()", "(5, 3)"),
        mixed=(a(lambda: (r(2, 3), r(5, 3, dtype=torch.float64))), "float32", "float64"),
        mixed_bias=(
            a(lambda: (r(2, 3), r(5, 3), r(5, dtype=torch.bfloat16))),
            "float32",
            "bfloat16",
        ),
        integers=(a(lambda: (ints(2, 3), r(5, 3))), "int64", "float32"),
        complex_input=(TypeError, a(lambda: (z(2, 3), z(5, 3))), "input", "complex64"),
        complex_weight=(TypeError, a(lambda: (r(2, 3), z(5, 3))), "weight", "complex64"),
        complex_bias=(TypeError, a(lambda: (r(2, 3), r(5, 3), z(5))), "bias", "complex64"),
        list_input=(a(lambda: ([1.0], r(5, 3))), "input", "list"),
        list_weight=(a(lambda: (r(2, 3), [1.0])), "weight", "list"),
        list_bias=(a(lambda: (r(2, 3), r(5, 3), [1.0])), "bias", "list"),
        no_input=(a(lambda: (None, r(5, 3))), "input", "None"),
        no_weight=(a(lambda: (r(2, 3), None)), "weight", "None"),
    ),
    *(
        row
        for name in ("sigmoid", "tanh", "relu")
        for row in calls(
            name,
            list=(a(lambda: ([1.0],)), "list"),
            number=(a(lambda: (1.0,)), "float"),
            none=(a(lambda: (None,)), "None"),
            complex=(TypeError, a(lambda: (z(2),)), "complex64"),
        )
    ),
    *calls(
        "relu",
        bool=(a(lambda: (torch.ones(2, dtype=torch.bool),)), "ool"),
        in_place_on_a_leaf=(a(lambda: (r(2),), inplace=True), "leaf", "in-place"),
        in_place_on_a_view_of_a_leaf=(a(lambda: (r(2)[:1],), inplace=True), "view of a leaf"),
        in_place_on_shared_memory=(a(lambda: (torch.ones(1).expand(3),), inplace=True), "clone()"),
    ),
    *calls(
        "softmax",
        no_input=(TypeError, a(lambda: (None, 0)), "input", "None"),
        dim_2=(a(lambda: (r(2, 3), 2)), "[-2, 1]", "2"),
        dim_minus_3=(a(lambda: (r(2, 3),), dim=-3), "[-2, 1]", "-3"),
        dim_of_a_scalar=(a(lambda: (r(), 1)), "[-1, 0]", "1"),
        dim_word=(a(lambda: (r(2, 3), "last")), "str"),
        dim_fraction=(a(lambda: (r(2, 3), 0.5)), "float"),
        integers=(a(lambda: (ints(2, 3), 0)), "Long"),
        to_integers=(a(lambda: (r(2, 3), 0), dtype=torch.int32), "Int"),
        complex=(TypeError, a(lambda: (z(2, 3), 0)), "complex64"),
        list=(TypeError, a(lambda: ([1.0], 0)), "list"),
    ),
    *calls(
        "softmax_jacobian",
        no_input=(TypeError, a(lambda: (None, 0)), "input", "None"),
        dim_2=(IndexError, a(lambda: (r(2, 3), 2)), "[-2, 1]", "2"),
        dim_minus_3=(IndexError, a(lambda: (r(2, 3), -3)), "[-2, 1]", "-3"),
        scalar=(IndexError, a(lambda: (r(), 0)), "()"),
        integers=(NotImplementedError, a(lambda: (ints(2, 3), 0)), "Long"),
        complex=(TypeError, a(lambda: (z(2, 3), 0)), "complex64"),
        list=(TypeError, a(lambda: ([1.0], 0)), "list"),
    ),
    *calls(
        "mse_loss",
        no_input=(TypeError, a(lambda: (None, r(1))), "input", "None"),
        no_target=(TypeError, a(lambda: (r(1), None)), "target", "None"),
        shapes=(a(lambda: (r(2, 3), r(2, 4))), "3", "4"),
        shapes_of_vectors=(a(lambda: (r(5), r(7))), "5", "7"),
        weight=(a(lambda: (r(2, 3), r(2, 3)), weight=lambda: r(3)), "(3,)", "(2, 3)"),
        integers=(a(lambda: (ints(2), ints(2))), "int64"),
        complex_input=(TypeError, a(lambda: (z(2), r(2))), "input", "complex64"),
        complex_target=(TypeError, a(lambda: (r(2), z(2))), "target", "complex64"),
        complex_weight=(TypeError, a(lambda: (r(2), r(2)), weight=lambda: z(2)), "weight"),
        list_input=(TypeError, a(lambda: ([1.0], r(1))), "input", "list"),
        list_target=(TypeError, a(lambda: (r(1), [1.0])), "target", "list"),
        **with_reductions(lambda: (r(2), r(2))),
    ),
    *calls(
        "cross_entropy",
        no_input=(a(lambda: (None, y(0))), "input", "None"),
        no_target=(a(lambda: (r(2, C), None)), "target", "None"),
        batch=(a(lambda: (r(2, C), y(0, 1, 2))), "(2, 4)", "(3,)"),
        batch_of_scalar=(a(lambda: (r(2, C), torch.tensor(1))), "(2, 4)", "()"),
        positions=(a(lambda: (r(2, C, 3), ints(2, 2))), "(2, 4, 3)", "(2, 2)"),
        no_positions=(a(lambda: (r(2, C, 3), ints(2))), "(2, 4, 3)", "(2,)"),
        classes_last=(a(lambda: (r(2, 3, C), ints(2, 3))), "(2, 3, 4)", "(2, 3)"),
        target_of_2_axes=(a(lambda: (r(2, C), ints(2, 1))), "(2, 4)", "(2, 1)"),
        probabilities=(a(lambda: (r(2, C), r(2, 3))), "(2, 4)", "(2, 3)"),
        probabilities_of_rows=(a(lambda: (r(2, C), r(2))), "float"),
        probabilities_unbatched=(a(lambda: (r(C), r(3))), "float32"),
        integer_probabilities=(a(lambda: (r(2, C), ints(2, C))), "int64", "(2, 4)"),
        without_axes=(a(lambda: (r(), torch.tensor(0))), "()"),
        unbatched_with_two=(a(lambda: (r(C), y(0, 1))), "(4,)", "(2,)"),
        unbatched_with_matrix=(a(lambda: (r(C), ints(2, 2))), "(4,)", "(2, 2)"),
        class_4=(a(lambda: (r(2, C), y(0, 4))), "4"),
        class_minus_1=(a(lambda: (r(2, C), y(0, -1))), "-1"),
        class_minus_100=(a(lambda: (r(2, C), y(0, -100)), ignore_index=1), "-100"),
        class_minus_5_unbatched=(a(lambda: (r(C), torch.tensor(-5))), "-5"),
        class_9_of_positions=(a(lambda: (r(2, C, 3), ints(2, 3) * 9)), "9"),
        byte_255=(a(lambda: (r(2, C), y(0, 255).byte())), "255"),
        int32=(a(lambda: (r(2, C), y(0, 1).int())), "int32"),
        bool_target=(a(lambda: (r(2, C), y(0, 1).bool())), "ool"),
        weight=(a(LOGITS, weight=lambda: r(3).detach()), "4", "(3,)"),
        weight_matrix=(a(LOGITS, weight=lambda: r(C, 1).detach()), "4", "(4, 1)"),
        weight_type=(a(LOGITS, weight=lambda: r(C, dtype=torch.float64).detach()), "64", "32"),
        integers=(a(lambda: (ints(2, C), y(0, 1))), "int64"),
        ignore_index_of_probabilities=(
            a(lambda: (r(2, C), r(2, C)), ignore_index=0),
            "ignore_index",
        ),
        complex_input=(TypeError, a(lambda: (z(2, C), y(0, 1))), "input", "complex64"),
        complex_target=(TypeError, a(lambda: (r(2, C), z(2, C))), "target", "complex64"),
        complex_weight=(TypeError, a(LOGITS, weight=lambda: z(C)), "weight", "complex64"),
        list_input=(a(lambda: ([[1.0]], y(0))), "input", "list"),
        list_target=(a(lambda: (r(2, C), [0, 1])), "target", "list"),
        list_weight=(a(LOGITS, weight=[1.0] * C), "weight", "list"),
        base_word=(TypeError, a(LOGITS, base="e"), "str"),
        **with_reductions(LOGITS),
        **with_smoothings(LOGITS),
        **with_bases(LOGITS),
        **with_logit_options(LOGITS),
        **with_z_losses(LOGITS),
    ),
    *calls(
        "linear_cross_entropy",
        no_input=(TypeError, a(lambda: (None, r(C, D), y(0))), "input", "None"),
        no_weight=(TypeError, a(lambda: (r(2, D), None, y(0))), "linear_weight", "None"),
        no_target=(TypeError, a(lambda: (r(2, D), r(C, D), None)), "target", "None"),
        features=(a(lambda: (r(2, 3), r(C, 5), y(0, 1))), "3", "5"),
        weight_of_1_axis=(a(lambda: (r(2, 3), r(3), y(0, 1))), "1"),
        weight_without_axes=(a(lambda: (r(2, 3), r(), y(0, 1))), "0"),
        input_without_axes=(a(lambda: (r(), r(C, 3), torch.tensor(0))), "()"),
        K_unbatched=(a(lambda: (r(3), r(C, 2, 3), ints(2))), "(4, 2, 3)", "(3,)"),
        K_sequence=(a(lambda: (r(2, 2, 3), r(C, 2, 3), ints(2, 2))), "(4, 2, 3)", "(2, 2, 3)"),
        bias=(a(HEAD, linear_bias=lambda: r(5)), "(4,)", "(5,)"),
        bias_matrix=(a(HEAD, linear_bias=lambda: r(C, 1)), "(4,)", "(4, 1)"),
        bias_K=(
            a(lambda: (r(2, 3), r(C, 2, 3), ints(2, 2)), linear_bias=lambda: r(C)),
            "(4, 2)",
            "(4,)",
        ),
        batch=(a(lambda: (r(2, D), r(C, D), y(0, 1, 2))), "(2, 4)", "(3,)"),
        target_of_2_axes=(a(lambda: (r(2, D), r(C, D), ints(2, 1))), "(2, 4)", "(2, 1)"),
        positions=(
            a(lambda: (r(2, D), r(C, 3, D), ints(2, 2))),
            "(2, 4, 3)",
            "(2, 2)",
        ),
        sequence=(RuntimeError, a(lambda: (r(2, 3, D), r(C, D), ints(6))), "(2, 3)", "(6,)"),
        sequence_transposed=(
            RuntimeError,
            a(lambda: (r(2, 3, D), r(C, D), ints(3, 2))),
            "(2, 3)",
            "(3, 2)",
        ),
        probabilities=(a(lambda: (r(2, D), r(C, D), r(2, 3))), "(2, 4)", "(2, 3)"),
        probabilities_of_rows=(a(lambda: (r(2, D), r(C, D), r(2))), "float"),
        integer_probabilities=(a(lambda: (r(2, D), r(C, D), ints(2, C))), "int64", "(2, 4)"),
        class_4=(a(lambda: (r(2, D), r(C, D), y(0, 4))), "4"),
        class_minus_1=(a(lambda: (r(2, D), r(C, D), y(0, -1))), "-1"),
        class_minus_100=(a(lambda: (r(2, D), r(C, D), y(0, -100)), ignore_index=255), "-100"),
        class_minus_5_unbatched=(a(lambda: (r(D), r(C, D), torch.tensor(-5))), "-5"),
        class_9_of_positions=(a(lambda: (r(2, D), r(C, 2, D), ints(2, 2) * 9)), "9"),
        class_9_of_sequence=(
            IndexError,
            a(lambda: (r(2, 3, D), r(C, D), ints(2, 3) * 9)),
            "9",
        ),
        int32=(a(lambda: (r(2, D), r(C, D), y(0, 1).int())), "int32"),
        weight=(a(HEAD, weight=lambda: r(3).detach()), "4", "(3,)"),
        weight_type=(a(HEAD, weight=lambda: r(C, dtype=torch.float64).detach()), "64", "32"),
        ignore_index_of_probabilities=(
            a(lambda: (r(2, D), r(C, D), r(2, C)), ignore_index=-100),
            "ignore_index",
        ),
        mixed=(a(lambda: (r(2, D), r(C, D, dtype=torch.float64), y(0, 1))), "32", "64"),
        mixed_bias=(a(HEAD, linear_bias=lambda: r(C, dtype=torch.bfloat16)), "32", "bfloat16"),
        complex_input=(TypeError, a(lambda: (z(2, D), r(C, D), y(0, 1))), "input", "complex64"),
        complex_weight=(TypeError, a(lambda: (r(2, D), z(C, D), y(0, 1))), "linear_weight"),
        complex_bias=(TypeError, a(HEAD, linear_bias=lambda: z(C)), "linear_bias", "complex64"),
        complex_target=(TypeError, a(lambda: (r(2, D), r(C, D), z(2, C))), "target", "complex64"),
        list_input=(TypeError, a(lambda: ([1.0], r(C, D), y(0))), "input", "list"),
        list_weight=(TypeError, a(lambda: (r(2, D), [1.0], y(0))), "linear_weight", "list"),
        list_target=(TypeError, a(lambda: (r(2, D), r(C, D), [0, 1])), "target", "list"),
        list_bias=(TypeError, a(HEAD, linear_bias=[0.0] * C), "linear_bias", "list"),
        base_word=(TypeError, a(HEAD, base="e"), "str"),
        **with_reductions(HEAD),
        **with_smoothings(HEAD),
        **with_bases(HEAD),
        **with_logit_options(HEAD),
        **with_z_losses(HEAD),
    ),
    *calls(
        "linear_log_probs",
        no_input=(TypeError, a(lambda: (None, r(C, D), y(0))), "input", "None"),
        no_target=(TypeError, a(lambda: (r(2, D), r(C, D), None)), "target", "None"),
        features=(RuntimeError, a(lambda: (r(2, 3), r(C, 5), y(0, 1))), "3", "5"),
        bias=(RuntimeError, a(HEAD, linear_bias=lambda: r(5)), "(4,)", "(5,)"),
        probabilities=(
            RuntimeError,
            a(lambda: (r(2, D), r(C, D), r(2, C)), return_entropy=True),
            "class indices",
            "entropy",
            "(2, 4)",
            "linear_cross_entropy",
        ),
        integer_probabilities=(
            RuntimeError,
            a(lambda: (r(2, D), r(C, D), ints(2, C))),
            "int64",
            "(2, 4)",
        ),
        batch=(ValueError, a(lambda: (r(2, D), r(C, D), y(0, 1, 2))), "(2, 4)", "(3,)"),
        class_4=(IndexError, a(lambda: (r(2, D), r(C, D), y(0, 4))), "4"),
        class_minus_100=(
            IndexError,
            a(lambda: (r(2, D), r(C, D), y(0, -100)), ignore_index=255),
            "-100",
        ),
        complex_input=(TypeError, a(lambda: (z(2, D), r(C, D), y(0, 1))), "input", "complex64"),
        complex_bias=(TypeError, a(HEAD, linear_bias=lambda: z(C)), "linear_bias", "complex64"),
        **with_bases(HEAD),
        **with_logit_options(HEAD),
    ),
    *(
        row
        for name in ("squared_error", "sigmoid_squared_error")
        for row in calls(
            name,
            no_input=(TypeError, a(lambda: (None, r(1))), "input", "None"),
            no_target=(TypeError, a(lambda: (r(1), None)), "target", "None"),
            column=(ValueError, a(lambda: (r(4, 1), r(4))), "(4, 1)", "(4,)"),
            scalar=(ValueError, a(lambda: (r(), r(1))), "()", "(1,)"),
            dim_2=(IndexError, a(lambda: (r(2, 3), r(2, 3)), dim=2), "[-2, 1]", "2"),
            dim_minus_3=(IndexError, a(lambda: (r(2, 3), r(2, 3)), dim=(0, -3)), "-3"),
            dim_twice=(ValueError, a(lambda: (r(2, 3), r(2, 3)), dim=(1, -1)), "(1, -1)"),
            dim_word=(TypeError, a(lambda: (r(2, 3), r(2, 3)), dim="last"), "str"),
            dim_fraction=(TypeError, a(lambda: (r(2, 3), r(2, 3)), dim=0.5), "float"),
            integers=(TypeError, a(lambda: (ints(2), r(2))), "input", "int64"),
            integer_target=(TypeError, a(lambda: (r(2), ints(2))), "target", "int64"),
            complex_input=(TypeError, a(lambda: (z(2), r(2))), "input", "complex64"),
            complex_target=(TypeError, a(lambda: (r(2), z(2))), "target", "complex64"),
            list_input=(TypeError, a(lambda: ([1.0], r(1))), "input", "list"),
            list_target=(TypeError, a(lambda: (r(1), [1.0])), "target", "list"),
            reduction=(ValueError, a(lambda: (r(2), r(2)), reduction="avg"), "avg"),
        )
    ),
    *calls(
        "categorical_cross_entropy",
        no_probs=(TypeError, a(lambda: (None, y(0))), "probs", "None"),
        no_target=(TypeError, a(lambda: (r(2, C), None)), "target", "None"),
        indices=(ValueError, a(lambda: (r(2, C), y(0, 1, 2))), "(2,)", "(3,)"),
        indices_of_matrix=(ValueError, a(lambda: (r(2, C), ints(2, 1))), "(2,)", "(2, 1)"),
        integer_probabilities=(ValueError, a(lambda: (r(2, C), ints(2, C))), "(2,)", "(2, 4)"),
        positions=(ValueError, a(lambda: (r(2, C, 3), ints(2, 3))), "(2, 4)", "(2, 3)"),
        probabilities=(ValueError, a(lambda: (r(2, C), r(2, 3))), "(2, 4)", "(2, 3)"),
        probabilities_of_rows=(ValueError, a(lambda: (r(2, C), r(C))), "(2, 4)", "(4,)"),
        class_4=(IndexError, a(lambda: (r(2, C), y(0, 4))), "4"),
        class_minus_1=(IndexError, a(lambda: (r(2, C), y(0, -1))), "-1"),
        class_minus_100=(IndexError, a(lambda: (r(2, C), y(0, -100))), "-100"),
        class_3_at_dim_0=(IndexError, a(lambda: (r(3, C), ints(C) * 3), dim=0), "3"),
        dim_2=(IndexError, a(lambda: (r(2, C), y(0, 1)), dim=2), "[-2, 1]", "2"),
        dim_minus_3=(IndexError, a(lambda: (r(2, C), y(0, 1)), dim=-3), "[-2, 1]", "-3"),
        dim_word=(TypeError, a(lambda: (r(2, C), y(0, 1)), dim="last"), "str"),
        integers=(TypeError, a(lambda: (ints(2, C), y(0, 1))), "probs", "int64"),
        complex_probs=(TypeError, a(lambda: (z(2, C), y(0, 1))), "probs", "complex64"),
        complex_target=(TypeError, a(lambda: (r(2, C), z(2, C))), "target", "complex64"),
        list_probs=(TypeError, a(lambda: ([1.0], y(0))), "probs", "list"),
        list_target=(TypeError, a(lambda: (r(2, C), [0, 1])), "target", "list"),
        reduction=(ValueError, a(lambda: (r(2, C), y(0, 1)), reduction="avg"), "avg"),
        **with_bases(lambda: (r(2, C), y(0, 1))),
    ),
    *calls(
        "feedforward",
        no_input=(TypeError, a(lambda: (None, [r(5, 3)], [None])), "input", "None"),
        no_layer=(ValueError, a(lambda: (r(2, 3), [], [])), "0 weights"),
        biases=(ValueError, a(lambda: (r(2, 3), [r(5, 3)], [])), "1 weights", "0 biases"),
        activation=(
            ValueError,
            a(lambda: (r(2, 3), [r(5, 3)], [None]), activation="gelu"),
            "'gelu'",
            "sigmoid, tanh, relu, identity",
        ),
        hidden_softmax=(
            ValueError,
            a(lambda: (r(2, 3), [r(5, 3)], [None]), activation="softmax"),
            "'softmax'",
        ),
        output_activation=(
            ValueError,
            a(lambda: (r(2, 3), [r(5, 3)], [None]), output_activation="Sigmoid"),
            "output_activation",
            "'Sigmoid'",
            "softmax",
        ),
        activation_function=(
            ValueError,
            a(lambda: (r(2, 3), [r(5, 3)], [None]), output_activation=None),
            "None",
        ),
        input=(RuntimeError, a(lambda: (r(2, 4), [r(5, 3)], [None])), "(2, 4)", "(5, 3)"),
        input_without_axes=(RuntimeError, a(lambda: (r(), [r(5, 3)], [None])), "()", "(5, 3)"),
        layers=(
            RuntimeError,
            a(lambda: (r(2, 3), [r(5, 3), r(2, 4)], [None, None])),
            "weights[1]",
            "5",
            "(2, 4)",
        ),
        bias=(RuntimeError, a(lambda: (r(2, 3), [r(5, 3)], [r(4)])), "4", "5"),
        weight_vector=(RuntimeError, a(lambda: (r(2, 3), [r(3)], [None])), "weights[0]", "(3,)"),
        mixed=(
            RuntimeError,
            a(lambda: (r(2, 3), [r(5, 3, dtype=torch.float64)], [None])),
            "float32",
            "float64",
        ),
        mixed_layers=(
            RuntimeError,
            a(lambda: (r(2, 3), [r(5, 3), r(2, 5, dtype=torch.bfloat16)], [None] * 2)),
            "weights[1]",
            "float32",
            "bfloat16",
        ),
        mixed_bias=(
            RuntimeError,
            a(lambda: (r(2, 3), [r(5, 3)], [r(5, dtype=torch.float64)])),
            "float32",
            "float64",
        ),
        complex_input=(TypeError, a(lambda: (z(2, 3), [r(5, 3)], [None])), "input", "complex64"),
        complex_weight=(
            TypeError,
            a(lambda: (r(2, 3), [r(5, 3), z(2, 5)], [None] * 2)),
            "weights[1]",
            "complex64",
        ),
        complex_bias=(TypeError, a(lambda: (r(2, 3), [r(5, 3)], [z(5)])), "biases[0]", "complex"),
        list_input=(TypeError, a(lambda: ([1.0], [r(5, 3)], [None])), "input", "list"),
        list_weight=(TypeError, a(lambda: (r(2, 3), [[1.0]], [None])), "weights[0]", "list"),
        no_weight=(TypeError, a(lambda: (r(2, 3), [None], [None])), "weights[0]", "None"),
    ),
]


def tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return (
        [x for item in value for x in tensors_in(item)] if isinstance(value, list | tuple) else []
    )


class Untouched:
    """Notes tensors, to see later that nothing was written to them: values, version, gradient."""

    def __init__(self, *values):
        self.tensors = tensors_in(list(values))
        self.before = [(x.detach().clone(), x._version) for x in self.tensors]

    def check(self):
        for x, (values, version) in zip(self.tensors, self.before, strict=True):
            assert x._version == version
            assert torch.equal(x.detach(), values)
            assert not x.is_leaf or x.grad is None


def raised(function, arguments):
    """The error of a call; PyTorch's warnings on the way to it are not the point here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(Exception) as error:  # noqa: PT011 the type is checked by the caller
            function(*arguments.args, **arguments.kwargs)
    return error.value


@pytest.mark.parametrize(("function", "expected", "make", "parts"), BAD)
def test_bad_arguments(function, expected, make, parts):
    if (function, *parts) in CHANGED and torch.__version__ < "2.13":
        pytest.skip("PyTorch has called this error otherwise before 2.13")
    arguments = make()
    before = Untouched(arguments.args, arguments.kwargs)
    error = raised(getattr(F, function), arguments)
    before.check()
    if expected is None:
        if not hasattr(PYTORCH, function):
            pytest.skip("this PyTorch does not have the function")
        expected = type(raised(getattr(PYTORCH, function), make()))
    assert type(error) is expected, error
    for part in parts:
        assert part in str(error)


@pytest.mark.parametrize("function", sorted(F.__all__))
def test_every_function_has_bad_calls(function):
    of_function = [row.values for row in BAD if row.values[0] == function]
    errors = {expected for _, expected, *_ in of_function}
    assert len(of_function) >= 4
    assert TypeError in errors


@pytest.mark.parametrize(
    ("make", "x", "error", "part"),
    [
        (lambda: nn.Linear(3, 5), lambda: (r(2, 4),), RuntimeError, "(2, 4)"),
        (lambda: nn.Sigmoid(), lambda: (z(2),), TypeError, "complex64"),
        (lambda: nn.Tanh(), lambda: (z(2),), TypeError, "complex64"),
        (lambda: nn.ReLU(), lambda: (z(2),), TypeError, "complex64"),
        (lambda: nn.ReLU(inplace=True), lambda: (r(2),), RuntimeError, "leaf"),
        (lambda: nn.Softmax(2), lambda: (r(2, 3),), IndexError, "[-2, 1]"),
        (lambda: nn.MSELoss(reduction="avg"), lambda: (r(2), r(2)), ValueError, "avg"),
        (lambda: nn.CrossEntropyLoss(reduction="avg"), LOGITS, ValueError, "avg"),
        (lambda: nn.CrossEntropyLoss(base=1), LOGITS, ValueError, "base"),
        (lambda: nn.CrossEntropyLoss(label_smoothing=2.0), LOGITS, RuntimeError, "2.0"),
        (lambda: nn.CrossEntropyLoss(torch.ones(3)), LOGITS, RuntimeError, "(3,)"),
        (lambda: nn.CrossEntropyLoss(), lambda: (r(2, C), y(0, -1)), IndexError, "-1"),
        (
            lambda: nn.LinearCrossEntropyLoss(D, C),
            lambda: (r(2, 5), y(0, 1)),
            RuntimeError,
            "(2, 5)",
        ),
        (lambda: nn.LinearCrossEntropyLoss(D, C), lambda: (r(2, D), y(0, 9)), IndexError, "9"),
        (
            lambda: nn.LinearCrossEntropyLoss(D, C, base=-1),
            lambda: (r(2, D), y(0, 1)),
            ValueError,
            "-1",
        ),
        (lambda: nn.SquaredErrorLoss(dim=3), lambda: (r(2), r(2)), IndexError, "3"),
        (lambda: nn.SigmoidSquaredErrorLoss(), lambda: (r(2, 1), r(2)), ValueError, "(2, 1)"),
        (lambda: nn.CategoricalCrossEntropyLoss(base=0), LOGITS, ValueError, "base"),
        (lambda: nn.CategoricalCrossEntropyLoss(dim=5), LOGITS, IndexError, "5"),
        (lambda: nn.Feedforward([3, 5], "gelu"), lambda: (r(2, 3),), ValueError, "gelu"),
        (lambda: nn.Feedforward([3, 5]), lambda: (r(2, 4),), RuntimeError, "(2, 4)"),
    ],
)
def test_bad_arguments_of_modules(make, x, error, part):
    module, x = make(), x()
    before = Untouched(x, *module.parameters(), *module.buffers())
    with pytest.raises(error) as caught:
        module(*x)
    before.check()
    assert type(caught.value) is error
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("make", "error", "part"),
    [
        (lambda: nn.Feedforward([3]), ValueError, "[3]"),
        (lambda: nn.Feedforward([]), ValueError, "[]"),
        (
            lambda: nn.LinearCrossEntropyLoss(D, C, weight=torch.ones(3)),
            RuntimeError,
            "(3,)",
        ),
        (lambda: nn.LinearCrossEntropyLoss(D, C, label_smoothing=2.0), RuntimeError, "2.0"),
    ],
)
def test_bad_arguments_of_constructors(make, error, part):
    with pytest.raises(error) as caught:
        make()
    assert type(caught.value) is error
    assert part in str(caught.value)


def test_unknown_arguments_are_refused_as_by_python():
    for name in F.__all__:
        with pytest.raises(TypeError, match="unexpected keyword argument 'out'"):
            getattr(F, name)(out=None)


def combined(*axes):
    """Every combination of one option per axis."""
    rows = [{}]
    for axis in axes:
        rows = [row | option for row in rows for option in axis]
    return rows


def options(name, *values):
    return [{name: value} for value in values]


REDUCTIONS = options("reduction", "none", "sum", "mean")
SMOOTHINGS = options("label_smoothing", 0.0, 0.1)


def class_weight(dtype):
    return torch.tensor([0.5, 2, 1, 0.25], dtype=dtype)


WEIGHTS = options("weight", None, class_weight)
GOOD = {
    "linear": (F.linear, [(2, D), (5, D), (5,)], [], [{}]),
    "linear vector": (F.linear, [(2, D), (D,), ()], [], [{}]),
    "sigmoid": (F.sigmoid, [(2, D)], [], [{}]),
    "tanh": (F.tanh, [(2, D)], [], [{}]),
    "relu": (F.relu, [(2, D)], [], [{}]),
    "softmax": (F.softmax, [(2, D)], [], [{"dim": 0}, {"dim": 1, "dtype": torch.float64}]),
    "softmax_jacobian": (F.softmax_jacobian, [(2, D)], [], [{"dim": 0}, {"dim": 1}]),
    "mse_loss": (F.mse_loss, [(2, D), (2, D)], [], REDUCTIONS),
    "mse_loss weight": (
        lambda a, t, w, **o: F.mse_loss(a, t, weight=w, **o),
        [(2, D)] * 3,
        [],
        REDUCTIONS,
    ),
    "squared_error": (F.squared_error, [(2, D), (2, D)], [], [*REDUCTIONS, {"dim": (0, 1)}]),
    "sigmoid_squared_error": (
        F.sigmoid_squared_error,
        [(2, D), (2, D)],
        [],
        [*REDUCTIONS, {"dim": (0, 1)}],
    ),
    "categorical_cross_entropy": (
        F.categorical_cross_entropy,
        [(2, C), (2, C)],
        [],
        [*REDUCTIONS, {"base": 2}, {"dim": 0}],
    ),
    "categorical_cross_entropy indices": (
        F.categorical_cross_entropy,
        [(2, C)],
        [y(0, 3)],
        REDUCTIONS,
    ),
    "cross_entropy": (
        F.cross_entropy,
        [(3, C)],
        [y(0, -100, 3)],
        combined(REDUCTIONS, SMOOTHINGS, WEIGHTS),
    ),
    "cross_entropy bytes": (
        F.cross_entropy,
        [(3, C)],
        [y(0, 255, 3).byte()],
        [{"ignore_index": 255}, {"ignore_index": 255, "label_smoothing": 0.1}],
    ),
    "cross_entropy probabilities": (
        F.cross_entropy,
        [(3, C), (3, C)],
        [],
        combined(REDUCTIONS, SMOOTHINGS, WEIGHTS),
    ),
    "cross_entropy K": (F.cross_entropy, [(2, C, 3)], [ints(2, 3)], REDUCTIONS),
    "head": (
        lambda x, W, b, y, **o: F.linear_cross_entropy(x, W, y, linear_bias=b, **o),
        [(3, D), (C, D), (C,)],
        [y(0, -100, 3)],
        combined(REDUCTIONS, SMOOTHINGS, WEIGHTS),
    ),
    "head probabilities": (
        F.linear_cross_entropy,
        [(3, D), (C, D), (3, C)],
        [],
        combined(REDUCTIONS, SMOOTHINGS),
    ),
    "head sequence": (F.linear_cross_entropy, [(2, 3, D), (C, D)], [ints(2, 3)], REDUCTIONS),
    "head K": (F.linear_cross_entropy, [(3, D), (C, 2, D)], [ints(3, 2)], REDUCTIONS),
    "feedforward": (
        lambda x, W, V, b, c, **o: F.feedforward(x, [W, V], [b, c], **o),
        [(2, D), (5, D), (2, 5), (5,), (2,)],
        [],
        [
            {"activation": f, "output_activation": g}
            for f, g in (
                ("sigmoid", "softmax"),
                ("tanh", "identity"),
                ("relu", "relu"),
                ("identity", "tanh"),
            )
        ],
    ),
}
GOOD_ROWS = [
    pytest.param(f, shapes, rest, row, id=f"{name}-{i}")
    for name, (f, shapes, rest, rows) in GOOD.items()
    for i, row in enumerate(rows)
]


@pytest.mark.parametrize(("f", "shapes", "rest", "row"), GOOD_ROWS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_good_calls_write_to_nothing(f, shapes, rest, row, dtype):
    leaves = [r(*shape, dtype=dtype) for shape in shapes]
    if row.get("weight"):
        row = row | {"weight": class_weight(dtype)}
    parents = [x * 1 for x in leaves]  # not leaves: to these, PyTorch itself would let one write
    before = Untouched(leaves, parents, rest, row)

    with torch.no_grad():
        f(*parents, *rest, **row)
    before.check()
    loss = f(*parents, *rest, **row)
    before.check()
    upstream = torch.rand_like(loss)
    given = Untouched(upstream, loss)
    first = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
    again = torch.autograd.grad(loss, leaves, upstream, create_graph=True)
    results = Untouched(first, again)
    along = sum(d.sum() for d in again)
    if along.requires_grad:
        torch.autograd.grad(along, leaves, materialize_grads=True)
    given.check()
    before.check()
    results.check()
    eps = torch.finfo(dtype).eps  # one is computed as it is written, the other in blocks
    for d, e in zip(first, again, strict=True):
        torch.testing.assert_close(d, e, rtol=4 * eps, atol=4 * eps, equal_nan=True)

    primals = [x.detach().clone() for x in leaves]
    tangents = [torch.rand_like(x) for x in leaves]
    given = Untouched(primals, tangents)
    jvp(lambda *leaves: f(*leaves, *rest, **row), tuple(primals), tuple(tangents))
    given.check()
    before.check()


@pytest.mark.parametrize(
    "name", ["linear", "head", "cross_entropy", "feedforward", "mse_loss", "squared_error"]
)
def test_good_calls_write_to_nothing_under_autocast(name):
    f, shapes, rest, rows = GOOD[name]
    leaves = [r(*shape) for shape in shapes]
    before = Untouched(leaves, rest)
    with torch.autocast("cpu", torch.bfloat16):
        loss = f(*leaves, *rest, **rows[0])
    torch.autograd.grad(loss, leaves, torch.ones_like(loss))
    before.check()


@pytest.mark.parametrize("f", [F.relu, lambda x, inplace: nn.ReLU(inplace)(x)])
def test_relu_in_place_writes_to_its_input_alone(f):
    x = torch.tensor([-1.0, 2.0], requires_grad=True)
    parent = x * 1
    version = parent._version
    out = f(parent, inplace=True)
    assert out is parent
    assert parent._version > version
    assert parent.tolist() == [0, 2]
    upstream = torch.tensor([3.0, 4.0])
    given = Untouched(upstream, x, out)
    (dx,) = torch.autograd.grad(out, x, upstream)
    given.check()
    assert dx.tolist() == [0, 4]
    assert x.tolist() == [-1, 2]
