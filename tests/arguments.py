"""Random arguments for the public functions, and a check that nothing writes to them."""

from typing import Any

import torch

C, D = 4, 3  # classes, features


def floats(*shape, dtype=torch.float32):
    """Returns numbers in (0, 1), which serve as logits, features and probabilities."""
    return torch.rand(shape).to(dtype).requires_grad_()


def ints(*shape, dtype=torch.int64):
    return torch.ones(shape, dtype=dtype)


def complexes(*shape):
    return torch.ones(shape, dtype=torch.complex64)


def classes(*indices):
    return torch.tensor(indices)


def find_tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return (
        [x for item in value for x in find_tensors(item)] if isinstance(value, list | tuple) else []
    )


class Snapshot:
    """The values and versions of tensors, to assert later that nothing was written to them."""

    def __init__(self, *values):
        self.tensors = find_tensors(list(values))
        self.before = [(x.detach().clone(), x._version) for x in self.tensors]

    def assert_unchanged(self):
        for x, (values, version) in zip(self.tensors, self.before, strict=True):
            assert x._version == version
            assert torch.equal(x.detach(), values)
            assert not x.is_leaf or x.grad is None
