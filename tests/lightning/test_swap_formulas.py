"""SwapFormulas: modules are swapped while the Trainer runs, and only then."""

import csv

import pytest
import torch
from lightning_models import (
    CLASSES,
    LIGHTNING_MARKS,
    Classifier,
    copy_weights,
    is_marked,
    make_loader,
    make_trainer,
    module_types,
    read_metrics,
)
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import torch_nnmath
from torch_nnmath import nn

pytest.importorskip("lightning.pytorch")
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger

from torch_nnmath.lightning import GradientCheck, SwapFormulas

pytestmark = LIGHTNING_MARKS


@pytest.mark.filterwarnings("ignore::torch_nnmath.deferred.MaterializedLogits")
def test_fit_swaps_a_boring_model_and_restores_it():
    class Spy(BoringModel):
        def training_step(self, batch, batch_idx):
            self.layer_type = type(self.layer)
            return super().training_step(batch, batch_idx)

    model, callback = Spy(), SwapFormulas()
    layer, parameters = model.layer, [*model.parameters()]
    make_trainer(callback, max_steps=3).fit(model)
    assert model.layer_type is nn.Linear
    assert model.layer is layer
    assert type(layer) is torch.nn.Linear
    assert not is_marked(model)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert [*callback.report] == [("layer", "torch.nn.Linear", "torch_nnmath.nn.Linear")]
    # a BoringModel's loss is a squared error, which reads the logits, in validation too
    (log,) = callback.report.heads.values()
    assert (log.name, log.fused) == ("layer", 0)
    assert log.materialized.total() > 0


def test_losses_of_a_run_equal_those_of_pytorch():
    g = torch.Generator().manual_seed(2)
    t = torch.randint(CLASSES, (512,), generator=g)
    x = torch.randn(CLASSES, 12, generator=g)[t] + 0.1 * torch.randn(512, 12, generator=g)
    loader = DataLoader(TensorDataset(x, t), 64)
    swapped, plain = (Classifier(body=make_body_without_dropout()) for _ in range(2))
    callback = SwapFormulas()
    make_trainer(callback, max_epochs=5).fit(swapped, loader)
    make_trainer(max_epochs=5).fit(plain, loader)
    assert swapped.head_types == {nn.Linear}
    assert plain.head_types == {torch.nn.Linear}
    assert callback.report.heads["head"].fused == 40
    assert not callback.report.heads["head"].materialized
    ours, expected = (torch.stack(m.losses).detach() for m in (swapped, plain))
    assert ours[-1] < ours[0] / 2
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0)


def make_body_without_dropout():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.ReLU())


class ConfiguredLate(Classifier):
    """Its encoder exists at setup; its net is built after it."""

    def __init__(self):
        super().__init__()
        del self.head

    def configure_model(self):
        if not hasattr(self, "net"):
            self.net = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, CLASSES))

    def loss(self, batch):
        x, t = batch
        self.head_types.add(type(self.net[1]))
        return F.cross_entropy(self.net(self.body(x)), t)


@pytest.mark.parametrize("head", ["auto", "net.1", None])
def test_modules_of_configure_model_are_swapped(head):
    model, callback = ConfiguredLate(), SwapFormulas(head=head)
    make_trainer(callback, max_steps=2).fit(model, make_loader())
    assert model.head_types == {nn.Linear}
    assert {change.name for change in callback.report} == {"body.0", "body.2", "net.0", "net.1"}
    assert {*callback.report.heads} == ({"net.1"} if head else set())
    if head:
        assert callback.report.heads["net.1"].fused == 2
    assert type(model.net[1]) is type(model.body[0]) is torch.nn.Linear
    assert not is_marked(model)


class StepError(Exception):
    pass


@pytest.mark.parametrize("place", ["fit", "sanity", "validate", "test", "predict", "callback"])
def test_exception_restores_the_module(place):
    def fail(*args):
        assert type(model.head) is nn.Linear
        raise StepError

    model, callback = Classifier(), SwapFormulas()
    before = module_types(model)
    if place == "callback":
        other = Callback()
        other.on_train_batch_end = fail
        trainer = make_trainer(callback, other)
    else:
        step = {"fit": "training", "sanity": "validation", "validate": "validation"}
        setattr(model, f"{step.get(place, place)}_step", fail)
        trainer = make_trainer(callback)
    run = trainer.fit if place in ("sanity", "callback") else getattr(trainer, place)
    with pytest.raises(StepError):
        run(model, *[make_loader()] * (1 + (place == "sanity")))
    assert module_types(model) == before
    assert not is_marked(model)
    assert callback.report


