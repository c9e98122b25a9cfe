"""Functions and modules of PyTorch with inputs, which the checker checks as examples."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Example(NamedTuple):
    """A function or a module of PyTorch, and its arguments."""

    function: Callable[..., Any]
    inputs: list[Any]


def make_examples() -> dict[str, Example]:
    """Returns the examples by name: functions, then modules."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        examples = {**_make_elementwise(), **_make_functions(), **_make_modules()}
    return {name: Example(function, inputs) for name, (function, inputs) in examples.items()}


def _draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def _draw_positive(*shape: int) -> Tensor:
    return 0.2 + torch.rand(shape, dtype=torch.float64)


def _make_elementwise() -> dict[str, tuple[Callable[..., Any], list[Any]]]:
    functions: list[Callable[[Tensor], Tensor]] = [
        *(F.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish, F.softplus),
        *(F.hardtanh, F.hardswish, F.hardsigmoid, F.logsigmoid, F.softsign, F.tanhshrink),
        *(torch.sigmoid, torch.tanh, torch.erf, torch.expm1, torch.atan),
    ]
    examples: dict[str, tuple[Callable[..., Any], list[Any]]]
    examples = {each.__name__: (each, [_draw(3, 4)]) for each in functions}
    positive_functions = [torch.log, torch.sqrt, torch.rsqrt, torch.lgamma, torch.special.entr]
    for each in positive_functions:
        examples[each.__name__] = (each, [_draw_positive(3, 2)])
    return examples


def _make_functions() -> dict[str, tuple[Callable[..., Any], list[Any]]]:
    classes, flags = torch.tensor([0, 2, 1]), torch.tensor([1.0, 0.0, 1.0]).double()
    square = _draw(3, 3) + 2 * torch.eye(3)
    image, kernel = _draw(1, 2, 4, 4), _draw(3, 2, 2, 2)
    query = [_draw(1, 2, 3) for _ in range(3)]
    return {
        "softmax": (partial(F.softmax, dim=-1), [_draw(3, 4)]),
        "log_softmax": (partial(F.log_softmax, dim=-1), [_draw(3, 4)]),
        "glu": (F.glu, [_draw(3, 4)]),
        "prelu": (F.prelu, [_draw(2, 3), _draw_positive(3)]),
        "normalize": (F.normalize, [_draw(2, 3)]),
        "layer_norm": (layer_norm, [_draw(2, 4), _draw(4), _draw(4)]),
        "group_norm": (partial(F.group_norm, num_groups=2), [_draw(2, 4, 3)]),
        "batch_norm": (batch_norm, [_draw(4, 3), _draw(3), _draw(3)]),
        "rms_norm": (partial(F.rms_norm, normalized_shape=(4,)), [_draw(2, 4)]),
        "linear": (F.linear, [_draw(3, 2), _draw(4, 2), _draw(4)]),
        "bilinear": (F.bilinear, [_draw(2, 2), _draw(2, 3), _draw(2, 2, 3)]),
        "embedding": (F.embedding, [classes, _draw(3, 2)]),
        "conv1d": (F.conv1d, [_draw(2, 2, 4), _draw(3, 2, 2), _draw(3)]),
        "conv2d": (F.conv2d, [image, kernel]),
        "conv_transpose1d": (F.conv_transpose1d, [_draw(1, 2, 3), _draw(2, 2, 2)]),
        "avg_pool2d": (partial(F.avg_pool2d, kernel_size=2), [image]),
        "max_pool2d": (partial(F.max_pool2d, kernel_size=2), [image]),
        "interpolate": (partial(F.interpolate, scale_factor=2.0, mode="linear"), [_draw(1, 2, 3)]),
        "pad": (partial(F.pad, pad=(1, 1), mode="reflect"), [_draw(2, 3)]),
        "attention": (F.scaled_dot_product_attention, query),
        "cosine_similarity": (F.cosine_similarity, [_draw(2, 3), _draw(2, 3)]),
        "pairwise_distance": (F.pairwise_distance, [_draw(2, 3), _draw(2, 3)]),
        "cross_entropy": (F.cross_entropy, [_draw(3, 3), classes]),
        "nll_loss": (F.nll_loss, [_draw(3, 3), classes]),
        "mse_loss": (F.mse_loss, [_draw(3, 2), _draw(3, 2)]),
        "smooth_l1_loss": (F.smooth_l1_loss, [_draw(3, 2), _draw(3, 2)]),
        "binary_cross_entropy": (F.binary_cross_entropy_with_logits, [_draw(3), flags]),
        "kl_div": (partial(F.kl_div, reduction="sum"), [_draw(3, 2), _draw_positive(3, 2)]),
        "gaussian_nll_loss": (F.gaussian_nll_loss, [_draw(3), _draw(3), _draw_positive(3)]),
        "logsumexp": (partial(torch.logsumexp, dim=-1), [_draw(2, 3)]),
        "logcumsumexp": (partial(torch.logcumsumexp, dim=-1), [_draw(2, 3)]),
        "cumprod": (partial(torch.cumprod, dim=-1), [_draw(2, 3)]),
        "gather": (gather, [_draw(3, 3), classes[:, None]]),
        "einsum": (partial(torch.einsum, "ij,jk->ik"), [_draw(2, 3), _draw(3, 2)]),
        "det": (torch.linalg.det, [square]),
        "slogdet": (torch.linalg.slogdet, [square]),
        "inv": (torch.linalg.inv, [square]),
        "rfft": (torch.fft.rfft, [_draw(2, 4)]),
    }


def _make_modules() -> dict[str, tuple[Callable[..., Any], list[Any]]]:
    state = (_draw(1, 2, 2), _draw(1, 2, 2))
    attention = nn.MultiheadAttention(2, 1, batch_first=True)
    layer = nn.TransformerEncoderLayer(4, 1, 3, batch_first=True, activation="gelu")
    weight_norm = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    modules: list[tuple[nn.Module, list[Any]]] = [
        (nn.Linear(3, 2), [_draw(2, 3)]),
        (nn.Conv2d(2, 2, 2), [_draw(1, 2, 3, 3)]),
        (nn.Embedding(3, 2), [torch.tensor([0, 2, 2])]),
        (nn.EmbeddingBag(3, 2), [torch.tensor([[0, 2], [1, 1]])]),
        (nn.LayerNorm(4), [_draw(2, 4)]),
        (nn.BatchNorm1d(3), [_draw(4, 3)]),
        (nn.InstanceNorm1d(2), [_draw(1, 2, 4)]),
        (nn.Dropout().eval(), [_draw(3, 2)]),
        (nn.RNN(2, 2), [_draw(2, 2, 2), _draw(1, 2, 2)]),
        (nn.GRU(2, 2), [_draw(2, 2, 2), _draw(1, 2, 2)]),
        (nn.LSTM(2, 2), [_draw(2, 2, 2), state]),
        (attention.eval(), [_draw(1, 2, 2) for _ in range(3)]),
        (layer.eval(), [_draw(1, 2, 4)]),
    ]
    examples = {type(module).__name__: (module, inputs) for module, inputs in modules}
    return {**examples, "weight_norm": (weight_norm, [_draw(2, 3)])}


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias)


def batch_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, weight, bias, training=True)


def gather(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index)
