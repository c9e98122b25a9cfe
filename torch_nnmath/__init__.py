"""Neural Network Mathematics: each formula a `torch.autograd.Function` with its own backward."""

from torch_nnmath import functional, nn
from torch_nnmath.swapping import swap, unswap

__version__ = "0.1.0"
__all__ = ["__version__", "functional", "nn", "swap", "unswap"]
