"""The formulas, each a `torch.autograd.Function` with its backward written by hand."""

from torch_nnmath.formulas._formula import mask_ignored
from torch_nnmath.formulas.affine import Affine
from torch_nnmath.formulas.categorical_cross_entropy import CategoricalCrossEntropy
from torch_nnmath.formulas.cost import Cost, CostWithGradient
from torch_nnmath.formulas.cross_entropy import CrossEntropy, WeightedTarget
from torch_nnmath.formulas.entropy import Entropy
from torch_nnmath.formulas.feedforward import ACTIVATIONS, Feedforward
from torch_nnmath.formulas.linear_cross_entropy import LinearCrossEntropy, LinearCrossEntropyCost
from torch_nnmath.formulas.linear_divergence import LinearDivergence, LinearDivergenceCost
from torch_nnmath.formulas.logit_scale import LogitScale
from torch_nnmath.formulas.relu import ReLU, relu_
from torch_nnmath.formulas.sigmoid import Sigmoid
from torch_nnmath.formulas.sigmoid_squared_error import SigmoidSquaredError
from torch_nnmath.formulas.softcap import SoftCap
from torch_nnmath.formulas.softmax import LogSoftmax, Softmax, softmax_jacobian
from torch_nnmath.formulas.split_softmax import SplitLogSumExp, compute_split_rows
from torch_nnmath.formulas.squared_error import SquaredError
from torch_nnmath.formulas.tanh import Tanh
from torch_nnmath.formulas.transfer import Transfer
from torch_nnmath.formulas.z_loss import ZLoss

__all__ = [
    "ACTIVATIONS",
    "Affine",
    "CategoricalCrossEntropy",
    "Cost",
    "CostWithGradient",
    "CrossEntropy",
    "Entropy",
    "Feedforward",
    "LinearCrossEntropy",
    "LinearCrossEntropyCost",
    "LinearDivergence",
    "LinearDivergenceCost",
    "LogSoftmax",
    "LogitScale",
    "ReLU",
    "Sigmoid",
    "SigmoidSquaredError",
    "SoftCap",
    "Softmax",
    "SplitLogSumExp",
    "SquaredError",
    "Tanh",
    "Transfer",
    "WeightedTarget",
    "ZLoss",
    "compute_split_rows",
    "mask_ignored",
    "relu_",
    "softmax_jacobian",
]
