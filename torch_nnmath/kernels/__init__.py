"""Fast arithmetic of the formulas, as operators of `torch.library` without derivatives.

A formula calls its operator below autograd and has the derivative; for exported programs
`formulas.linear_cross_entropy` registers its backward with the operator `head`. Public functions
call `class_indices`. `elementwise` has the kernels of several formulas, `_block` what those of the
head share.
"""

from torch_nnmath.kernels._divergence_block import choose_divergence_dtype
from torch_nnmath.kernels.class_indices import (
    class_indices,
    read_kept_indices,
    read_plain_indices,
)
from torch_nnmath.kernels.cross_entropy import cross_entropy, cross_entropy_cost
from torch_nnmath.kernels.dispatch import explain
from torch_nnmath.kernels.elementwise import (
    relu_product,
    sigmoid_product,
    sigmoid_squared_error,
    sigmoid_squared_error_cost,
    softmax_product,
    squared_error,
    squared_error_cost,
    tanh_product,
)
from torch_nnmath.kernels.gpu.plan import get_memory_budget, set_memory_budget
from torch_nnmath.kernels.linear_cross_entropy import head, head_second_order
from torch_nnmath.kernels.linear_divergence import divergence, divergence_second_order
from torch_nnmath.kernels.row_functions import entropy, log_softmax_product, log_sum_exp, z_loss

__all__ = [
    "choose_divergence_dtype",
    "class_indices",
    "cross_entropy",
    "cross_entropy_cost",
    "divergence",
    "divergence_second_order",
    "entropy",
    "explain",
    "get_memory_budget",
    "head",
    "head_second_order",
    "log_softmax_product",
    "log_sum_exp",
    "read_kept_indices",
    "read_plain_indices",
    "relu_product",
    "set_memory_budget",
    "sigmoid_product",
    "sigmoid_squared_error",
    "sigmoid_squared_error_cost",
    "softmax_product",
    "squared_error",
    "squared_error_cost",
    "tanh_product",
    "z_loss",
]
