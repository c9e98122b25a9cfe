"""The memory of Lightning's validation with a large vocabulary, plain and swapped."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning_models import LIGHTNING_MARKS, make_trainer
from torch.nn import functional as F

from torch_nnmath._memory import MIB, read_peak, reset_peak
from torch_nnmath.lightning import SwapFormulas

pytest.importorskip("lightning.pytorch")
import lightning as L
from lightning.pytorch.callbacks import Callback

pytestmark = LIGHTNING_MARKS
TESTS = Path(__file__).parent.parent
CLASSES, ROWS, LENGTH, WIDTH = 131072, 2, 256, 32
CPU = torch.device("cpu")


class LanguageModel(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(CLASSES, WIDTH)
        self.body = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Tanh())
        self.lm_head = torch.nn.Linear(WIDTH, CLASSES, bias=False)

    def validation_step(self, batch, batch_idx):
        ids = batch[0]
        logits = self.lm_head(self.body(self.embedding(ids)))[:, :-1].flatten(0, 1)
        target = ids[:, 1:].flatten()
        predicted = logits.argmax(-1).float().mean()  # in place of the accuracy, which is 0
        self.log_dict({"loss": F.cross_entropy(logits.float(), target), "predicted": predicted})


class ValidationPeak(Callback):
    """Measures the last batch; the first one loads what a first call loads."""

    def on_validation_batch_start(self, *_):
        self.before = reset_peak(CPU)

    def on_validation_batch_end(self, *_):
        self.used = read_peak(CPU) - self.before


def measure(kind, path):
    """Saves the peak of a validation step in MiB, and the metrics."""
    torch.set_num_threads(1)
    ids = torch.randint(CLASSES, (2 * ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(ids), ROWS)
    peak, swap = ValidationPeak(), SwapFormulas()
    trainer = make_trainer(peak, *[swap] * (kind == "swapped"))
    (metrics,) = trainer.validate(LanguageModel(), loader, verbose=False)
    if kind == "swapped":
        log = swap.report.heads["lm_head"]
        assert (log.fused, log.reduced, log.materialized.total()) == (2, 2, 0)
        print(swap.report)
    torch.save((peak.used / MIB, {name: metrics[name] for name in ("loss", "predicted")}), path)


def test_validation_of_a_large_vocabulary_needs_under_a_third_of_the_memory(tmp_path):
    """The logits take 256 MiB, and PyTorch's loss a copy."""
    used, metrics = {}, {}
    for kind in ("plain", "swapped"):
        paths = f"sys.path[:0] = {str(TESTS)!r}, {str(TESTS / 'lightning')!r}"
        call = f"measure({kind!r}, {str(tmp_path / kind)!r})"
        code = f"import sys; {paths}; from test_validation_memory import measure; {call}"
        subprocess.run([sys.executable, "-c", code], check=True)
        used[kind], metrics[kind] = torch.load(tmp_path / kind)
    print({kind: f"{size:.0f} MiB" for kind, size in used.items()}, metrics)
    assert used["plain"] > ROWS * LENGTH * CLASSES * 4 / MIB
    assert used["swapped"] < used["plain"] / 3
    assert metrics["swapped"] == pytest.approx(metrics["plain"], rel=1e-5)
