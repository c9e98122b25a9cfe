"""PeakMemory: the peak of a training step."""

import sys

import pytest
import torch
from lightning_models import LIGHTNING_MARKS, Classifier, make_loader, make_trainer

pytest.importorskip("lightning.pytorch")
from torch_nnmath.lightning import PeakMemory, SwapFormulas

pytestmark = LIGHTNING_MARKS


class LargeHead(Classifier):
    """Its logits of 512 rows take 64 MiB."""

    def __init__(self):
        super().__init__(body=torch.nn.Linear(12, 16))
        self.head = torch.nn.Linear(16, 2**15)


@pytest.mark.skipif(sys.platform != "linux", reason="the CPU's peak is measured on Linux only")
def test_step_peak_contains_logits_of_a_plain_head_only():
    peaks = {}
    for is_swapped in (False, True):
        callbacks = [*[SwapFormulas()] * is_swapped, peak := PeakMemory(1)]
        make_trainer(*callbacks, max_epochs=2).fit(LargeHead(), make_loader(512, 512))
        peaks[is_swapped] = peak.peaks["memory/step_MiB"]
    assert 128 <= peaks[False] < 256  # logits and their gradient
    assert peaks[True] < 64


def test_other_platforms_warn_and_log_nothing(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.warns(UserWarning, match="on a CPU under Linux only"):
        make_trainer(peak := PeakMemory(1)).fit(Classifier(), make_loader())
    assert not peak.peaks


def test_every_n_steps_below_1_raises():
    with pytest.raises(ValueError, match="must be at least"):
        PeakMemory(0)
