"""Neural Network Mathematics: every formula as a `torch.autograd.Function` with its own backward."""

from torch_nnmath import functional, nn

__version__ = "0.1.0"
__all__ = ["__version__", "functional", "nn"]
