"""The formulas as modules: subclasses of PyTorch's with another `forward`, and the document's own.

Parameters, their initialisation, state dict, repr and hooks are inherited from PyTorch's modules.
This library's options have class-level defaults. So it is enough that `swap` changes the class.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_nnmath import _torch, deferred
from torch_nnmath import functional as F

__all__ = [
    "CategoricalCrossEntropyLoss",
    "CrossEntropyLoss",
    "Feedforward",
    "Linear",
    "LinearCrossEntropyLoss",
    "LinearJSDLoss",
    "LinearKLDivLoss",
    "MSELoss",
    "ReLU",
    "Sigmoid",
    "SigmoidSquaredErrorLoss",
    "Softmax",
    "SquaredErrorLoss",
    "Tanh",
]


class Linear(torch.nn.Linear):
    """`torch.nn.Linear` by F1 and F8: (*, in_features) -> (*, out_features).

    If `swap` made it the head, its logits are deferred until an operation needs them.
    """

    def forward(self, input: Tensor) -> Tensor:
        if deferred.get_head_log(self) is not None:
            return deferred.linear(input, self.weight, self.bias, self)
        return F.linear(input, self.weight, self.bias)


class Sigmoid(torch.nn.Sigmoid):
    """`torch.nn.Sigmoid` by F6, elementwise."""

    def forward(self, input: Tensor) -> Tensor:
        return F.sigmoid(input)


class Tanh(torch.nn.Tanh):
    """`torch.nn.Tanh` by F2, elementwise."""

    def forward(self, input: Tensor) -> Tensor:
        return F.tanh(input)


class ReLU(torch.nn.ReLU):
    """`torch.nn.ReLU` by F2, elementwise."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(input, inplace=self.inplace)


class Softmax(torch.nn.Softmax):
    """`torch.nn.Softmax` by F7, over `dim`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.softmax(input, self.dim, _stacklevel=5)


class MSELoss(torch.nn.MSELoss):
    """`torch.nn.MSELoss` by F4."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(input, target, reduction=self.reduction)


