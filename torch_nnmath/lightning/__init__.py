"""Callbacks for Lightning's Trainer: swap modules, check gradients, log peak memory.

    trainer = Trainer(callbacks=[SwapFormulas(), GradientCheck(every_n_steps=500), PeakMemory()])

They work with `lightning.pytorch` and with `pytorch_lightning`. They derive from the Callback of
`lightning.pytorch` if it is installed; the Trainer of either package accepts them. Metrics go to
the Trainer's loggers, with the same step as those of `self.log`.
"""

from torch_nnmath.lightning.gradient_check import GradientCheck, GradientError
from torch_nnmath.lightning.peak_memory import PeakMemory
from torch_nnmath.lightning.swap_formulas import SwapFormulas

__all__ = ["GradientCheck", "GradientError", "PeakMemory", "SwapFormulas"]
