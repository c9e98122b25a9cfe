"""The callbacks for Lightning's Trainer: swapped while it runs, gradients checked, peaks logged."""

import csv
import importlib.util
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as theirs
from torch.utils.data import DataLoader, TensorDataset

import torch_nnmath
from torch_nnmath import formulas, nn

pytest.importorskip("lightning")
import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from torchmetrics import MeanMetric

from torch_nnmath.lightning import (
    Finding,
    GradientCheck,
    GradientError,
    PeakMemory,
    SwapFormulas,
    _is_as_pytorchs,
    _tolerance,
)

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        ".*LeafSpec:FutureWarning",  # Lightning's, of PyTorch's trees
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
]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trainer(*callbacks, **options):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    length = {} if {"max_steps", "max_epochs"} & {*options} else {"max_epochs": 1}
    options = quiet | length | options
    return L.Trainer(accelerator="cpu", devices=1, callbacks=[*callbacks], **options)


CLASSES = 40


def data(rows=64, batch_size=16):
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
        self.losses, self.kinds = [], set()

    def loss(self, batch):
        x, t = batch
        self.kinds.add(type(self.head))
        return theirs.cross_entropy(self.head(self.body(x)), t)

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
        self.kinds.add(type(self.head))
        return self.head(self.body(batch[0]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


def kinds(module):
    return {name: type(m) for name, m in module.named_modules()}


def is_marked(module):
    return any("_nnmath_swapped" in vars(m) for m in module.modules())


# SwapFormulas


@pytest.mark.filterwarnings("ignore::torch_nnmath.deferred.MaterializedLogits")
def test_boring_model_is_swapped_while_it_is_fitted():
    class Watching(BoringModel):
        def training_step(self, batch, batch_idx):
            self.seen = type(self.layer)
            return super().training_step(batch, batch_idx)

    model, callback = Watching(), SwapFormulas()
    layer, parameters = model.layer, [*model.parameters()]
    trainer(callback, max_steps=3).fit(model)
    assert model.seen is nn.Linear
    assert model.layer is layer
    assert type(layer) is torch.nn.Linear
    assert not is_marked(model)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert [*callback.report] == [("layer", "torch.nn.Linear", "torch_nnmath.nn.Linear")]
    # the loss of a BoringModel is squared errors, which read the logits, in validation too
    (log,) = callback.report.heads.values()
    assert (log.name, log.fused) == ("layer", 0)
    assert log.materialized.total() > 0


def digits():
    images, labels = pytest.importorskip("sklearn.datasets").load_digits(return_X_y=True)
    x, t = torch.tensor(images[:512], dtype=torch.float32) / 16, torch.tensor(labels[:512])
    return DataLoader(TensorDataset(x, t), 64)


class Digits(Classifier):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU())
        self.head = torch.nn.Linear(32, 10)


def test_digits_are_learned_as_by_pytorch():
    swapped, plain = Digits(), Digits()
    callback = SwapFormulas()
    trainer(callback, max_epochs=5).fit(swapped, digits())
    trainer(max_epochs=5).fit(plain, digits())
    assert swapped.kinds == {nn.Linear}
    assert plain.kinds == {torch.nn.Linear}
    assert callback.report.heads["head"].fused == 40
    assert not callback.report.heads["head"].materialized
    ours, theirs_ = (torch.stack(m.losses).detach() for m in (swapped, plain))
    assert ours[-1] < ours[0] / 2
    torch.testing.assert_close(ours, theirs_, rtol=1e-5, atol=0)


class Late(Classifier):
    """An encoder that is there at setup, and a net that is built after it."""

    def __init__(self):
        super().__init__()
        del self.head

    def configure_model(self):
        if not hasattr(self, "net"):
            self.net = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, CLASSES))

    def loss(self, batch):
        x, t = batch
        self.kinds.add(type(self.net[1]))
        return theirs.cross_entropy(self.net(self.body(x)), t)


@pytest.mark.parametrize("head", ["auto", "net.1", None])
def test_configure_model_is_met(head):
    model, callback = Late(), SwapFormulas(head=head)
    trainer(callback, max_steps=2).fit(model, data())
    assert model.kinds == {nn.Linear}
    assert {change.name for change in callback.report} == {"body.0", "body.2", "net.0", "net.1"}
    assert {*callback.report.heads} == ({"net.1"} if head else set())
    if head:
        assert callback.report.heads["net.1"].fused == 2
    assert type(model.net[1]) is type(model.body[0]) is torch.nn.Linear
    assert not is_marked(model)


class Fails(Exception):
    pass