class _CrossEntropyOptions:
    """Options that PyTorch's cross entropies lack. The repr shows values other than the default.

    A `logit_scale` that is a Parameter is learnt; any other tensor becomes a buffer.
    """

    base: float = math.e
    softcap: float | None = None
    temperature: float = 1.0
    z_loss: float = 0.0
    return_stats: bool = False
    output_dtype: torch.dtype | None = None

    def __init__(
        self,
        *args: Any,
        base: float = math.e,
        logit_scale: Tensor | float = 1.0,
        softcap: float | None = None,
        temperature: float = 1.0,
        z_loss: float = 0.0,
        return_stats: bool = False,
        output_dtype: torch.dtype | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.base, self.softcap, self.temperature = base, softcap, temperature
        self.z_loss, self.return_stats, self.output_dtype = z_loss, return_stats, output_dtype
        if isinstance(logit_scale, Tensor) and not isinstance(logit_scale, torch.nn.Parameter):
            self.register_buffer("logit_scale", logit_scale)  # type: ignore[attr-defined]
        else:
            self.logit_scale = logit_scale

    def get_own_options(self) -> dict[str, Any]:
        """Returns the options that PyTorch's module lacks."""
        # a class-level default would hide a Parameter
        return {
            "logit_scale": _torch.get_attribute(self, "logit_scale", 1.0),  # type: ignore[arg-type]
            "base": self.base,
            "softcap": self.softcap,
            "temperature": self.temperature,
            "z_loss": self.z_loss,
            "return_stats": self.return_stats,
            "output_dtype": self.output_dtype,
        }

    def extra_repr(self) -> str:
        parts = [super().extra_repr()]  # type: ignore[misc]
        for name, value in self.get_own_options().items():
            if isinstance(value, Tensor):
                parts.append(f"{name}={type(value).__name__}")
            elif value != getattr(_CrossEntropyOptions, name, 1.0):
                parts.append(f"{name}={value}")
        return ", ".join(filter(None, parts))


class CrossEntropyLoss(_CrossEntropyOptions, torch.nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` by F13: softmax and cross entropy on logits.

    The constructor also takes, by keyword, the options of `functional.cross_entropy` that PyTorch's
    lacks: base, logit_scale, softcap, temperature, z_loss, return_stats, output_dtype. A
    `logit_scale` that is a Parameter is learnt. A call takes
    `(input, target, row_weight=None, divisor=None)`.
    """

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        row_weight: Tensor | None = None,
        divisor: Tensor | float | None = None,
    ) -> Any:
        return F.cross_entropy(
            input,
            target,
            row_weight=row_weight,
            divisor=divisor,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            **self.get_own_options(),
        )


if hasattr(torch.nn, "LinearCrossEntropyLoss"):
    _LinearCrossEntropyLoss = torch.nn.LinearCrossEntropyLoss
else:

    class _LinearCrossEntropyLoss(torch.nn.Module):  # type: ignore[no-redef]
        """The constructor and the state of PyTorch 2.13's module, for older releases."""

        def __init__(
            self,
            in_features: int,
            num_classes: int,
            *,
            out_features: tuple[int, ...] = (),
            bias: bool = False,
            device: Any = None,
            dtype: Any = None,
            reduction: str = "mean",
            weight: Tensor | None = None,
            ignore_index: int | None = None,
            label_smoothing: float = 0.0,
            options: Any = None,
        ):
            if weight is not None and weight.shape != (num_classes,):
                raise RuntimeError(
                    f"expected weight shape to be {(num_classes,)}, got {tuple(weight.shape)}"
                )
            if not 0 <= label_smoothing <= 1:
                raise RuntimeError(
                    f"expected label_smoothing to be in range [0, 1], got {label_smoothing}"
                )
            super().__init__()
            self.register_buffer("weight", weight)
            self.num_classes, self.out_features = num_classes, out_features
            self.reduction, self.ignore_index = reduction, ignore_index
            self.label_smoothing, self.options = label_smoothing, options
            output_count = math.prod(out_features, start=num_classes)
            self.linear = torch.nn.Linear(in_features, output_count, bias, device, dtype)

        def extra_repr(self) -> str:
            return (
                f"in_features={self.linear.in_features}, num_classes={self.num_classes}, "
                f"out_features={self.out_features}, bias={self.linear.bias is not None}, "
                f"reduction={self.reduction}, ignore_index={self.ignore_index}, "
                f"label_smoothing={self.label_smoothing}, options={self.options}"
            )


class LinearCrossEntropyLoss(_CrossEntropyOptions, _LinearCrossEntropyLoss):
    """`torch.nn.LinearCrossEntropyLoss`, the head (F15): linear layer, softmax and cross entropy.

    The constructor also takes, by keyword, the options of `functional.linear_cross_entropy` that
    PyTorch's lacks: base, logit_scale, softcap, temperature, z_loss, return_stats, output_dtype. A
    `logit_scale` that is a Parameter is learnt. A call takes
    `(input, target, row_weight=None, divisor=None)`.
    To tie the weight, set `loss.linear.weight = embedding.weight`.
    """

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        row_weight: Tensor | None = None,
        divisor: Tensor | float | None = None,
    ) -> Any:
        weight: Any = self.linear.weight
        bias: Any = self.linear.bias
        if self.out_features:
            shape = (self.num_classes, *self.out_features)
            weight = weight.reshape(*shape, self.linear.in_features)
            bias = None if bias is None else bias.reshape(shape)
        return F.linear_cross_entropy(
            input,
            weight,
            target,
            linear_bias=bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            row_weight=row_weight,
            divisor=divisor,
            **self.get_own_options(),
        )


class _DivergenceLoss(torch.nn.Module):
    """The options that `functional.linear_kl_div` and `linear_jsd` share."""

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        temperature_factor: bool = False,
        alpha: float = 0.0,
        ignore_index: int = -100,
        remainder: str = "class",
        base: float = math.e,
        reduction: str = "mean",
        output_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.temperature, self.temperature_factor = temperature, temperature_factor
        self.alpha, self.ignore_index, self.remainder = alpha, ignore_index, remainder
        self.base, self.reduction, self.output_dtype = base, reduction, output_dtype

    def get_options(self) -> dict[str, Any]:
        """The options by name."""
        names = "temperature", "temperature_factor", "alpha", "ignore_index", "remainder"
        return {n: getattr(self, n) for n in (*names, "base", "reduction", "output_dtype")}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.get_options().items())


class LinearKLDivLoss(_DivergenceLoss):
    """KL(p||q) of a teacher's head from a student's (F25), or KL(q||p) with `reverse` (F26).

    It has no parameters. The constructor takes the options of `functional.linear_kl_div` by
    keyword: reverse, temperature, temperature_factor, alpha, ignore_index, remainder, base,
    reduction, output_dtype. A call takes the function's tensors.
    """

    def __init__(self, *, reverse: bool = False, **options: Any):
        super().__init__(**options)
        self.reverse = reverse

    def forward(
        self,
        student: Tensor,
        student_weight: Tensor,
        teacher: Tensor,
        teacher_weight: Tensor | None = None,
        *,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        teacher_indices: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        return F.linear_kl_div(
            *(student, student_weight, teacher, teacher_weight),
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            teacher_indices=teacher_indices,
            labels=labels,
            **self.get_options(),
        )

    def get_options(self) -> dict[str, Any]:
        """The options by name."""
        return {"reverse": self.reverse, **super().get_options()}


class LinearJSDLoss(_DivergenceLoss):
    """The generalised Jensen-Shannon divergence of two heads (F27), with the weight `beta`.

    It has no parameters. The constructor takes the options of `functional.linear_jsd` by keyword:
    beta, temperature, temperature_factor, alpha, ignore_index, remainder, base, reduction,
    output_dtype. A call takes the function's tensors.
    """

    def __init__(self, *, beta: float = 0.5, **options: Any):
        super().__init__(**options)
        self.beta = beta

    def forward(
        self,
        student: Tensor,
        student_weight: Tensor,
        teacher: Tensor,
        teacher_weight: Tensor | None = None,
        *,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        teacher_indices: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        return F.linear_jsd(
            *(student, student_weight, teacher, teacher_weight),
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            teacher_indices=teacher_indices,
            labels=labels,
            **self.get_options(),
        )

    def get_options(self) -> dict[str, Any]:
        """The options by name."""
        return {"beta": self.beta, **super().get_options()}


class SquaredErrorLoss(torch.nn.Module):
    """½ Σ (target - input)² over the axes `dim` of an example (F4), reduced over examples (F3)."""

    def __init__(self, *, reduction: str = "mean", dim: int | Sequence[int] = -1):
        super().__init__()
        self.reduction, self.dim = reduction, dim

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.squared_error(input, target, reduction=self.reduction, dim=self.dim)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}, dim={self.dim}"


class SigmoidSquaredErrorLoss(SquaredErrorLoss):
    """½ Σ (target - σ(input))² over the axes `dim` (F9, F11), on pre-activations."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.sigmoid_squared_error(input, target, reduction=self.reduction, dim=self.dim)


class CategoricalCrossEntropyLoss(torch.nn.Module):
    """-Σ target log_base input over the axis `dim` (F5), on probabilities.

    A call takes `(input, target, row_weight=None)`, with a weight for each example.
    """

    def __init__(self, *, base: float = math.e, reduction: str = "mean", dim: int = -1):
        super().__init__()
        self.base, self.reduction, self.dim = base, reduction, dim

    def forward(self, input: Tensor, target: Tensor, row_weight: Tensor | None = None) -> Tensor:
        return F.categorical_cross_entropy(
            input,
            target,
            base=self.base,
            reduction=self.reduction,
            dim=self.dim,
            row_weight=row_weight,
        )

    def extra_repr(self) -> str:
        return f"base={self.base}, reduction={self.reduction!r}, dim={self.dim}"


class Feedforward(torch.nn.Module):
    """A feed-forward network of `sizes` (n_0, ..., n_L): all layers are one formula (F10, F12).

    If a loss on pre-activations follows, set `output_activation="identity"`.
    Parameters are `layers.{i}.weight` and `layers.{i}.bias`, initialised as `torch.nn.Linear`'s.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        activation: str = "sigmoid",
        output_activation: str = "sigmoid",
        *,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        if len(sizes) < 2:
            raise ValueError(f"sizes must hold at least an input and an output size, got {sizes}")
        self.activation, self.output_activation = activation, output_activation
        self.layers = torch.nn.ModuleList(
            Linear(n_in, n_out, bias, device, dtype) for n_in, n_out in itertools.pairwise(sizes)
        )

    def forward(self, input: Tensor) -> Tensor:
        layers: Any = self.layers
        return F.feedforward(
            input,
            [layer.weight for layer in layers],
            [layer.bias for layer in layers],
            activation=self.activation,
            output_activation=self.output_activation,
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, output_activation={self.output_activation!r}"
