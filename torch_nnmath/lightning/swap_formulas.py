"""The callback that swaps a module's layers and losses while the Trainer runs."""

from __future__ import annotations

from typing import Any

import torch

from torch_nnmath.deferred import compute_logits_before_update, materialize
from torch_nnmath.lightning._lightning import Callback, log_metrics, rank_zero_info
from torch_nnmath.lightning._swap_state import SwapState
from torch_nnmath.swapping import Report, Selector, swap


class SwapFormulas(Callback):
    """Swaps the module by `torch_nnmath.swap` while the Trainer runs it.

    Swaps when fit, validate, test or predict starts, and restores the module when it ends, also
    after an exception. Modules that were swapped before stay swapped. Checkpoints are those of the
    plain module, and can be resumed with or without the callback. The changed modules are logged at
    the start, and at the end how often the head's logits were computed. At the end of each epoch,
    except in predict, it logs the metrics

        head/fused_losses        losses so far that were computed without logits
        head/materialized_logits times so far that logits were computed

    summed over heads and processes; validation within fit counts too.

    Logits that outlive a training step, such as those that it returns, are computed before the
    optimizer changes the weights. With manual optimization only detached logits are. Logits that
    `predict_step` returns are computed.

    Modules that `configure_model` builds or wraps are swapped too. The page Scale (docs/scale.md)
    says which wrappers keep the head fused. A strategy that spawns processes does not return the
    report to the main process.

    Args:
        include: modules to swap: a pattern for names ("encoder.*"), a class, a predicate
            `(name, module) -> bool`, or a list of these; None is all.
        exclude: modules not to swap, in the same forms; it takes precedence.
        head: the Linear that computes logits: the module or its name, relative to the
            LightningModule; "auto" finds it; None for no head.

    Attributes:
        report: the `Report` of the current run, or else of the last one.

    When the Trainer starts, raises ValueError for a head that is not in the module, and TypeError
    for an argument of another type.

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
        self._state_before: SwapState | None = None
        self._is_complete = False

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._state_before = SwapState(pl_module)
        self.report, self._is_complete = Report(), False
        # Swaps before `configure_model` wraps modules. The head may not exist before that hook.
        self._swap(pl_module, head=None)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if self._state_before is None or self._is_complete:
            return
        self._state_before.restore_heads()
        self._swap(pl_module, self.head)
        self._is_complete = True
        rank_zero_info(f"{type(self).__name__}:\n{self.report}")

    on_validation_start = on_test_start = on_predict_start = on_fit_start

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        # With manual optimization the training step's own variables are still alive.
        if pl_module.automatic_optimization:
            compute_logits_before_update(optimizer, "use after the training step", lambda _: True)

    def on_predict_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        materialize(outputs, "result of predict_step")

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._log_counts(trainer)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn == "validate":  # validation within fit is logged with fit's epoch
            self._log_counts(trainer)

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._log_counts(trainer)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._restore(pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._restore(pl_module)

    def _swap(self, pl_module: Any, head: Any) -> None:
        new = swap(pl_module, include=self.include, exclude=self.exclude, head=head)
        self.report = Report([*self.report, *new], new.heads, new.left)

    def _restore(self, pl_module: Any) -> None:
        if self._state_before is None:
            return
        self._state_before.restore(pl_module)
        self._state_before = None
        for log in self.report.heads.values():
            rank_zero_info(repr(log))

    def _log_counts(self, trainer: Any) -> None:
        logs = self.report.heads.values()
        if logs:
            counts = {
                "head/fused_losses": sum(log.fused for log in logs),
                "head/materialized_logits": sum(log.materialized.total() for log in logs),
            }
            # Lightning logs the epoch's metrics of fit at the epoch's last step.
            step_offset = -1 if trainer.state.fn == "fit" else 0
            log_metrics(trainer, counts, reduce_op="sum", step_offset=step_offset)