@pytest.mark.parametrize("where", ["fit", "sanity", "validate", "test", "predict", "callback"])
def test_an_exception_restores(where):
    def fail(*args):
        assert type(model.head) is nn.Linear
        raise Fails

    model, callback = Classifier(), SwapFormulas()
    before = kinds(model)
    if where == "callback":
        other = Callback()
        other.on_train_batch_end = fail
        run = trainer(callback, other)
    else:
        step = {"fit": "training", "sanity": "validation", "validate": "validation"}
        setattr(model, f"{step.get(where, where)}_step", fail)
        run = trainer(callback)
    method = run.fit if where in ("sanity", "callback") else getattr(run, where)
    with pytest.raises(Fails):
        method(model, *[data()] * (1 + (where == "sanity")))
    assert kinds(model) == before
    assert not is_marked(model)
    assert callback.report


def test_a_wrong_head_raises_and_restores():
    model = Classifier()
    with pytest.raises(ValueError, match="no module named 'haed'; near it are 'head'"):
        trainer(SwapFormulas(head="haed")).fit(model, data())
    assert not is_marked(model)
    with pytest.raises(TypeError, match="include must be"):
        trainer(SwapFormulas(include=3)).fit(model, data())


@pytest.mark.parametrize("inference_mode", [False, True])
@pytest.mark.parametrize("what", ["validate", "test", "predict"])
def test_evaluation_alone(what, inference_mode, tmp_path):
    model, callback, plain = Classifier(), SwapFormulas(), Classifier()
    run = trainer(callback, logger=CSVLogger(tmp_path, "", ""), inference_mode=inference_mode)
    results = getattr(run, what)(model, data(), **({} if what == "predict" else {"verbose": False}))
    assert model.kinds == {nn.Linear}
    assert type(model.head) is torch.nn.Linear
    expected = getattr(trainer(), what)(
        plain, data(), **({} if what == "predict" else {"verbose": False})
    )
    torch.testing.assert_close(results, expected, check_dtype=False)
    log = callback.report.heads["head"]
    fused = 0 if what == "predict" or inference_mode else 4  # where all logits are plain
    assert log.fused == fused
    if what != "predict":
        assert logged(tmp_path)["head/fused_losses"] == [fused]
    trainer(callback).fit(model, data())  # and another run
    assert callback.report.heads["head"].fused == 4
    assert not is_marked(model)


def test_what_was_swapped_before_stays_so():
    model = Classifier()
    report = torch_nnmath.swap(model, include=["head", "body.0"], head="body.0")
    before, log = kinds(model), report.heads["body.0"]
    callback = SwapFormulas(head="head")
    trainer(callback, max_steps=2).fit(model, data())
    assert callback.report.heads["head"].fused == 2
    assert [change.name for change in callback.report] == ["body.2"]
    assert kinds(model) == before
    assert vars(model.body[0])["_nnmath_swapped"] is log
    # with "auto" a head that is there stays the head
    with pytest.warns(torch_nnmath.deferred.MaterializedLogits):
        trainer(callback := SwapFormulas(), max_steps=2).fit(model, data())
    assert callback.report.heads == {"body.0": log}
    torch_nnmath.unswap(model)
    assert kinds(model) == kinds(Classifier())


def test_it_says_what_it_did(caplog):
    trainer(SwapFormulas(), max_steps=2).fit(Classifier(), data(), data())
    text = "\n".join(record.getMessage() for record in caplog.records)
    assert "head    torch.nn.Linear  ->  torch_nnmath.nn.Linear  head\n3 modules changed" in text
    assert "head head: 4 losses without logits so far" in text  # two of validation before
    assert text.count("modules changed") == 1


# Checkpoints


class Simple(Classifier):
    """Without a norm, before which a bias has no gradient, of which Adam takes the sign."""

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        layers = torch.nn.Linear(12, 16), torch.nn.Tanh(), torch.nn.Dropout(0.3)
        super().__init__(seed, torch.nn.Sequential(*layers))


def weights(model):
    return {name: v.clone() for name, v in model.state_dict().items()}


def test_checkpoints_go_either_way(tmp_path):
    whole = Simple()
    torch.manual_seed(3)
    trainer(max_epochs=4).fit(whole, data())
    for first, second in [(True, False), (False, True), (True, True)]:
        path = tmp_path / f"{first}{second}"
        model = Simple()
        torch.manual_seed(3)
        run = trainer(
            *[SwapFormulas()] * first,
            max_epochs=2,
            enable_checkpointing=True,
            default_root_dir=path,
        )
        run.fit(model, data())
        state = torch.get_rng_state()
        (saved,) = path.rglob("*.ckpt")
        there = torch.load(saved, weights_only=False)
        assert there["state_dict"].keys() == whole.state_dict().keys()
        loaded = Simple.load_from_checkpoint(saved)
        torch.testing.assert_close(weights(loaded), weights(model), rtol=0, atol=0)
        assert kinds(loaded) == kinds(whole)
        resumed = Simple(seed=5)
        torch.set_rng_state(state)
        run = trainer(*[SwapFormulas()] * second, max_epochs=4)
        run.fit(resumed, data(), ckpt_path=saved, weights_only=False)
        assert run.global_step == 16
        assert resumed.kinds == {nn.Linear if second else torch.nn.Linear}
        torch.testing.assert_close(weights(resumed), weights(whole), rtol=1e-4, atol=1e-5)


