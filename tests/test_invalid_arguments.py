"""Invalid arguments raise an error that names the fault, and change none of the caller's tensors.

Where PyTorch has the function, the error has the type that PyTorch raises for that call.
"""

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from arguments import C, D, Snapshot, classes, complexes, floats, ints

import torch_nnmath.functional as F
from torch_nnmath import nn

PYTORCH = SimpleNamespace(**vars(torch.nn.functional) | {"sigmoid": torch.sigmoid})
PYTORCH.tanh = torch.tanh
# Calls, by function and part of the message, for which PyTorch raises another type before 2.13
ERRORS_CHANGED_IN_2_13 = [("softmax", "str"), ("cross_entropy", "float32")]


def cases(function, **rows):
    """One test case for each row: (call, *parts of the message), after an error type or not.

    Without a type, PyTorch's error for the call decides. Rows with a type are calls that PyTorch
    lacks, allows or crashes on.
    """
    for name, row in rows.items():
        error_type = row[0] if isinstance(row[0], type) else None
        make_call, *parts = row[1:] if error_type else row
        yield pytest.param(function, error_type, make_call, parts, id=f"{function}-{name}")


class Arguments:
    def __init__(self, *args, **kwargs):
        self.args, self.kwargs = args, kwargs


def call(make, **kwargs):
    """Makes the arguments afresh for each call: `make` and callable keywords return tensors."""
    return lambda: Arguments(*make(), **{k: v() if callable(v) else v for k, v in kwargs.items()})


def base_cases(make):
    return {
        f"base_{base}": (ValueError, call(make, base=base), "base", str(base))
        for base in (0, 0.0, -1, -2.0, 1, 1.0, math.nan, math.inf, -math.inf)
    }


def scale_and_cap_cases(make):
    one = torch.ones(1)
    return {
        "cap_0": (ValueError, call(make, softcap=0.0), "softcap", "positive", "0.0"),
        "cap_negative": (ValueError, call(make, softcap=-30), "softcap", "positive", "-30"),
        "cap_infinite": (ValueError, call(make, softcap=math.inf), "softcap", "finite", "inf"),
        "cap_nan": (ValueError, call(make, softcap=math.nan), "softcap", "finite", "nan"),
        "cap_word": (TypeError, call(make, softcap="30"), "softcap", "str"),
        "cap_tensor": (TypeError, call(make, softcap=torch.tensor(30.0)), "softcap", "Tensor"),
        "temperature_0": (ValueError, call(make, temperature=0.0), "temperature", "positive"),
        "temperature_nan": (ValueError, call(make, temperature=math.nan), "temperature", "finite"),
        "temperature_word": (TypeError, call(make, temperature="1"), "temperature", "str"),
        "output_integer": (
            TypeError,
            call(make, output_dtype=torch.int64),
            "output_dtype",
            "int64",
        ),
        "output_word": (TypeError, call(make, output_dtype="half"), "output_dtype", "half"),
        "scale_infinite": (ValueError, call(make, logit_scale=-math.inf), "logit_scale", "-inf"),
        "scale_nan": (ValueError, call(make, logit_scale=math.nan), "logit_scale", "nan"),
        "scale_word": (TypeError, call(make, logit_scale="2"), "logit_scale", "str"),
        "scale_none": (TypeError, call(make, logit_scale=None), "logit_scale", "None"),
        "scale_vector": (ValueError, call(make, logit_scale=one), "logit_scale", "(1,)"),
        "scale_complex": (TypeError, call(make, logit_scale=torch.tensor(1j)), "logit_scale", "64"),
    }


def z_loss_cases(make):
    return {
        "z_loss_nan": (ValueError, call(make, z_loss=math.nan), "z_loss", "nan"),
        "z_loss_infinite": (ValueError, call(make, z_loss=math.inf), "z_loss", "inf"),
        "z_loss_word": (TypeError, call(make, z_loss="0"), "z_loss", "str"),
        "z_loss_tensor": (TypeError, call(make, z_loss=torch.tensor(0.1)), "z_loss", "Tensor"),
    }


def row_weight_cases(make):
    return {
        "row_weight_shape": (ValueError, call(make, row_weight=lambda: floats(3)), "(2,)", "(3,)"),
        "row_weight_column": (ValueError, call(make, row_weight=lambda: floats(2, 1)), "(2, 1)"),
        "row_weight_type": (
            RuntimeError,
            call(make, row_weight=lambda: floats(2, dtype=torch.float64)),
            "row_weight",
            "float32",
            "float64",
        ),
        "row_weight_complex": (
            TypeError,
            call(make, row_weight=lambda: complexes(2)),
            "row_weight",
            "complex64",
        ),
        "row_weight_list": (TypeError, call(make, row_weight=[1.0, 1.0]), "row_weight", "list"),
    }


