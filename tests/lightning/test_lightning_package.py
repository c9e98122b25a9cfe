"""The callbacks together: their imports, their metrics, either package, several processes."""

import importlib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from lightning_models import (
    LIGHTNING_MARKS,
    Classifier,
    is_marked,
    make_loader,
    make_trainer,
    read_metrics,
)

from torch_nnmath import nn

pytest.importorskip("lightning.pytorch")
from lightning.pytorch.loggers import CSVLogger

from torch_nnmath.deferred.log import FREED_WEIGHT
from torch_nnmath.lightning import GradientCheck, PeakMemory, SwapFormulas

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent
pytestmark = LIGHTNING_MARKS


def test_import_without_lightning_says_what_to_install(monkeypatch):
    for name in [*sys.modules]:
        if name.partition(".")[0] in ("lightning", "pytorch_lightning"):
            monkeypatch.setitem(sys.modules, name, None)
        if name.startswith("torch_nnmath.lightning"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    with pytest.raises(ImportError, match=r"pip install torch-nnmath\[lightning\]"):
        importlib.import_module("torch_nnmath.lightning")


def test_metrics_of_all_callbacks_are_logged(tmp_path):
    model = Classifier()
    callbacks = [SwapFormulas(), check := GradientCheck(3), peak := PeakMemory(2)]
    logger = CSVLogger(tmp_path, "", "")
    trainer = make_trainer(*callbacks, max_epochs=2, logger=logger, log_every_n_steps=1)
    trainer.fit(model, make_loader())
    metrics = read_metrics(tmp_path)
    assert metrics["head/fused_losses"] == [4.0, 8.0]
    assert metrics["head/materialized_logits"] == [0.0, 0.0]
    for key in ("pytorch", "numerical", "uncertainty"):
        assert len(metrics[f"gradient_error/{key}"]) == 3  # at steps 0, 3, 6
    assert max(metrics["gradient_error/pytorch"]) < 1e-3
    assert max(metrics["gradient_error/numerical"]) < 1e-5
    assert max(metrics["gradient_error/uncertainty"]) < 1e-3
    assert check.errors.keys() == {k for k in metrics if k.startswith("gradient_error")}
    assert len(metrics["memory/peak_MiB"]) == len(metrics["memory/step_MiB"]) == 4
    assert 50 < peak.peaks["memory/peak_MiB"] < 1e5


def test_callbacks_work_with_pytorch_lightning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pl = pytest.importorskip("pytorch_lightning")

    class Model(pl.LightningModule):
        def __init__(self):
            super().__init__()
            model = Classifier()
            self.body, self.head, self.head_types = model.body, model.head, set()

        def training_step(self, batch, batch_idx):
            self.log("loss", loss := Classifier.loss(self, batch))
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 1e-2)

    model, swap, check = Model(), SwapFormulas(), GradientCheck(2)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        callbacks=[swap, check, PeakMemory(1)],
        logger=pl.loggers.CSVLogger(tmp_path, "", ""),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(model, make_loader())
    assert model.head_types == {nn.Linear}
    assert swap.report.heads["head"].fused == 4
    assert not is_marked(model)
    metrics = read_metrics(tmp_path)
    assert len(metrics["gradient_error/numerical"]) == 2
    assert len(metrics["loss"]) == 4


# By how the model is wrapped: class of the head, losses without logits, why logits were computed
SHARDED = {
    "inside": ("Linear", 2, []),
    "outside": ("Linear", 2, []),
    "head alone": ("FSDPLinear", 2, []),
    "head alone, freed": ("FSDPLinear", 0, [FREED_WEIGHT]),
    "classes": ("Linear", 4, []),
}


def test_callbacks_work_in_two_processes(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(FOLDER / "two_processes.py"), str(tmp_path)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for result in results:
        ddp = result["ddp"]
        assert ddp["head types"] == [str(nn.Linear)]
        assert ddp["fused"] == 2
        assert not ddp["is marked"]
        assert ddp["errors"]["gradient_error/pytorch"] < 1e-3
        assert ddp["errors"] == results[0]["ddp"]["errors"]
        assert ddp["peaks"] == results[0]["ddp"]["peaks"]
        assert ddp["difference to start"] > 1e-3
        assert ddp["difference to plain"] < 1e-5
        assert not result["wrong"]["is marked"]
        for kind, (head_class, fused, computed) in SHARDED.items():
            sharded = result[kind]
            assert sharded["is swapped"]
            assert sharded["difference to plain"] < 1e-5
            assert not sharded["is swapped after"]
            assert not sharded["is marked"]
            assert (sharded["fused"], sharded["computed"]) == (fused, computed)
            first_class = "Linear" if kind == "classes" else "FSDPLinear"
            names = [first_class, "Tanh", head_class]
            assert sharded["class names"] == sharded["class names after"][1:] == names
        assert "ModelParallelStrategy shards its parameters" in result["fsdp check"]
    first, second = (result["wrong"]["message"] for result in results)
    assert first == "step 0: a gradient is wrong in another process"
    assert "numerical differentiation gives" in second
    assert read_metrics(tmp_path)["head/fused_losses"] == [4.0]  # summed over both processes
    assert done.stdout.count("3 modules changed") == 7  # rank 0 alone reports each of seven runs
