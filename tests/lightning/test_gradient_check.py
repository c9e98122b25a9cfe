"""GradientCheck: what it compares, with which tolerance, and that training stays as it is."""

import threading

import numpy as np
import pytest
import torch
from lightning_models import (
    LIGHTNING_MARKS,
    Classifier,
    copy_weights,
    make_loader,
    make_trainer,
    read_metrics,
)
from torch.nn import functional as F
from torch.utils.data import DataLoader

from torch_nnmath import nn

pytest.importorskip("lightning.pytorch")
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger

from torch_nnmath.lightning import GradientCheck, GradientError, SwapFormulas
from torch_nnmath.lightning._comparison import choose_limits
from torch_nnmath.lightning._swap_state import has_own_options

pytestmark = LIGHTNING_MARKS


class SideEffects(Classifier):
    """Draws random numbers, changes its batch, writes to the Trainer and to its logger."""

    def training_step(self, batch, batch_idx):
        x, _ = batch
        x += 0.1 * torch.randn_like(x)
        self.logger.log_metrics({"own": float(batch_idx)})
        self.trainer.own_counter = getattr(self.trainer, "own_counter", 0) + 1
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("is_swapped", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_is_bitwise_the_same_with_the_check(tmp_path, is_swapped, precision):
    def train(folder, *checks):
        model, gradients, spy = SideEffects(), [], Callback()
        spy.on_before_optimizer_step = lambda trainer, model, optimizer: gradients.extend(
            p.grad.clone() for p in model.parameters()
        )
        torch.manual_seed(0)
        trainer = make_trainer(
            *[SwapFormulas()] * is_swapped,
            *checks,
            spy,
            max_epochs=2,
            precision=precision,
            logger=CSVLogger(folder, "", ""),
            log_every_n_steps=1,
        )
        trainer.fit(model, make_loader())
        assert trainer.own_counter == 8
        metrics = read_metrics(folder)
        assert {"loss", "mean_step", "mean_epoch", "own"} <= {*metrics}
        return {
            "weights": copy_weights(model),
            "optimizer": trainer.optimizers[0].state_dict()["state"],
            "gradients": gradients,
            "losses": [v.detach() for v in model.losses],
            "rng": torch.get_rng_state(),
            "metrics": {
                name: values
                for name, values in metrics.items()
                if not name.startswith(("gradient_error", "step"))
            },
        }

    expected = train(tmp_path / "without")
    found = train(tmp_path / "with", GradientCheck(2))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_errors_are_small_in_every_precision(precision):
    model = Classifier()
    callbacks = [swap := SwapFormulas(), check := GradientCheck(2, parameters=7, entries=7)]
    make_trainer(*callbacks, precision=precision).fit(model, make_loader())
    assert swap.report.heads["head"].fused == 4
    error = check.errors["gradient_error/pytorch"]
    assert error < (1e-5 if precision == "64-true" else 1e-1)
    # the second comparison is in float64 at any precision
    assert check.errors["gradient_error/numerical"] < 1e-5
    assert check.errors["gradient_error/uncertainty"] < 1e-3


def test_tolerance_argument_replaces_that_of_the_precision():
    trainer = make_trainer(SwapFormulas(), GradientCheck(1, tolerance=1e-6), precision="bf16-mixed")
    with pytest.raises(GradientError, match="PyTorch's own operations give"):
        trainer.fit(Classifier(), make_loader())


HALF, SINGLE, DOUBLE = (
    [*torch.nn.Linear(2, 2).to(dtype).parameters()]
    for dtype in (torch.bfloat16, torch.float32, torch.float64)
)


@pytest.mark.parametrize(
    ("precision", "parameters", "tolerance"),
    [
        ("32-true", SINGLE, 1e-3),
        ("64-true", DOUBLE, 1e-5),
        ("bf16-true", HALF, 1e-1),
        ("bf16-mixed", SINGLE, 1e-1),
        ("transformer-engine", SINGLE, 1e-1),
        ("32-true", HALF, 1e-1),
        ("32-true", [], 1e-5),  # without parameters nothing is rounded
    ],
)
def test_tolerance_depends_on_precision_and_parameters(precision, parameters, tolerance):
    assert choose_limits(precision, parameters).tolerance == tolerance


def test_tolerance_is_larger_for_less_precise_matrix_products():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert choose_limits("32-true", SINGLE).tolerance == 1e-2
    finally:
        torch.set_float32_matmul_precision(before)


def test_accumulated_gradients_are_checked_at_the_first_batch_of_a_step():
    checked = []

    class Spy(GradientCheck):
        def _compare(self, replay, step):
            checked.append((step, replay.batch_idx))
            return super()._compare(replay, step)

    swapped, plain = Classifier(), Classifier()
    callback = SwapFormulas()
    for model, callbacks in [(swapped, [callback, Spy(2)]), (plain, [])]:
        torch.manual_seed(0)
        trainer = make_trainer(*callbacks, accumulate_grad_batches=2, max_epochs=2)
        trainer.fit(model, make_loader())
    assert checked == [(0, 0), (2, 0)]
    assert callback.report.heads["head"].fused == 8
    ours, expected = (torch.stack(m.losses).detach() for m in (swapped, plain))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=0)


