"""Public arguments of the head -> `HeadInputs`, and its row results -> losses."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from torch_nnmath import _check as check
from torch_nnmath import formulas
from torch_nnmath._logits import LogitOptions, LossStats, is_scaled, make_stats, scale_logits
from torch_nnmath._precision import (
    HALF,
    cast_for_loss,
    cast_for_product,
    find_weight_dtype,
    is_autocast,
    make_scalar,
    multiply,
    weigh,
    wide_type,
    widen,
)
from torch_nnmath._records import HeadInputs, Requests, RowResults, Target
from torch_nnmath._reduction import choose_divisor, count_kept, read_divisor
from torch_nnmath._target import (
    TargetOptions,
    read_indices,
    read_probabilities,
    read_row_weight,
)
from torch_nnmath.formulas.transfer import sum_over_ranks
from torch_nnmath.kernels.dispatch import has_dtensor

if TYPE_CHECKING:
    from torch_nnmath._sharding import Sharding


class LogitChanges(NamedTuple):
    """What autocast and recorded steps made of the logits of a Linear.

    A wider dtype, a bias added to every row, a factor for each row (then without the bias); and the
    type to which autocast rounded the weight, as in `HeadInputs`. Further, how ranks share a weight
    that is a DTensor, if the features are none.
    """

    dtype: torch.dtype | None = None
    added_bias: Tensor | None = None  # (C)
    row_scale: Tensor | None = None  # (*, 1)
    weight_dtype: torch.dtype | None = None
    sharding: Sharding | None = None


NO_CHANGES = LogitChanges()


class Head(NamedTuple):
    """Checked arguments of the head: `HeadInputs` for each position, and how to reduce.

    The N rows are the features' batch axes in one; every position has its own weight (C, D).
    """

    inputs: list[HeadInputs]  # one for each position
    output_dtype: torch.dtype  # of the results
    compute_dtype: torch.dtype  # of the arithmetic
    shape: tuple[int, ...]  # of the losses: (*batch, *positions)
    row_weight: Tensor | None  # (N, positions), 0 in ignored rows
    total_weight: Any  # divisor of the loss's mean: number of rows, or their total weight
    kept_rows: Any  # the same for the z-loss, which class weights do not affect
    labels: Tensor  # class indices (N, positions), or probabilities (N, C, positions)
    sharding: Sharding | None = None  # where DTensors were given; then the rest is this rank's

    def with_output_dtype(self, dtype: torch.dtype | None) -> Head:
        """The head with results of this type; None leaves theirs."""
        check.output_dtype(dtype)
        return self if dtype is None else self._replace(output_dtype=dtype)

    def with_divisor(self, divisor: Any, reduction: str) -> Head:
        """The head whose means divide by this number; None leaves theirs."""
        if self.sharding is not None and isinstance(divisor, Tensor):
            divisor = self.sharding.take_replicated("divisor", divisor, is_of_classes=False)
        n = read_divisor(divisor, reduction, self.labels.new_empty((), dtype=self.compute_dtype))
        return self if n is None else self._replace(total_weight=n, kept_rows=n)

    def compute_loss(self, reduction: str, z_loss_coefficient: float, return_stats: bool) -> Any:
        """The loss; with `return_stats` also `LossStats`."""
        check.finite("z_loss", z_loss_coefficient)
        requests = Requests(entropy=return_stats, predicted=return_stats)
        if reduction == "none":
            rows = self._evaluate_rows(requests)
            losses = [r.loss for r in rows]
            if z_loss_coefficient:
                losses = [r.loss + z_loss_coefficient * r.squared_lse for r in rows]
            loss = self._give_rows(self._weigh(self._stack(losses)).to(self.output_dtype))
        else:
            zero = self.labels.new_zeros((), dtype=self.compute_dtype)
            n = choose_divisor(reduction, self.total_weight, zero)
            kept_rows = choose_divisor(reduction, self.kept_rows, zero)
            costs, rows = [], []
            for d, inputs in enumerate(self.inputs):
                weight = None if self.row_weight is None else self.row_weight[:, d : d + 1]
                needs_gradient = formulas.LinearCrossEntropyCost.select_gradients(inputs)
                if formulas.LinearCrossEntropyCost.may_replace(needs_gradient):
                    ω = None
                    if z_loss_coefficient:
                        ω = z_loss_coefficient / make_scalar(kept_rows, zero)
                    cost, lse, entropy, predicted, *_ = formulas.LinearCrossEntropyCost.apply(
                        *(make_scalar(n, zero), ω, weight),
                        *(*inputs.flatten(), requests, needs_gradient),
                    )
                    result = RowResults(None, lse, None, entropy, predicted)
                else:
                    result = _evaluate(inputs, requests)
                    cost = _compose_cost(result, weight, n, kept_rows, z_loss_coefficient)
                costs.append(cost)
                rows.append(result)
            loss = sum(costs[1:], costs[0]) if costs else zero / n
            if self.sharding is not None:
                loss = self.sharding.give_total(loss)
            loss = loss.to(self.output_dtype)
        if not return_stats:
            return loss
        lse = self._stack([r.lse for r in rows])
        entropy = self._stack([r.entropy for r in rows])
        predicted = self._stack([r.predicted for r in rows])
        predicted = predicted.to(torch.int64)  # a float if there is no position
        stats = make_stats(lse, entropy, predicted, self._get_label(), z_loss_coefficient)
        return loss, LossStats(*map(self._give_rows, stats))

    def compute_log_probs(self, return_entropy: bool) -> Any:
        """The weighted log-probability of each row's class, F22; with `return_entropy` also F21."""
        rows = self._evaluate_rows(Requests(entropy=return_entropy))
        log_probs = self._weigh(self._stack([-r.loss for r in rows])).to(self.output_dtype)
        log_probs = self._give_rows(log_probs)
        if not return_entropy:
            return log_probs
        entropy = self._stack([r.entropy for r in rows]).to(self.output_dtype)
        return log_probs, self._give_rows(entropy)

    def compute_log_sum_exp(self) -> Tensor:
        """ln Σ e^v of each row. The target must be class indices of weight 1."""
        rows = self._evaluate_log_sum_exp(Requests())
        return self._give_rows(self._stack([r.loss for r in rows]).to(self.output_dtype))

    def compute_expectation(self, is_log: bool) -> Tensor:
        """Σ a l of each row, or Σ a v of the logits. The target as in `compute_log_sum_exp`."""
        rows = self._evaluate_log_sum_exp(Requests(entropy=True))
        values = [-r.entropy if is_log else r.loss - r.entropy for r in rows]
        return self._give_rows(self._stack(values).to(self.output_dtype))

    def _evaluate_log_sum_exp(self, requests: Requests) -> list[RowResults]:
        """The rows' results, whose loss is the log-sum-exp."""
        rows = []
        for inputs in self.inputs:
            weight_alone = Target(None, inputs.target.p, None)
            inputs = inputs._replace(target=weight_alone, base=math.e)
            rows.append(_evaluate(inputs, requests))
        return rows

    def compute_class_logits(self) -> Tensor:
        """The logit of each row's class."""
        logits = []
        for inputs in self.inputs:
            x, W, b, target, _, _, cap, weight_dtype, *_ = inputs
            assert target.y is not None
            y, rows, shard = target.y.squeeze(1), None, inputs.shard
            if shard is not None:
                y = y - shard.first_class
                (rows,) = torch.where((y >= 0) & (y < len(W)))
                x, y = x[rows], y[rows]
            # widened first, since the gradients of many rows may be added to one class
            w = widen(W)[y]
            w = w if weight_dtype is None else w.to(weight_dtype)
            z = (widen(x) * widen(w)).sum(1)
            z = z if b is None else z + widen(b)[y]
            if shard is not None:
                z = z.new_zeros(len(target.y)).index_put((rows,), z)
                z = sum_over_ranks(z, shard.group)
            logits.append(z if cap is None else formulas.SoftCap.evaluate(z, cap))
        return self._give_rows(self._stack(logits).to(self.output_dtype))

    def _evaluate_rows(self, requests: Requests) -> list[RowResults]:
        return [_evaluate(inputs, requests) for inputs in self.inputs]

    def _stack(self, positions: list[Tensor]) -> Tensor:
        """One number for each row and position, in the shape of the losses."""
        if not positions:
            return self.labels.new_zeros(self.shape, dtype=self.compute_dtype)
        return torch.stack([v.reshape(-1) for v in positions], -1).reshape(self.shape)

    def _weigh(self, rows: Tensor) -> Tensor:
        """Values in the shape of the losses, times the rows' weights."""
        r = self.row_weight
        return weigh(None if r is None else r.reshape(self.shape), rows)

    def _get_label(self) -> Tensor:
        """The target's class of each row, or its most probable one."""
        y = self.labels
        if y.is_floating_point():
            if self.sharding is not None:
                y = self.sharding.argmax(y, 1)
            else:
                y = y.argmax(1) if y.shape[1] else y.sum(1).to(torch.int64)
        return y.reshape(self.shape)

    def _give_rows(self, v: Tensor) -> Tensor:
        return v if self.sharding is None else self.sharding.give_rows(v)


