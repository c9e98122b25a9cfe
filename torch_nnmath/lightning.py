"""Callbacks for Lightning's Trainer: the formulas in its module, its gradients checked, its memory.

    trainer = Trainer(callbacks=[SwapFormulas(), GradientCheck(every_n_steps=500), PeakMemory()])

They work with `lightning.pytorch` and with `pytorch_lightning`: they derive from the first's
Callback where it is installed, and either's Trainer calls them with its own modules. Metrics go to
the Trainer's loggers, on the same axis of steps as those of `self.log`.
"""

from __future__ import annotations

import copy
import ctypes
import inspect
import math
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from torch_nnmath.deferred import HeadLog
from torch_nnmath.swapping import _MARK, _THEIRS, Report, Selector, swap, unswap

try:
    from lightning.pytorch import Callback
    from lightning.pytorch.loggers.logger import DummyLogger
    from lightning.pytorch.utilities.seed import isolate_rng
except ModuleNotFoundError:
    try:
        from pytorch_lightning import Callback  # type: ignore[assignment]
        from pytorch_lightning.loggers.logger import DummyLogger  # type: ignore[assignment]
        from pytorch_lightning.utilities.seed import isolate_rng
    except ModuleNotFoundError as error:
        raise ImportError(
            "torch_nnmath.lightning needs Lightning: pip install torch-nnmath[lightning]"
        ) from error
from lightning_utilities.core.apply_func import apply_to_collection  # which both bring
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

__all__ = ["GradientCheck", "GradientError", "PeakMemory", "SwapFormulas"]

MIB = 2**20