# Precision, accumulation, metrics


def logged(folder):
    """The metrics that went to a CSVLogger, in order."""
    (path,) = Path(folder).rglob("metrics.csv")
    columns = {}
    for row in csv.DictReader(path.read_text().splitlines()):
        for name, value in row.items():
            if value:
                columns.setdefault(name, []).append(float(value))
    return columns


def test_metrics(tmp_path):
    model = Classifier()
    callbacks = [SwapFormulas(), check := GradientCheck(3), peak := PeakMemory(2)]
    run = trainer(*callbacks, max_epochs=2, logger=CSVLogger(tmp_path, "", ""), log_every_n_steps=1)
    run.fit(model, data())
    found = logged(tmp_path)
    assert found["head/fused_losses"] == [4.0, 8.0]
    assert found["head/materialized_logits"] == [0.0, 0.0]
    for kind in ("pytorch", "numerical", "uncertainty"):
        assert len(found[f"gradient_error/{kind}"]) == 3  # at steps 0, 3, 6
    assert max(found["gradient_error/pytorch"]) < 1e-3
    assert max(found["gradient_error/numerical"]) < 1e-5
    assert max(found["gradient_error/uncertainty"]) < 1e-3
    assert check.errors.keys() == {k for k in found if k.startswith("gradient_error")}
    assert len(found["memory/peak_MiB"]) == len(found["memory/step_MiB"]) == 4
    assert 50 < peak.peaks["memory/peak_MiB"] < 1e5


def test_counts_are_logged_with_the_epochs_own_metrics(tmp_path):
    """And not at each validation in fit, which they count too, nor twice."""
    swap = SwapFormulas()
    run = trainer(swap, logger=CSVLogger(tmp_path, "", ""), max_epochs=2, val_check_interval=0.5)
    run.fit(Classifier(), data(), data())
    (path,) = tmp_path.rglob("metrics.csv")
    rows = [*csv.DictReader(path.read_text().splitlines())]
    counts = [(row["step"], row["head/fused_losses"]) for row in rows if row["head/fused_losses"]]
    ends = [row["step"] for row in rows if row["mean_epoch"]]
    assert [step for step, _ in counts] == ends == ["3", "7"]
    sanity, training, validation = 2, 4, 8
    assert [float(count) for _, count in counts] == [
        sanity + (training + validation) * epoch for epoch in (1, 2)
    ]


def test_a_callback_serves_again():
    callback = SwapFormulas(head="head")
    for _ in range(2):
        model = Classifier()
        trainer(callback, max_steps=2).fit(model, data())
        assert [change.name for change in callback.report] == ["body.0", "body.2", "head"]
        assert callback.report.heads["head"].fused == 2
        assert not is_marked(model)


