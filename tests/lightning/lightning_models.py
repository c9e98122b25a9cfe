"""Models, data and a quiet Trainer for the tests of the callbacks."""

import csv
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("lightning.pytorch")  # not "lightning", a name that this folder has too
import lightning as L
from torchmetrics import MeanMetric

LIGHTNING_WARNINGS = (
    ".*LeafSpec:FutureWarning",  # Lightning's use of PyTorch's trees
    ".*LeafSpec:DeprecationWarning",
    ".*does not have many workers",
    ".*smaller than the logging interval",
    ".*Checkpoint directory .* exists",
    "You defined a `validation_step`",
    "You defined a `training_step`",
    ".*`lr_scheduler.step\\(\\)` before `optimizer.step\\(\\)`",
    ".*you are using `.*num_workers",
    ".*callbacks used to create the checkpoint need to be provided",
    "`training_step` returned `None`",
    "You are using the `dataloader_iter` step flavor",
)
LIGHTNING_MARKS = [
    pytest.mark.usefixtures("one_thread"),
    *(pytest.mark.filterwarnings(f"ignore:{message}") for message in LIGHTNING_WARNINGS),
]
CLASSES = 40


def make_trainer(*callbacks, **options):
    """Returns a Trainer on the CPU that prints and writes nothing; one epoch unless told."""
    defaults = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    if not {"max_steps", "max_epochs"} & {*options}:
        defaults["max_epochs"] = 1
    options = {"accelerator": "cpu", "devices": 1, **defaults, **options}
    return L.Trainer(callbacks=[*callbacks], **options)


def make_loader(rows=64, batch_size=16):
    g = torch.Generator().manual_seed(1)
    x, t = torch.randn(rows, 12, generator=g), torch.randint(CLASSES, (rows,), generator=g)
    return DataLoader(TensorDataset(x, t), batch_size)


class Classifier(L.LightningModule):
    """Draws random numbers, keeps statistics and metrics, and tensors that are in a graph."""

    def __init__(self, seed=0, body=None):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = body or torch.nn.Sequential(
                torch.nn.Linear(12, 16),
                torch.nn.BatchNorm1d(16),
                torch.nn.Tanh(),
                torch.nn.Dropout(0.3),
            )
            self.head = torch.nn.Linear(16, CLASSES)
        self.mean = MeanMetric()
        self.losses, self.head_types = [], set()

    def loss(self, batch):
        x, t = batch
        self.head_types.add(type(self.head))
        return F.cross_entropy(self.head(self.body(x)), t)

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.losses.append(loss)
        self.mean(loss)
        self.log("loss", loss)
        self.log("mean", self.mean, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        self.head_types.add(type(self.head))
        return self.head(self.body(batch[0]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


class WrongIdentity(torch.autograd.Function):
    """x, with a wrong gradient in every second column."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dx):
        dx = dx.clone()
        dx[:, 1::2] *= 1.5
        return dx


class WrongLayer(torch.nn.Module):
    def forward(self, x):
        return WrongIdentity.apply(x)


def make_wrong_body():
    return torch.nn.Sequential(torch.nn.Linear(12, 16), WrongLayer(), torch.nn.Tanh())


def module_types(module):
    return {name: type(m) for name, m in module.named_modules()}


def is_marked(module):
    return any("_nnmath_swapped" in vars(m) for m in module.modules())


def copy_weights(model):
    return {name: v.clone() for name, v in model.state_dict().items()}


def read_metrics(folder):
    """Returns the metrics that went to a CSVLogger, in order."""
    (path,) = Path(folder).rglob("metrics.csv")
    columns = {}
    for row in csv.DictReader(path.read_text().splitlines()):
        for name, value in row.items():
            if value:
                columns.setdefault(name, []).append(float(value))
    return columns
