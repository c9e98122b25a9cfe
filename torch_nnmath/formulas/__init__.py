"""The document's formulas, each a `torch.autograd.Function` with its backward written by hand."""

from torch_nnmath.formulas.affine import Affine
from torch_nnmath.formulas.categorical_cross_entropy import CategoricalCrossEntropy
from torch_nnmath.formulas.cost import Cost
from torch_nnmath.formulas.cross_entropy import CrossEntropy, Weighted, kept
from torch_nnmath.formulas.entropy import Entropy
from torch_nnmath.formulas.feedforward import ACTIVATIONS, Feedforward
from torch_nnmath.formulas.linear_cross_entropy import LinearCrossEntropy
from torch_nnmath.formulas.logit_scale import LogitScale
from torch_nnmath.formulas.relu import ReLU, relu_
from torch_nnmath.formulas.sigmoid import Sigmoid
from torch_nnmath.formulas.sigmoid_squared_error import SigmoidSquaredError
from torch_nnmath.formulas.softcap import SoftCap
from torch_nnmath.formulas.softmax import LogSoftmax, Softmax, softmax_jacobian
from torch_nnmath.formulas.squared_error import SquaredError
from torch_nnmath.formulas.tanh import Tanh
from torch_nnmath.formulas.z_loss import ZLoss

__all__ = [
    "ACTIVATIONS",
    "Affine",
    "CategoricalCrossEntropy",
    "Cost",
    "CrossEntropy",
    "Entropy",
    "Feedforward",
    "LinearCrossEntropy",
    "LogSoftmax",
    "LogitScale",
    "ReLU",
    "Sigmoid",
    "SigmoidSquaredError",
    "SoftCap",
    "Softmax",
    "SquaredError",
    "Tanh",
    "Weighted",
    "ZLoss",
    "kept",
    "relu_",
    "softmax_jacobian",
]