class Noisy(Classifier):
    """Reads random numbers of several kinds, changes its batch, writes to the trainer's logger."""

    def training_step(self, batch, batch_idx):
        x, _ = batch
        x += 0.1 * torch.randn_like(x)
        self.logger.log_metrics({"own": float(batch_idx)})
        self.trainer.mine = getattr(self.trainer, "mine", 0) + 1
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_check_has_no_side_effects(tmp_path, swapped, precision):
    ends = []
    for i, checks in enumerate(([], [GradientCheck(2)])):
        model = Noisy()
        torch.manual_seed(0)
        grads = []
        spy = Callback()
        spy.on_before_optimizer_step = lambda trainer, model, optimizer, grads=grads: grads.extend(
            p.grad.clone() for p in model.parameters()
        )
        run = trainer(
            *[SwapFormulas()] * swapped,
            *checks,
            spy,
            max_epochs=2,
            precision=precision,
            logger=CSVLogger(tmp_path / str(i), "", ""),
            log_every_n_steps=1,
        )
        run.fit(model, data())
        metrics = logged(tmp_path / str(i))
        optimizer = run.optimizers[0].state_dict()["state"]
        others = {k: v for k, v in metrics.items() if not k.startswith(("gradient_error", "step"))}
        assert {"loss", "mean_step", "mean_epoch", "own"} <= {*others}
        losses = [v.detach() for v in model.losses]
        end = [weights(model), optimizer, others, grads, losses, run.mine, torch.get_rng_state()]
        ends.append(end)
    without, with_it = ends
    assert without[5] == 8
    torch.testing.assert_close(with_it, without, rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(precision):
    model = Classifier()
    callbacks = [swap := SwapFormulas(), check := GradientCheck(2, parameters=7, entries=7)]
    trainer(*callbacks, precision=precision).fit(model, data())
    assert swap.report.heads["head"].fused == 4
    error = check.errors["gradient_error/pytorch"]
    assert error < (1e-5 if precision == "64-true" else 1e-1)
    # the second comparison is as sharp as ever
    assert check.errors["gradient_error/numerical"] < 1e-5
    assert check.errors["gradient_error/uncertainty"] < 1e-3


def test_tolerance_is_for_the_precision():
    run = trainer(SwapFormulas(), GradientCheck(1, tolerance=1e-6), precision="bf16-mixed")
    with pytest.raises(GradientError, match="PyTorch's own operations give"):
        run.fit(Classifier(), data())
    half = torch.nn.Linear(2, 2).bfloat16()
    for precision, module, tolerance in [
        ("32-true", torch.nn.Linear(2, 2), 1e-3),
        ("64-true", torch.nn.Linear(2, 2).double(), 1e-5),
        ("bf16-true", half, 1e-1),
        ("bf16-mixed", torch.nn.Linear(2, 2), 1e-1),
        ("transformer-engine", torch.nn.Linear(2, 2), 1e-1),
        ("32-true", half, 1e-1),
        ("32-true", torch.nn.ReLU(), 1e-5),  # without parameters there is nothing to round
    ]:
        trainer_ = SimpleNamespace(precision=precision)
        assert _tolerance(trainer_, [*module.parameters()])[0] == tolerance
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        full = SimpleNamespace(precision="32-true")
        assert _tolerance(full, [*torch.nn.Linear(2, 2).parameters()])[0] == 1e-2
    finally:
        torch.set_float32_matmul_precision(before)


def test_gradient_accumulation():
    steps = []

    class Counted(GradientCheck):
        def _findings(self, run, step):
            steps.append((step, run.batch_idx))
            return super()._findings(run, step)

    swapped, plain = Classifier(), Classifier()
    callback = SwapFormulas()
    for model, callbacks in [(swapped, [callback, Counted(2)]), (plain, [])]:
        torch.manual_seed(0)
        trainer(*callbacks, accumulate_grad_batches=2, max_epochs=2).fit(model, data())
    assert steps == [(0, 0), (2, 0)]
    assert callback.report.heads["head"].fused == 8
    ours, expected = (torch.stack(m.losses).detach() for m in (swapped, plain))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=0)


# GradientCheck


class Wrong(torch.autograd.Function):
    """x, with a gradient that is wrong in the rows of odd number."""

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
        return Wrong.apply(x)


def wrong_body():
    return torch.nn.Sequential(torch.nn.Linear(12, 16), WrongLayer(), torch.nn.Tanh())


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_wrong_backward_is_caught_by_numbers(swapped, precision):
    model = Classifier(body=wrong_body())
    check = GradientCheck(1, entries=8)
    run = trainer(*[SwapFormulas()] * swapped, check, precision=precision)
    with pytest.raises(GradientError) as caught:
        run.fit(model, data())
    error = caught.value
    assert error.parameter in ("body.0.weight", "body.0.bias")
    assert error.entry[0] % 2 == 1
    assert error.found == pytest.approx(1.5 * error.expected, rel=1e-4)
    assert error.step == 0
    assert check.errors["gradient_error/numerical"] > 1e-2
    assert check.errors["gradient_error/pytorch"] < 1e-1
    said = f"step 0: the gradient in {error.parameter}[{error.entry[0]}"
    assert str(error).startswith(said)
    assert "numerical differentiation gives" in str(error)
    assert not is_marked(model)


class OneWrongEntry(torch.autograd.Function):
    """x Wᵀ, with the wrong sign in one entry of the weight's gradient, or in one of the input's."""

    @staticmethod
    def forward(ctx, x, W, of_weight):
        ctx.save_for_backward(x, W)
        ctx.of_weight = of_weight
        return x @ W.T

    @staticmethod
    def backward(ctx, dz):
        x, W = ctx.saved_tensors
        dx, dW = dz @ W, dz.T @ x
        if ctx.of_weight:
            dW[5, 7] *= -1
        else:
            dx[3, 4] *= -1
        return dx, dW, None


@pytest.mark.parametrize("of_weight", [True, False])
def test_one_wrong_entry_of_all_is_caught_and_found(of_weight):
    class Product(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(16, 12))

        def forward(self, x):
            return OneWrongEntry.apply(x, self.weight, of_weight)

    body = torch.nn.Sequential(torch.nn.Linear(12, 12), torch.nn.Tanh(), Product())
    check = GradientCheck(1, parameters=1, entries=1)
    with pytest.raises(GradientError, match="numerical differentiation gives") as caught:
        trainer(check).fit(Classifier(body=body), data())
    error = caught.value
    if of_weight:
        assert (error.parameter, error.entry) == ("body.2.weight", (5, 7))
        assert error.found == pytest.approx(-error.expected)
    else:
        assert error.parameter in ("body.0.weight", "body.0.bias")
        assert error.entry[0] == 4
    assert error.error > 1e-5