def _evaluate(inputs: HeadInputs, requests: Requests) -> RowResults:
    return RowResults(*formulas.LinearCrossEntropy.evaluate(*inputs.flatten(), requests)[:5])


def _compose_cost(
    rows: RowResults, weight: Tensor | None, n: Any, kept_rows: Any, z_loss_coefficient: float
) -> Tensor:
    """F3 of the losses over n, plus `z_loss_coefficient` times F3 of F20 over the kept rows.

    With a weight for each row both are F30.
    """
    cost: Tensor = formulas.Cost.evaluate(rows.loss, n, weight)
    if z_loss_coefficient:
        z_loss = formulas.Cost.evaluate(rows.squared_lse, kept_rows, weight)
        cost = cost + multiply(z_loss, z_loss_coefficient)
    return cost


def prepare_head(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    target_options: TargetOptions,
    logit_options: LogitOptions,
    changes: LogitChanges = NO_CHANGES,
) -> Head:
    """Checks the head's arguments, casts them and splits them into positions."""
    base, logit_scale, cap = logit_options
    check.head(input, linear_weight, linear_bias, changes.weight_dtype)
    check.smoothing(target_options.label_smoothing)
    sharding = changes.sharding or _find_sharding(input, linear_weight)
    logit_dtype = changes.dtype or input.dtype
    output_dtype, target, weight = cast_for_loss(logit_dtype, target, target_options.weight)
    target_options = target_options._replace(weight=weight, sharding=sharding)
    if is_autocast(input):
        output_dtype = torch.float64 if output_dtype == torch.float64 else torch.float32
    # the operator itself rounds the weight, and so computes dW in the weight's own type
    W, weight_dtype = linear_weight, changes.weight_dtype or find_weight_dtype(linear_weight)
    input, b = cast_for_product(input, linear_bias)
    added_bias, row_scale = changes.added_bias, changes.row_scale
    C, *positions_shape = W.shape[:-1]
    D = W.shape[-1]
    is_distribution = target.shape == (*input.shape[:-1], C, *positions_shape)
    if sharding is not None:
        weight = target_options.weight
        input, W = sharding.take_features(input), sharding.take_weight("linear_weight", W)
        b = b if b is None else sharding.take_weight("linear_bias", b)
        if is_distribution:
            target = sharding.take_probabilities(target)
        else:
            target = sharding.take_rows("target", target)
            sharding.check_indices(target, target_options.ignore_index)
        if weight is not None:
            weight = sharding.take_replicated("weight", weight, is_of_classes=False)
            target_options = target_options._replace(weight=weight)
        if isinstance(logit_scale, Tensor):
            logit_scale = sharding.take_replicated("logit_scale", logit_scale, is_of_classes=True)
        if added_bias is not None:
            added_bias = sharding.take_weight("added_bias", added_bias)
        if row_scale is not None:
            row_scale = sharding.take_replicated("row_scale", row_scale, is_of_classes=True)
    if added_bias is not None:
        b = added_bias if b is None else widen(b) + added_bias
    batch = input.shape[:-1]
    N, positions = math.prod([*batch]), math.prod([*positions_shape])
    row_weight = target_options.row_weight
    if row_weight is not None:
        if sharding is not None:
            row_weight = sharding.take_rows("row_weight", row_weight)
        check.row_weight(row_weight, (*batch, *positions_shape), wide_type(input.dtype))
        row_weight = row_weight.reshape(N, positions)
        target_options = target_options._replace(row_weight=row_weight)
    x = input.reshape(N, D)
    b = scale_logits(b, logit_scale)
    if positions > 1:  # every position adds to x's gradient: add in float32
        x, W, b = widen(x), widen(W), None if b is None else widen(b)
    read_target = _read_probabilities if is_distribution else _read_indices
    head_target = read_target(
        input, target, (C, *positions_shape), target_options, logit_dtype, output_dtype
    )
    keep = head_target.keep
    if is_scaled(logit_scale) and keep is not None:
        x = formulas.mask_ignored(keep.any(1, keepdim=True), x)
    x, features, scale = _scale_features(x, logit_scale, row_scale)
    Ws, bs = _split_positions(W, positions, D), _split_positions(b, positions)
    keeps = [None if keep is None else keep[:, d : d + 1] for d in range(positions)]
    parts = zip(Ws, bs, head_target.targets, keeps, strict=True)
    shard = None if sharding is None else sharding.shard
    options: Any = base, cap, weight_dtype, features, scale, shard
    kept_rows = count_kept(keep, N * positions, head_target.row_weight) if C else 0
    total_weight = head_target.total_weight
    if sharding is not None:
        zero = x.new_zeros((), dtype=wide_type(x.dtype))
        total_weight, kept_rows = (
            sharding.sum_over_rows(n, zero) for n in (total_weight, kept_rows)
        )
    return Head(
        inputs=[HeadInputs(x, *part, *options) for part in parts],
        output_dtype=head_target.output_dtype,
        compute_dtype=wide_type(input.dtype),
        shape=(*batch, *positions_shape),
        row_weight=head_target.row_weight,
        total_weight=total_weight,
        kept_rows=kept_rows,
        labels=head_target.labels,
        sharding=sharding,
    )


