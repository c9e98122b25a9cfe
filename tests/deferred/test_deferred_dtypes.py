"""Losses of deferred logits in float32, half precision and autocast."""

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from deferred_helpers import (
    BF16,
    IGNORED,
    MARKS,
    assert_fused,
    ce,
    compute_results,
    make_inputs,
    make_pair,
    make_params,
)
from tolerance import compute_distance, get_rounding_tolerance
from torch import nn

import torch_nnmath
from torch_nnmath import functional

pytestmark = MARKS


def smooth_labels_as_trainer(z, o):
    """Computes the loss as the label smoother of transformers does."""
    labels, epsilon, ignore_index = o.y.clone(), 0.1, IGNORED
    log_probs = -nn.functional.log_softmax(z, dim=-1)
    if labels.dim() == log_probs.dim() - 1:
        labels = labels.unsqueeze(-1)
    padding_mask = labels.eq(ignore_index)
    labels = torch.clamp(labels, min=0)
    nll_loss = log_probs.gather(dim=-1, index=labels)
    smoothed_loss = log_probs.sum(dim=-1, keepdim=True, dtype=torch.float32)
    nll_loss.masked_fill_(padding_mask, 0.0)
    smoothed_loss.masked_fill_(padding_mask, 0.0)
    num_active_elements = padding_mask.numel() - padding_mask.long().sum()
    nll_loss = nll_loss.sum() / num_active_elements
    smoothed_loss = smoothed_loss.sum() / (num_active_elements * log_probs.shape[-1])
    return (1 - epsilon) * nll_loss + epsilon * smoothed_loss


def widen(z):
    return z.float() if z.dtype in (BF16, torch.float16) else z.double()


LOSSES: dict[str, Any] = {
    "as it is": lambda z, o: ce(z, o.y),
    "widened": lambda z, o: ce(widen(z), o.y),
    "at least float32": lambda z, o: ce(z.to(dtype=torch.float32)[:, 1:], o.y[:, 1:]),
    "widened, scaled": lambda z, o: ce(widen(z) * 0.7, o.y),
    "scaled": lambda z, o: ce(z / 3, o.y),
    "times a learnt number": lambda z, o: ce(z * o.s, o.y),
    "widened, times narrow numbers": lambda z, o: ce(
        0.3 * z.float() * o.narrow_s * o.narrow_s, o.y
    ),
    "widened, over a narrow number": lambda z, o: ce(z.float() / o.narrow_s, o.y),
    "cap": lambda z, o: ce(4 * torch.tanh(z / 4), o.y),
    "widened, cap": lambda z, o: ce(4 * torch.tanh(widen(z) / 4), o.y),
    "cap, widened": lambda z, o: ce(widen(4 * torch.tanh(z / 4)), o.y),
    "row": lambda z, o: ce(z + o.row, o.y),
    "wide row": lambda z, o: ce(z + o.wide_row, o.y),
    "widened, wide row": lambda z, o: ce(widen(z) + o.wide_row, o.y),
    "none": lambda z, o: ce(z, o.y, reduction="none"),
    "class weights": lambda z, o: ce(z.float(), o.y, weight=o.weight.float()),
    "probabilities": lambda z, o: F.cross_entropy(z.mT, o.probs.mT),
    "z-loss": lambda z, o: functional.cross_entropy(z.mT, o.y, z_loss=0.1, softcap=5.0),
    "wide result": lambda z, o: functional.cross_entropy(
        z.mT, o.y, reduction="sum", output_dtype=torch.float32
    ),
    "gather": lambda z, o: z.log_softmax(-1).gather(-1, o.all_y[..., None]),
    "gather of wide": lambda z, o: F.log_softmax(z, -1, dtype=torch.float32).gather(
        -1, o.all_y[..., None]
    ),
    "gather of logits": lambda z, o: z.gather(-1, o.all_y[..., None]),
    "logsumexp": lambda z, o: z.logsumexp(-1),
    "logsumexp of wide": lambda z, o: widen(z).logsumexp(-1),
    "sum": lambda z, o: z.log_softmax(-1).sum(-1, dtype=torch.float32),
    "mean": lambda z, o: z.log_softmax(-1).mean(-1),
    "smoothed by trainer": smooth_labels_as_trainer,
    "read": lambda z, o: (z / 9).exp().mean(),
    "read, detached": lambda z, o: (z.detach() / 9).exp().mean() + (z / 9).exp().mean(),
}
LOSSES_WITHOUT_BIAS: dict[str, Any] = {
    "temperatures": lambda z, o: ce(z / o.t, o.y),
    "wide temperatures": lambda z, o: ce(z / o.wide_t, o.y),
    "widened, temperatures": lambda z, o: ce(widen(z) / o.t, o.y),
    "widened, wide temperatures": lambda z, o: ce(widen(z) * o.wide_t, o.y),
    "widened, narrow temperatures": lambda z, o: ce(z.float() / o.narrow_t, o.y),
}


