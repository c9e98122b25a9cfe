"""Numbers to 60 digits that carry a bound on the rounding error of floating-point arithmetic.

A formula evaluated on `BoundedReal`s gives the true result and, for each element, the error e that
the same formula makes in floating point: an operation passes on its operands' errors and adds one
eps of its result; a sum of n terms adds √n/2 eps of Σ |terms|. The bound therefore belongs to the
element, and grows only where the formula cancels.
"""

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mpmath
import numpy as np
import torch
from mpmath import mpf
from torch import Tensor


@contextmanager
def use_60_digits() -> Iterator[None]:
    with mpmath.workdps(60), np.errstate(all="ignore"):  # a bound may overflow where v does
        yield


def binary_operation(f):
    """Makes f accept a plain number beside a BoundedReal, and leaves arrays to numpy."""

    @functools.wraps(f)
    def operation(self, other):
        if isinstance(other, np.ndarray):
            return NotImplemented
        return f(self, other if isinstance(other, BoundedReal) else type(self)(mpf(other)))

    return operation


class BoundedReal:
    """v to 60 digits; e bounds the distance of the floating-point result; size is |v| as a float.

    numpy's exp, log and tanh of an array of objects call the methods of these names.
    """

    __slots__ = ("e", "size", "v")
    eps: float
    tiny: float  # the absolute error of underflow

    def __init__(self, v, e=0.0, size=None):
        self.v, self.e = v, e
        self.size = abs(float(v)) if size is None else size

    def round(self, v, e):
        """Returns v with the error e plus that of rounding it. An exact 0 stays exact."""
        size = abs(float(v))
        if math.isinf(size) or (e == 0 and v == 0):
            return type(self)(v, 0.0, size)
        return type(self)(v, e + self.eps * size + self.tiny, size)

    def is_zero(self):
        return self.e == 0 and self.v == 0

    def __neg__(self):
        return type(self)(-self.v, self.e, self.size)

    @binary_operation
    def __add__(self, other):
        return self.round(self.v + other.v, self.e + other.e)

    @binary_operation
    def __mul__(self, other):
        if self.is_zero() or other.is_zero():  # also 0 log 0
            return type(self)(mpf(0))
        return self.round(self.v * other.v, self.size * other.e + other.size * self.e)

    @binary_operation
    def __truediv__(self, other):
        if self.is_zero():
            return self
        if other.v == 0:
            return type(self)(mpmath.sign(self.v) * mpmath.inf)
        v = self.v / other.v
        return self.round(v, (self.e + abs(float(v)) * other.e) / other.size)

    @binary_operation
    def __sub__(self, other):
        return self + -other

    @binary_operation
    def __rsub__(self, other):
        return other + -self

    @binary_operation
    def __rtruediv__(self, other):
        return other / self

    @binary_operation
    def __ge__(self, other):
        return self.v >= other.v

    @binary_operation
    def __gt__(self, other):
        return self.v > other.v

    __radd__, __rmul__ = __add__, __mul__

    def exp(self):
        v = mpmath.exp(self.v)
        return self.round(v, abs(float(v)) * self.e)

    def log(self):
        if self.v == 0:
            return type(self)(-mpmath.inf)
        return self.round(mpmath.log(self.v), self.e / self.size)

    def tanh(self):
        v = mpmath.tanh(self.v)
        return self.round(v, abs(float(1 - v * v)) * self.e)

    def sigmoid(self):
        v = 1 / (1 + mpmath.exp(-self.v))
        return self.round(v, abs(float(v * (1 - v))) * self.e)


@functools.cache
def real_type(dtype: torch.dtype, wide_dtype: torch.dtype) -> type[BoundedReal]:
    """BoundedReals of arithmetic in `dtype`, whose underflow is that of the wider of the two."""
    info, wide = torch.finfo(dtype), torch.finfo(wide_dtype)
    tiny = max(info.eps * info.smallest_normal, wide.smallest_normal)
    return type("BoundedReal", (BoundedReal,), {"__slots__": (), "eps": info.eps, "tiny": tiny})


def to_reals(x: Tensor, real: type[BoundedReal]) -> Any:
    """Returns x's numbers without error, as an array of objects."""
    reals = np.empty(x.shape, object)
    for i in np.ndindex(*x.shape):
        reals[i] = real(mpf(x[i].item()))
    return reals


def sum_over(x, axis=-1):
    """Returns the sum over an axis, which keeps size 1."""
    x = np.moveaxis(x, axis, -1)
    sums = np.empty((*x.shape[:-1], 1), object)
    for i in np.ndindex(*x.shape[:-1]):
        terms = x[i]
        sums[i][0] = first = terms[0]
        if len(terms) > 1 and not all(r.is_zero() for r in terms):
            v = mpmath.fsum(r.v for r in terms)
            k = math.sqrt(len(terms)) / 2 * first.eps
            e = math.fsum(r.e + k * r.size for r in terms) + first.tiny
            sums[i][0] = type(first)(v, 0.0 if mpmath.isinf(v) else e)
    return np.moveaxis(sums, -1, axis)


def sum_all(x):
    return sum_over(np.ravel(x)).reshape(())


def matmul(A, B):
    return sum_over(A[:, :, None] * B[None], 1)[:, 0]


sigmoid = np.frompyfunc(BoundedReal.sigmoid, 1, 1)


def relu(z):
    return np.where(z > 0, z, 0 * z)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / sum_over(e)


def log_softmax(z):
    s = z - z.max(-1, keepdims=True)
    return s - np.log(sum_over(np.exp(s)))
