"""Fast arithmetic of the formulas, as operators of `torch.library` without derivatives.

A formula calls its operator below autograd; the derivative is the formula's. `class_indices` is
called by public functions. Each kernel's file is named after its formula.
"""

from torch_nnmath.kernels.class_indices import class_indices
from torch_nnmath.kernels.cross_entropy import cross_entropy
from torch_nnmath.kernels.elementwise import (
    relu_product,
    sigmoid_product,
    sigmoid_squared_error,
    softmax_product,
    squared_error,
    tanh_product,
)
from torch_nnmath.kernels.linear_cross_entropy import head, head_second_order

__all__ = [
    "class_indices",
    "cross_entropy",
    "head",
    "head_second_order",
    "relu_product",
    "sigmoid_product",
    "sigmoid_squared_error",
    "softmax_product",
    "squared_error",
    "tanh_product",
]
