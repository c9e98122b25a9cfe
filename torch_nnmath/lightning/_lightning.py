"""Imports from either package of Lightning, and the logging of metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

try:
    from lightning.pytorch import Callback
    from lightning.pytorch.loggers.logger import DummyLogger
    from lightning.pytorch.utilities.seed import isolate_rng
except ModuleNotFoundError:
    try:
        from pytorch_lightning import Callback  # type: ignore[assignment]
        from pytorch_lightning.loggers.logger import DummyLogger  # type: ignore[assignment]
        from pytorch_lightning.utilities.seed import isolate_rng
    except ModuleNotFoundError as error:
        raise ImportError(
            "torch_nnmath.lightning needs Lightning: pip install torch-nnmath[lightning]"
        ) from error
# both packages depend on lightning_utilities
from lightning_utilities.core.apply_func import apply_to_collection
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

__all__ = [
    "Callback",
    "DummyLogger",
    "apply_to_collection",
    "isolate_rng",
    "log_metrics",
    "rank_zero_info",
    "rank_zero_warn",
]


def log_metrics(
    trainer: Any,
    metrics: Mapping[str, float],
    reduce_op: Literal["max", "sum"] = "max",
    step_offset: int = 0,
) -> dict[str, float]:
    """Reduces metrics over all processes, sends them to the Trainer's loggers and returns them."""
    device = trainer.strategy.root_device
    values = torch.tensor([*map(float, metrics.values())], device=device, dtype=torch.float32)
    values = trainer.strategy.reduce(values, reduce_op=reduce_op)
    reduced_metrics = dict(zip(metrics, values.tolist(), strict=True))
    step = trainer.fit_loop.epoch_loop._batches_that_stepped + step_offset  # as in `self.log`
    for logger in trainer.loggers:
        logger.log_metrics(reduced_metrics, step=step)
    return reduced_metrics