class SwapFormulas(Callback):
    """Turns the module over to the formulas, by `torch_nnmath.swap`, while the Trainer runs it.

    It is turned over when fit, validate, test or predict starts, and is as it was when they end, be
    it by an exception; what was swapped before stays so. Checkpoints are the plain module's, resume
    it and are resumed by it. What is changed is logged at the start, and at the end what became of
    the head's logits; at the end of each epoch, but for predict's, the metrics

        head/fused_losses        losses so far that were computed without logits
        head/materialized_logits times so far that logits were computed

    of all heads and processes. Validation within fit counts too. The Trainer's validate, test and
    predict run in inference mode, where all logits are plain and neither is counted;
    `Trainer(inference_mode=False)` keeps the head.

    A net that `configure_model` builds is met. A Linear that it builds and wraps by itself, as by
    FSDP2's `fully_shard(self.head)`, has a class of its own by then and is left, unless `swap` is
    called between. What sharding asks of the loss is in `docs/swapping.md`. Under a strategy that
    spawns processes the report stays in them.

    Args:
        include: which modules, as for `swap`.
        exclude: which modules not, as for `swap`.
        head: which Linear makes logits, as for `swap`. A name is that in the LightningModule.

    Attributes:
        report: the `Report` of the run that is going on, or else of the last.

    Raises, when the Trainer starts, what `swap` raises.

    >>> callback = SwapFormulas(exclude="encoder.*", head="model.lm_head")
    >>> callback.report
    no modules changed
    """

    def __init__(
        self,
        include: Selector | None = None,
        exclude: Selector | None = None,
        head: str | torch.nn.Module | None = "auto",
    ):
        super().__init__()
        self.include, self.exclude, self.head = include, exclude, head
        self.report = Report()
        self._before: dict[torch.nn.Module, Any] | None = None  # each module's mark
        self._is_complete = False

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._before = {module: vars(module).get(_MARK) for module in pl_module.modules()}
        self.report, self._is_complete = Report(), False
        self._swap(pl_module, None)  # before configure_model wraps it; which is the head, it shows

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if self._before is None or self._is_complete:
            return
        for module, mark in self._before.items():
            if isinstance(mark, HeadLog):  # was a head before
                vars(module)[_MARK] = mark
        self._swap(pl_module, self.head)
        self._is_complete = True
        rank_zero_info(f"{type(self).__name__}:\n{self.report}")

    on_validation_start = on_test_start = on_predict_start = on_fit_start

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._log(trainer)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn == "validate":  # and not fit
            self._log(trainer)

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._log(trainer)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._restore(pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._restore(pl_module)

    def _swap(self, pl_module: Any, head: Any) -> None:
        new = swap(pl_module, include=self.include, exclude=self.exclude, head=head)
        self.report = Report([*self.report, *new], new.heads, new.left)

    def _restore(self, pl_module: Any) -> None:
        if self._before is None:
            return
        for module in pl_module.modules():
            if _MARK in vars(module) and self._before.get(module) is None:
                unswap(module)
        for module, mark in self._before.items():
            if mark is not None:
                vars(module)[_MARK] = mark
        self._before = None
        for log in self.report.heads.values():
            rank_zero_info(repr(log))

    def _log(self, trainer: Any) -> None:
        heads = self.report.heads.values()
        if heads:
            counts = {
                "head/fused_losses": sum(log.fused for log in heads),
                "head/materialized_logits": sum(log.materialized.total() for log in heads),
            }
            is_fit = trainer.state.fn == "fit"  # whose epoch's metrics are at its last step
            _logged(trainer, counts, reduce_op="sum", earlier=int(is_fit))


class GradientError(AssertionError):
    """A gradient is not what it should be.

    Attributes:
        step: the optimizer's steps before it.
        parameter: the parameter's name in the LightningModule; "" for the gradient as a whole.
        entry: its indices.
        found, expected: the two numbers.
        error: how far they are apart, relative to the gradient.
    """

    def __init__(self, message: str, step: int, finding: Finding | None = None):
        super().__init__(message)
        self.step = step
        if finding is not None:
            self.parameter, self.entry = finding.parameter, finding.entry
            self.found, self.expected = finding.found, finding.expected
            self.error = finding.error


class GradientCheck(Callback):
    """Compares gradients with PyTorch's and with numerical differentiation while a module trains.

    Before every n-th step, the batch's loss is computed by `training_step` of copies of the module,
    in its mode and from its state of random numbers, so that dropout is the same in each:

    - by a copy as it is and one of PyTorch's modules, in the precision of the training. The
      gradients in a few parameters are compared entry by entry.
    - by a copy as it is and one of PyTorch's modules, in float64. A few entries of the gradients
      are compared with (c(w + h) - c(w - h)) / 2h, h = 1e-5 max(1, |w|), which shows what is wrong
      in a backward of the module's own too; and so is the gradient as a whole, all parameters
      moving at random, h = 1e-7 for each: one wrong entry among many shows in it, and is then
      looked for by halves. By how much the difference with 2h is another, and by its rounding, it
      may be wrong.

    An error is relative to the parameter's largest entry of the gradient that is expected, or to a
    thousandth (in half precision a tenth) of all parameters' largest, if this is more; for the
    gradient as a whole to its norm. The largest are logged at each check, over all processes, as

        gradient_error/pytorch      of the first comparison
        gradient_error/numerical    of the second, beyond what the difference may be wrong by
        gradient_error/uncertainty  what it may be wrong by

    The gradient is that of the loss that `training_step` returns: what hooks of parameters,
    `on_after_backward`, clipping or a `backward` of the module's own do to it is not looked at.

    The module's weights, gradients, buffers, metrics, random numbers and optimizers stay as they
    are: training goes on as without the check, but what `training_step` does elsewhere, as to a
    global counter, is done by the copies too. What they log goes nowhere, and what they write to
    the Trainer stays theirs. A check costs two steps in the training's precision, one in float64
    and 4 · (entries + 1) forward passes in float64, and the memory of two modules and a step in
    float64 beside what there is. A batch without a loss, or with one that is not finite, is passed
    over. Under gradient accumulation a step's first batch is taken.

    Args:
        every_n_steps: how many steps of the optimizer from one check to the next, the first before
            the first step.
        parameters: of how many parameters entries are compared, other ones at each check.
        entries: how many entries, of these in turn: the largest of the gradient or any, by chance.
            0 leaves the second comparison out, as for a module that cannot compute in float64.
        tolerance: the largest error of the first comparison. None is 1e-5 for float64, 1e-3 for
            float32, 1e-2 where its matrix products are less precise, as TF32, and 1e-1 where the
            Trainer's precision or a parameter is half or less; autocast that `training_step` enters
            by itself is not seen.
        numerical_tolerance: the largest error of the second, which is in float64 whatever the
            training's precision.
        on_error: "raise" a `GradientError`, in all processes, or "warn", as a UserWarning.
        seed: of what is drawn.

    Attributes:
        errors: the metrics of the last check.

    Raises:
        ValueError: an argument that is none of these; at the start of fit, a strategy that shards
            parameters, a module that optimizes by hand, a training step that takes an iterator.
        GradientError: an error beyond its tolerance.
        RuntimeError: the training step cannot be run in float64.

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
        for name, value, least in (
            ("every_n_steps", every_n_steps, 1),
            ("parameters", parameters, 1),
            ("entries", entries, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if on_error not in ("raise", "warn"):
            raise ValueError(f'on_error must be "raise" or "warn", got {on_error!r}')
        self.every_n_steps, self.parameters, self.entries = every_n_steps, parameters, entries
        self.tolerance, self.numerical_tolerance = tolerance, numerical_tolerance
        self.on_error, self.seed = on_error, seed
        self.errors: dict[str, float] = {}
        self._checked: int | None = None  # the last step that was

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self._checked = None
        strategies = [cls.__name__ for cls in type(trainer.strategy).__mro__]
        for strategy in ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"):
            if strategy in strategies:
                raise ValueError(
                    f"GradientCheck copies the module, and {strategy} shards its parameters: check "
                    'on one device or under "ddp"'
                )
        if not pl_module.automatic_optimization:
            raise ValueError(
                "GradientCheck calls training_step for its loss, and this one optimizes by hand"
            )
        if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
            raise ValueError("GradientCheck needs a training_step of a batch, not of an iterator")

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step % self.every_n_steps or step == self._checked:
            return
        self._checked = step
        findings = [*self._findings(_Run(trainer, pl_module, batch, batch_idx), step)]
        errors = dict.fromkeys((f"gradient_error/{kind}" for kind in LIMITED), 0.0)
        for f in findings:
            key = f"gradient_error/{f.kind}"
            errors[key] = max(errors[key], f.error)
            rest = "gradient_error/uncertainty"
            errors[rest] = max(errors[rest], f.uncertainty)
        self.errors = _logged(trainer, errors)
        wrong = [f for f in findings if f.error > f.limit]
        is_wrong = trainer.strategy.reduce_boolean_decision(bool(wrong), all=False)
        if wrong:
            worst = max(wrong, key=lambda f: f.error / f.limit)
            message = f"step {step}: {worst}"
            if self.on_error == "raise":
                raise GradientError(message, step, worst)
            warnings.warn(message, stacklevel=2)
        elif is_wrong and self.on_error == "raise":
            raise GradientError(f"step {step}: a gradient is wrong in another process", step)

    def _findings(self, run: _Run, step: int) -> Iterator[Finding]:
        draw = random.Random(f"{self.seed} {step}")
        named = dict(run.pl_module.named_parameters())
        checked = [
            name
            for name, p in named.items()
            if p.requires_grad and p.numel() and p.is_floating_point()
        ]
        names = draw.sample(checked, min(self.parameters, len(checked)))
        ours = run.gradients(names)
        if ours is None:
            return
        pytorchs = run.gradients(names, plain=True)
        assert pytorchs is not None
        tolerance, least = _tolerance(run.trainer, named.values())
        if self.tolerance is not None:
            tolerance = self.tolerance
        for name in names:
            yield _compared(name, ours.of[name], pytorchs, least, tolerance)
        if self.entries and names:
            try:
                yield from self._numerical_findings(run, checked, names, draw)
            except Exception as error:  # whatever a training step raises
                raise RuntimeError(
                    "GradientCheck could not compute the loss of a copy of the module in float64: "
                    "entries=0 leaves the comparison with numerical differentiation out"
                ) from error

    def _numerical_findings(
        self, run: _Run, checked: list[str], names: list[str], draw: random.Random
    ) -> Iterator[Finding]:
        ours = run.gradients(checked, double=True)
        if ours is None:
            return
        loss, limit = run.loss_along(), self.numerical_tolerance
        named = dict(run.pl_module.named_parameters())

        def of_entry(part: _Part) -> Finding:
            name, i, _ = part
            g = ours.of[name]
            entry, one = _entry(i, g.shape), torch.ones(1, dtype=g.dtype, device=g.device)
            h = 1e-5 * max(1.0, abs(named[name][entry].item()))
            difference = _difference(lambda times: loss([(part, one)], times), h)
            scale = max(_largest(g), 1e-3 * ours.largest)
            return _beside_difference(name, entry, g[entry].item(), *difference, scale, limit)

        for k in range(self.entries):
            name = names[k % len(names)]
            g = ours.of[name]
            i = int(g.abs().argmax()) if draw.random() < 0.5 else draw.randrange(g.numel())
            yield of_entry(_Part(name, i, i + 1))

        generator = torch.Generator().manual_seed(draw.getrandbits(63))
        direction = {
            name: torch.randn(g.numel(), generator=generator, dtype=g.dtype).to(g.device)
            for name, g in ours.of.items()
        }
        norm = math.hypot(*(g.norm().nan_to_num(0, 0).item() for g in ours.of.values()))

        def of_whole(parts: list[_Part]) -> Finding:
            moved = [(part, direction[part.parameter][part.start : part.stop]) for part in parts]
            found = sum((ours.of[p.parameter].flatten()[p.start : p.stop] @ v) for p, v in moved)
            difference = _difference(lambda times: loss(moved, times), 1e-7)
            return _beside_difference("", (), float(found), *difference, norm, limit)

        parts = [_Part(name, 0, g.numel()) for name, g in ours.of.items()]
        whole = of_whole(parts)
        if whole.error > limit:
            while halves := _halves(parts):
                parts = max(halves, key=lambda half: of_whole(half).error)
            entry = of_entry(*parts)
            whole = entry if entry.error > limit else whole
        yield whole


LIMITED = {
    "pytorch": "PyTorch's own operations give",
    "numerical": "numerical differentiation gives",
    "uncertainty": "",
}


class Finding(NamedTuple):
    """The entry of a gradient that is farthest off, or that was looked at."""

    kind: str
    parameter: str
    entry: tuple[int, ...]
    found: float
    expected: float
    error: float
    limit: float
    uncertainty: float = 0.0

    def __str__(self) -> str:
        where = f"gradient in {self.parameter}{list(self.entry)}"
        if not self.parameter:
            where = "derivative along a random direction in all parameters"
        return (
            f"the {where} is {self.found:.6g}, "
            f"{LIMITED[self.kind]} {self.expected:.6g}: the relative error is {self.error:.2g}, "
            f"{self.limit:.2g} is allowed"
        )


class _Part(NamedTuple):
    """Entries of a parameter, in the order of its indices."""

    parameter: str
    start: int
    stop: int


def _halves(parts: list[_Part]) -> list[list[_Part]]:
    """Of several parts, or of the entries of one; none of an entry."""
    if len(parts) > 1:
        return [parts[: len(parts) // 2], parts[len(parts) // 2 :]]
    (name, start, stop), middle = parts[0], (parts[0].start + parts[0].stop) // 2
    return [[_Part(name, start, middle)], [_Part(name, middle, stop)]] if middle > start else []


class _Gradients(NamedTuple):
    of: dict[str, Tensor]  # some parameters
    largest: float  # entry, of all


class _Run:
    """A batch that copies of the module compute the loss of."""

    def __init__(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int):
        self.trainer, self.pl_module, self.batch = trainer, pl_module, batch
        self.batch_idx = batch_idx

    def gradients(
        self, names: list[str], *, plain: bool = False, double: bool = False
    ) -> _Gradients | None:
        """In some parameters; None where there is no loss, or none that is finite."""
        twin = self.twin(plain, double)
        with isolate_rng():
            loss = self.loss(twin, double)
            if loss is None or not loss.isfinite():
                return None
            with _quiet(), _precision(self.trainer, double):
                loss.backward()
        named = dict(twin.named_parameters())
        gradients = {name: p.grad for name, p in named.items() if p.grad is not None}
        largest = max((_largest(g) for g in gradients.values() if g.numel()), default=0.0)
        return _Gradients({n: gradients.get(n, torch.zeros_like(named[n])) for n in names}, largest)

    def loss_along(self) -> Callable[[list[tuple[_Part, Tensor]], float], float]:
        """The loss in float64 by PyTorch, of parameters parts of which move along vectors."""
        twin = self.twin(plain=True, double=True)
        for p in twin.parameters():
            p.data = p.data.contiguous()
        flat = {name: p.detach().view(-1) for name, p in twin.named_parameters()}
        buffers = [(m._buffers, _copied(m._buffers)) for m in twin.modules() if m._buffers]

        def loss(moved: list[tuple[_Part, Tensor]], times: float) -> float:
            for there, before in buffers:
                there.update(_copied(before))
            there = [flat[part.parameter][part.start : part.stop] for part, _ in moved]
            before = [w.clone() for w in there]
            for w, (_, v) in zip(there, moved, strict=True):
                w.add_(v, alpha=times)
            with isolate_rng():
                c = self.loss(twin, double=True).item()
            for w, w_before in zip(there, before, strict=True):
                w.copy_(w_before)
            return c

        return loss

    def twin(self, plain: bool, double: bool) -> Any:
        """A copy that logs nothing, on demand with PyTorch's modules for ours, in float64."""
        parts = [vars(module) for module in self.pl_module.modules()]
        twin = _copied(self.pl_module, parts)
        if getattr(twin, "_compiler_ctx", None):  # compiled functions are the module's itself
            for name in ("forward", "training_step"):
                vars(twin).pop(name, None)
        if plain:
            unswap(twin)
        onlooker = _Onlooker(self.trainer)
        for module in twin.modules():
            if plain and type(module) in _THEIRS and _is_as_pytorchs(module):
                module.__class__ = _THEIRS[type(module)]
            if double:
                for name, value in vars(module).items():
                    if isinstance(value, Tensor):
                        vars(module)[name] = _double(value)
            if "_trainer" in vars(module):  # a LightningModule, of either package
                module._trainer = onlooker
                module.log = module.log_dict = _nowhere
        return twin.double() if double else twin

    def loss(self, twin: Any, double: bool) -> Any:
        batch = _copied(self.batch)
        if double:
            batch = apply_to_collection(batch, Tensor, _double)
        step = twin.training_step
        try:
            inspect.signature(step).bind(batch, self.batch_idx)
            arguments = [batch, self.batch_idx]
        except TypeError:
            arguments = [batch]
        with _quiet(), torch.enable_grad(), _precision(self.trainer, double):
            output = step(*arguments)
        return output["loss"] if isinstance(output, Mapping) else output


class _Onlooker:
    """What a copy takes for the Trainer: it reads what is there, and writes to itself."""

    def __init__(self, trainer: Any):
        self._seen, self.logger = trainer, DummyLogger()
        self.loggers = [self.logger]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._seen, name)


