"""Public arguments of the head -> `HeadInputs`, and its row results -> losses."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_nnmath import _check as check
from torch_nnmath import formulas
from torch_nnmath._precision import cast_for_loss, cast_for_product, is_autocast, wide_type, widen
from torch_nnmath._records import HeadInputs, Requests, RowResults, Target
from torch_nnmath._reduction import choose_divisor, count_kept
from torch_nnmath._target import TargetOptions, read_indices, read_probabilities


class LossStats(NamedTuple):
    """What `return_stats` gives beside a loss, for each row, without gradient.

    An ignored row has 0 everywhere, the class -1 and False.
    """

    lse: Tensor  # ln Σ e^logits, of the logits that the loss sees: scaled, then capped
    entropy: Tensor  # of their softmax, to the loss's base
    predicted: Tensor  # the class of the largest logit, the first of several
    correct: Tensor  # whether that is the target, or the target's most probable class
    z_loss: Tensor  # lse² times its coefficient


def make_stats(lse: Tensor, entropy: Tensor, predicted: Tensor, label: Any, z: float) -> LossStats:
    """`LossStats` of rows with these labels; `z` is the z-loss's coefficient.

    Ignored rows have predicted class -1, so `correct` is False whatever their label.
    """
    lse, entropy = lse.detach(), entropy.detach()
    return LossStats(lse, entropy, predicted, predicted == label, z * lse.square())


class LogitOptions(NamedTuple):
    """What is done to logits before the loss, and the base of its logarithm."""

    base: float = math.e
    scale: Tensor | float = 1.0  # F18
    cap: float | None = None  # F19


def measure_logits(
    logits: Tensor, keep: Tensor | None, dim: int, options: LogitOptions, label: Any, z: float
) -> LossStats:
    """`LossStats` of logits that are in memory, their classes at `dim`."""
    constant = formulas.mask_ignored(keep, logits.detach())
    lse = widen(constant).logsumexp(dim, keepdim=True)
    entropy = formulas.Entropy.evaluate(constant, dim, options.base)
    lse, entropy = (formulas.mask_ignored(keep, v).squeeze(dim) for v in (lse, entropy))
    if constant.shape[dim]:
        predicted = constant.argmax(dim)
    else:
        predicted = lse.new_full(lse.shape, -1, dtype=torch.int64)
    if keep is not None:
        predicted = predicted.masked_fill(~keep.squeeze(dim), -1)
    return make_stats(lse, entropy, predicted, label, z)


class LogitSource(NamedTuple):
    """Where logits come from that an operation has changed since, as deferred logits.

    The head then computes logits of a wider `dtype`, with a row added to each, and, without a bias,
    each row times its factor.
    """

    dtype: torch.dtype | None = None
    added_row: Tensor | None = None
    row_scale: Tensor | None = None


PLAIN_LOGITS = LogitSource()


def is_scaled(logit_scale: Tensor | float) -> bool:
    """Whether the scale changes anything. A tensor's value is not looked at."""
    return isinstance(logit_scale, Tensor) or logit_scale != 1


def scale_logits(x: Any, logit_scale: Tensor | float) -> Any:
    """F18; None stays None."""
    if x is None or not is_scaled(logit_scale):
        return x
    return formulas.LogitScale.evaluate(x, logit_scale)


class Head(NamedTuple):
    """Checked arguments of the head: `HeadInputs` for each position, and how to reduce."""

    inputs: list[HeadInputs]
    dtype: torch.dtype  # of the loss
    loss_type: torch.dtype  # that the loss is computed in
    shape: tuple[int, ...]  # of one number for each row
    total_weight: Any  # what a mean divides by: examples or their weights
    kept_rows: Any  # the number of rows that are not ignored
    labels: Tensor  # class indices, or probabilities (N, C, positions)

    def compute_loss(self, reduction: str, z_loss: float, return_stats: bool) -> Any:
        """The loss with this z-loss coefficient; with `return_stats` also `LossStats`."""
        requests = Requests(return_stats, return_stats)
        if reduction == "none":
            rows = self._evaluate_rows(requests)
            losses = [r.loss + z_loss * r.z_loss if z_loss else r.loss for r in rows]
            loss = self._stack(losses)
        else:
            zero, rows = self.labels.new_zeros((), dtype=self.loss_type), []
            n = choose_divisor(reduction, self.total_weight, zero)
            kept = choose_divisor(reduction, self.kept_rows, zero)
            for inputs in self.inputs:
                needs = formulas.LinearCrossEntropyCost.needed_gradients(n, inputs)
                if needs is None:
                    rows.append(_compose_cost(inputs, n, kept, z_loss, requests))
                else:
                    ω = z_loss / torch.as_tensor(kept).to(zero) if z_loss else None
                    C, lse, entropy, predicted, *_ = formulas.LinearCrossEntropyCost.apply(
                        torch.as_tensor(n).to(zero), ω, *inputs.flat(), requests, needs
                    )
                    rows.append(RowResults(C, lse, None, entropy, predicted))
            loss = sum((r.loss for r in rows[1:]), rows[0].loss) if rows else zero / n
        if not return_stats:
            return loss.to(self.dtype)
        lse, entropy, predicted = (self._stack([r[i] for r in rows]) for i in (1, 3, 4))
        predicted = predicted.to(torch.int64)  # a float if there is no position
        return loss.to(self.dtype), make_stats(lse, entropy, predicted, self._label(), z_loss)

    def compute_log_probs(self, return_entropy: bool) -> Any:
        """The log-probability of each row's class, F22; with `return_entropy` also F21."""
        rows = self._evaluate_rows(Requests(entropy=return_entropy))
        log_probs = self._stack([-r.loss for r in rows]).to(self.dtype)
        if not return_entropy:
            return log_probs
        return log_probs, self._stack([r.entropy for r in rows]).to(self.dtype)

    def compute_log_sum_exp(self) -> Tensor:
        """ln Σ e^v of each row, whatever its target is: F14 of a weight 1 without a class."""
        rows = [
            _evaluate(i._replace(target=Target(None, i.target.p, None), base=math.e), Requests())
            for i in self.inputs
        ]
        return self._stack([r.loss for r in rows]).to(self.dtype)

    def compute_class_logits(self) -> Tensor:
        """The logit of each row's class."""
        logits = []
        for x, W, b, target, _, _, cap in self.inputs:
            assert target.y is not None
            y = target.y.squeeze(1)
            # widened first, since the gradients of many rows may be added to one class
            z = (widen(x) * widen(W)[y]).sum(1)
            z = z if b is None else z + widen(b)[y]
            logits.append(z if cap is None else formulas.SoftCap.evaluate(z, cap))
        return self._stack(logits).to(self.dtype)

    def _evaluate_rows(self, requests: Requests) -> list[RowResults]:
        return [_evaluate(inputs, requests) for inputs in self.inputs]

    def _stack(self, positions: list[Tensor]) -> Tensor:
        """One number for each row and position, in the shape of the losses."""
        if not positions:
            return self.labels.new_zeros(self.shape, dtype=self.loss_type)
        return torch.stack([v.reshape(-1) for v in positions], -1).reshape(self.shape)

    def _label(self) -> Tensor:
        """The target's class of each row, or its most probable one."""
        y = self.labels
        if y.is_floating_point():
            y = y.argmax(1) if y.shape[1] else y.sum(1).to(torch.int64)
        return y.reshape(self.shape)


