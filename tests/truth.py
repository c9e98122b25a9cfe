"""Softmax, cross entropy and divergences with every option, in differentiable PyTorch operations.

Tests take it as the truth in float64. Results have the dtype of the inputs, so a test can also run
it in float32 or bfloat16 to see how far a plain implementation is from the truth there.

Options have the names and the defaults of the public functions. Every tensor may need a gradient,
also the class weights, the temperature and probabilities.
"""

import math

import torch
from torch import Tensor


def compute_logits(x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
    """Returns z = x Wᵀ + b: (*, D), (C, *d, D), (C, *d) -> (*, C, *d)."""
    z = torch.nn.functional.linear(x, W.flatten(0, -2), None if b is None else b.flatten())
    return z.reshape(*x.shape[:-1], *W.shape[:-1])


def scale_and_cap(
    z: Tensor,
    logit_scale: float | Tensor = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Returns v = (κ/θ) tanh(s z / κ), or (s/θ) z without a cap."""
    v = z * logit_scale
    v = v if softcap is None else softcap * torch.tanh(v / softcap)
    return v / temperature


def log_sum_exp(v: Tensor, dim: int) -> Tensor:
    """Computed with the maximum as a constant: derivatives of `torch.logsumexp` are less exact."""
    m = v.detach().amax(dim, keepdim=True)
    return (m + (v - m).exp().sum(dim, keepdim=True).log()).squeeze(dim)


def softmax(z: Tensor, dim: int) -> Tensor:
    m = z.detach().amax(dim, keepdim=True) if z.numel() else 0.0
    e = (z - m).exp()
    return e / e.sum(dim, keepdim=True)


def reduce_losses(c: Tensor, reduction: str, count: float | Tensor) -> Tensor:
    return {"none": lambda: c, "sum": c.sum, "mean": lambda: c.sum() / count}[reduction]()


def cross_entropy(
    z: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    row_weight: Tensor | None = None,
    divisor: float | Tensor | None = None,
    base: float = math.e,
    logit_scale: float | Tensor = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    z_loss: float = 0.0,
    class_dim: int | None = None,
) -> Tensor:
    """Returns cross entropy and z-loss of logits z with the classes at `class_dim`.

    By default that is axis 1, or 0 of a vector. The target has class indices in z's shape without
    that axis, or probabilities in z's shape. Ignored rows may hold any logits and weights.
    """
    dim = class_dim if class_dim is not None else min(1, z.dim() - 1)
    z, C, s = z.movedim(dim, -1), z.shape[dim], label_smoothing
    w = z.new_ones(C) if weight is None else weight
    if target.is_floating_point():
        keep = torch.ones(z.shape[:-1], dtype=torch.bool)
        n = n_rows = keep.sum() if row_weight is None else row_weight.sum()
        v = scale_and_cap(z, logit_scale, softcap, temperature)
        l = v.log_softmax(-1)
        c = -(w * ((1 - s) * target.movedim(dim, -1) + s / C) * l).sum(-1)
    else:
        keep = target.long() != (-100 if ignore_index is None else ignore_index)
        y = target.long().masked_fill(~keep, 0)
        r = keep if row_weight is None else row_weight.masked_fill(~keep, 0)
        n, n_rows = (w[y] * r).sum(), r.sum()
        v = scale_and_cap(z.masked_fill(~keep.unsqueeze(-1), 0), logit_scale, softcap, temperature)
        l = v.log_softmax(-1)
        # the true class is gathered, so that a logit of -inf elsewhere is not multiplied by 0
        c = -(1 - s) * w[y] * l.gather(-1, y.unsqueeze(-1)).squeeze(-1)
        c = c - s / C * (w * l).sum(-1) if s else c
    if divisor is not None:
        n = n_rows = divisor
    c = c if row_weight is None else row_weight * c
    loss = reduce_losses(c.masked_fill(~keep, 0), reduction, n) / math.log(base)
    if not z_loss:
        return loss
    q = z_loss * log_sum_exp(v, -1).square()
    q = q if row_weight is None else row_weight * q
    return loss + reduce_losses(q.masked_fill(~keep, 0), reduction, n_rows)


def linear_cross_entropy(
    x: Tensor, W: Tensor, target: Tensor, b: Tensor | None = None, **options
) -> Tensor:
    """Returns the cross entropy of a head's logits: the classes come after x's batch axes."""
    return cross_entropy(compute_logits(x, W, b), target, class_dim=x.dim() - 1, **options)


def linear_log_probs(
    x: Tensor,
    W: Tensor,
    y: Tensor,
    b: Tensor | None = None,
    *,
    base: float = math.e,
    logit_scale: float | Tensor = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Returns log a_y and the entropy of each row, of x (*, D), W (C, D), y (*)."""
    l = scale_and_cap(compute_logits(x, W, b), logit_scale, softcap, temperature).log_softmax(-1)
    log_probs, entropy = l.gather(-1, y.unsqueeze(-1)).squeeze(-1), -(l.exp() * l).sum(-1)
    return log_probs / math.log(base), entropy / math.log(base)


def divergence(l: Tensor, lt: Tensor, mix: float) -> Tensor:
    """KL(p||q) for mix 0, KL(q||p) for 1, else the generalised Jensen-Shannon divergence.

    l and lt are the log-probabilities of q and p, which need not be normalised.
    """
    q, p = l.exp(), lt.exp()
    if mix == 0:
        return (p * (lt - l)).sum(-1)
    if mix == 1:
        return (q * (l - lt)).sum(-1)
    lm = torch.logaddexp(l + math.log(1 - mix), lt + math.log(mix))
    return (mix * p * (lt - lm) + (1 - mix) * q * (l - lm)).sum(-1)


def add_remainder(l: Tensor, lt: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Returns l and lt of the classes `indices`, and of all others as one class, if any."""
    selected = l.gather(-1, indices)
    if indices.shape[-1] == l.shape[-1]:
        return selected, lt
    others = l.scatter(-1, indices, -math.inf)
    rest = log_sum_exp(others, -1).unsqueeze(-1)
    lt_rest = (1 - lt.exp().sum(-1, keepdim=True)).log()
    return torch.cat((selected, rest), -1), torch.cat((lt, lt_rest), -1)


def linear_divergence(
    x: Tensor,
    W: Tensor,
    xt: Tensor,
    Wt: Tensor | None = None,
    b: Tensor | None = None,
    bt: Tensor | None = None,
    *,
    mix: float,
    teacher_indices: Tensor | None = None,
    remainder: str = "class",
    temperature: float = 1.0,
    temperature_factor: bool = False,
    labels: Tensor | None = None,
    alpha: float = 0.0,
    ignore_index: int = -100,
    base: float = math.e,
    reduction: str = "mean",
) -> Tensor:
    """Returns the divergence between two heads; half types are computed in float32."""
    dtype = x.dtype
    if dtype in (torch.bfloat16, torch.float16):
        x, W, xt, Wt, b, bt = (None if v is None else v.float() for v in (x, W, xt, Wt, b, bt))
    z = compute_logits(x, W, b)
    l = (z / temperature).log_softmax(-1)
    if teacher_indices is not None:
        lt = xt
        if remainder == "class":
            l, lt = add_remainder(l, lt, teacher_indices)
        else:
            l = l.gather(-1, teacher_indices)
    else:
        zt = xt if Wt is None else compute_logits(xt, Wt, bt)
        lt = (zt / temperature).log_softmax(-1)
    c = (1 - alpha) * divergence(l, lt, mix) * (temperature**2 if temperature_factor else 1)
    keep = torch.ones(c.shape, dtype=torch.bool)
    if labels is not None:
        keep = labels.long() != ignore_index
        y = labels.long().masked_fill(~keep, 0).unsqueeze(-1)
        c = c - alpha * z.log_softmax(-1).gather(-1, y).squeeze(-1)
    c = c.masked_fill(~keep, 0) / math.log(base)
    return reduce_losses(c, reduction, keep.sum()).to(dtype)