def test_modules_with_own_options_are_not_replaced_by_pytorchs():
    class OwnLoss(Classifier):
        def __init__(self):
            super().__init__()
            self.own = nn.CrossEntropyLoss(base=2, z_loss=0.1)
            self.plain = nn.CrossEntropyLoss()

        def loss(self, batch):
            z = self.head(self.body(batch[0]))
            return self.own(z, batch[1]) + self.plain(z, batch[1])

    make_trainer(check := GradientCheck(1, parameters=9)).fit(OwnLoss(), make_loader())
    assert check.errors["gradient_error/pytorch"] < 1e-3


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Tanh(), False),
        (nn.CrossEntropyLoss(), False),
        (nn.CrossEntropyLoss(base=2), True),
        (nn.CrossEntropyLoss(softcap=3.0), True),
        (nn.LinearCrossEntropyLoss(2, 3), False),
        (nn.LinearCrossEntropyLoss(2, 3, logit_scale=0.5), True),
        (nn.LinearCrossEntropyLoss(2, 3, logit_scale=torch.nn.Parameter(torch.ones(()))), True),
    ],
)
def test_has_own_options(module, expected):
    assert has_own_options(module) == expected


class Float32Norm(torch.nn.Module):
    """Names float32 and uses the default type, as norms and rotations of language models do."""

    def forward(self, x):
        angles = torch.arange(16, dtype=torch.float32)[None]
        wide = x.to(torch.float32) @ torch.eye(16) + angles.cos() * x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True))).to(x.dtype)


class Float32Loss(Classifier):
    def loss(self, batch):
        z = self.head(self.body(batch[0])).float()
        return F.cross_entropy(z, batch[1]) + z.softmax(-1, dtype=torch.float32).pow(2).mean()


@pytest.mark.filterwarnings("ignore::torch_nnmath.deferred.MaterializedLogits")
def test_explicit_and_default_float32_are_replaced_by_float64():
    body = torch.nn.Sequential(torch.nn.Linear(12, 16), Float32Norm())
    callbacks = [SwapFormulas(), check := GradientCheck(1, parameters=9, entries=9)]
    make_trainer(*callbacks).fit(Float32Loss(body=body), make_loader())
    assert check.errors["gradient_error/numerical"] < 1e-5
    assert check.errors["gradient_error/uncertainty"] < 1e-4


def test_inaccurate_differences_are_uncertain_and_no_error():
    class RoughLoss(Classifier):
        """Its differences with the step 1e-5 are wrong by a factor of sin(1)."""

        def loss(self, batch):
            return super().loss(batch) + 1e-5 * torch.sin(1e5 * self.head.bias).sum()

    make_trainer(check := GradientCheck(1, parameters=9, entries=9)).fit(RoughLoss(), make_loader())
    assert check.errors["gradient_error/numerical"] < 1e-5
    assert check.errors["gradient_error/uncertainty"] > 1e-1


