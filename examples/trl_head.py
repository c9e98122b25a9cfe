"""Makes TRL's trainers compute their losses by this library's heads.

In training, these trainers of TRL 1.16 do not call a model's head, so `torch_nnmath.swap` has
nothing to swap. Two autograd Functions multiply the features by `lm_head.weight` and compute tiles
of logits: one in the forward that `add_fused_lm_head` gives the model, one in
`DistillationTrainer`. Within

    with use_in_trl():
        trainer.train()

the functions below replace these two. `trainer` is TRL's SFT, DPO, KTO, GRPO, RLOO or distillation
trainer. Do not use it with DeepSpeed's ZeRO-3, which gathers the weights within TRL's Functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from torch_nnmath.functional import (
    linear_cross_entropy,
    linear_jsd,
    linear_log_probs,
    linear_log_sum_exp,
)


def compute_log_probs(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    y: Tensor,
    temperature: float,
    chunk_size: int,
    softcap: float | None = None,
    scale: float = 1.0,
    outputs: tuple[str, ...] = ("entropy",),
) -> tuple[Tensor | None, ...]:
    """Computes what TRL's `ChunkedLogProbFunction` returns, of features x (N, D), classes y (N).

    It has the Function's arguments, of which `chunk_size` is not needed. Returns log-probabilities,
    entropy, ln Σ p², the mean of the logits, and whether y has the largest logit, each (N). All but
    the first are None if they are not in `outputs`.
    """
    options: dict[str, Any] = {"linear_bias": b, "softcap": softcap, "logit_scale": scale}
    at_temperature = {"temperature": temperature, **options}
    entropy = log_sum_of_squares = mean = is_top = None
    if "is_top1" in outputs:  # trainers that ask for it need no gradient of the entropy
        losses, stats = linear_cross_entropy(
            *(x, W, y),
            **at_temperature,
            reduction="none",
            return_stats=True,
            output_dtype=torch.promote_types(x.dtype, torch.float32),
        )
        log_probs, entropy, is_top = -losses, stats.entropy, stats.correct
    elif "entropy" in outputs:
        log_probs, entropy = linear_log_probs(x, W, y, **at_temperature, return_entropy=True)
    else:
        log_probs = linear_log_probs(x, W, y, **at_temperature)
    with torch.no_grad():
        if "log_sum_sq_probs" in outputs:  # Σ p² = Σ e^{2v} / (Σ e^v)²
            log_sums = (
                linear_log_sum_exp(x, W, temperature=temperature / k, **options) for k in (1, 2)
            )
            log_sum, log_sum_of_double = log_sums
            log_sum_of_squares = log_sum_of_double - 2 * log_sum
        if "mean_logits" in outputs and softcap is None:
            mean = scale / temperature * (x @ W.mean(0) + (0 if b is None else b.mean()))
        elif "mean_logits" in outputs:
            blocks = (scale / softcap * torch.nn.functional.linear(u, W, b) for u in x.split(256))
            mean = softcap / temperature * torch.cat([z.tanh_().mean(1) for z in blocks])
    return log_probs, entropy, log_sum_of_squares, mean, is_top


def compute_divergence(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    xt: Tensor,
    Wt: Tensor,
    bt: Tensor | None,
    beta: float,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    teacher_scale: float = 1.0,
    teacher_softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes what TRL's `ChunkedDivergenceFunction` returns, with its arguments.

    Returns the divergence of each row, and the student's entropy, which has no gradient.
    """
    if softcap is not None or teacher_softcap is not None:
        raise NotImplementedError("divergences of capped logits need the logits")
    x, b = scale * x, b if b is None else scale * b
    xt, bt = teacher_scale * xt, bt if bt is None else teacher_scale * bt
    divergence = linear_jsd(
        *(x, W, xt.detach(), Wt.detach()),
        student_bias=b,
        teacher_bias=bt if bt is None else bt.detach(),
        beta=beta,
        temperature=temperature,
        reduction="none",
        output_dtype=torch.promote_types(x.dtype, torch.float32),
    )
    any_class = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    with torch.no_grad():
        _, entropy = linear_log_probs(
            *(x, W, any_class), linear_bias=b, temperature=temperature, return_entropy=True
        )
    return divergence, entropy


@contextmanager
def use_in_trl(
    log_probs: Callable[..., Any] = compute_log_probs,
    divergence: Callable[..., Any] = compute_divergence,
) -> Iterator[None]:
    """Replaces TRL's two Functions by these functions while the `with` block runs."""
    from trl.trainer import distillation_trainer, utils

    replace = mock.patch.object
    with (
        replace(utils, "_ChunkedLogProbFunction", SimpleNamespace(apply=log_probs)),
        replace(
            distillation_trainer, "ChunkedDivergenceFunction", SimpleNamespace(apply=divergence)
        ),
    ):
        yield
