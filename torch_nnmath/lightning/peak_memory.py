"""The callback that logs the peak memory of training steps."""

from __future__ import annotations

from typing import Any

from torch_nnmath._memory import MIB, can_reset_peak, read_peak, reset_peak
from torch_nnmath.lightning._lightning import Callback, log_metrics, rank_zero_warn


class PeakMemory(Callback):
    """Logs the peak memory of a training step: forward, backward and optimizer.

    The metrics, in MiB (2^20 bytes), are the largest of all processes:

        memory/peak_MiB   the most memory in use during the step
        memory/step_MiB   the same, minus the memory in use when the step started

    On a GPU it measures what PyTorch allocated there, and resets PyTorch's peak statistics. On a
    CPU under Linux it measures the resident memory of the process, and first returns the C
    library's free memory to the system. Elsewhere it warns and logs nothing. Place it after
    `GradientCheck` in the list of callbacks, so that it does not count the copies of that check.

    Args:
        every_n_steps: measures batches 0, n, 2n, ... of each epoch. The first step also allocates
            memory that stays in use, such as the optimizer's state.

    Attributes:
        peaks: the metrics of the last measurement.

    Raises ValueError for an `every_n_steps` below 1.

    >>> PeakMemory(every_n_steps=10).peaks
    {}
    """

    def __init__(self, every_n_steps: int = 50):
        super().__init__()
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.peaks: dict[str, float] = {}
        self._bytes_before = 0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if not can_reset_peak(trainer.strategy.root_device):
            rank_zero_warn("PeakMemory measures on CUDA's GPUs and on a CPU under Linux only")

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._is_measured(trainer, batch_idx):
            self._bytes_before = reset_peak(trainer.strategy.root_device)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._is_measured(trainer, batch_idx):
            peak = read_peak(trainer.strategy.root_device)
            step = max(0, peak - self._bytes_before)
            metrics = {"memory/peak_MiB": peak / MIB, "memory/step_MiB": step / MIB}
            self.peaks = log_metrics(trainer, metrics)

    def _is_measured(self, trainer: Any, batch_idx: int) -> bool:
        is_due = batch_idx % self.every_n_steps == 0
        return is_due and can_reset_peak(trainer.strategy.root_device)