class ForwardCounter(torch.nn.Module):
    """A buffer that each forward changes and the loss depends on."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x * (1 + self.calls)


class CountsInAttribute(torch.nn.Module):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return x * (1 + self.calls)


class AddsNoise(torch.nn.Module):
    """Draws from a generator of its own."""

    def __init__(self, make_generator):
        super().__init__()
        self.calls, self.generators = 0, {"noise": make_generator(0)}

    def forward(self, x):
        self.calls += 1
        generator = self.generators["noise"]
        if isinstance(generator, torch.Generator):
            return x + torch.randn(x.shape, dtype=x.dtype, generator=generator)
        return x + torch.from_numpy(generator.standard_normal(x.shape)).to(x.dtype)


class DecaysWeight(torch.nn.Module):
    """A frozen parameter that each forward changes in place."""

    def __init__(self):
        super().__init__()
        self.calls, self.layer = 0, torch.nn.Linear(16, 16).requires_grad_(False)

    def forward(self, x):
        self.calls += 1
        self.layer.weight.mul_(0.5)
        return self.layer(x)


@pytest.mark.parametrize(
    "make_layer",
    [
        ForwardCounter,
        CountsInAttribute,
        lambda: AddsNoise(np.random.default_rng),
        lambda: AddsNoise(torch.Generator().manual_seed),
        DecaysWeight,
    ],
    ids=["buffer", "attribute", "numpy.Generator", "torch.Generator", "frozen parameter"],
)
def test_every_recomputed_loss_starts_with_the_state_of_the_batch(make_layer):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        body = torch.nn.Sequential(torch.nn.Linear(12, 16), make_layer(), torch.nn.Tanh())
    check = GradientCheck(1, parameters=7, entries=7)
    make_trainer(check).fit(model := Classifier(body=body), make_loader())
    assert check.errors["gradient_error/uncertainty"] < 1e-3
    assert check.errors["gradient_error/numerical"] < 1e-5
    assert model.body[1].calls == 4


class HoldsTensors:
    """An object of the user, which no search in lists and dicts enters."""

    logits = None


@pytest.mark.filterwarnings("ignore::torch_nnmath.deferred.MaterializedLogits")
def test_module_that_keeps_its_logits_in_an_object_is_copied():
    class Keeper(Classifier):
        def __init__(self):
            super().__init__()
            self.kept = HoldsTensors()

        def training_step(self, batch, batch_idx):
            self.kept.logits = self.head(self.body(batch[0]))
            return F.cross_entropy(self.kept.logits, batch[1])

    make_trainer(check := GradientCheck(2), SwapFormulas()).fit(model := Keeper(), make_loader())
    assert check.errors["gradient_error/numerical"] < 1e-5
    assert model.kept.logits.grad_fn is not None


@pytest.mark.parametrize("obstacle", [threading.Lock(), (x for x in ())], ids=["lock", "generator"])
def test_module_that_cannot_be_copied_raises_with_the_attribute(obstacle):
    model = Classifier()
    model.body[2].tools = {"held": obstacle}
    message = "GradientCheck copies the module, .* its attribute 'body.2.tools' of type dict"
    with pytest.raises(RuntimeError, match=message):
        make_trainer(GradientCheck(1)).fit(model, make_loader())


def test_choice_of_entries_depends_on_step_and_seed_alone():
    def compared_entries(seed):
        entries = []

        class Spy(GradientCheck):
            def _compare(self, replay, step):
                for c in super()._compare(replay, step):
                    entries.append((step, c.kind, c.parameter, c.entry))
                    yield c

        torch.manual_seed(0)
        spy = Spy(2, parameters=2, entries=3, seed=seed)
        make_trainer(spy).fit(Classifier(), make_loader())
        return entries

    first = compared_entries(0)
    kinds = [kind for step, kind, *_ in first if step == 0]
    assert kinds == ["pytorch"] * 2 + ["numerical"] * 4  # three entries and a direction
    parameters = [{name for step, _, name, _ in first if step == k} for k in (0, 2)]
    assert parameters[0] != parameters[1]
    assert compared_entries(0) == first
    assert compared_entries(1) != first


def test_batches_without_finite_loss_are_skipped():
    class DictStep(Classifier):
        """A training step without `batch_idx` that returns a dict, or None."""

        def training_step(self, batch):
            x, t = batch["x"], batch["t"]
            if (t < 0).all():
                return None
            return {"loss": self.loss((x, t)), "more": 3}

    x, t = next(iter(make_loader()))
    batches = [
        {"x": x, "t": t},
        {"x": x, "t": t * 0 - 1},  # no loss
        {"x": x * torch.inf, "t": t},  # a loss that is not finite
    ]
    loader = DataLoader(batches, batch_size=None)
    make_trainer(check := GradientCheck(1)).fit(DictStep(), loader)
    assert check.errors == dict.fromkeys(check.errors, 0.0)  # those of the last batch


def test_frozen_and_unused_parameters_are_checked_without_error():
    model = Classifier()
    model.head.bias.requires_grad_(False)
    model.unused = torch.nn.Parameter(torch.ones(3))
    make_trainer(check := GradientCheck(1, parameters=99, entries=9)).fit(model, make_loader())
    assert check.errors["gradient_error/numerical"] < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, "must be at least"),
        ({"parameters": 0}, "must be at least"),
        ({"entries": -1}, "must be at least"),
        ({"on_error": "print"}, '"raise" or "warn"'),
    ],
)
def test_invalid_argument_raises(options, message):
    with pytest.raises(ValueError, match=message):
        GradientCheck(**options)


def test_manual_optimization_raises():
    model = Classifier()
    model.automatic_optimization = False
    with pytest.raises(ValueError, match="needs automatic optimization"):
        make_trainer(GradientCheck()).fit(model, make_loader())


def test_training_step_of_an_iterator_raises():
    class IteratorStep(Classifier):
        def training_step(self, dataloader_iter):
            return self.loss(next(dataloader_iter)[0])

    with pytest.raises(ValueError, match="not an iterator"):
        make_trainer(GradientCheck()).fit(IteratorStep(), make_loader())


def test_step_that_fails_in_float64_raises_unless_entries_is_0():
    class Float32Only(torch.nn.Module):
        def forward(self, x):
            if x.dtype == torch.float64:
                raise TypeError("float32 only")
            return x

    body = torch.nn.Sequential(torch.nn.Linear(12, 16), Float32Only())
    with pytest.raises(RuntimeError, match="entries=0 skips"):
        make_trainer(GradientCheck()).fit(Classifier(body=body), make_loader())
    make_trainer(GradientCheck(entries=0)).fit(Classifier(body=body), make_loader())


def test_step_without_loss_in_float64_skips_the_numerical_comparison():
    class LossInFloat32Only(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if loss.dtype == torch.float64 else loss

    make_trainer(check := GradientCheck()).fit(LossInFloat32Only(), make_loader())
    assert check.errors["gradient_error/numerical"] == 0
