"""Losses without logits: the same values and gradients, and no tensor of tokens x classes."""

import contextlib
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import OperationRecorder, limit_head_blocks
from deferred_helpers import (
    BF16,
    F64,
    IGNORED,
    MARKS,
    B,
    C,
    assert_agree,
    assert_fused,
    ce,
    compute_results,
    has_logits_shape,
    make_inputs,
    make_pair,
    make_params,
)
from torch import nn

import torch_nnmath
from torch_nnmath import functional, kernels, swap
from torch_nnmath.kernels._block import count_block_rows

pytestmark = MARKS


def sum_losses_of_chunks(z, o):
    pairs = zip(z.chunk(3, 1), o.y.chunk(3, 1), strict=True)
    return sum(ce(v, y, reduction="sum") for v, y in pairs) / (o.y != IGNORED).sum()


def call_loss_module(loss):
    """Returns the loss as a module computes it."""
    return lambda z, o: loss(o)(z.flatten(0, 1), o.y.flatten())


def stack_loss_and_stats(z, o):
    options = {"softcap": 5.0, "z_loss": 0.01, "base": 2.0, "reduction": "none"}
    loss, stats = functional.cross_entropy(z.mT, o.y, **options, return_stats=True)
    assert not any(v.requires_grad for v in stats)
    return torch.stack([loss, *(v.to(loss.dtype) for v in stats)])


def mask_losses(z, o):
    """A mean over the tokens of a mask, as trainers compute it from unreduced losses."""
    mask = (o.y != IGNORED).to(z.dtype)
    return (ce(z, o.all_y, reduction="none").view_as(mask) * mask).sum() / mask.sum()


def compute_policy_loss(z, o):
    """The clipped loss of GRPO, with an entropy bonus and a KL penalty estimated from samples."""
    l = (z[:, :-1] / 0.9).log_softmax(-1)
    log_probs = l.gather(-1, o.all_y[:, 1:, None]).squeeze(-1)
    old, advantage = log_probs.detach() - 0.1, torch.linspace(-1, 1, B, dtype=z.dtype)[:, None]
    ratio = (log_probs - old).exp()
    loss = -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    penalty = (old - log_probs).exp() - (old - log_probs) - 1
    return loss + 0.1 * penalty - 0.01 * -(l.exp() * l).sum(-1)


def compute_preference_loss(z, o):
    """DPO's loss of the first example, which is chosen, and the second, which is rejected."""
    mask = o.y[:, 1:] != IGNORED
    log_probs = z[:, :-1].log_softmax(-1)
    log_probs = torch.gather(log_probs, 2, o.all_y[:, 1:].unsqueeze(2)).squeeze(2)
    chosen, rejected = (log_probs * mask).sum(-1)
    return -F.logsigmoid(0.1 * (chosen - rejected - 0.3))


def compute_entropy_of_chunks(z, o):
    """Computes entropies as trainers for reinforcement learning do, some rows at a time."""
    chunks = z.reshape(-1, C).split(5, dim=0)
    logarithms = [F.log_softmax(chunk, dim=-1) for chunk in chunks]
    return torch.cat([-(torch.exp(l) * l).sum(-1) for l in logarithms]).reshape(B, -1)


def compute_constant_entropy(z, o):
    with torch.no_grad():
        entropy = compute_entropy_of_chunks(z, o)
    assert not entropy.requires_grad
    return entropy + ce(z, o.y)


def compute_cross_term(z, o):
    """The probabilities are constants: the gradient is not that of an entropy."""
    with torch.no_grad():
        p = z.softmax(-1)
    return -(p * z.log_softmax(-1)).sum(-1)


def compute_cross_term_in_other_order(z, o):
    with torch.no_grad():
        p = z.softmax(-1)
    return -(z.log_softmax(-1) * p).sum(-1)


def apply_to(function):
    """Returns a function of what one more operation on the logits gives."""
    return lambda change: lambda z, o: function(change(z, o))


compute_entropy = apply_to(lambda v: -(v.softmax(-1) * v.log_softmax(-1)).sum(-1))
compute_expected_logit = apply_to(lambda v: (v * v.softmax(-1)).sum(-1))


def add_z_loss(z, o):
    return ce(z, o.y) + 1e-2 * z.logsumexp(-1).square().mean()