def test_invalid_arguments_raise_and_restore():
    model = Classifier()
    with pytest.raises(ValueError, match="no module named 'haed'; similar names are 'head'"):
        make_trainer(SwapFormulas(head="haed")).fit(model, make_loader())
    assert not is_marked(model)
    with pytest.raises(TypeError, match="include must be"):
        make_trainer(SwapFormulas(include=3)).fit(model, make_loader())


@pytest.mark.parametrize("inference_mode", [False, True])
@pytest.mark.parametrize("method", ["validate", "test", "predict"])
def test_evaluation_equals_pytorch_and_counts_losses(method, inference_mode, tmp_path):
    model, callback, plain = Classifier(), SwapFormulas(), Classifier()
    logger = CSVLogger(tmp_path, "", "")
    trainer = make_trainer(callback, logger=logger, inference_mode=inference_mode)
    options = {} if method == "predict" else {"verbose": False}
    results = getattr(trainer, method)(model, make_loader(), **options)
    assert model.head_types == {nn.Linear}
    assert type(model.head) is torch.nn.Linear
    expected = getattr(make_trainer(), method)(plain, make_loader(), **options)
    torch.testing.assert_close(results, expected, check_dtype=False)
    log = callback.report.heads["head"]
    if method == "predict":
        assert log.fused == 0
        ((reason, count),) = log.materialized.items()
        assert (reason.split(" at ")[0], count) == ("result of predict_step", 4)
    else:
        assert log.fused == 4
        assert not log.materialized
        assert read_metrics(tmp_path)["head/fused_losses"] == [4]
    make_trainer(callback).fit(model, make_loader())
    assert callback.report.heads["head"].fused == 4
    assert not is_marked(model)


class ReturnsLogits(Classifier):
    """Returns its logits from the training step, or keeps them as an attribute."""

    is_kept = False

    def training_step(self, batch, batch_idx):
        x, t = batch
        z = self.head(self.body(x))
        if self.is_kept:
            self.last_logits = z
            return F.cross_entropy(z, t)
        return {"loss": F.cross_entropy(z, t), "logits": z}


class ReadsLogits(Callback):
    def __init__(self):
        self.logits = []

    def on_train_batch_end(self, trainer, pl_module, outputs, *_):
        logits = pl_module.last_logits if pl_module.is_kept else outputs["logits"]
        self.logits.append(logits.detach() + 0)


@pytest.mark.filterwarnings("ignore::torch_nnmath.deferred.MaterializedLogits")
@pytest.mark.parametrize("is_kept", [False, True])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_logits_that_outlive_the_step_are_those_of_its_weights(accumulated, is_kept):
    logits = []
    for callbacks in ([callback := SwapFormulas()], []):
        model, reader = ReturnsLogits(body=make_body_without_dropout()), ReadsLogits()
        model.is_kept = is_kept
        trainer = make_trainer(*callbacks, reader, accumulate_grad_batches=accumulated)
        trainer.fit(model, make_loader())
        logits.append(torch.stack(reader.logits))
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
    log = callback.report.heads["head"]
    assert log.fused == 4
    assert any("use after the training step" in reason for reason in log.materialized)


@pytest.mark.filterwarnings("ignore::torch_nnmath.deferred.MaterializedLogits")
def test_module_that_keeps_its_logits_passes_later_gradient_checks():
    model = ReturnsLogits(body=make_body_without_dropout())
    model.is_kept = True
    check = GradientCheck(every_n_steps=2)
    make_trainer(SwapFormulas(), check).fit(model, make_loader())
    assert "last_logits" in vars(model)


class OptimizesManually(ReturnsLogits):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        loss = super().training_step(batch, batch_idx)["loss"]
        z = self.head(self.body(batch[0]))  # alive in the optimizer's step
        optimizer.zero_grad()
        self.manual_backward(loss + F.cross_entropy(z, batch[1]))
        optimizer.step()


def test_logits_of_manual_optimization_are_not_computed():
    callback = SwapFormulas()
    make_trainer(callback).fit(OptimizesManually(), make_loader())
    log = callback.report.heads["head"]
    assert log.fused == 8
    assert not log.materialized


def test_predictions_keep_their_values_after_training():
    model, plain, callback = Classifier(), Classifier(), SwapFormulas()
    predictions = make_trainer(callback).predict(model, make_loader())
    make_trainer().fit(model, make_loader())
    expected = make_trainer().predict(plain, make_loader())
    torch.testing.assert_close([z + 0 for z in predictions], expected)


