"""The arithmetic made fast, as operators of `torch.library`; derivatives are the formulas'.

Each is called below autograd: `class_indices` by a public function, the others by a formula or a
cost. Only an exported program calls `head` itself, whose derivative there is a formula too.
"""

from torch_nnmath.kernels.blocked import head, head_second
from torch_nnmath.kernels.classes import class_indices
from torch_nnmath.kernels.elementwise import (
    relu_product,
    sigmoid_product,
    sigmoid_squared_error,
    softmax_product,
    squared_error,
    tanh_product,
)
from torch_nnmath.kernels.rowwise import cross_entropy

__all__ = [
    "class_indices",
    "cross_entropy",
    "head",
    "head_second",
    "relu_product",
    "sigmoid_product",
    "sigmoid_squared_error",
    "softmax_product",
    "squared_error",
    "tanh_product",
]
