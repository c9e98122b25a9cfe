"""The callback that checks the gradients of training steps."""

from __future__ import annotations

import inspect
import random
import warnings
from collections.abc import Iterator
from typing import Any, Literal

from torch_nnmath.lightning._comparison import (
    Comparison,
    Limits,
    choose_limits,
    compare_entries,
)
from torch_nnmath.lightning._lightning import Callback, log_metrics
from torch_nnmath.lightning._numerical import NumericalCheck
from torch_nnmath.lightning._replay import LossReplay

SHARDING_STRATEGIES = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy")


class GradientError(AssertionError):
    """A gradient differs from its expected value by more than the tolerance.

    Attributes:
        step: the number of optimizer steps before the check.
        parameter: the parameter's name in the LightningModule; "" for all parameters together.
        entry: the entry's indices in the parameter.
        found: the entry of the gradient, or its derivative along a direction in all parameters.
        expected: the value that it was compared with.
        error: their distance, relative to the gradient.

    In a process that raises it because of another process's gradient, only `step` is set.
    """

    def __init__(self, message: str, step: int, comparison: Comparison | None = None):
        super().__init__(message)
        self.step = step
        if comparison is not None:
            self.parameter, self.entry = comparison.parameter, comparison.entry
            self.found, self.expected = comparison.found, comparison.expected
            self.error = comparison.error