REGIONS = ["float32", "bfloat16", "float16", "inside", "outside", "before"]


@pytest.mark.parametrize(
    ("region", "name"), make_params(itertools.product(REGIONS, LOSSES | LOSSES_WITHOUT_BIAS))
)
def test_error_is_at_most_a_rounding_more_than_the_plain_model(region, name):
    """Dtypes agree with the plain model's.

    Autocast covers the logits and the loss ("inside"), the logits alone ("outside") or the loss
    alone ("before").
    """
    loss = (LOSSES | LOSSES_WITHOUT_BIAS)[name]
    dtype = getattr(torch, region, torch.float32)
    plain, swapped, log = make_pair(name in LOSSES, dtype)
    exact = copy.deepcopy(plain).double()

    def run(model):
        def logits(x):
            with torch.autocast("cpu", BF16, enabled=region in ("inside", "outside")):
                return model(x)

        def compute_loss(z, o):
            with torch.autocast("cpu", BF16, enabled=region in ("inside", "before")):
                return loss(z, o)

        logits.parameters = model.parameters
        return compute_results(logits, compute_loss, make_inputs(dtype))

    truth = compute_results(exact, loss, make_inputs(dtype, exact=True))
    results, plain_results = run(swapped), run(plain)
    limit = get_rounding_tolerance(BF16 if region in ("inside", "outside") else dtype) * max(
        log.fused, 1
    )
    for result, plain_result, exact_result in zip(results, plain_results, truth, strict=True):
        assert (result is None) == (exact_result is None)
        if exact_result is not None:
            assert (result.dtype, result.shape) == (plain_result.dtype, plain_result.shape)
            scale = compute_distance(exact_result, 0.0)
            allowed = compute_distance(plain_result, exact_result) + limit * scale
            assert compute_distance(result, exact_result) <= allowed
    if (region, name) == ("inside", "logsumexp"):  # its dtype depends on the device
        assert not log.fused
    elif "read" not in name and (dtype, name) != (torch.float32, "at least float32"):
        assert_fused(log)


@pytest.mark.parametrize("is_materialized", [False, True])
def test_autocast_keeps_no_copy_of_a_float32_weight(is_materialized):
    """The weight's gradient is that of the rounded weight, and is itself rounded only by a head
    whose logits are computed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 50))
    torch_nnmath.swap(model, head="0")
    x, y = torch.randn(6, 8), torch.randint(50, (6,))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
        call = logits.recipe.call
        assert [v.data_ptr() for v in call.operands[1:2]] == [model[0].weight.data_ptr()]
        if is_materialized:
            logits = logits + torch.arange(6)[:, None]
        loss = functional.cross_entropy(logits, y)
    loss.backward()
    rounded = [v.detach().bfloat16().double() for v in (x, model[0].weight, model[0].bias)]
    W = rounded[1].requires_grad_()
    F.cross_entropy(F.linear(rounded[0], W, rounded[2]), y).backward()
    eps = 2**-8 if is_materialized else 2**-18
    assert model[0].weight.grad.dtype == torch.float32
    error = (model[0].weight.grad - W.grad).abs().max() / W.grad.abs().max()
    assert error < 2 * eps