def test_what_is_wrong_in_no_entry_by_itself_is_wrong_as_a_whole():
    said = str(Finding("numerical", "", (), 1.5, 1.0, 0.5, 1e-5))
    assert said.startswith("the derivative along a random direction in all parameters is 1.5, ")
    error = GradientError(said, 3, Finding("numerical", "", (), 1.5, 1.0, 0.5, 1e-5))
    assert (error.step, error.parameter, error.entry, error.expected) == (3, "", (), 1.0)


def test_a_gradient_that_is_not_finite_is_caught(monkeypatch):
    monkeypatch.setattr(Wrong, "backward", staticmethod(lambda ctx, dx: dx / 0))
    with pytest.raises(GradientError, match="numerical differentiation gives"):
        trainer(GradientCheck(1)).fit(Classifier(body=wrong_body()), data())
    # in both, there is nothing to compare; in one, there is
    trainer(GradientCheck(1, entries=0), max_steps=1).fit(Classifier(body=wrong_body()), data())
    monkeypatch.setattr(formulas.Tanh, "backward", staticmethod(lambda ctx, da: da * torch.nan))
    body = torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.Tanh())
    with pytest.raises(GradientError, match="PyTorch's own operations give"):
        trainer(SwapFormulas(), GradientCheck(1, entries=0)).fit(Classifier(body=body), data())


def test_a_wrong_backward_is_warned_of():
    model = Classifier(body=wrong_body())
    with pytest.warns(UserWarning, match="numerical differentiation gives") as caught:
        trainer(GradientCheck(2, entries=8, on_error="warn")).fit(model, data())
    said = [str(w.message) for w in caught if "numerical" in str(w.message)]
    assert [line.split(":")[0] for line in said] == ["step 0", "step 2"]
    assert len(model.losses) == 4  # training went on


def test_a_formula_that_is_wrong_is_caught_by_pytorch(monkeypatch):
    right = formulas.Tanh.backward
    monkeypatch.setattr(formulas.Tanh, "backward", staticmethod(lambda ctx, da: -right(ctx, da)))
    body = torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.Tanh())
    with pytest.raises(GradientError, match="PyTorch's own operations give") as caught:
        trainer(SwapFormulas(), GradientCheck(1, entries=0)).fit(Classifier(body=body), data())
    assert caught.value.found == pytest.approx(-caught.value.expected, rel=1e-4)
    # of both comparisons the one is named that is farther beyond its tolerance
    with pytest.raises(GradientError, match="numerical differentiation gives"):
        trainer(SwapFormulas(), GradientCheck(1, entries=8)).fit(Classifier(body=body), data())
    # also where the module is ours to begin with
    body = torch.nn.Sequential(torch.nn.Linear(12, 16), nn.Tanh())
    with pytest.raises(GradientError, match="PyTorch's own operations give"):
        trainer(GradientCheck(1, entries=0)).fit(Classifier(body=body), data())


def test_a_formula_of_another_function_is_caught(monkeypatch):
    """Its backward is that of its forward, which PyTorch's module does not compute."""
    monkeypatch.setattr(nn.Tanh, "forward", lambda self, x: torch.tanh(1.5 * x))
    body = torch.nn.Sequential(torch.nn.Linear(12, 16), nn.Tanh())
    check = GradientCheck(4, parameters=2, entries=8, on_error="warn")
    with pytest.warns(UserWarning, match="relative error"):
        trainer(check).fit(Classifier(body=body), data())
    assert min(check.errors[f"gradient_error/{k}"] for k in ("pytorch", "numerical")) > 1e-2

    class WithLoss(Classifier):
        def __init__(self):
            super().__init__()
            self.criterion = nn.CrossEntropyLoss()

        def loss(self, batch):
            return self.criterion(self.head(self.body(batch[0])), batch[1])

    def wrong(self, z, t):
        return 1.5 * theirs.cross_entropy(z, t)

    trainer(GradientCheck(1)).fit(WithLoss(), data())
    monkeypatch.setattr(nn.CrossEntropyLoss, "forward", wrong)
    with pytest.raises(GradientError, match="PyTorch's own operations give"):
        trainer(GradientCheck(1, entries=0)).fit(WithLoss(), data())


def test_a_gradient_of_zeros_is_right_or_wrong(monkeypatch):
    class Idle(Classifier):
        def loss(self, batch):
            return 0 * super().loss(batch)

    def fit(**options):
        body = torch.nn.Sequential(torch.nn.Linear(12, 16), nn.Tanh())
        check = GradientCheck(1, parameters=9, **options)
        trainer(check).fit(Idle(body=body), data())
        return check.errors

    assert fit()["gradient_error/pytorch"] == fit()["gradient_error/numerical"] == 0
    ones = staticmethod(lambda ctx, da: torch.ones_like(da))
    monkeypatch.setattr(formulas.Tanh, "backward", ones)
    with pytest.raises(GradientError, match="relative error is inf"):
        fit(entries=0)