def divisor_cases(make):
    return {
        "divisor_negative": (ValueError, call(make, divisor=-1.0), "divisor", "-1"),
        "divisor_inf": (ValueError, call(make, divisor=math.inf), "divisor", "inf"),
        "divisor_shape": (ValueError, call(make, divisor=lambda: floats(2)), "divisor", "(2,)"),
        "divisor_complex": (TypeError, call(make, divisor=lambda: complexes()), "divisor"),
        "divisor_text": (TypeError, call(make, divisor="2"), "divisor", "str"),
        "divisor_of_sum": (ValueError, call(make, divisor=2, reduction="sum"), "divisor", "'sum'"),
        "divisor_of_none": (ValueError, call(make, divisor=2, reduction="none"), "'none'"),
    }


def reduction_cases(make):
    return {
        f"reduction_{word}": (
            call(make, reduction=word),
            f"{word} is not a valid value for reduction",
        )
        for word in ("avg", "Mean", "", "batchmean")
    }


def smoothing_cases(make):
    return {
        f"smoothing_{s}": (*error, call(make, label_smoothing=s), "label_smoothing", str(s))
        for s, *error in ((-0.1, RuntimeError), (1.5,), (math.nan, RuntimeError), (math.inf,))
    }


def make_logits():
    """Valid arguments of cross_entropy, to which a row adds an invalid one."""
    return floats(2, C), classes(0, 1)


def make_pair():
    """Two heads."""
    return floats(2, D), floats(C, D), floats(2, D), floats(C, D)


def make_head():
    return floats(2, D), floats(C, D), classes(0, 1)


def make_features():
    return floats(2, D), floats(C, D)


