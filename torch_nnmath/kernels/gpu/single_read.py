"""The head whose row kernel reads the logits once: when it applies, and what it asks of products.

A row's sum of exponentials is known only after the row has been read. So the kernel writes E, and
numbers of each row make Δ of it (`RowFactors`). They stand outside of the products:

    dX = k ∘ (E W) + c ∘ W_y,  dW = Eᵀ (k' ∘ X),  db = Eᵀ k'

The price is that k' ∘ X is rounded to half. The gain is the second read, where a row's logits no
longer are in the L2 cache. k' is such that the class's entry of Δ, often much the largest, is not
rounded in dW; c is its rounding in dX.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torch_nnmath._records import HeadInputs, Requests, Target, UpstreamGradients
from torch_nnmath.kernels.gpu.launch import count_processors, get_cache_size
from torch_nnmath.kernels.gpu.products import multiply
from torch_nnmath.kernels.gpu.records import RowFactors, RowInputs, RowOutputs

CACHE_SHARE = 0.7  # of the L2 cache, which keeps logits until they are read again
COLUMNS = 8  # of the operand that holds k', so that its rows are 16 bytes


def may_read_once(
    inputs: HeadInputs,
    upstream: UpstreamGradients | None,
    sums: Tensor | None,
    requests: Requests,
) -> bool:
    """Whether Triton's row kernel with one read supports the arguments and saves a read of memory.

    float16 has no range for E. A dense target and the entropy's gradient have no factor for each
    row. Given the sums, the other kernel reads once, too.
    """
    if (inputs.weight_dtype or inputs.W.dtype) != torch.bfloat16:
        return False
    if inputs.target.t is not None or sums is not None or requests.entropy:
        return False
    if upstream is None or upstream.η is not None:
        return False
    device, row_bytes = inputs.W.device, 4 * len(inputs.W)
    return count_processors(device) * row_bytes > CACHE_SHARE * get_cache_size(device)


class SingleRead:
    """The factors of all rows, and what they do to the products of a block."""

    def __init__(self, W: Tensor, target: Target, N: int, block_rows: int):
        self.W, self.y = W, target.y
        has_class = self.y is not None and target.p is not None
        softmax, exact, class_error = self.W.new_empty((3, N, 1), dtype=torch.float32)
        self.factors = RowFactors(softmax, exact, class_error if has_class else None)
        self.buffer = W.new_empty((block_rows, W.shape[1]))

    def process_rows(
        self,
        z: Tensor,
        E: Tensor,
        rows: slice,
        inputs: RowInputs,
        upstream: UpstreamGradients,
        outputs: RowOutputs,
    ) -> None:
        """Writes the results of the rows `rows`, and E of these."""
        from torch_nnmath.kernels.gpu import triton_head_single

        triton_head_single.process_rows(z, E, rows, inputs, upstream, outputs, self.factors)

    def finish_dx_(self, dx: Tensor, block: slice) -> None:
        """E W → k ∘ (E W) + c ∘ W_y."""
        dx.mul_(self.factors.softmax[block])
        if self.factors.class_error is not None and self.y is not None:
            y = self.y[block].squeeze(1)
            W_y = torch.index_select(self.W, 0, y, out=self.buffer[: len(dx)])
            dx.addcmul_(W_y, self.factors.class_error[block])

    def scale_features(self, x: Tensor, block: slice) -> Tensor:
        """k' ∘ X, rounded."""
        return torch.mul(x, self.factors.exact[block], out=self.buffer[: len(x)])

    def sum_rows(self, E: Tensor, block: slice) -> Tensor:
        """Eᵀ k', with k' as the sum of three columns of half type."""
        k = self.factors.exact[block]
        columns = E.new_zeros((len(k), COLUMNS))
        for i in range(3):
            columns[:, i : i + 1] = k
            k = k - columns[:, i : i + 1]
        sums = E.new_empty((E.shape[1], COLUMNS), dtype=torch.float32)
        return multiply(E.t(), columns, sums).sum(1)