def test_modules_swapped_before_stay_swapped():
    model = Classifier()
    report = torch_nnmath.swap(model, include=["head", "body.0"], head="body.0")
    before, log = module_types(model), report.heads["body.0"]
    callback = SwapFormulas(head="head")
    make_trainer(callback, max_steps=2).fit(model, make_loader())
    assert callback.report.heads["head"].fused == 2
    assert [change.name for change in callback.report] == ["body.2"]
    assert module_types(model) == before
    assert vars(model.body[0])["_nnmath_swapped"] is log
    # "auto" keeps an existing head
    with pytest.warns(torch_nnmath.deferred.MaterializedLogits):
        make_trainer(callback := SwapFormulas(), max_steps=2).fit(model, make_loader())
    assert callback.report.heads == {"body.0": log}
    torch_nnmath.unswap(model)
    assert module_types(model) == module_types(Classifier())


def test_report_is_logged_once_and_counts_at_the_end(caplog):
    make_trainer(SwapFormulas(), max_steps=2).fit(Classifier(), make_loader(), make_loader())
    text = "\n".join(record.getMessage() for record in caplog.records)
    assert "head    torch.nn.Linear  ->  torch_nnmath.nn.Linear  head\n3 modules changed" in text
    assert "head head: 4 losses without logits so far" in text  # two of them in validation
    assert text.count("modules changed") == 1


def test_callback_can_be_used_again():
    callback = SwapFormulas(head="head")
    for _ in range(2):
        model = Classifier()
        make_trainer(callback, max_steps=2).fit(model, make_loader())
        assert [change.name for change in callback.report] == ["body.0", "body.2", "head"]
        assert callback.report.heads["head"].fused == 2
        assert not is_marked(model)


def test_counts_are_logged_once_at_the_step_of_epoch_metrics(tmp_path):
    """Validation within fit is counted, but has no row of its own."""
    logger = CSVLogger(tmp_path, "", "")
    trainer = make_trainer(SwapFormulas(), logger=logger, max_epochs=2, val_check_interval=0.5)
    trainer.fit(Classifier(), make_loader(), make_loader())
    (path,) = tmp_path.rglob("metrics.csv")
    rows = [*csv.DictReader(path.read_text().splitlines())]
    counts = [(row["step"], row["head/fused_losses"]) for row in rows if row["head/fused_losses"]]
    epoch_steps = [row["step"] for row in rows if row["mean_epoch"]]
    assert [step for step, _ in counts] == epoch_steps == ["3", "7"]
    sanity, training, validation = 2, 4, 8
    assert [float(count) for _, count in counts] == [
        sanity + (training + validation) * epoch for epoch in (1, 2)
    ]


class WithoutNorm(Classifier):
    """Before a norm a bias has no gradient but for rounding, of which Adam takes the sign."""

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        layers = torch.nn.Linear(12, 16), torch.nn.Tanh(), torch.nn.Dropout(0.3)
        super().__init__(seed, torch.nn.Sequential(*layers))


def test_checkpoints_resume_with_and_without_the_callback(tmp_path):
    uninterrupted = WithoutNorm()
    torch.manual_seed(3)
    make_trainer(max_epochs=4).fit(uninterrupted, make_loader())
    for saves_swapped, resumes_swapped in [(True, False), (False, True), (True, True)]:
        path = tmp_path / f"{saves_swapped}{resumes_swapped}"
        model = WithoutNorm()
        torch.manual_seed(3)
        trainer = make_trainer(
            *[SwapFormulas()] * saves_swapped,
            max_epochs=2,
            enable_checkpointing=True,
            default_root_dir=path,
        )
        trainer.fit(model, make_loader())
        rng_state = torch.get_rng_state()
        (checkpoint,) = path.rglob("*.ckpt")
        contents = torch.load(checkpoint, weights_only=False)
        assert contents["state_dict"].keys() == uninterrupted.state_dict().keys()
        loaded = WithoutNorm.load_from_checkpoint(checkpoint)
        torch.testing.assert_close(copy_weights(loaded), copy_weights(model), rtol=0, atol=0)
        assert module_types(loaded) == module_types(uninterrupted)
        resumed = WithoutNorm(seed=5)
        torch.set_rng_state(rng_state)
        trainer = make_trainer(*[SwapFormulas()] * resumes_swapped, max_epochs=4)
        trainer.fit(resumed, make_loader(), ckpt_path=checkpoint, weights_only=False)
        assert trainer.global_step == 16
        assert resumed.head_types == {nn.Linear if resumes_swapped else torch.nn.Linear}
        expected = copy_weights(uninterrupted)
        torch.testing.assert_close(copy_weights(resumed), expected, rtol=1e-4, atol=1e-5)