class _Widening(TorchFunctionMode):
    """float64 where a floating type is named, as by `logits.float()`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            func = Tensor.double
        named = {name: _widened(value) for name, value in (kwargs or {}).items()}
        return func(*map(_widened, args), **named)


def _widened(value: Any) -> Any:
    is_real = isinstance(value, torch.dtype) and value.is_floating_point
    return torch.float64 if is_real else value


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


@contextmanager
def _precision(trainer: Any, double: bool) -> Iterator[None]:
    """The training's, or float64."""
    if not double:
        with trainer.precision_plugin.train_step_context():
            yield
        return
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Widening():
            yield
    finally:
        torch.set_default_dtype(default)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of a training step, which will give them by itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _copied(x: Any, parts: Any = None) -> Any:
    """A deep copy, of tensors in `parts` that are in a graph too: of their values."""
    tensors = [v for v in tree_leaves(x if parts is None else parts) if isinstance(v, Tensor)]
    memo: Any = {id(v): v.detach().clone() for v in tensors if not v.is_leaf}
    return copy.deepcopy(x, memo)


def _nowhere(*args: Any, **kwargs: Any) -> None:
    pass


def _is_as_pytorchs(module: Any) -> bool:
    """Whether it computes what PyTorch's class of the name does."""
    options = module.options_of_ours() if hasattr(module, "options_of_ours") else {}
    return not any(
        isinstance(value, Tensor) or value != getattr(type(module), name, 1.0)
        for name, value in options.items()
    )