def compute_log_probs_of_policy(z, o):
    """Computes log-probabilities as trainers for reinforcement learning do, example by example."""
    chosen = torch.gather(z, dim=-1, index=o.all_y.unsqueeze(-1)).squeeze(-1)
    return chosen - torch.stack([torch.logsumexp(v, dim=-1) for v in z])


FUSED: dict[str, Any] = {
    # views and moves of axes
    "view": lambda z, o: F.cross_entropy(z.view(-1, C), o.y.view(-1)),
    "reshape": lambda z, o: F.cross_entropy(z.reshape(-1, C), o.y.reshape(-1)),
    "flatten": lambda z, o: F.cross_entropy(z.flatten(0, 1), o.y.flatten()),
    "shift": lambda z, o: F.cross_entropy(z[:, :-1].reshape(-1, C), o.y[:, 1:].reshape(-1)),
    "shift, contiguous": lambda z, o: F.cross_entropy(
        z[..., :-1, :].contiguous().view(-1, C), o.y[..., 1:].contiguous().view(-1)
    ),
    "shift, masked": lambda z, o: F.cross_entropy(
        z[:, :-1][o.y[:, 1:] != IGNORED], o.y[:, 1:][o.y[:, 1:] != IGNORED]
    ),
    "padded labels": lambda z, o: ce(z, F.pad(o.y, (0, 1), value=IGNORED)[..., 1:].contiguous()),
    "transpose": lambda z, o: F.cross_entropy(z.transpose(1, 2), o.y),
    "permute": lambda z, o: nn.CrossEntropyLoss(reduction="sum")(z.permute(0, 2, 1), o.y),
    "movedim": lambda z, o: F.cross_entropy(z.movedim(-1, 1), o.y),
    "mT": lambda z, o: nn.CrossEntropyLoss()(z.mT, o.y),
    "swapaxes, contiguous": lambda z, o: F.cross_entropy(z.swapaxes(-1, -2).contiguous(), o.y),
    "t": lambda z, o: F.cross_entropy(z[1].t().t(), o.y[1]),
    "transposed, then flattened": lambda z, o: ce(z.transpose(0, 1), o.y.T),
    "K dimensions": lambda z, o: F.cross_entropy(
        z.view(B, 3, 3, C).movedim(-1, 1), o.y.view(B, 3, 3), weight=o.weight, label_smoothing=0.1
    ),
    "unflatten": lambda z, o: F.cross_entropy(
        z.unflatten(1, (3, 3)).permute(0, 3, 1, 2), o.y.unflatten(1, (3, 3))
    ),
    "unsqueeze, squeeze": lambda z, o: ce(z.unsqueeze(1).squeeze(1)[:, None].squeeze((1, 3)), o.y),
    "squeeze of one example": lambda z, o: F.cross_entropy(z[:1].squeeze(0), o.y[0]),
    "squeeze of all": lambda z, o: F.cross_entropy(z[1:].squeeze(), o.y[1]),
    "unsqueezed classes": lambda z, o: F.cross_entropy(z.flatten(0, 1)[..., None], o.y.view(-1, 1)),
    # selected rows
    "select": lambda z, o: F.cross_entropy(z[:, -1], o.y[:, -1]),
    "one row": lambda z, o: F.cross_entropy(z[1, -1], o.y[1, -1]),
    "mask": lambda z, o: F.cross_entropy(z[o.y != IGNORED], o.y[o.y != IGNORED]),
    "mask of flat logits": lambda z, o: F.cross_entropy(
        z.view(-1, C)[(o.y > 9).view(-1)], o.y[o.y > 9]
    ),
    "index": lambda z, o: ce(z[:, torch.tensor([1, 2, 5, 1])], o.y[:, [1, 2, 5, 1]]),
    "index, by a list": lambda z, o: ce(z[[1, 0]], o.y[[1, 0]]),
    "index of a part": lambda z, o: ce(z[1:][:, [1, 2]], o.y[1:, [1, 2]]),
    "mask of one example": lambda z, o: F.cross_entropy(z[1][o.y[1] > 9], o.y[1][o.y[1] > 9]),
    "index of pairs": lambda z, o: F.cross_entropy(
        z[torch.arange(B), torch.tensor([8, 4])], o.y[[0, 1], [8, 4]]
    ),
    "index, after the classes": lambda z, o: F.cross_entropy(
        z.mT.contiguous()[..., [4, 3]], o.y[:, [4, 3]]
    ),
    "index_select": lambda z, o: ce(z.index_select(1, torch.tensor([7, 3])), o.y[:, [7, 3]]),
    "every other": lambda z, o: ce(z[:, ::2], o.y[:, ::2]),
    "narrow": lambda z, o: ce(z.narrow(1, 2, 4), o.y[:, 2:6]),
    "iteration": lambda z, o: sum(F.cross_entropy(v, y) for v, y in zip(z, o.y, strict=True)),
    "unbind": lambda z, o: F.cross_entropy(z.unbind(1)[5], o.y[:, 5]),
    "split": lambda z, o: sum(
        ce(v, y) for v, y in zip(z.split(5, 1), o.y.split(5, 1), strict=True)
    ),
    "split by sizes": lambda z, o: ce(z.split([4, 5], 1)[1], o.y[:, 4:]),
    "chunk": sum_losses_of_chunks,
    "two losses": lambda z, o: ce(z, o.y) + 0.3 * ce(z[:, :-2], o.y[:, 2:]),
    # values
    "clone": lambda z, o: ce(z.clone(), o.y),
    "the same type": lambda z, o: ce(z.double().to(F64).to("cpu").contiguous(), o.y),
    "a copy of the same type": lambda z, o: ce(z.to(F64, copy=True), o.y),
    "times a number": lambda z, o: ce(z * 0.3, o.y),
    "number times": lambda z, o: ce(-2 * z, o.y),
    "over a number": lambda z, o: ce(z / 3, o.y),
    "times a tensor": lambda z, o: ce(z * torch.tensor(0.3, dtype=F64), o.y),
    "over a tensor": lambda z, o: ce(z / torch.tensor(3), o.y),
    "times a learnt number": lambda z, o: ce(z * o.s, o.y),
    "over a learnt number": lambda z, o: ce(z / o.s, o.y),
    "times what is made of it": lambda z, o: ce(o.s.exp() * z, o.y),
    "several scales": lambda z, o: ce((z * o.s / 0.7 / o.s.square() * 3).neg(), o.y),
    "negated": lambda z, o: ce(-z, o.y),
    "cap": lambda z, o: ce(3 * torch.tanh(z / 3), o.y),
    "cap, in steps": lambda z, o: ce(z.div(30).mul(7).tanh().mul(5), o.y),
    "cap with factors": lambda z, o: ce(3 * torch.tanh(z * 0.2) / 0.7, o.y),
    "negative cap": lambda z, o: ce(-3 * (z / 3).tanh(), o.y),
    "cap of scaled logits": lambda z, o: ce(3 * torch.tanh(-z * o.s / 3), o.y),
    "cap of 1": lambda z, o: ce(z.tanh(), o.y),
    "capped, then shifted": lambda z, o: ce(5 * torch.tanh(z[:, :-1] / 5), o.y[:, 1:]),
    "a row": lambda z, o: ce(z + o.fixed_row, o.y),
    "row first": lambda z, o: ce(o.fixed_row[None, None] + z, o.y),
    "a learnt row": lambda z, o: ce(z + o.row, o.y),
    "two rows": lambda z, o: ce(z + o.row + o.fixed_row + 2 * o.row, o.y),
    "a row, then scaled": lambda z, o: ce((z + o.row) * 0.3, o.y),
    "a row, then capped": lambda z, o: ce(4 * torch.tanh((z + o.row) * o.s / 4), o.y),
    "a column": lambda z, o: F.cross_entropy(z.mT + o.row[:, None], o.y),
    # arguments of the loss
    "by keywords": lambda z, o: F.cross_entropy(input=z.flatten(0, 1), target=o.y.flatten()),
    "none": lambda z, o: ce(z, o.y, reduction="none"),
    "sum": lambda z, o: ce(z, o.y, reduction="sum"),
    "class weights": lambda z, o: ce(z, o.y, weight=o.weight),
    "smoothing": lambda z, o: ce(z, o.y, label_smoothing=0.2, weight=o.weight, reduction="sum"),
    "all smoothing": lambda z, o: ce(z, o.y, label_smoothing=1.0),
    "ignore_index": lambda z, o: ce(z, o.all_y, ignore_index=0),
    "bytes": lambda z, o: ce(z, o.all_y.clamp(max=255).byte()),
    "legacy sum": lambda z, o: ce(z, o.y, size_average=False),
    "legacy none": lambda z, o: ce(z, o.y, reduce=False),
    "probabilities": lambda z, o: F.cross_entropy(z.flatten(0, 1), o.fixed_probs.flatten(0, 1)),
    "probabilities with everything": lambda z, o: F.cross_entropy(
        z.mT, o.fixed_probs.mT, o.weight, reduction="none", label_smoothing=0.2
    ),
    "learnt probabilities": lambda z, o: F.cross_entropy(z.mT, o.probs.mT),
    "module of PyTorch": lambda z, o: nn.CrossEntropyLoss(o.weight, label_smoothing=0.1)(z.mT, o.y),
    "module of nnmath": call_loss_module(
        lambda o: torch_nnmath.nn.CrossEntropyLoss(o.weight, base=2)
    ),
    "module of nnmath, capped": call_loss_module(
        lambda o: torch_nnmath.nn.CrossEntropyLoss(softcap=4.0, logit_scale=o.s, z_loss=0.1)
    ),
    "function of nnmath": lambda z, o: functional.cross_entropy(
        z.mT, o.y, base=2, softcap=5.0, z_loss=1e-2, reduction="sum"
    ),
    "function of nnmath, scaled": lambda z, o: functional.cross_entropy(
        (z * 0.5).flatten(0, 1), o.y.flatten(), logit_scale=o.s, softcap=5.0, label_smoothing=0.1
    ),
    "function of nnmath, temperature": lambda z, o: functional.cross_entropy(
        (z * o.s).mT, o.y, softcap=4.0, temperature=0.7, z_loss=1e-2
    ),
    "function of nnmath, capped": lambda z, o: functional.cross_entropy(
        4 * torch.tanh(z.mT * o.s / 4), o.y, z_loss=1e-2, weight=o.weight
    ),
    "function of nnmath, row weights": lambda z, o: functional.cross_entropy(
        z.mT, o.y, row_weight=o.t.squeeze(-1), z_loss=1e-2, label_smoothing=0.1
    ),
    "module of nnmath, row weights": lambda z, o: torch_nnmath.nn.CrossEntropyLoss()(
        z.flatten(0, 1), o.y.flatten(), o.t.flatten()
    ),
    "function of nnmath, divisor": lambda z, o: functional.cross_entropy(
        z.mT, o.y, divisor=7, z_loss=1e-2, weight=o.weight
    ),
    "module of nnmath, learnt divisor": lambda z, o: torch_nnmath.nn.CrossEntropyLoss(z_loss=1e-2)(
        z.mT, o.y, divisor=o.s
    ),
    "stats": stack_loss_and_stats,
    # log-probabilities
    "nll_loss": lambda z, o: F.nll_loss(F.log_softmax(z, -1).flatten(0, 1), o.y.flatten()),
    "NLLLoss": lambda z, o: nn.NLLLoss(o.weight, reduction="none")(nn.LogSoftmax(1)(z.mT), o.y),
    "nll_loss of the capped": lambda z, o: F.nll_loss(
        F.log_softmax((2 * (z + o.row).tanh())[:, 1:].flatten(0, 1), dim=-1),
        o.y[:, 1:].flatten(),
    ),
    "gather": lambda z, o: z.log_softmax(-1).gather(-1, o.all_y[..., None]).squeeze(-1),
    "negated gather": lambda z, o: (-z.log_softmax(-1)).gather(2, o.all_y[..., None]),
    "gather, by keywords": lambda z, o: torch.gather(
        input=-1 * z.mT.log_softmax(dim=1) / -1, dim=1, index=o.all_y[:, None]
    ),
    "gather of few": lambda z, o: (z[:, 2:] / o.s).log_softmax(-1).gather(-1, o.all_y[:, 2:, None]),
    "sum over classes": lambda z, o: z.log_softmax(-1).sum(-1),
    "negated sum": lambda z, o: (-torch.log_softmax(z, 2)).sum(dim=2, keepdim=True),
    "mean over classes": lambda z, o: torch.mean(F.log_softmax(z.mT, 1), dim=[1]),
    "sum by axis": lambda z, o: z.log_softmax(-1).sum(axis=-1),
    "sum, type": lambda z, o: torch.sum(z.log_softmax(-1), -1, dtype=F64),
    # logits of one class, and log-sum-exp
    "gather of logits": lambda z, o: z.gather(-1, o.all_y[..., None]).square(),
    "gather of capped logits": lambda z, o: (-2 * torch.tanh((z + o.row) * o.s)).mT.gather(
        1, o.all_y[:, None]
    ),
    "logsumexp": lambda z, o: z.logsumexp(-1),
    "logsumexp, function": lambda z, o: torch.logsumexp(z.mT, [1], keepdim=True),
    "logsumexp, special": lambda z, o: torch.special.logsumexp(z[:, 1:] + o.row, dim=2).sin(),
    "logsumexp of capped logits": lambda z, o: (3 * (z * o.s).tanh()).logsumexp(2),
    "logsumexp of negated logits": lambda z, o: (-z).logsumexp(-1),
    "z-loss of the user's": add_z_loss,
    "gather less logsumexp": lambda z, o: (
        z.gather(-1, o.all_y[..., None]) - z.logsumexp(-1, keepdim=True)
    ),
    "log-probabilities of a policy": compute_log_probs_of_policy,
    # losses of tuning, and entropies
    "losses times a mask": mask_losses,
    "policy gradient": compute_policy_loss,
    "preference": compute_preference_loss,
    "entropy": compute_entropy(lambda z, o: z),
    "entropy of scaled": compute_entropy(lambda z, o: z * o.s),
    "entropy of capped": compute_entropy(lambda z, o: 3 * torch.tanh((z + o.row) / 3)),
    "entropy of some rows": compute_entropy(
        lambda z, o: z[:, 1:].flatten(0, 1)[o.y[:, 1:].flatten() > 9]
    ),
    "entropy, rows after softmax": lambda z, o: (
        z.mT.softmax(1)[..., 1:] * -z.mT.log_softmax(1)[..., 1:]
    ).sum(1, keepdim=True),
    "entropy by exp": lambda z, o: -(z.log_softmax(-1).exp() * z.log_softmax(-1)).sum(dim=-1),
    "entropy of negated": lambda z, o: torch.sum(-z.softmax(2) * F.log_softmax(z, 2), [2]),
    "entropy, mean": lambda z, o: torch.mean(-1 * F.log_softmax(z, 2) * F.softmax(z, 2), -1),
    "entropy, terms": lambda z, o: torch.special.entr(F.softmax(z / 2, -1)).sum(-1),
    "entropy of chunks": compute_entropy_of_chunks,
    "entropy without gradient": compute_constant_entropy,
    "entropy from logits": lambda z, o: z.logsumexp(-1) - (z.softmax(-1) * z).sum(-1),
    # divergences of one head's distributions; those of two heads have tests of their own
    "cross entropy at another temperature": lambda z, o: (
        -(z.softmax(-1) * (z / 2).log_softmax(-1)).sum(-1)
    ),
    "cross entropy of other rows": lambda z, o: (
        -(z[:, 1:].softmax(-1) * z[:, :-1].log_softmax(-1)).sum(-1)
    ),
    "cross entropy at two learnt temperatures": lambda z, o: (
        -((z * o.s).softmax(-1) * (z * o.narrow_s).log_softmax(-1)).sum(-1)
    ),
    "cross entropy of detached probabilities": lambda z, o: (
        -(z.softmax(-1).detach() * z.log_softmax(-1)).sum(-1)
    ),
    "its own probabilities as targets": lambda z, o: F.cross_entropy(z.mT, z.mT.softmax(1)),
    "cross entropy of constant probabilities": compute_cross_term,
    "cross entropy of constants, in other order": compute_cross_term_in_other_order,
    "divergence from probabilities": lambda z, o: F.kl_div(
        z.log_softmax(-1), o.probs, reduction="sum"
    ),
    "logarithms scaled": lambda z, o: (
        2 * z.log_softmax(-1).sum(-1) - (z.log_softmax(-1) * 3).sum(-1)
    ),
    "expected logit": compute_expected_logit(lambda z, o: z),
    "expected logit, capped": compute_expected_logit(lambda z, o: -2 * torch.tanh(z * o.s)),
    "expected logit, negated": lambda z, o: (z.log_softmax(-1).exp().neg() * z).sum(-1),
}
FUSED_WITHOUT_BIAS: dict[str, Any] = {
    "over temperatures": lambda z, o: ce(z / o.fixed_t, o.y),
    "times temperatures": lambda z, o: F.cross_entropy((z * o.fixed_t)[:, 1:].mT / 2, o.y[:, 1:]),
    "learnt temperatures": lambda z, o: ce(z / o.t, o.y),
    "times learnt temperatures": lambda z, o: F.cross_entropy(o.t.mT * z.mT, o.y),
    "two temperatures": lambda z, o: ce((z / o.fixed_t)[:, :-1] * o.t[:, 1:], o.y[:, 1:]),
    "temperatures of positions": lambda z, o: ce(z / o.fixed_t[0], o.y),
    "temperatures of examples": lambda z, o: ce(z / o.t[:, :1], o.y),
    "temperature of all": lambda z, o: ce(z / o.t[1, 1], o.y),
    "temperatures of some": lambda z, o: F.cross_entropy(
        (z / o.t)[o.y != IGNORED], o.y[o.y != IGNORED]
    ),
    "temperatures and a scale": lambda z, o: ce(o.s * (z / o.t), o.y),
    "temperatures, logarithms": lambda z, o: (z / o.t).log_softmax(-1).mean(-1),
    "temperatures, logsumexp": lambda z, o: (z / o.t).logsumexp(-1),
    "temperatures, gather of logits": lambda z, o: (z / o.t).gather(-1, o.all_y[..., None]),
    "temperatures, entropy": compute_entropy(lambda z, o: z / o.t),
    "temperatures, cap": lambda z, o: functional.cross_entropy((z / o.t).mT, o.y, softcap=3.0),
    "no bias": lambda z, o: ce(4 * torch.tanh((z + o.row) * o.s / 4), o.y),
}
LOSS_COUNTS = {
    "iteration": 2,
    "split": 2,
    "chunk": 3,
    "two losses": 2,
    "z-loss of the user's": 2,
    "gather less logsumexp": 2,
    "log-probabilities of a policy": B + 1,
    "policy gradient": 2,
    "entropy of chunks": 4,
    "entropy without gradient": 5,
    "entropy from logits": 2,
    "logarithms scaled": 2,
}


