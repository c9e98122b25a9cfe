"""`python -m torch_nnmath bench`: time and memory of each function and of its alternatives."""

from torch_nnmath.bench.command import main

__all__ = ["main"]
