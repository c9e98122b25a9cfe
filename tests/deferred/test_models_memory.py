"""The memory of a training step with a large vocabulary, plain and swapped."""

import subprocess
import sys
from pathlib import Path

import torch
from swapped_models import LM, Step, assert_steps_agree, make_batch

import torch_nnmath
from torch_nnmath._memory import read_peak, reset_peak

TESTS = Path(__file__).parent.parent
CLASSES, TOKENS = 131072, 512
CPU = torch.device("cpu")


def measure(kind, path):
    """Saves the peak of a training step beyond parameters and gradients, in bytes, and the step."""
    torch.manual_seed(0)
    model = LM(classes=CLASSES, bias=False)
    if kind == "swapped":
        report = torch_nnmath.swap(model)
    ids, labels = make_batch(2, TOKENS // 2, CLASSES)
    parameters = dict(model.named_parameters())
    results = []

    def run(length=None):
        loss, _ = model(ids[:, :length], labels[:, :length])
        results[:] = loss.detach(), *torch.autograd.grad(loss, [*parameters.values()])

    run(64)  # loads what a first call loads
    before = reset_peak(CPU)
    run()
    used = read_peak(CPU) - before - sum(x.nbytes for x in results)
    assert kind == "plain" or report.heads["lm_head"].fused == 2
    loss, *gradients = results
    torch.save((used, loss, dict(zip(parameters, gradients, strict=True))), path)


def test_large_vocabulary_takes_a_fraction_of_the_memory(tmp_path):
    """The logits take 256 MiB, and PyTorch holds several copies."""
    used, steps = {}, {}
    for kind in ("plain", "swapped"):
        paths = f"sys.path[:0] = {str(TESTS)!r}, {str(TESTS / 'deferred')!r}"
        call = f"measure({kind!r}, {str(tmp_path / kind)!r})"
        code = f"import sys; {paths}; from test_models_memory import measure; {call}"
        subprocess.run([sys.executable, "-c", code], check=True)
        used[kind], *step = torch.load(tmp_path / kind)
        steps[kind] = Step(*step)
    logits = TOKENS * CLASSES * 4
    assert used["plain"] > 2 * logits
    assert used["swapped"] < logits / 2
    assert_steps_agree(steps["swapped"], steps["plain"])