INVALID_CALLS = [
    *cases(
        "linear",
        number=(RuntimeError, call(lambda: (floats(), floats(5, 4))), "one dimension", "(5, 4)"),
        numbers=(RuntimeError, call(lambda: (floats(), floats())), "1 or 2 dimensions", "()"),
        weight_number=(RuntimeError, call(lambda: (floats(3), floats())), "1 or 2", "()"),
        features=(call(lambda: (floats(2, 3), floats(5, 4))), "(2, 3)", "(5, 4)"),
        features_of_vectors=(call(lambda: (floats(3), floats(4))), "(3,)", "(4,)"),
        bias=(call(lambda: (floats(2, 3), floats(5, 3), floats(4))), "4", "5"),
        bias_of_one_feature=(call(lambda: (floats(2, 3), floats(3), floats(1))), "(3,)", "(1,)"),
        weight_of_3_axes=(call(lambda: (floats(2, 3), floats(2, 5, 3))), "(2, 5, 3)"),
        weight_without_axes=(call(lambda: (floats(2, 3), floats())), "()"),
        input_without_axes=(call(lambda: (floats(), floats(5, 3))), "()", "(5, 3)"),
        mixed=(
            call(lambda: (floats(2, 3), floats(5, 3, dtype=torch.float64))),
            "float32",
            "float64",
        ),
        mixed_bias=(
            call(lambda: (floats(2, 3), floats(5, 3), floats(5, dtype=torch.bfloat16))),
            "float32",
            "bfloat16",
        ),
        integers=(call(lambda: (ints(2, 3), floats(5, 3))), "int64", "float32"),
        complex_input=(
            TypeError,
            call(lambda: (complexes(2, 3), complexes(5, 3))),
            "input",
            "complex64",
        ),
        complex_weight=(
            TypeError,
            call(lambda: (floats(2, 3), complexes(5, 3))),
            "weight",
            "complex64",
        ),
        complex_bias=(
            TypeError,
            call(lambda: (floats(2, 3), floats(5, 3), complexes(5))),
            "bias",
            "complex64",
        ),
        list_input=(call(lambda: ([1.0], floats(5, 3))), "input", "list"),
        list_weight=(call(lambda: (floats(2, 3), [1.0])), "weight", "list"),
        list_bias=(call(lambda: (floats(2, 3), floats(5, 3), [1.0])), "bias", "list"),
        no_input=(call(lambda: (None, floats(5, 3))), "input", "None"),
        no_weight=(call(lambda: (floats(2, 3), None)), "weight", "None"),
    ),
    *(
        row
        for name in ("sigmoid", "tanh", "relu")
        for row in cases(
            name,
            list=(call(lambda: ([1.0],)), "list"),
            number=(call(lambda: (1.0,)), "float"),
            none=(call(lambda: (None,)), "None"),
            complex=(TypeError, call(lambda: (complexes(2),)), "complex64"),
        )
    ),
    *cases(
        "relu",
        bool=(call(lambda: (torch.ones(2, dtype=torch.bool),)), "ool"),
        in_place_on_a_leaf=(call(lambda: (floats(2),), inplace=True), "leaf", "in-place"),
        in_place_on_a_view_of_a_leaf=(
            call(lambda: (floats(2)[:1],), inplace=True),
            "view of a leaf",
        ),
        in_place_on_shared_memory=(
            call(lambda: (torch.ones(1).expand(3),), inplace=True),
            "clone()",
        ),
    ),
    *cases(
        "softmax",
        no_input=(TypeError, call(lambda: (None, 0)), "input", "None"),
        dim_2=(call(lambda: (floats(2, 3), 2)), "[-2, 1]", "2"),
        dim_minus_3=(call(lambda: (floats(2, 3),), dim=-3), "[-2, 1]", "-3"),
        dim_of_a_scalar=(call(lambda: (floats(), 1)), "[-1, 0]", "1"),
        dim_word=(call(lambda: (floats(2, 3), "last")), "str"),
        dim_fraction=(call(lambda: (floats(2, 3), 0.5)), "float"),
        integers=(call(lambda: (ints(2, 3), 0)), "Long"),
        to_integers=(call(lambda: (floats(2, 3), 0), dtype=torch.int32), "Int"),
        complex=(TypeError, call(lambda: (complexes(2, 3), 0)), "complex64"),
        list=(TypeError, call(lambda: ([1.0], 0)), "list"),
    ),
    *cases(
        "softmax_jacobian",
        no_input=(TypeError, call(lambda: (None, 0)), "input", "None"),
        dim_2=(IndexError, call(lambda: (floats(2, 3), 2)), "[-2, 1]", "2"),
        dim_minus_3=(IndexError, call(lambda: (floats(2, 3), -3)), "[-2, 1]", "-3"),
        scalar=(IndexError, call(lambda: (floats(), 0)), "()"),
        integers=(NotImplementedError, call(lambda: (ints(2, 3), 0)), "Long"),
        complex=(TypeError, call(lambda: (complexes(2, 3), 0)), "complex64"),
        list=(TypeError, call(lambda: ([1.0], 0)), "list"),
    ),
    *cases(
        "mse_loss",
        no_input=(TypeError, call(lambda: (None, floats(1))), "input", "None"),
        no_target=(TypeError, call(lambda: (floats(1), None)), "target", "None"),
        shapes=(call(lambda: (floats(2, 3), floats(2, 4))), "3", "4"),
        shapes_of_vectors=(call(lambda: (floats(5), floats(7))), "5", "7"),
        weight=(
            call(lambda: (floats(2, 3), floats(2, 3)), weight=lambda: floats(3)),
            "(3,)",
            "(2, 3)",
        ),
        integers=(call(lambda: (ints(2), ints(2))), "int64"),
        complex_input=(TypeError, call(lambda: (complexes(2), floats(2))), "input", "complex64"),
        complex_target=(TypeError, call(lambda: (floats(2), complexes(2))), "target", "complex64"),
        complex_weight=(
            TypeError,
            call(lambda: (floats(2), floats(2)), weight=lambda: complexes(2)),
            "weight",
        ),
        list_input=(TypeError, call(lambda: ([1.0], floats(1))), "input", "list"),
        list_target=(TypeError, call(lambda: (floats(1), [1.0])), "target", "list"),
        **reduction_cases(lambda: (floats(2), floats(2))),
    ),
    *cases(
        "cross_entropy",
        no_input=(call(lambda: (None, classes(0))), "input", "None"),
        no_target=(call(lambda: (floats(2, C), None)), "target", "None"),
        batch=(call(lambda: (floats(2, C), classes(0, 1, 2))), "(2, 4)", "(3,)"),
        batch_of_scalar=(call(lambda: (floats(2, C), torch.tensor(1))), "(2, 4)", "()"),
        positions=(call(lambda: (floats(2, C, 3), ints(2, 2))), "(2, 4, 3)", "(2, 2)"),
        no_positions=(call(lambda: (floats(2, C, 3), ints(2))), "(2, 4, 3)", "(2,)"),
        classes_last=(call(lambda: (floats(2, 3, C), ints(2, 3))), "(2, 3, 4)", "(2, 3)"),
        target_of_2_axes=(call(lambda: (floats(2, C), ints(2, 1))), "(2, 4)", "(2, 1)"),
        probabilities=(call(lambda: (floats(2, C), floats(2, 3))), "(2, 4)", "(2, 3)"),
        probabilities_of_rows=(call(lambda: (floats(2, C), floats(2))), "float"),
        probabilities_unbatched=(call(lambda: (floats(C), floats(3))), "float32"),
        integer_probabilities=(call(lambda: (floats(2, C), ints(2, C))), "int64", "(2, 4)"),
        without_axes=(call(lambda: (floats(), torch.tensor(0))), "()"),
        unbatched_with_two=(call(lambda: (floats(C), classes(0, 1))), "(4,)", "(2,)"),
        unbatched_with_matrix=(call(lambda: (floats(C), ints(2, 2))), "(4,)", "(2, 2)"),
        class_4=(call(lambda: (floats(2, C), classes(0, 4))), "4"),
        class_minus_1=(call(lambda: (floats(2, C), classes(0, -1))), "-1"),
        class_minus_100=(call(lambda: (floats(2, C), classes(0, -100)), ignore_index=1), "-100"),
        class_minus_5_unbatched=(call(lambda: (floats(C), torch.tensor(-5))), "-5"),
        class_9_of_positions=(call(lambda: (floats(2, C, 3), ints(2, 3) * 9)), "9"),
        byte_255=(call(lambda: (floats(2, C), classes(0, 255).byte())), "255"),
        int32=(call(lambda: (floats(2, C), classes(0, 1).int())), "int32"),
        bool_target=(call(lambda: (floats(2, C), classes(0, 1).bool())), "ool"),
        weight=(call(make_logits, weight=lambda: floats(3).detach()), "4", "(3,)"),
        weight_matrix=(call(make_logits, weight=lambda: floats(C, 1).detach()), "4", "(4, 1)"),
        weight_type=(
            call(make_logits, weight=lambda: floats(C, dtype=torch.float64).detach()),
            "64",
            "32",
        ),
        integers=(call(lambda: (ints(2, C), classes(0, 1))), "int64"),
        ignore_index_of_probabilities=(
            call(lambda: (floats(2, C), floats(2, C)), ignore_index=0),
            "ignore_index",
        ),
        complex_input=(
            TypeError,
            call(lambda: (complexes(2, C), classes(0, 1))),
            "input",
            "complex64",
        ),
        complex_target=(
            TypeError,
            call(lambda: (floats(2, C), complexes(2, C))),
            "target",
            "complex64",
        ),
        complex_weight=(
            TypeError,
            call(make_logits, weight=lambda: complexes(C)),
            "weight",
            "complex64",
        ),
        list_input=(call(lambda: ([[1.0]], classes(0))), "input", "list"),
        list_target=(call(lambda: (floats(2, C), [0, 1])), "target", "list"),
        list_weight=(call(make_logits, weight=[1.0] * C), "weight", "list"),
        base_word=(TypeError, call(make_logits, base="e"), "str"),
        **reduction_cases(make_logits),
        **smoothing_cases(make_logits),
        **base_cases(make_logits),
        **scale_and_cap_cases(make_logits),
        **z_loss_cases(make_logits),
        **row_weight_cases(make_logits),
        **divisor_cases(make_logits),
    ),
    *cases(
        "linear_cross_entropy",
        no_input=(TypeError, call(lambda: (None, floats(C, D), classes(0))), "input", "None"),
        no_weight=(
            TypeError,
            call(lambda: (floats(2, D), None, classes(0))),
            "linear_weight",
            "None",
        ),
        no_target=(TypeError, call(lambda: (floats(2, D), floats(C, D), None)), "target", "None"),
        features=(call(lambda: (floats(2, 3), floats(C, 5), classes(0, 1))), "3", "5"),
        weight_of_1_axis=(call(lambda: (floats(2, 3), floats(3), classes(0, 1))), "1"),
        weight_without_axes=(call(lambda: (floats(2, 3), floats(), classes(0, 1))), "0"),
        input_without_axes=(call(lambda: (floats(), floats(C, 3), torch.tensor(0))), "()"),
        K_unbatched=(call(lambda: (floats(3), floats(C, 2, 3), ints(2))), "(4, 2, 3)", "(3,)"),
        K_sequence=(
            call(lambda: (floats(2, 2, 3), floats(C, 2, 3), ints(2, 2))),
            "(4, 2, 3)",
            "(2, 2, 3)",
        ),
        bias=(call(make_head, linear_bias=lambda: floats(5)), "(4,)", "(5,)"),
        bias_matrix=(call(make_head, linear_bias=lambda: floats(C, 1)), "(4,)", "(4, 1)"),
        bias_K=(
            call(
                lambda: (floats(2, 3), floats(C, 2, 3), ints(2, 2)), linear_bias=lambda: floats(C)
            ),
            "(4, 2)",
            "(4,)",
        ),
        batch=(call(lambda: (floats(2, D), floats(C, D), classes(0, 1, 2))), "(2, 4)", "(3,)"),
        target_of_2_axes=(
            call(lambda: (floats(2, D), floats(C, D), ints(2, 1))),
            "(2, 4)",
            "(2, 1)",
        ),
        positions=(
            call(lambda: (floats(2, D), floats(C, 3, D), ints(2, 2))),
            "(2, 4, 3)",
            "(2, 2)",
        ),
        sequence=(
            RuntimeError,
            call(lambda: (floats(2, 3, D), floats(C, D), ints(6))),
            "(2, 3)",
            "(6,)",
        ),
        sequence_transposed=(
            RuntimeError,
            call(lambda: (floats(2, 3, D), floats(C, D), ints(3, 2))),
            "(2, 3)",
            "(3, 2)",
        ),
        probabilities=(
            call(lambda: (floats(2, D), floats(C, D), floats(2, 3))),
            "(2, 4)",
            "(2, 3)",
        ),
        probabilities_of_rows=(call(lambda: (floats(2, D), floats(C, D), floats(2))), "float"),
        integer_probabilities=(
            call(lambda: (floats(2, D), floats(C, D), ints(2, C))),
            "int64",
            "(2, 4)",
        ),
        class_4=(call(lambda: (floats(2, D), floats(C, D), classes(0, 4))), "4"),
        class_minus_1=(call(lambda: (floats(2, D), floats(C, D), classes(0, -1))), "-1"),
        class_minus_100=(
            call(lambda: (floats(2, D), floats(C, D), classes(0, -100)), ignore_index=255),
            "-100",
        ),
        class_minus_5_unbatched=(call(lambda: (floats(D), floats(C, D), torch.tensor(-5))), "-5"),
        class_9_of_positions=(call(lambda: (floats(2, D), floats(C, 2, D), ints(2, 2) * 9)), "9"),
        class_9_of_sequence=(
            IndexError,
            call(lambda: (floats(2, 3, D), floats(C, D), ints(2, 3) * 9)),
            "9",
        ),
        int32=(call(lambda: (floats(2, D), floats(C, D), classes(0, 1).int())), "int32"),
        weight=(call(make_head, weight=lambda: floats(3).detach()), "4", "(3,)"),
        weight_type=(
            call(make_head, weight=lambda: floats(C, dtype=torch.float64).detach()),
            "64",
            "32",
        ),
        ignore_index_of_probabilities=(
            call(lambda: (floats(2, D), floats(C, D), floats(2, C)), ignore_index=-100),
            "ignore_index",
        ),
        mixed=(
            call(lambda: (floats(2, D), floats(C, D, dtype=torch.float64), classes(0, 1))),
            "32",
            "64",
        ),
        mixed_bias=(
            call(make_head, linear_bias=lambda: floats(C, dtype=torch.bfloat16)),
            "32",
            "bfloat16",
        ),
        complex_input=(
            TypeError,
            call(lambda: (complexes(2, D), floats(C, D), classes(0, 1))),
            "input",
            "complex64",
        ),
        complex_weight=(
            TypeError,
            call(lambda: (floats(2, D), complexes(C, D), classes(0, 1))),
            "linear_weight",
        ),
        complex_bias=(
            TypeError,
            call(make_head, linear_bias=lambda: complexes(C)),
            "linear_bias",
            "complex64",
        ),
        complex_target=(
            TypeError,
            call(lambda: (floats(2, D), floats(C, D), complexes(2, C))),
            "target",
            "complex64",
        ),
        list_input=(TypeError, call(lambda: ([1.0], floats(C, D), classes(0))), "input", "list"),
        list_weight=(TypeError, call(lambda: (floats(2, D), [1.0], classes(0))), "linear_weight"),
        list_target=(TypeError, call(lambda: (floats(2, D), floats(C, D), [0, 1])), "target"),
        list_bias=(TypeError, call(make_head, linear_bias=[0.0] * C), "linear_bias", "list"),
        base_word=(TypeError, call(make_head, base="e"), "str"),
        **reduction_cases(make_head),
        **smoothing_cases(make_head),
        **base_cases(make_head),
        **scale_and_cap_cases(make_head),
        **row_weight_cases(make_head),
        **divisor_cases(make_head),
        **z_loss_cases(make_head),
    ),
    *cases(
        "linear_log_sum_exp",
        features=(RuntimeError, call(lambda: (floats(2, 3), floats(C, 5))), "3", "5"),
        bias=(RuntimeError, call(make_features, linear_bias=lambda: floats(5)), "(4,)", "(5,)"),
        no_class=(IndexError, call(lambda: (floats(2, 3), floats(0, 3))), "one class", "(0, 3)"),
        vector=(RuntimeError, call(lambda: (floats(2, 3), floats(3))), "at least 2", "1"),
        no_weight=(TypeError, call(lambda: (floats(2, 3), None)), "linear_weight", "None"),
        **scale_and_cap_cases(make_features),
    ),
    *cases(
        "linear_log_probs",
        no_input=(TypeError, call(lambda: (None, floats(C, D), classes(0))), "input", "None"),
        no_target=(TypeError, call(lambda: (floats(2, D), floats(C, D), None)), "target", "None"),
        features=(
            RuntimeError,
            call(lambda: (floats(2, 3), floats(C, 5), classes(0, 1))),
            "3",
            "5",
        ),
        bias=(RuntimeError, call(make_head, linear_bias=lambda: floats(5)), "(4,)", "(5,)"),
        probabilities=(
            RuntimeError,
            call(lambda: (floats(2, D), floats(C, D), floats(2, C)), return_entropy=True),
            "class indices",
            "entropy",
            "(2, 4)",
            "linear_cross_entropy",
        ),
        integer_probabilities=(
            RuntimeError,
            call(lambda: (floats(2, D), floats(C, D), ints(2, C))),
            "int64",
            "(2, 4)",
        ),
        batch=(
            ValueError,
            call(lambda: (floats(2, D), floats(C, D), classes(0, 1, 2))),
            "(2, 4)",
            "(3,)",
        ),
        class_4=(IndexError, call(lambda: (floats(2, D), floats(C, D), classes(0, 4))), "4"),
        class_minus_100=(
            IndexError,
            call(lambda: (floats(2, D), floats(C, D), classes(0, -100)), ignore_index=255),
            "-100",
        ),
        complex_input=(
            TypeError,
            call(lambda: (complexes(2, D), floats(C, D), classes(0, 1))),
            "input",
            "complex64",
        ),
        complex_bias=(
            TypeError,
            call(make_head, linear_bias=lambda: complexes(C)),
            "linear_bias",
            "complex64",
        ),
        **base_cases(make_head),
        **scale_and_cap_cases(make_head),
        **row_weight_cases(make_head),
    ),
    *(
        row
        for name in ("squared_error", "sigmoid_squared_error")
        for row in cases(
            name,
            no_input=(TypeError, call(lambda: (None, floats(1))), "input", "None"),
            no_target=(TypeError, call(lambda: (floats(1), None)), "target", "None"),
            column=(ValueError, call(lambda: (floats(4, 1), floats(4))), "(4, 1)", "(4,)"),
            scalar=(ValueError, call(lambda: (floats(), floats(1))), "()", "(1,)"),
            dim_2=(IndexError, call(lambda: (floats(2, 3), floats(2, 3)), dim=2), "[-2, 1]", "2"),
            dim_minus_3=(IndexError, call(lambda: (floats(2, 3), floats(2, 3)), dim=(0, -3)), "-3"),
            dim_twice=(
                ValueError,
                call(lambda: (floats(2, 3), floats(2, 3)), dim=(1, -1)),
                "(1, -1)",
            ),
            dim_word=(TypeError, call(lambda: (floats(2, 3), floats(2, 3)), dim="last"), "str"),
            dim_fraction=(TypeError, call(lambda: (floats(2, 3), floats(2, 3)), dim=0.5), "float"),
            integers=(TypeError, call(lambda: (ints(2), floats(2))), "input", "int64"),
            integer_target=(TypeError, call(lambda: (floats(2), ints(2))), "target", "int64"),
            complex_input=(
                TypeError,
                call(lambda: (complexes(2), floats(2))),
                "input",
                "complex64",
            ),
            complex_target=(
                TypeError,
                call(lambda: (floats(2), complexes(2))),
                "target",
                "complex64",
            ),
            list_input=(TypeError, call(lambda: ([1.0], floats(1))), "input", "list"),
            list_target=(TypeError, call(lambda: (floats(1), [1.0])), "target", "list"),
            reduction=(ValueError, call(lambda: (floats(2), floats(2)), reduction="avg"), "avg"),
        )
    ),
    *(
        case
        for name in ("linear_kl_div", "linear_jsd")
        for case in cases(
            name,
            classes=(
                RuntimeError,
                call(lambda: (floats(2, D), floats(C, D), floats(2, D), floats(C + 1, D))),
                "5",
                "4",
            ),
            rows=(
                RuntimeError,
                call(lambda: (floats(2, D), floats(C, D), floats(3, D), floats(C, D))),
                "2",
                "3",
            ),
            complex_student=(
                TypeError,
                call(lambda: (complexes(2, D), floats(C, D), floats(2, C))),
                "student",
                "complex64",
            ),
            list_teacher=(
                TypeError,
                call(lambda: (floats(2, D), floats(C, D), [1.0])),
                "teacher",
                "list",
            ),
            alpha=(ValueError, call(make_pair, alpha=1.5, labels=lambda: classes(0, 1)), "alpha"),
            alpha_alone=(ValueError, call(make_pair, alpha=0.5), "alpha", "labels"),
            label_9=(IndexError, call(make_pair, labels=lambda: classes(0, 9)), "9"),
            temperature=(ValueError, call(make_pair, temperature=0.0), "temperature", "0.0"),
            remainder=(ValueError, call(make_pair, remainder="mass"), "remainder", "mass"),
            reduction=(ValueError, call(make_pair, reduction="avg"), "avg"),
            **base_cases(make_pair),
        )
    ),
    *cases("linear_jsd", beta=(ValueError, call(make_pair, beta=1.5), "beta", "1.5")),
    *cases(
        "categorical_cross_entropy",
        no_probs=(TypeError, call(lambda: (None, classes(0))), "probs", "None"),
        no_target=(TypeError, call(lambda: (floats(2, C), None)), "target", "None"),
        indices=(ValueError, call(lambda: (floats(2, C), classes(0, 1, 2))), "(2,)", "(3,)"),
        indices_of_matrix=(ValueError, call(lambda: (floats(2, C), ints(2, 1))), "(2,)", "(2, 1)"),
        integer_probabilities=(
            ValueError,
            call(lambda: (floats(2, C), ints(2, C))),
            "(2,)",
            "(2, 4)",
        ),
        positions=(ValueError, call(lambda: (floats(2, C, 3), ints(2, 3))), "(2, 4)", "(2, 3)"),
        probabilities=(ValueError, call(lambda: (floats(2, C), floats(2, 3))), "(2, 4)", "(2, 3)"),
        probabilities_of_rows=(
            ValueError,
            call(lambda: (floats(2, C), floats(C))),
            "(2, 4)",
            "(4,)",
        ),
        class_4=(IndexError, call(lambda: (floats(2, C), classes(0, 4))), "4"),
        class_minus_1=(IndexError, call(lambda: (floats(2, C), classes(0, -1))), "-1"),
        class_minus_100=(IndexError, call(lambda: (floats(2, C), classes(0, -100))), "-100"),
        class_3_at_dim_0=(IndexError, call(lambda: (floats(3, C), ints(C) * 3), dim=0), "3"),
        dim_2=(IndexError, call(lambda: (floats(2, C), classes(0, 1)), dim=2), "[-2, 1]", "2"),
        dim_minus_3=(
            IndexError,
            call(lambda: (floats(2, C), classes(0, 1)), dim=-3),
            "[-2, 1]",
            "-3",
        ),
        dim_word=(TypeError, call(lambda: (floats(2, C), classes(0, 1)), dim="last"), "str"),
        integers=(TypeError, call(lambda: (ints(2, C), classes(0, 1))), "probs", "int64"),
        complex_probs=(
            TypeError,
            call(lambda: (complexes(2, C), classes(0, 1))),
            "probs",
            "complex64",
        ),
        complex_target=(
            TypeError,
            call(lambda: (floats(2, C), complexes(2, C))),
            "target",
            "complex64",
        ),
        list_probs=(TypeError, call(lambda: ([1.0], classes(0))), "probs", "list"),
        list_target=(TypeError, call(lambda: (floats(2, C), [0, 1])), "target", "list"),
        reduction=(ValueError, call(lambda: (floats(2, C), classes(0, 1)), reduction="avg"), "avg"),
        **base_cases(lambda: (floats(2, C), classes(0, 1))),
    ),
    *cases(
        "feedforward",
        no_input=(TypeError, call(lambda: (None, [floats(5, 3)], [None])), "input", "None"),
        no_layer=(ValueError, call(lambda: (floats(2, 3), [], [])), "0 weights"),
        biases=(
            ValueError,
            call(lambda: (floats(2, 3), [floats(5, 3)], [])),
            "1 weights",
            "0 biases",
        ),
        activation=(
            ValueError,
            call(lambda: (floats(2, 3), [floats(5, 3)], [None]), activation="gelu"),
            "'gelu'",
            "sigmoid, tanh, relu, identity",
        ),
        hidden_softmax=(
            ValueError,
            call(lambda: (floats(2, 3), [floats(5, 3)], [None]), activation="softmax"),
            "'softmax'",
        ),
        output_activation=(
            ValueError,
            call(lambda: (floats(2, 3), [floats(5, 3)], [None]), output_activation="Sigmoid"),
            "output_activation",
            "'Sigmoid'",
            "softmax",
        ),
        activation_function=(
            ValueError,
            call(lambda: (floats(2, 3), [floats(5, 3)], [None]), output_activation=None),
            "None",
        ),
        input=(
            RuntimeError,
            call(lambda: (floats(2, 4), [floats(5, 3)], [None])),
            "(2, 4)",
            "(5, 3)",
        ),
        input_without_axes=(
            RuntimeError,
            call(lambda: (floats(), [floats(5, 3)], [None])),
            "()",
            "(5, 3)",
        ),
        layers=(
            RuntimeError,
            call(lambda: (floats(2, 3), [floats(5, 3), floats(2, 4)], [None, None])),
            "weights[1]",
            "5",
            "(2, 4)",
        ),
        bias=(RuntimeError, call(lambda: (floats(2, 3), [floats(5, 3)], [floats(4)])), "4", "5"),
        weight_vector=(
            RuntimeError,
            call(lambda: (floats(2, 3), [floats(3)], [None])),
            "weights[0]",
            "(3,)",
        ),
        mixed=(
            RuntimeError,
            call(lambda: (floats(2, 3), [floats(5, 3, dtype=torch.float64)], [None])),
            "float32",
            "float64",
        ),
        mixed_layers=(
            RuntimeError,
            call(
                lambda: (
                    floats(2, 3),
                    [floats(5, 3), floats(2, 5, dtype=torch.bfloat16)],
                    [None] * 2,
                )
            ),
            "weights[1]",
            "float32",
            "bfloat16",
        ),
        mixed_bias=(
            RuntimeError,
            call(lambda: (floats(2, 3), [floats(5, 3)], [floats(5, dtype=torch.float64)])),
            "float32",
            "float64",
        ),
        complex_input=(
            TypeError,
            call(lambda: (complexes(2, 3), [floats(5, 3)], [None])),
            "input",
            "complex64",
        ),
        complex_weight=(
            TypeError,
            call(lambda: (floats(2, 3), [floats(5, 3), complexes(2, 5)], [None] * 2)),
            "weights[1]",
            "complex64",
        ),
        complex_bias=(
            TypeError,
            call(lambda: (floats(2, 3), [floats(5, 3)], [complexes(5)])),
            "biases[0]",
            "complex",
        ),
        list_input=(TypeError, call(lambda: ([1.0], [floats(5, 3)], [None])), "input", "list"),
        list_weight=(
            TypeError,
            call(lambda: (floats(2, 3), [[1.0]], [None])),
            "weights[0]",
            "list",
        ),
        no_weight=(TypeError, call(lambda: (floats(2, 3), [None], [None])), "weights[0]", "None"),
    ),
]