def _tolerance(trainer: Any, parameters: Any) -> tuple[float, float]:
    """The error that rounding may make; the part of the largest gradient it is relative to."""
    types = {p.dtype for p in parameters if p.is_floating_point()}
    precision = str(trainer.precision)
    if (
        "16" in precision
        or precision.startswith("transformer")
        or min((dtype.itemsize for dtype in types), default=4) < 4
    ):
        return 1e-1, 1e-1
    if torch.float32 in types:
        return (1e-3 if torch.get_float32_matmul_precision() == "highest" else 1e-2), 1e-3
    return 1e-5, 1e-3


def _compared(
    name: str, found: Tensor, pytorchs: _Gradients, least: float, limit: float
) -> Finding:
    """The entry that is farthest off; what is nan or infinite in both is no error."""
    a, b = found.double(), pytorchs.of[name].double()
    distance = (a - b).abs().masked_fill((a == b) | (a.isnan() & b.isnan()), 0).nan_to_num(math.inf)
    entry = _entry(int(distance.argmax()), found.shape)
    scale = max(_largest(b), least * pytorchs.largest)
    error = _ratio(distance[entry].item(), scale)
    return Finding("pytorch", name, entry, a[entry].item(), b[entry].item(), error, limit)


def _beside_difference(
    name: str,
    entry: tuple[int, ...],
    found: float,
    expected: float,
    uncertainty: float,
    scale: float,
    limit: float,
) -> Finding:
    if not math.isfinite(expected + uncertainty):  # nothing is known
        error, uncertainty = 0.0, math.inf
    elif not math.isfinite(found):
        error = math.inf
    else:
        error = max(abs(found - expected) - uncertainty, 0.0)
    error, uncertainty = _ratio(error, scale), _ratio(uncertainty, scale)
    return Finding("numerical", name, entry, found, expected, error, limit, uncertainty)