def _evaluate(inputs: HeadInputs, requests: Requests) -> RowResults:
    return RowResults(*formulas.LinearCrossEntropy.evaluate(*inputs.flat(), requests)[:5])


def _compose_cost(
    inputs: HeadInputs, n: Any, kept: Any, z_loss: float, requests: Requests
) -> RowResults:
    """F3 of F14, and `z_loss` times that of F20 over the kept rows, in place of the rows' loss."""
    rows = _evaluate(inputs, requests)
    C = formulas.Cost.evaluate(rows.loss, n)
    if z_loss:
        C = C + z_loss * formulas.Cost.evaluate(rows.z_loss, kept)
    return rows._replace(loss=C)


def prepare_head(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    target_options: TargetOptions,
    logit_options: LogitOptions,
    source: LogitSource = PLAIN_LOGITS,
) -> Head:
    """Checks the head's arguments, casts them and splits them into positions."""
    base, logit_scale, cap = logit_options
    check.base(base)
    check.head(input, linear_weight, linear_bias)
    check.smoothing(target_options.label_smoothing)
    logit_type = source.dtype or input.dtype
    dtype, target, weight = cast_for_loss(logit_type, target, target_options.weight)
    target_options = target_options._replace(weight=weight)
    if is_autocast(input):
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
    input, W, b = cast_for_product(input, linear_weight, linear_bias)
    if source.added_row is not None:
        b = source.added_row if b is None else widen(b) + source.added_row
    (C, *positions_shape, D), batch = W.shape, input.shape[:-1]
    N, positions = math.prod([*batch]), math.prod([*positions_shape])
    x, b = input.reshape(N, D), scale_logits(b, logit_scale)
    if positions > 1:  # each adds a gradient in x: in float32
        x, W, b = widen(x), widen(W), None if b is None else widen(b)
    loss_type = wide_type(input.dtype)
    keep: Any = None
    if target.shape == (*batch, C, *positions_shape):
        check.probabilities(target, -1)
        check.no_ignore_index(target_options.ignore_index, target)
        t, dtype = read_probabilities(target, target_options, len(batch), C, dtype)
        labels = t.reshape(N, C, positions).to(loss_type)
        targets = [Target(None, None, labels[..., d]) for d in range(positions)]
        total_weight: Any = N * positions if C else 0
    else:
        target = check.flatten_head_indices(input, target, C, positions_shape)
        indices = read_indices(target.reshape(N, positions), C, target_options, logit_type)
        labels, keep, total_weight = indices.y, indices.keep, indices.total_weight
        targets = [
            indices.make_target(labels[:, d : d + 1], indices.p[:, d : d + 1], 1, 2)
            for d in range(positions)
        ]
    if source.row_scale is not None:
        x = widen(x) * source.row_scale.reshape(N, 1)
    if is_scaled(logit_scale):
        if keep is not None:
            x = formulas.mask_ignored(keep.any(1, keepdim=True), x)
        x = scale_logits(x, logit_scale)
    Ws, bs = _split_positions(W, positions, D), _split_positions(b, positions)
    keeps = [None if keep is None else keep[:, d : d + 1] for d in range(positions)]
    parts = zip(Ws, bs, targets, keeps, strict=True)
    return Head(
        inputs=[HeadInputs(x, *part, base, cap) for part in parts],
        dtype=dtype,
        loss_type=loss_type,
        shape=(*batch, *positions_shape),
        total_weight=total_weight,
        kept_rows=count_kept(keep, N * positions) if C else 0,
        labels=labels,
    )


def _split_positions(v: Tensor | None, positions: int, *last: int) -> Any:
    """The head's weight or bias of each position; a view, if there is one position."""
    if v is None:
        return [None] * positions
    if positions == 1:
        return [v.reshape(v.shape[0], *last)]
    return v.reshape(v.shape[0], positions, *last).unbind(1)