def test_a_class_made_from_ours_is_compared_with_pytorchs(monkeypatch):
    right = formulas.Affine.backward
    twice = staticmethod(lambda ctx, dz: right(ctx, 2 * dz))
    model = Classifier()
    torch_nnmath.swap(model, include="body.0", head=None)
    torch.nn.utils.parametrizations.weight_norm(model.body[0])
    trainer(check := GradientCheck(1, parameters=9)).fit(model, data())
    assert check.errors["gradient_error/pytorch"] < 1e-3
    assert type(model.body[0]).__name__ == "ParametrizedLinear"
    monkeypatch.setattr(formulas.Affine, "backward", twice)
    with pytest.raises(GradientError, match="PyTorch's own operations give"):
        trainer(GradientCheck(1, parameters=9, entries=0)).fit(model, data())


def test_own_options_are_kept():
    class Own(Classifier):
        def __init__(self):
            super().__init__()
            self.cost = nn.CrossEntropyLoss(base=2, z_loss=0.1)
            self.plain = nn.CrossEntropyLoss()

        def loss(self, batch):
            z = self.head(self.body(batch[0]))
            return self.cost(z, batch[1]) + self.plain(z, batch[1])

    trainer(check := GradientCheck(1, parameters=9)).fit(Own(), data())
    assert check.errors["gradient_error/pytorch"] < 1e-3
    learnt = torch.nn.Parameter(torch.tensor(1.0))
    for module, is_as_pytorchs in [
        (nn.Tanh(), True),
        (nn.CrossEntropyLoss(), True),
        (nn.CrossEntropyLoss(base=2), False),
        (nn.CrossEntropyLoss(softcap=3.0), False),
        (nn.LinearCrossEntropyLoss(2, 3), True),
        (nn.LinearCrossEntropyLoss(2, 3, logit_scale=0.5), False),
        (nn.LinearCrossEntropyLoss(2, 3, logit_scale=learnt), False),
    ]:
        assert _is_as_pytorchs(module) == is_as_pytorchs


class Narrowing(torch.nn.Module):
    """As the norms and rotations of language models do."""

    def forward(self, x):
        angles = torch.arange(16, dtype=torch.float32)[None]
        wide = x.to(torch.float32) + angles.cos() * x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True))).to(x.dtype)


class Narrow(Classifier):
    def loss(self, batch):
        z = self.head(self.body(batch[0])).float()
        return theirs.cross_entropy(z, batch[1]) + z.softmax(-1, dtype=torch.float32).pow(2).mean()


@pytest.mark.filterwarnings("ignore::torch_nnmath.deferred.MaterializedLogits")
def test_a_module_that_names_float32_is_checked_in_float64():
    body = torch.nn.Sequential(torch.nn.Linear(12, 16), Narrowing())
    callbacks = [SwapFormulas(), check := GradientCheck(1, parameters=9, entries=9)]
    trainer(*callbacks).fit(Narrow(body=body), data())
    assert check.errors["gradient_error/numerical"] < 1e-5
    assert check.errors["gradient_error/uncertainty"] < 1e-4


class Remembering(torch.nn.Module):
    """A buffer that each forward changes and the loss depends on."""

    def __init__(self):
        super().__init__()
        self.register_buffer("times", torch.zeros(()))

    def forward(self, x):
        self.times += 1
        return x * (1 + self.times)


def test_buffers_of_each_loss_are_those_of_the_batch():
    body = torch.nn.Sequential(torch.nn.Linear(12, 16), Remembering(), torch.nn.Tanh())
    trainer(check := GradientCheck(1)).fit(model := Classifier(body=body), data())
    assert check.errors["gradient_error/uncertainty"] < 1e-3
    assert model.body[1].times == 4


def test_what_is_looked_at_is_drawn_anew_and_the_same_each_time():
    def looked_at(seed):
        drawn = []

        class Spy(GradientCheck):
            def _findings(self, run, step):
                for finding in super()._findings(run, step):
                    drawn.append((step, finding.kind, finding.parameter, finding.entry))
                    yield finding

        torch.manual_seed(0)
        trainer(Spy(2, parameters=2, entries=3, seed=seed)).fit(Classifier(), data())
        return drawn

    first = looked_at(0)
    kinds = [f[1] for f in first if f[0] == 0]
    assert kinds == ["pytorch"] * 2 + ["numerical"] * 4  # three entries, and all in one direction
    assert {f[2] for f in first if f[0] == 0} != {f[2] for f in first if f[0] == 2}
    assert looked_at(0) == first
    assert looked_at(1) != first


