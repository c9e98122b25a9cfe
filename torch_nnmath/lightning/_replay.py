"""The loss of a training batch and its gradients, recomputed by copies of the module."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from torch_nnmath.lightning._lightning import DummyLogger, apply_to_collection, isolate_rng
from torch_nnmath.lightning._swap_state import use_pytorch_classes


class Segment(NamedTuple):
    """Entries start, ..., stop - 1 of a parameter, in row-major order."""

    parameter: str
    start: int
    stop: int


Displacement: TypeAlias = list[tuple[Segment, Tensor]]


class Gradients(NamedTuple):
    """Gradients by the parameter's name."""

    by_name: dict[str, Tensor]
    largest: (
        float  # the largest magnitude of an entry, over all parameters, also those not in by_name
    )


class LossReplay:
    """Recomputes the loss of a batch with copies of the module, which itself stays unchanged."""

    def __init__(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int):
        self.trainer, self.pl_module = trainer, pl_module
        self.batch, self.batch_idx = batch, batch_idx

    def compute_gradients(
        self, names: list[str], *, is_pytorch: bool = False, is_double: bool = False
    ) -> Gradients | None:
        """Returns the loss's gradients, or None if the batch has no finite loss.

        Args:
            names: the parameters to return gradients of.
            is_pytorch: whether to replace this library's modules by PyTorch's.
            is_double: whether to compute in float64 rather than in the training's precision.
        """
        module = self._copy_module(is_pytorch, is_double)
        with isolate_rng():
            loss = self._compute_loss(module, is_double)
            if loss is None or not loss.isfinite():
                return None
            with _ignore_warnings(), _enter_precision(self.trainer, is_double):
                loss.backward()
        parameters = dict(module.named_parameters())
        gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        largest = max((max_abs(g) for g in gradients.values() if g.numel()), default=0.0)
        by_name = {n: gradients.get(n, torch.zeros_like(parameters[n])) for n in names}
        return Gradients(by_name, largest)

    def compute_displaced_loss(self, displacement: Displacement, h: float) -> float:
        """Returns c(w + h v), computed by PyTorch's modules in float64.

        Each call copies the module anew, since a step may change any of its state: buffers,
        counters, generators of random numbers, parameters that average others.
        """
        module = self._copy_module(is_pytorch=True, is_double=True)
        parameters = dict(module.named_parameters())
        for segment, v in displacement:
            p = parameters[segment.parameter]
            p.data = p.data.contiguous()
            p.data.view(-1)[segment.start : segment.stop].add_(v, alpha=h)
        with isolate_rng():
            c: float = self._compute_loss(module, is_double=True).item()
        return c

    def _copy_module(self, is_pytorch: bool, is_double: bool) -> Any:
        """Returns a copy of the module whose logging is discarded.

        Raises RuntimeError with the name of an attribute that cannot be copied.
        """
        try:
            module_copy = _copy_deeply(self.pl_module)
        except Exception as error:  # an attribute's own code may raise anything
            raise RuntimeError(
                "GradientCheck copies the module, but cannot copy "
                f"{_describe_obstacle(self.pl_module)}: create it in training_step, leave it out "
                "of the module's __getstate__, or give its class a __deepcopy__"
            ) from error
        if getattr(module_copy, "_compiler_ctx", None):  # its methods are bound to the original
            for name in ("forward", "training_step"):
                vars(module_copy).pop(name, None)
        if is_pytorch:
            use_pytorch_classes(module_copy)
        trainer = _TrainerView(self.trainer)
        for module in module_copy.modules():
            if is_double:
                for name, value in vars(module).items():
                    if isinstance(value, Tensor):
                        vars(module)[name] = _to_double(value)
            if "_trainer" in vars(module):  # a LightningModule of either package
                module._trainer = trainer
                module.log = module.log_dict = _discard
        return module_copy.double() if is_double else module_copy

    def _compute_loss(self, module: Any, is_double: bool) -> Any:
        batch = _copy_deeply(self.batch)
        if is_double:
            batch = apply_to_collection(batch, Tensor, _to_double)
        step = module.training_step
        try:
            inspect.signature(step).bind(batch, self.batch_idx)
            arguments = [batch, self.batch_idx]
        except TypeError:
            arguments = [batch]
        with _ignore_warnings(), torch.enable_grad(), _enter_precision(self.trainer, is_double):
            output = step(*arguments)
        return output["loss"] if isinstance(output, Mapping) else output


def max_abs(x: Tensor) -> float:
    """Returns the largest finite magnitude in x, or 0."""
    return x.abs().nan_to_num(nan=0, posinf=0).max().item()


class _TrainerView:
    """The Trainer of a copy: keeps writes from the real one, and discards what is logged."""

    def __init__(self, trainer: Any):
        self._trainer, self.logger = trainer, DummyLogger()
        self.loggers = [self.logger]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)


class _DoubleMode(TorchFunctionMode):
    """Replaces floating dtypes that a call requests by float64, also that of `logits.float()`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            func = Tensor.double
        options = {name: _replace_dtype(value) for name, value in (kwargs or {}).items()}
        return func(*map(_replace_dtype, args), **options)


def _replace_dtype(value: Any) -> Any:
    is_floating = isinstance(value, torch.dtype) and value.is_floating_point
    return torch.float64 if is_floating else value


def _to_double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


@contextmanager
def _enter_precision(trainer: Any, is_double: bool) -> Iterator[None]:
    """Computes in float64, or else in the training's precision."""
    if not is_double:
        with trainer.precision_plugin.train_step_context():
            yield
        return
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _DoubleMode():
            yield
    finally:
        torch.set_default_dtype(default)


@contextmanager
def _ignore_warnings() -> Iterator[None]:
    """Ignores the warnings of a copy: the training step itself will raise them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _describe_obstacle(module: Any) -> str:
    """Names the attribute of a module, or of its submodules, that cannot be copied."""
    modules = list(module.modules())
    for name, submodule in module.named_modules():
        for attribute, value in submodule.__getstate__().items():
            try:
                _copy_deeply(value, {id(m): m for m in modules})
            except Exception as error:  # as above
                path = f"{name}.{attribute}".removeprefix(".")
                return f"its attribute {path!r} of type {type(value).__name__} ({error})"
    return "it as a whole"


class _CopyMode(TorchFunctionMode):
    """Lets `deepcopy` copy tensors of a graph, which it refuses: their copies are detached."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            x, memo = args
            memo[id(x)] = x.detach().clone()
            return memo[id(x)]
        return func(*args, **(kwargs or {}))


def _copy_deeply(x: Any, memo: dict[int, Any] | None = None) -> Any:
    with _CopyMode():
        return copy.deepcopy(x, memo)


def _discard(*args: Any, **kwargs: Any) -> None:
    """Replaces `log` and `log_dict` in a copy."""
