"""The head's plan for a GPU, on CPU tensors, with the row kernels in PyTorch operations."""

import importlib

import gpu_helpers
import pytest
import torch
from gpu_helpers import gpu_operators  # noqa: F401

from torch_nnmath import functional
from torch_nnmath.kernels.gpu import plan

library = importlib.import_module("torch_nnmath.kernels._library")
gpu_head = importlib.import_module("torch_nnmath.kernels.gpu.head")