def test_other_training_steps():
    class Other(Classifier):
        def training_step(self, batch):
            x, t = batch["x"], batch["t"]
            if (t < 0).all():
                return None
            return {"loss": self.loss((x, t)), "more": 3}

    x, t = next(iter(data()))
    batches = [
        {"x": x, "t": t},
        {"x": x, "t": t * 0 - 1},  # no loss
        {"x": x * torch.inf, "t": t},  # not finite
    ]
    loader = DataLoader(batches, batch_size=None)
    trainer(check := GradientCheck(1)).fit(Other(), loader)
    assert check.errors == dict.fromkeys(check.errors, 0.0)  # of the last batch
    model = Classifier()
    model.head.bias.requires_grad_(False)
    model.idle = torch.nn.Parameter(torch.ones(3))
    trainer(check := GradientCheck(1, parameters=99, entries=9)).fit(model, data())
    assert check.errors["gradient_error/numerical"] < 1e-5


def test_what_cannot_be_checked():
    for bad in ({"every_n_steps": 0}, {"parameters": 0}, {"entries": -1}):
        with pytest.raises(ValueError, match="must be at least"):
            GradientCheck(**bad)
    with pytest.raises(ValueError, match='"raise" or "warn"'):
        GradientCheck(on_error="print")
    with pytest.raises(ValueError, match="must be at least"):
        PeakMemory(0)
    model = Classifier()
    model.automatic_optimization = False
    with pytest.raises(ValueError, match="optimizes by hand"):
        trainer(GradientCheck()).fit(model, data())

    class Iterating(Classifier):
        def training_step(self, dataloader_iter):
            return self.loss(next(dataloader_iter)[0])

    with pytest.raises(ValueError, match="not of an iterator"):
        trainer(GradientCheck()).fit(Iterating(), data())

    class Single(torch.nn.Module):
        def forward(self, x):
            if x.dtype == torch.float64:
                raise TypeError("float32 only")
            return x

    body = torch.nn.Sequential(torch.nn.Linear(12, 16), Single())
    with pytest.raises(RuntimeError, match="entries=0 leaves"):
        trainer(GradientCheck()).fit(Classifier(body=body), data())
    trainer(GradientCheck(entries=0)).fit(Classifier(body=body), data())

    class Fussy(Classifier):  # has no loss in float64
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if loss.dtype == torch.float64 else loss

    trainer(check := GradientCheck()).fit(Fussy(), data())
    assert check.errors["gradient_error/numerical"] == 0


# PeakMemory


class Large(Classifier):
    """A head of which the logits are 64 MiB."""

    def __init__(self):
        super().__init__(body=torch.nn.Linear(12, 16))
        self.head = torch.nn.Linear(16, 2**15)


@pytest.mark.skipif(sys.platform != "linux", reason="measured on Linux")
def test_peak_memory_is_that_of_the_step():
    batches = DataLoader(TensorDataset(*data(512).dataset.tensors), 512)
    peaks = {}
    for swapped in (False, True):
        callbacks = [*[SwapFormulas()] * swapped, peak := PeakMemory(1)]
        trainer(*callbacks, max_epochs=3).fit(Large(), batches)
        peaks[swapped] = peak.peaks["memory/step_MiB"]
    assert 128 <= peaks[False] < 256  # logits and their gradient
    assert peaks[True] < 64


