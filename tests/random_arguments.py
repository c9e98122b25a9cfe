"""Random arguments for tests: hypothesis draws options and shapes, a seeded generator the numbers.

So a failing example shrinks to something readable. NNMATH_EXAMPLES multiplies their number.
"""

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

F64 = torch.float64
SIZES = (1, 2, 3, 0, 5)
ROW_COUNTS = (1, 2, 0, 5, 32, 31, 33, 65, 97, 33, 65, 97)  # a block of the head has 32 rows or more
BASES = (math.e, 2.0, 10.0, 0.5)
REDUCTIONS = ("none", "sum", "mean")
LAYOUTS = ("contiguous", "offset", "transposed", "stepped", "expanded", "negated")


def use_examples(number: int) -> Any:
    return settings(
        deadline=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        derandomize=True,
        max_examples=number * int(os.environ.get("NNMATH_EXAMPLES", "1")),
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def run_examples(number: int, check: Callable[[Any], None]) -> None:
    """Runs `check(data)` for this number of hypothesis examples."""
    use_examples(number)(given(st.data())(check))()


class RandomArguments:
    """Draws options, shapes, and tensors of one dtype in random layouts.

    With `has_finite_mean`, batches are not empty and not all rows are ignored: the derivatives of
    a mean over nothing are nan.
    """

    def __init__(
        self, data: Any, dtypes: Sequence[torch.dtype] = (F64,), has_finite_mean: bool = False
    ):
        self.draw = data.draw
        self.generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), "seed"))
        self.dtype = self.choose(*dtypes)
        self.has_finite_mean = has_finite_mean

    # Options

    def choose(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def choose_subset(self, names: Sequence[str]) -> list[str]:
        """Returns some of the names. An example shrinks to all of them."""
        left_out = self.draw(st.sets(st.sampled_from(list(names))))
        return [name for name in names if name not in left_out]

    def choose_dim(self, rank: int) -> int:
        n = max(rank, 1)
        return self.draw(st.integers(-n, n - 1))

    def choose_shape(self, min_rank: int = 0, max_rank: int = 3) -> tuple[int, ...]:
        rank = self.draw(st.integers(min_rank, max_rank))
        shape = [self.choose(*SIZES) for _ in range(rank)]
        if rank and self.choose(False, False, True):
            shape[0] = self.choose(17, 33, 65)
        return tuple(max(n, 1) for n in shape) if self.has_finite_mean else tuple(shape)

    # Numbers in float64, contiguous

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=F64, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, dtype=F64, generator=self.generator)

    def indices(self, shape: Sequence[int], high: int) -> Tensor:
        return torch.randint(high, tuple(shape), generator=self.generator)

    # Arguments in the drawn dtype and a random layout

    def tensor(self, *shape: int, may_be_large: bool = False) -> Tensor:
        factor = self.choose(1.0, 10.0) if may_be_large else 1.0
        return self.lay_out((self.normal(*shape) * factor).to(self.dtype))

    def positive(self, *shape: int) -> Tensor:
        return self.lay_out((self.uniform(*shape) + 0.05).to(self.dtype))

    def lay_out(self, x: Tensor) -> Tensor:
        """Returns a copy of x in a random layout. The memory between its elements is nan, or 77."""
        layout = self.choose(*LAYOUTS)
        fill = math.nan if x.is_floating_point() else 77
        if layout == "offset":
            return x.new_full((x.numel() + 3,), fill)[3:].view(x.shape).copy_(x)
        if layout == "transposed":
            axes = tuple(reversed(range(x.dim())))
            return x.permute(axes).contiguous().permute(axes)
        if layout == "stepped":
            base = x.new_full([2 * n + 1 for n in x.shape], fill)
            return base[(slice(1, None, 2),) * x.dim()].copy_(x)
        if layout == "expanded" and x.dim():
            axis = self.draw(st.integers(0, x.dim() - 1))
            return x.narrow(axis, 0, min(x.shape[axis], 1)).expand(x.shape)
        if layout == "negated" and x.dtype in (torch.float32, F64):
            return torch.complex(torch.zeros_like(x), -x).conj().imag
        return x