def catch_error(function, arguments):
    """Returns the error of a call, ignoring the warnings before it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(Exception) as error:  # noqa: PT011 the caller checks the type
            function(*arguments.args, **arguments.kwargs)
    return error.value


@pytest.mark.parametrize(("function", "error_type", "make_call", "parts"), INVALID_CALLS)
def test_invalid_call_raises_and_changes_no_tensor(function, error_type, make_call, parts):
    if (function, *parts) in ERRORS_CHANGED_IN_2_13 and torch.__version__ < "2.13":
        pytest.skip("PyTorch raises another type before 2.13")
    arguments = make_call()
    snapshot = Snapshot(arguments.args, arguments.kwargs)
    error = catch_error(getattr(F, function), arguments)
    snapshot.assert_unchanged()
    if error_type is None:
        if not hasattr(PYTORCH, function):
            pytest.skip("this PyTorch does not have the function")
        error_type = type(catch_error(getattr(PYTORCH, function), make_call()))
    assert type(error) is error_type, error
    for part in parts:
        assert part in str(error)


@pytest.mark.parametrize("function", sorted(F.__all__))
def test_every_public_function_has_invalid_calls(function):
    rows = [row.values for row in INVALID_CALLS if row.values[0] == function]
    assert len(rows) >= 4
    assert TypeError in {error_type for _, error_type, *_ in rows}


@pytest.mark.parametrize(
    ("make_module", "make_inputs", "error_type", "part"),
    [
        (lambda: nn.Linear(3, 5), lambda: (floats(2, 4),), RuntimeError, "(2, 4)"),
        (lambda: nn.Sigmoid(), lambda: (complexes(2),), TypeError, "complex64"),
        (lambda: nn.Tanh(), lambda: (complexes(2),), TypeError, "complex64"),
        (lambda: nn.ReLU(), lambda: (complexes(2),), TypeError, "complex64"),
        (lambda: nn.ReLU(inplace=True), lambda: (floats(2),), RuntimeError, "leaf"),
        (lambda: nn.Softmax(2), lambda: (floats(2, 3),), IndexError, "[-2, 1]"),
        (lambda: nn.MSELoss(reduction="avg"), lambda: (floats(2), floats(2)), ValueError, "avg"),
        (lambda: nn.CrossEntropyLoss(reduction="avg"), make_logits, ValueError, "avg"),
        (lambda: nn.CrossEntropyLoss(base=1), make_logits, ValueError, "base"),
        (lambda: nn.CrossEntropyLoss(label_smoothing=2.0), make_logits, RuntimeError, "2.0"),
        (lambda: nn.CrossEntropyLoss(torch.ones(3)), make_logits, RuntimeError, "(3,)"),
        (lambda: nn.CrossEntropyLoss(), lambda: (floats(2, C), classes(0, -1)), IndexError, "-1"),
        (
            lambda: nn.LinearCrossEntropyLoss(D, C),
            lambda: (floats(2, 5), classes(0, 1)),
            RuntimeError,
            "(2, 5)",
        ),
        (
            lambda: nn.LinearCrossEntropyLoss(D, C),
            lambda: (floats(2, D), classes(0, 9)),
            IndexError,
            "9",
        ),
        (
            lambda: nn.LinearCrossEntropyLoss(D, C, base=-1),
            lambda: (floats(2, D), classes(0, 1)),
            ValueError,
            "-1",
        ),
        (lambda: nn.SquaredErrorLoss(dim=3), lambda: (floats(2), floats(2)), IndexError, "3"),
        (
            lambda: nn.SigmoidSquaredErrorLoss(),
            lambda: (floats(2, 1), floats(2)),
            ValueError,
            "(2, 1)",
        ),
        (lambda: nn.CategoricalCrossEntropyLoss(base=0), make_logits, ValueError, "base"),
        (lambda: nn.CategoricalCrossEntropyLoss(dim=5), make_logits, IndexError, "5"),
        (lambda: nn.Feedforward([3, 5], "gelu"), lambda: (floats(2, 3),), ValueError, "gelu"),
        (lambda: nn.Feedforward([3, 5]), lambda: (floats(2, 4),), RuntimeError, "(2, 4)"),
    ],
)
def test_invalid_module_call_raises_and_changes_no_tensor(
    make_module, make_inputs, error_type, part
):
    module, inputs = make_module(), make_inputs()
    snapshot = Snapshot(inputs, *module.parameters(), *module.buffers())
    with pytest.raises(error_type) as error:
        module(*inputs)
    snapshot.assert_unchanged()
    assert type(error.value) is error_type
    assert part in str(error.value)


@pytest.mark.parametrize(
    ("make_module", "error_type", "part"),
    [
        (lambda: nn.Feedforward([3]), ValueError, "at least an input and an output size, got [3]"),
        (lambda: nn.Feedforward([]), ValueError, "[]"),
        (
            lambda: nn.LinearCrossEntropyLoss(D, C, weight=torch.ones(3)),
            RuntimeError,
            "(3,)",
        ),
        (lambda: nn.LinearCrossEntropyLoss(D, C, label_smoothing=2.0), RuntimeError, "2.0"),
    ],
)
def test_invalid_constructor_argument_raises(make_module, error_type, part):
    with pytest.raises(error_type) as error:
        make_module()
    assert type(error.value) is error_type
    assert part in str(error.value)


@pytest.mark.parametrize("function", sorted(F.__all__))
def test_unknown_keyword_raises_type_error(function):
    with pytest.raises(TypeError, match="unexpected keyword argument 'out'"):
        getattr(F, function)(out=None)


def test_empty_weight_is_said_to_be_partitioned():
    """ZeRO-3 leaves a parameter of shape (0,) outside of its module's forward."""
    x, y = torch.randn(3, D), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"ZeRO-3 has partitioned it.*GatheredParameters"):
        F.linear_cross_entropy(x, torch.empty(0), y)
    with pytest.raises(RuntimeError, match=r"at least 2, got 1$"):
        F.linear_cross_entropy(x, torch.ones(D), y)