def test_peak_memory_elsewhere(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.warns(UserWarning, match="on a CPU under Linux only"):
        trainer(peak := PeakMemory(1)).fit(Classifier(), data())
    assert not peak.peaks


# Packages and processes


def test_without_lightning_the_import_says_what_to_install(monkeypatch):
    for name in [*sys.modules]:
        if name.partition(".")[0] in ("lightning", "pytorch_lightning"):
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    spec = importlib.util.find_spec("torch_nnmath.lightning")
    with pytest.raises(ImportError, match=r"pip install torch-nnmath\[lightning\]"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_the_library_does_not_import_lightning():
    code = "import sys, torch_nnmath.testing; sys.exit('lightning' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


def test_pytorch_lightning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pl = pytest.importorskip("pytorch_lightning")

    body = {k: v for k, v in vars(Classifier).items() if k in ("loss", "configure_optimizers")}

    def training_step(self, batch, batch_idx):
        self.log("loss", loss := self.loss(batch))
        return loss

    def init(self):
        pl.LightningModule.__init__(self)
        like = Classifier()
        self.body, self.head, self.kinds = like.body, like.head, set()

    Theirs = type(
        "Theirs",
        (pl.LightningModule,),
        {**body, "training_step": training_step, "__init__": init},
    )
    model, swap, check = Theirs(), SwapFormulas(), GradientCheck(2)
    run = pl.Trainer(
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
    run.fit(model, data())
    assert model.kinds == {nn.Linear}
    assert swap.report.heads["head"].fused == 4
    assert not is_marked(model)
    found = logged(tmp_path)
    assert len(found["gradient_error/numerical"]) == 2
    assert len(found["loss"]) == 4


SCRIPT = """
import json, sys, warnings
import lightning as L, torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
sys.path.insert(0, sys.argv[1])
from test_lightning import *

torch.set_num_threads(1)
folder, found = Path(sys.argv[2]), {}

def fit(model, *callbacks, strategy="ddp", **options):
    run = L.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, callbacks=[*callbacks], max_epochs=1,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        **{"logger": False, **options},
    )
    run.fit(model, data())
    return run

def flat(model):
    return [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]

class Plain(Classifier):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(body=torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.Tanh()))
        self.register_buffer("idle", torch.zeros(1))

plain, swapped = Plain(), Plain()
fit(plain)
swap, check, peak = SwapFormulas(), GradientCheck(1), PeakMemory(1)
logger = CSVLogger(folder, "", "")
run = fit(swapped, swap, check, peak, logger=logger, log_every_n_steps=1)
found["kinds"] = [str(kind) for kind in swapped.kinds]
found["fused"] = swap.report.heads["head"].fused
found["restored"] = not is_marked(swapped)
found["errors"], found["peaks"] = check.errors, peak.peaks
found["difference"] = max((a - b).abs().max().item() for a, b in zip(flat(plain), flat(swapped)))
found["moved"] = max((a - b).abs().max().item() for a, b in zip(flat(plain), flat(Plain())))

wrong = Plain()  # in the second process
if run.global_rank == 1:
    wrong.body = wrong_body()
try:
    fit(wrong, SwapFormulas(), GradientCheck(1, parameters=4, entries=16))
except GradientError as error:
    found["wrong"] = str(error)
found["restored after"] = not is_marked(wrong)

class WithLoss(torch.nn.Sequential):  # what comes out of it is hooked
    def forward(self, x, t):
        return theirs.cross_entropy(super().forward(x), t)

class Sharded(Plain):
    def __init__(self):
        super().__init__()
        self.net = WithLoss(*self.body, self.head)
        del self.body, self.head

    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        fully_shard(self.net[0], mesh=mesh)
        fully_shard(self.net, mesh=mesh)

    def loss(self, batch):
        self.kinds |= {type(m).__name__ for m in self.net}
        self.kinds.add(all(isinstance(m, (nn.Linear, nn.Tanh)) for m in self.net))
        return self.net(*batch)

sharded, swap = Sharded(), SwapFormulas()
def parallel():
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
fit(sharded, swap, PeakMemory(1), strategy=parallel())
found["fsdp kinds"] = sorted(map(str, sharded.kinds))
found["fsdp fused"] = swap.report.heads["net.2"].fused
found["fsdp materialized"] = swap.report.heads["net.2"].materialized.total()
found["fsdp difference"] = max(
    (a - b).abs().max().item() for a, b in zip(flat(plain), flat(sharded))
)
found["fsdp names"] = [type(m).__name__ for m in sharded.net.modules()]
found["fsdp restored"] = not any(isinstance(m, (nn.Linear, nn.Tanh)) for m in sharded.modules())
found["fsdp marks"] = is_marked(sharded)
try:
    fit(Sharded(), GradientCheck(1), strategy=parallel())
except ValueError as error:
    found["fsdp check"] = str(error)
(folder / f"{run.global_rank}.json").write_text(json.dumps(found))
"""


def test_two_processes(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(Path(__file__).parent), str(tmp_path)],
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for found in ranks:
        assert found["fsdp kinds"] == ["FSDPLinear", "Linear", "Tanh", "True"]
        assert found["fsdp names"] == ["FSDPWithLoss", "FSDPLinear", "Tanh", "Linear"]
        assert found["kinds"] == [str(nn.Linear)]
        assert found["fused"] == 2
        assert found["restored"]
        assert found["errors"]["gradient_error/pytorch"] < 1e-3
        assert found["errors"] == ranks[0]["errors"]
        assert found["peaks"] == ranks[0]["peaks"]
        assert found["moved"] > 1e-3
        assert found["difference"] < 1e-5
        assert found["restored after"]
        assert found["fsdp fused"] == 2
        assert found["fsdp materialized"] == 0
        assert found["fsdp difference"] < 1e-5
        assert found["fsdp restored"]
        assert not found["fsdp marks"]
        assert "ModelParallelStrategy shards its parameters" in found["fsdp check"]
    assert ranks[0]["wrong"] == "step 0: a gradient is wrong in another process"
    assert "numerical differentiation gives" in ranks[1]["wrong"]
    assert logged(tmp_path)["head/fused_losses"] == [4.0]  # of both
    assert (done.stdout + done.stderr).count("3 modules changed") == 3  # in one process, thrice
