"""Models of the tests of `swap`."""

import pytest
import torch
from torch import nn

HAS_HEAD = hasattr(nn, "LinearCrossEntropyLoss")
needs_deferral_in_compiled_models = pytest.mark.skipif(
    torch.__version__ < "2.12", reason="PyTorch 2.11 has plain logits in compiled models"
)
WEIGHT = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)


class Everything(nn.Module):
    """Has every class that swap replaces, a shared module, a container and a dropout."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5, bias=False), nn.ReLU(), nn.Dropout(0.0)
        )
        self.again = self.body[1]
        self.gate = nn.ModuleDict({"linear": nn.Linear(5, 3), "sigmoid": nn.Sigmoid()})
        self.softmax = nn.Softmax(dim=-1)
        self.mse = nn.MSELoss(reduction="sum")
        self.ce = nn.CrossEntropyLoss(weight=WEIGHT.clone(), ignore_index=1, label_smoothing=0.1)
        if HAS_HEAD:
            self.head = nn.LinearCrossEntropyLoss(5, 3, bias=True, weight=WEIGHT.clone())
        self.double()

    def forward(self, x, target):
        features = self.again(self.body(x))
        logits = self.gate["linear"](features)
        losses = [self.ce(logits, target)]
        losses.append(self.mse(self.softmax(logits), self.gate["sigmoid"](logits)))
        if HAS_HEAD:
            losses.append(self.head(features, target))
        return torch.stack(losses)


def make_small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double()


class Subclass(nn.Linear):
    def forward(self, input):
        return super().forward(input) + 1


def make_patched_linear():
    layer = nn.Linear(4, 3)
    layer.forward = lambda input: input
    return layer


def list_types(model):
    return [type(module) for module in model.modules()]


def changed_names(report):
    return [row.name for row in report]