@pytest.mark.parametrize("name", make_params(FUSED | FUSED_WITHOUT_BIAS))
def test_fused_losses_agree_and_make_no_logits(name):
    loss = (FUSED | FUSED_WITHOUT_BIAS)[name]
    plain, swapped, log = make_pair(bias=name in FUSED)
    truth = compute_results(plain, loss)
    assert_agree(compute_results(swapped, loss), truth)
    assert_fused(log, LOSS_COUNTS.get(name, 1))
    o = make_inputs()
    with OperationRecorder() as recorder:
        results = compute_results(swapped, loss, o)
    assert_agree(results, truth)
    has_large_target = "probabilities" in name
    assert has_large_target or not recorder.list_outputs(has_logits_shape)


def test_recorder_sees_plain_logits():
    (plain, *_), o = make_pair(), make_inputs()
    with OperationRecorder() as recorder:
        compute_results(plain, FUSED["view"], o)
    assert len(recorder.list_outputs(has_logits_shape)) > 2


LOSSES_IN_BLOCKS = [
    *("shift", "cap of scaled logits", "stats", "smoothing", "gather", "learnt temperatures"),
    *("logsumexp", "logsumexp of capped logits", "gather of capped logits"),
]


@pytest.mark.parametrize("name", LOSSES_IN_BLOCKS)
@pytest.mark.parametrize("rows", [3500, 150])
def test_losses_in_several_blocks_of_rows_agree(name, rows):
    """3500 x 700 exceeds the block size; for 150 x 70 it is reduced to 32 rows."""
    sizes = {"examples": 2, "tokens": rows // 2, "classes": 700 if rows == 3500 else 70}
    loss = (FUSED | FUSED_WITHOUT_BIAS)[name]
    plain, swapped, log = make_pair(bias=name in FUSED, classes=sizes["classes"])
    block_size = limit_head_blocks() if rows == 150 else contextlib.nullcontext()
    with block_size, mock.patch.dict(globals(), C=sizes["classes"]):
        assert count_block_rows(rows, sizes["classes"]) < rows
        results = [compute_results(model, loss, make_inputs(**sizes)) for model in (swapped, plain)]
    assert_agree(*results, atol=1e-10)
    assert_fused(log)


def test_weight_gradient_of_a_frequent_class_is_summed_in_float32():
    random = torch.Generator().manual_seed(0)
    x = torch.rand(4096, 8, generator=random).to(BF16)
    head = nn.Sequential(nn.Linear(8, 30)).to(BF16)
    swap(head)
    chosen = head(x).gather(1, torch.full((4096, 1), 3))
    dW, db = torch.autograd.grad(chosen.sum(), [*head.parameters()])
    torch.testing.assert_close(dW[3], x.double().sum(0).to(BF16), rtol=2**-8, atol=0)
    assert db[3] == 4096
    assert not dW[4:].any()


PRECEDING_USES: dict[str, Any] = {
    "nothing": lambda z, o: None,
    "a loss": lambda z, o: F.cross_entropy(z, o.y.flatten()),
    "read": lambda z, o: z.exp(),
    "reduced": lambda z, o: z.argmax(-1),
    "detached": lambda z, o: z.detach(),
    "edited": lambda z, o: z.mul_(0.3),
    "edited without gradient": lambda z, o: z.data.mul_(0.3),
    "watched": lambda z, o: z.register_hook(lambda g: 2 * g),
    "retained": lambda z, o: z.retain_grad(),
    "its node read": lambda z, o: z.grad_fn.name(),
}


@pytest.mark.parametrize("name", make_params(PRECEDING_USES))
def test_loss_of_logits_without_steps_after_another_use_agrees(name):
    def loss(z, o):
        PRECEDING_USES[name](z, o)
        return F.cross_entropy(z, o.y.flatten(), label_smoothing=0.1)

    plain, swapped, log = make_pair()
    results = []
    for model in (swapped, plain):
        o = make_inputs()
        z = model(o.x.flatten(0, 1))
        leaves = [*model.parameters(), o.x]
        value = loss(z, o)
        results.append([value, *torch.autograd.grad(value, leaves)])
    assert_agree(*results)
    assert log.fused == {"nothing": 1, "reduced": 1, "detached": 1, "a loss": 2}.get(name, 0)
    assert bool(log.materialized) != bool(log.fused)


@pytest.fixture
def gradient_requests(monkeypatch):
    """Lists, for each call of the head's kernel, whether gradients were requested."""
    requests, original = [], kernels.head

    def head(*args):
        requests.append(any(args[-1]))
        return original(*args)

    monkeypatch.setattr(kernels, "head", head)
    return requests


def test_loss_computes_its_gradient_once(gradient_requests):
    _, swapped, _ = make_pair()
    o = make_inputs()
    z = swapped(o.x)
    ce(z, o.y).backward()
    assert gradient_requests == [True]
    gradient_requests.clear()
    ce(swapped(o.x), o.y, reduction="none").sum().backward()
    assert gradient_requests == [False, True]
    gradient_requests.clear()
    with torch.no_grad():
        ce(swapped(o.x), o.y)
    ce(swapped.requires_grad_(False)(o.x.detach()), o.y)
    assert gradient_requests == [False, False]


def test_log_sum_exp_with_out_writes_it():
    plain, swapped, _ = make_pair()
    x = make_inputs().fixed_x
    with torch.no_grad():
        expected = plain(x).logsumexp(-1)
        out = torch.empty_like(expected)
        result = torch.logsumexp(swapped(x), -1, out=out)
    assert result is out
    torch.testing.assert_close(out, expected)


def test_logits_as_probabilities_of_plain_logits_are_computed():
    plain, swapped, _ = make_pair()
    x = make_inputs().fixed_x
    input = torch.randn(x.shape[0] * x.shape[1], C, dtype=F64)
    losses = [F.cross_entropy(input, model(x).flatten(0, 1)) for model in (plain, swapped)]
    torch.testing.assert_close(losses[1], losses[0])