def _find_sharding(input: Tensor, linear_weight: Tensor) -> Sharding | None:
    """How ranks share the features and the weight; None if neither is a DTensor."""
    if not has_dtensor(input, linear_weight):
        return None
    from torch_nnmath._sharding import read_sharding

    return read_sharding(input, linear_weight)


def make_any_class(input: Tensor, linear_weight: Tensor) -> Tensor:
    """Class 0 for each row and position: a target for results that do not depend on it."""
    if linear_weight.dim() and not len(linear_weight):
        got = tuple(linear_weight.shape)
        raise IndexError(f"expected linear_weight with at least one class, got shape {got}")
    shape = *input.shape[:-1], *linear_weight.shape[1:-1]
    return torch.zeros(shape, dtype=torch.int64, device=input.device)


def _scale_features(
    x: Tensor, logit_scale: Tensor | float, row_scale: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x times the scales, and the `features` and `scale` of `HeadInputs`."""
    scaled, factor = x, None
    if row_scale is not None:
        factor = row_scale.reshape(len(x), 1)
        scaled = widen(x) * factor
    if is_scaled(logit_scale):
        scaled = scale_logits(scaled, logit_scale)
        factor = make_scalar(logit_scale, scaled) if factor is None else factor * logit_scale
    if factor is None or x.dtype not in HALF or scaled.dtype != torch.float32:
        return scaled, None, None
    return scaled, x.detach(), factor.detach().to(torch.float32)


class _HeadTarget(NamedTuple):
    """The head's target, read; see `Head` for fields without a comment."""

    targets: list[Target]  # one for each position
    keep: Tensor | None  # (N, positions)
    row_weight: Tensor | None
    total_weight: Any
    labels: Tensor
    output_dtype: torch.dtype


def _read_probabilities(
    input: Tensor,
    target: Tensor,
    classes_shape: tuple[int, ...],
    options: TargetOptions,
    logit_dtype: torch.dtype,
    output_dtype: torch.dtype,
) -> _HeadTarget:
    """Reads probabilities; `classes_shape` is (C, *positions)."""
    del logit_dtype
    C, *positions_shape = classes_shape
    batch = input.shape[:-1]
    N, positions = math.prod([*batch]), math.prod([*positions_shape])
    check.probabilities(target, -1)  # the dtype alone; the next line checks ignore_index
    check.no_ignore_index(options.ignore_index, target)
    t, output_dtype = read_probabilities(target, options, len(batch), C, output_dtype)
    labels = t.reshape(N, t.shape[len(batch)], positions).to(wide_type(input.dtype))
    targets = [Target(None, None, labels[..., d]) for d in range(positions)]
    r = read_row_weight(options, (N, positions), None, wide_type(input.dtype))
    n = count_kept(None, N * positions, r) if C else 0
    return _HeadTarget(targets, None, r, n, labels, output_dtype)


def _read_indices(
    input: Tensor,
    target: Tensor,
    classes_shape: tuple[int, ...],
    options: TargetOptions,
    logit_dtype: torch.dtype,
    output_dtype: torch.dtype,
) -> _HeadTarget:
    """Reads class indices; `classes_shape` is (C, *positions)."""
    C, *positions_shape = classes_shape
    batch = input.shape[:-1]
    N, positions = math.prod([*batch]), math.prod([*positions_shape])
    target = check.flatten_head_indices(input, target, C, positions_shape)
    indices = read_indices(target.reshape(N, positions), C, options, logit_dtype)
    y, p = indices.y, indices.p.expand(N, positions)
    targets = [
        indices.make_target(y[:, d : d + 1], p[:, d : d + 1], 1, 2) for d in range(positions)
    ]
    return _HeadTarget(
        *(targets, indices.keep, indices.row_weight, indices.total_weight, y, output_dtype)
    )


def _split_positions(v: Tensor | None, positions: int, *features: int) -> Any:
    """The head's weight or bias of each position.

    With one position a reshape; else unbound along the positions.
    """
    if v is None:
        return [None] * positions
    if positions == 1:
        return [v.reshape(v.shape[0], *features)]
    return v.reshape(v.shape[0], positions, *features).unbind(1)
