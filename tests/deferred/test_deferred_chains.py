"""Random chains of steps between a head and a loss, on a swapped model and its plain copy."""

import math
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from deferred_helpers import (
    F64,
    IGNORED,
    MARKS,
    assert_agree,
    compute_results,
    make_inputs,
    make_pair,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_nnmath import functional

pytestmark = MARKS


class Chain:
    """Random steps from logits to a loss, callable on the logits of either model.

    Steps that move rows and axes are applied to `token`, the index of each logit's token, from
    which the targets follow, and to `cls`, the index of its class. `is_foldable` tells whether the
    loss must be computed without logits.
    """

    def __init__(self, data: Any):
        self.data, self.steps = data, []
        self.examples, self.tokens = self.draw(1, 2, 4), self.draw(1, 3, 4)
        self.classes, self.features = self.draw(4, 7), self.draw(1, 3, 4, 9)
        self.bias, self.is_float32 = self.draw(True, False), self.draw(False, False, True)
        self.dtype = torch.float32 if self.is_float32 else F64
        shape = self.examples, self.tokens, self.classes
        self.token = torch.arange(shape[0] * shape[1]).view(*shape[:2], 1).expand(shape)
        self.cls = torch.arange(self.classes).expand(shape)
        self.like = torch.empty(shape)  # has the strides of the logits
        self.is_foldable, self.is_scaled, self.is_capped, self.has_row_scales = (True, *[False] * 3)
        for _ in range(self.draw(0, 1, 2, 3, 4, 5)):
            getattr(self, self.draw(*self.STEP_NAMES))()
        self.loss = self.draw("cross_entropy", "nnmath_cross_entropy", "nll_loss", "gather", "sum")
        getattr(self, f"draw_{self.loss}")()

    STEP_NAMES = (
        *(
            "transpose",
            "flatten",
            "slice_rows",
            "select_row",
            "unsqueeze",
            "index_rows",
            "mask_rows",
            "split_rows",
            "view_rows_as_two_axes",
        ),
        *(
            "copy_logits",
            "scale_by_number",
            "scale_by_parameter",
            "apply_cap",
            "apply_tanh",
            "add_row",
            "scale_rows",
            "widen",
            "negate",
        )
        * 2,
        "apply_unsupported",
    )

    def draw(self, *options: Any) -> Any:
        return self.data.draw(st.sampled_from(options))

    @property
    def axis(self) -> int:
        """The axis of the classes."""
        v = self.cls
        (axis,) = [d for d, n in enumerate(v.shape) if n > 1 and (v.diff(dim=d) == 1).all()]
        return axis

    @property
    def row_axes(self) -> list[int]:
        return [d for d in range(self.cls.dim()) if d != self.axis]

    def move(self, f: Any) -> None:
        """Appends a step that moves rows or axes."""
        self.steps.append(lambda z, o: f(z))
        self.token, self.cls, self.like = f(self.token), f(self.cls), f(self.like)

    def apply(self, f: Any, is_foldable: bool) -> None:
        """Appends a step that changes values."""
        self.steps.append(f)
        self.is_foldable &= is_foldable
        self.like = self.like + 1

    def is_packed(self) -> bool:
        return self.like.stride() == torch.empty(self.like.shape).stride()

    # Steps

    def transpose(self):
        i, j = (self.draw(*range(self.cls.dim())) for _ in range(2))
        self.move(lambda v: v.transpose(i, j))

    def flatten(self):
        axis, C = self.axis, self.classes
        self.move(lambda v: v.movedim(axis, -1).reshape(-1, C))

    def view_rows_as_two_axes(self):
        """Views the axes before the classes as two."""
        n, sizes = math.prod(self.cls.shape[: self.axis]), self.cls.shape[self.axis :]
        first = self.draw(*(k for k in range(1, n + 1) if n % k == 0))
        self.move(lambda v: v.reshape(first, n // first, *sizes))

    def slice_rows(self):
        if self.row_axes:
            d = self.draw(*self.row_axes)
            start, step = self.draw(0, 1), self.draw(1, 1, 2)
            if self.cls.shape[d] > start:
                index = (slice(None),) * d + (slice(start, None, step),)
                self.move(lambda v: v[index])

    def select_row(self):
        if self.row_axes:
            d, i = self.draw(*self.row_axes), self.draw(0, -1)
            self.move(lambda v: v.select(d, i))

    def unsqueeze(self):
        d = self.draw(*range(self.cls.dim() + 1))
        self.move(lambda v: v.unsqueeze(d))
        if self.draw(True, False):
            self.move(lambda v: v.squeeze(d))

    def index_rows(self):
        if self.row_axes:
            d = self.draw(*self.row_axes)
            n = self.cls.shape[d]
            at = torch.tensor([self.draw(*range(-n, n)) for _ in range(self.draw(1, 2, 3))])
            self.is_foldable &= self.is_packed()
            self.move(lambda v: v[(slice(None),) * d + (at,)])

    def mask_rows(self):
        if self.axis == self.cls.dim() - 1:
            mask = self.token.select(-1, 0) % self.draw(1, 2, 3) == 0
            if mask.any():
                self.is_foldable &= self.is_packed()
                self.move(lambda v: v[mask])

    def split_rows(self):
        if self.row_axes:
            d, i = self.draw(*self.row_axes), self.draw(0, -1)
            if self.draw(True, False):
                self.move(lambda v: v.unbind(d)[i])
            else:
                self.move(lambda v: v.chunk(2, d)[i])

    def copy_logits(self):
        f = self.draw(torch.clone, torch.Tensor.contiguous, lambda v: v.view_as(v))
        self.move(f)

    def widen(self):
        self.apply(lambda z, o: z.double(), is_foldable=True)
        self.dtype = F64

    def scale_by_number(self):
        k = self.draw(0.5, -2, 3.0, torch.tensor(0.7))
        f = self.draw(torch.mul, torch.div)
        self.apply(lambda z, o: f(z, k), is_foldable=True)
        self.is_scaled = True

    def negate(self):
        self.apply(lambda z, o: -z, is_foldable=True)
        self.is_scaled = True

    def scale_by_parameter(self):
        f = self.draw(torch.mul, torch.div)
        self.apply(lambda z, o: f(z, o.s), is_foldable=not self.is_capped)
        self.is_scaled = True

    def apply_cap(self):
        cap = self.draw(1.5, 4)
        self.apply(
            lambda z, o: cap * torch.tanh(z / cap),
            is_foldable=not (self.is_capped or self.has_row_scales),
        )
        self.is_scaled = self.is_capped = True

    def apply_tanh(self):
        """Caps at 1, without factors."""
        self.apply(lambda z, o: z.tanh(), is_foldable=not (self.is_capped or self.has_row_scales))
        self.is_capped = True

    def add_row(self):
        axis, dim, name = self.axis, self.cls.dim(), self.draw("row", "fixed_row")
        shape = [self.classes if d == axis else 1 for d in range(dim)]
        is_foldable = not (self.is_scaled or self.is_capped or self.has_row_scales)
        self.apply(lambda z, o: z + getattr(o, name).view(shape).to(z.dtype), is_foldable)
        self.has_row = True

    has_row = False

    def scale_rows(self):
        axis, token, name = self.axis, self.token, self.draw("t", "fixed_t")
        f = self.draw(torch.mul, torch.div)
        at = token.narrow(axis, 0, 1)
        is_foldable = not (self.bias or self.has_row or self.is_capped)
        self.apply(lambda z, o: f(z, getattr(o, name).flatten()[at].to(z.dtype)), is_foldable)
        self.has_row_scales = True

    def apply_unsupported(self):
        """Applies an operation that is not a step."""
        axis = self.axis
        perm = torch.randperm(self.classes, generator=torch.Generator().manual_seed(0))
        functions = [
            lambda z, o: z.sub(1.0),
            lambda z, o: z.clamp(-2, 2),
            lambda z, o: z.index_select(axis, perm),
            lambda z, o: z.clone().mul_(2),
            lambda z, o: z + 0.1 * z.exp(),
            lambda z, o: z.masked_fill(z > 3, 3.0),
        ]
        self.apply(self.draw(*functions), is_foldable=False)

    # Losses

    def move_classes(self):
        """Moves the classes to the axis where PyTorch's losses expect them."""
        self.steps.append(lambda z, o: z)
        axis = self.axis
        expected = min(self.cls.dim() - 1, 1)
        if axis != expected:
            self.move(lambda v: v.movedim(axis, expected))
        self.targets = self.token.select(expected, 0)

    def get_target(self, o: Any, ignored: int) -> torch.Tensor:
        return (o.y if ignored == IGNORED else o.all_y).flatten()[self.targets]

    def draw_options(self):
        weighted, ignored = self.draw(True, False), self.draw(IGNORED, 2)
        return weighted, ignored, {"reduction": self.draw("none", "sum", "mean")}

    def draw_cross_entropy(self, function=F.cross_entropy, **more_options):
        self.move_classes()
        weighted, ignored, options = self.draw_options()
        options |= {"label_smoothing": self.draw(0.0, 0.2), **more_options}
        is_distribution, at = self.draw(False, False, True), self.targets
        axis = self.axis

        def loss(z, o):
            weight = {"weight": o.weight.to(z.dtype)} if weighted else {}
            if not is_distribution:
                y = self.get_target(o, ignored)
                return function(z, y, ignore_index=ignored, **options, **weight)
            p = o.probs.flatten(0, 1)[at].movedim(-1, axis).to(z.dtype)
            return function(z, p, **options, **weight)

        self.steps.append(loss)

    def draw_nnmath_cross_entropy(self):
        cap, scale = self.draw(None, 3.0), self.draw(1.0, -0.5)
        more_options = {"base": self.draw(math.e, 2.0), "z_loss": self.draw(0.0, 0.1)}
        self.is_foldable &= not self.is_capped or (cap is None and scale == 1.0)
        self.draw_cross_entropy(
            functional.cross_entropy, softcap=cap, logit_scale=scale, **more_options
        )

    def draw_nll_loss(self):
        self.move_classes()
        weighted, ignored, options = self.draw_options()
        axis = self.axis

        def loss(z, o):
            weight = o.weight.to(z.dtype) if weighted else None
            l = z.log_softmax(axis)
            return F.nll_loss(
                l, self.get_target(o, ignored), weight, ignore_index=ignored, **options
            )

        self.steps.append(loss)

    def draw_gather(self):
        axis, at = self.axis, self.token.narrow(self.axis, 0, 1)
        sign = self.draw(torch.neg, torch.clone)
        self.steps.append(
            lambda z, o: sign(z.log_softmax(axis)).gather(axis, o.all_y.flatten()[at])
        )

    def draw_sum(self):
        axis, keepdim, f = self.axis, self.draw(True, False), self.draw(torch.sum, torch.mean)
        self.steps.append(lambda z, o: f(-z.log_softmax(axis), axis, keepdim))

    def __call__(self, z, o):
        for step in self.steps:
            z = step(z, o)
        return z


def test_random_chains_agree_and_are_fused_if_foldable():
    """Results always agree. The loss is fused if all steps can be applied to the features."""
    fused = Counter()

    @settings(deadline=None, derandomize=True, max_examples=500)
    @given(st.data())
    def check(data):
        chain = Chain(data)
        sizes = {"examples": chain.examples, "tokens": chain.tokens, "classes": chain.classes}
        start = torch.float32 if chain.is_float32 else F64
        plain, swapped, log = make_pair(
            chain.bias, start, features=chain.features, classes=chain.classes
        )

        results, truth = (
            compute_results(m, chain, make_inputs(start, **sizes)) for m in (swapped, plain)
        )
        tolerance = {"rtol": 1e-4, "atol": 1e-4} if chain.is_float32 else {}
        assert_agree(results, truth, **tolerance)
        assert log.fused or log.materialized
        if chain.is_foldable:
            assert (log.fused, log.materialized) == (1, {})
        fused[chain.is_foldable] += 1

    check()
    assert min(fused[True], fused[False]) > 50
