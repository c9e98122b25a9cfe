"""The arithmetic made fast, as operators of `torch.library`; none has a derivative of its own.

Each is called below autograd: `class_indices` by a public function, the others by the head.
"""

from torch_nnmath.kernels.blocked import head, head_second
from torch_nnmath.kernels.classes import class_indices

__all__ = ["class_indices", "head", "head_second"]
