"""A checker of derivatives: any function or `autograd.Function` under every transform of PyTorch.

>>> import torch
>>> from torch_nnmath import testing
>>> report = testing.check(torch.tanh, [torch.tensor([0.3, -1.2])], transforms=["gradient", "vmap"])
>>> print(report)
tanh, float64
gradient  right
vmap      right
"""

from torch_nnmath.testing._check import QUICK, TRANSFORMS, assert_right, check
from torch_nnmath.testing._report import Report, Row, Verdict

__all__ = ["QUICK", "TRANSFORMS", "Report", "Row", "Verdict", "assert_right", "check"]