class GradientCheck(Callback):
    """Compares gradients with PyTorch's and with numerical differentiation during training.

    Before every n-th step, copies of the module compute the batch's loss by `training_step`. Each
    copy starts with the module's mode and state, its counters and generators of random numbers
    included, and with the same global random state, so that dropout is the same.

    - The first comparison is in the training's precision, with a copy that has PyTorch's own
      modules. The gradients of some parameters are compared entry by entry.
    - The second is in float64, with numerical differentiation of the loss of such a copy. So it
      also detects errors in a backward that the user has written.
      A few entries of the gradient are compared with (c(w + h) - c(w - h)) / 2h, where
      h = 1e-5 max(1, |w|). The gradient as a whole is compared along a random direction in all
      parameters, with h = 1e-7, which detects one wrong entry among many; bisection then finds it.
      The uncertainty of such a difference is its distance from that with 2h, plus a bound for
      rounding.

    Errors are relative to the largest entry of the parameter's expected gradient, or to a
    thousandth (in half precision a tenth) of the largest entry of all gradients if that is more.
    Along the random direction they are relative to the gradient's norm. Each check logs the maxima
    over all processes:

        gradient_error/pytorch      error of the first comparison
        gradient_error/numerical    error of the second, beyond the uncertainty
        gradient_error/uncertainty  uncertainty of the differences

    The gradient is that of the loss that `training_step` returns. Changes by parameter hooks,
    `on_after_backward`, clipping or an override of `backward` are not checked. Numerical
    differentiation does not know `detach`: for a loss that depends on parameters through a
    detached tensor, skip the second comparison by `entries=0`.

    Training is the same as without the check: weights, gradients, buffers, metrics, random numbers
    and optimizers do not change. The copies repeat other side effects of `training_step`, such as
    on a global counter. What they log is discarded, and what they write to the Trainer does not
    reach it. A check costs two steps in the training's precision, one in float64 and 4 · (entries +
    1) forward passes in float64, and needs memory for two more modules and a step in float64. A
    batch without a finite loss is skipped. With gradient accumulation the first batch of a step is
    checked.

    Args:
        every_n_steps: number of optimizer steps between checks; the first check is before the first
            step.
        parameters: number of parameters whose entries are compared, drawn anew at each check.
        entries: number of entries compared numerically, taken from these parameters in turn: either
            the gradient's largest entry or any, at random. 0 skips the second comparison, for a
            module that cannot compute in float64.
        tolerance: the largest allowed error of the first comparison. None is 1e-5 for float64, 1e-3
            for float32, 1e-2 for float32 with less precise matrix products such as TF32, and 1e-1
            if the Trainer's precision or a parameter is half or less. Autocast that `training_step`
            enters itself is not detected.
        numerical_tolerance: the largest allowed error of the second comparison, which is in float64
            at any precision of the training.
        on_error: "raise" a `GradientError` in all processes, or "warn" with a UserWarning.
        seed: seed of the random choices.

    Attributes:
        errors: the metrics of the last check.

    Raises:
        ValueError: an invalid argument; when fit starts, a strategy that shards parameters, manual
            optimization, or a training step that takes an iterator.
        GradientError: an error above its tolerance.
        RuntimeError: an attribute of the module cannot be copied, such as a lock or a Python
            generator, or the training step failed in float64.

    >>> GradientCheck(every_n_steps=500, on_error="warn").errors
    {}
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        parameters: int = 4,
        entries: int = 4,
        tolerance: float | None = None,
        numerical_tolerance: float = 1e-5,
        on_error: Literal["raise", "warn"] = "raise",
        seed: int = 0,
    ):
        super().__init__()
        for name, value, minimum in (
            ("every_n_steps", every_n_steps, 1),
            ("parameters", parameters, 1),
            ("entries", entries, 0),
        ):
            if value < minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {value}")
        if on_error not in ("raise", "warn"):
            raise ValueError(f'on_error must be "raise" or "warn", got {on_error!r}')
        self.every_n_steps, self.parameters, self.entries = every_n_steps, parameters, entries
        self.tolerance, self.numerical_tolerance = tolerance, numerical_tolerance
        self.on_error, self.seed = on_error, seed
        self.errors: dict[str, float] = {}
        self._last_checked_step: int | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self._last_checked_step = None
        strategy_classes = [cls.__name__ for cls in type(trainer.strategy).__mro__]
        for strategy in SHARDING_STRATEGIES:
            if strategy in strategy_classes:
                raise ValueError(
                    f"GradientCheck copies the module, but {strategy} shards its parameters: check "
                    'on one device or under "ddp"'
                )
        if not pl_module.automatic_optimization:
            raise ValueError(
                "GradientCheck needs automatic optimization: it calls training_step for the loss"
            )
        if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
            raise ValueError(
                "GradientCheck needs a training_step that takes a batch, not an iterator"
            )

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step % self.every_n_steps or step == self._last_checked_step:
            return
        self._last_checked_step = step
        replay = LossReplay(trainer, pl_module, batch, batch_idx)
        comparisons = [*self._compare(replay, step)]
        self.errors = log_metrics(trainer, _collect_metrics(comparisons))
        failures = [c for c in comparisons if c.error > c.tolerance]
        has_any_failed = trainer.strategy.reduce_boolean_decision(bool(failures), all=False)
        if failures:
            worst = max(failures, key=lambda c: c.error / c.tolerance)
            message = f"step {step}: {worst}"
            if self.on_error == "raise":
                raise GradientError(message, step, worst)
            warnings.warn(message, stacklevel=2)
        elif has_any_failed and self.on_error == "raise":
            raise GradientError(f"step {step}: a gradient is wrong in another process", step)

    def _compare(self, replay: LossReplay, step: int) -> Iterator[Comparison]:
        """Yields the comparisons of a batch; none if its loss is not finite."""
        rng = random.Random(f"{self.seed} {step}")
        parameters = dict(replay.pl_module.named_parameters())
        trainable = [
            name
            for name, p in parameters.items()
            if p.requires_grad and p.numel() and p.is_floating_point()
        ]
        names = rng.sample(trainable, min(self.parameters, len(trainable)))
        gradients = replay.compute_gradients(names)
        if gradients is None:
            return
        expected = replay.compute_gradients(names, is_pytorch=True)
        assert expected is not None
        limits = choose_limits(str(replay.trainer.precision), parameters.values())
        if self.tolerance is not None:
            limits = Limits(self.tolerance, limits.scale_floor)
        for name in names:
            yield compare_entries(name, gradients, expected, limits)
        if self.entries and names:
            try:
                yield from self._compare_numerically(replay, trainable, names, rng)
            except Exception as error:  # a training step may raise anything
                raise RuntimeError(
                    "GradientCheck could not compute the loss of a copy of the module in float64: "
                    "entries=0 skips the comparison with numerical differentiation"
                ) from error

    def _compare_numerically(
        self, replay: LossReplay, trainable: list[str], names: list[str], rng: random.Random
    ) -> Iterator[Comparison]:
        gradients = replay.compute_gradients(trainable, is_double=True)
        if gradients is None:
            return
        check = NumericalCheck(replay, gradients, self.numerical_tolerance)
        for k in range(self.entries):
            name = names[k % len(names)]
            g = gradients.by_name[name]
            index = int(g.abs().argmax()) if rng.random() < 0.5 else rng.randrange(g.numel())
            yield check.compare_entry(name, index)
        yield check.compare_direction(seed=rng.getrandbits(63))


def _collect_metrics(comparisons: list[Comparison]) -> dict[str, float]:
    """Returns the largest error of each kind and the largest uncertainty."""
    metrics = {f"gradient_error/{key}": 0.0 for key in ("pytorch", "numerical", "uncertainty")}
    for comparison in comparisons:
        for key, value in (
            (comparison.kind, comparison.error),
            ("uncertainty", comparison.uncertainty),
        ):
            metrics[f"gradient_error/{key}"] = max(metrics[f"gradient_error/{key}"], value)
    return metrics