def _difference(loss: Callable[[float], float], h: float) -> tuple[float, float]:
    """The derivative at 0 by a central difference, and how wrong it may be."""
    c = {times: loss(times * h) for times in (-2, -1, 1, 2)}
    near, far = (c[1] - c[-1]) / (2 * h), (c[2] - c[-2]) / (4 * h)
    rounding = 64 * torch.finfo(torch.float64).eps * max(map(abs, c.values())) / h
    return near, abs(near - far) + rounding


def _largest(g: Tensor) -> float:
    return g.abs().nan_to_num(0, 0).max().item()


def _entry(flat: int, shape: torch.Size) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), shape))


def _ratio(error: float, scale: float) -> float:
    return error / scale if scale else math.inf if error else 0.0


class PeakMemory(Callback):
    """Logs the peak of memory of a training step: forward, backward and the optimizer's.

    The metrics, in MiB (2^20 bytes), of the process where they are largest:

        memory/peak_MiB   the most that was in use during the step
        memory/step_MiB   by how much this is more than what was in use at its start

    On a GPU that is what PyTorch allocated there, whose statistics of peaks are reset for it; on a
    CPU under Linux the resident memory of the process, from which the C library's free memory is
    given back before. Elsewhere nothing is logged, which a warning says. In the list of callbacks
    it comes after `GradientCheck`, whose copies are else counted.

    Args:
        every_n_steps: each epoch's batches 0, n, 2n, ... are measured. The first step of all
            allocates what stays, such as the optimizer's state.

    Attributes:
        peaks: the metrics of the last measurement.

    Raises ValueError for an `every_n_steps` below 1.

    >>> PeakMemory(every_n_steps=10).peaks
    {}
    """

    def __init__(self, every_n_steps: int = 50):
        super().__init__()
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.peaks: dict[str, float] = {}
        self._before = 0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if not _is_measured(trainer.strategy.root_device):
            rank_zero_warn("PeakMemory measures on CUDA's GPUs and on a CPU under Linux only")

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        device = trainer.strategy.root_device
        if batch_idx % self.every_n_steps == 0 and _is_measured(device):
            self._before = _reset_peak(device)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        device = trainer.strategy.root_device
        if batch_idx % self.every_n_steps == 0 and _is_measured(device):
            peak = _peak(device)
            found = {"memory/peak_MiB": peak, "memory/step_MiB": max(0, peak - self._before)}
            self.peaks = _logged(trainer, {name: value / MIB for name, value in found.items()})


def _is_measured(device: torch.device) -> bool:
    return device.type == "cuda" or (device.type == "cpu" and sys.platform == "linux")


def _reset_peak(device: torch.device) -> int:
    """Bytes in use, from where on the peak counts."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc keeps what was freed
        libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _peak(device)


def _peak(device: torch.device) -> int:
    """Bytes, the most since it was reset."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def _logged(
    trainer: Any,
    metrics: Mapping[str, float],
    reduce_op: Literal["max", "sum"] = "max",
    earlier: int = 0,
) -> dict[str, float]:
    """Metrics of all processes, as they went to the loggers."""
    device = trainer.strategy.root_device
    values = torch.tensor([*map(float, metrics.values())], device=device, dtype=torch.float32)
    values = trainer.strategy.reduce(values, reduce_op=reduce_op)
    named = dict(zip(metrics, values.tolist(), strict=True))
    step = trainer.fit_loop.epoch_loop._batches_that_stepped - earlier  # as all other metrics
    for logger in trainer.loggers:
        logger.log_metrics(named, step=step)
    return named
