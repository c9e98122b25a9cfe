"""The example that swaps every architecture, on some: each outcome that it tells apart comes up."""

import os
import subprocess
import sys

import pytest
from scripts import EXAMPLES, ROOT, scripts

import torch_nnmath

pytest.importorskip("transformers")

# The example says in its table what this warns of.
pytestmark = pytest.mark.filterwarnings("ignore::torch_nnmath.deferred.MaterializedLogits")


@pytest.fixture(scope="module")
def architectures():
    with scripts("architectures") as (module,):
        yield module


@pytest.fixture(scope="module")
def llama(architectures):
    model, _ = architectures.build("llama")
    return model, architectures.reference(model)


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("gemma2", "fused", ""),
        ("gpt2", "fused", ""),
        ("mamba", "fused", ""),
        ("blt", "right, not fused", "patcher"),
        ("musicgen", "no head", "no torch.nn.Linear"),
    ],
)
def test_outcomes(architectures, name, kind, reason):
    outcome = architectures.compare(architectures.build(name)[0])
    assert outcome.kind == kind
    assert reason in outcome.reason
    assert all(size < 1e-5 for size in outcome.sizes.values())


def test_a_swap_that_does_nothing_is_not_fused(architectures, llama):
    model, theirs = llama
    outcome = architectures.compare(model, architectures.nothing, theirs)
    assert outcome.kind == "no head"
    assert set(outcome.sizes.values()) == {0.0}


def test_what_sees_no_logits_is_itself_wrong(architectures, llama, monkeypatch):
    monkeypatch.setattr(architectures.Shapes, "logits", lambda self, classes, tokens: [])
    outcome = architectures.compare(llama[0], architectures.nothing, llama[1])
    assert outcome.kind == "WRONG"
    assert "the logits of the model as it is were not seen" in outcome.reason
    assert "neither logits were seen nor a fused loss reported" in outcome.reason


def wrong_gradient(model):
    model.get_output_embeddings().weight.register_hook(lambda gradient: 1.001 * gradient)


def wrong_value(model):
    model.get_output_embeddings().register_forward_hook(lambda module, x, z: 1.001 * z)


def wrong_at_generation(model):
    def to_last(module, x, z):
        return z if module.training else z.flip(-1)

    model.get_output_embeddings().register_forward_hook(to_last)


def no_gradient(model):
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)


def raising(model):
    raise RuntimeError("planted")


@pytest.mark.parametrize(
    ("then", "reason"),
    [
        (wrong_gradient, "gradients lm_head.weight by"),
        (wrong_value, "loss by"),
        (wrong_at_generation, "generated tokens"),
        (no_gradient, "gradients model.layers.0.mlp.up_proj.weight"),
        (raising, "RuntimeError: planted"),
    ],
)
def test_what_is_wrong_is_seen(architectures, llama, then, reason):
    def swap(model):
        report = torch_nnmath.swap(model)
        then(model)
        return report

    outcome = architectures.compare(llama[0], swap, llama[1])
    assert outcome.kind == "WRONG"
    assert reason in outcome.reason


def test_as_a_command(tmp_path):
    table = tmp_path / "table.txt"
    names = ["llama", "blt"]
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "architectures.py"), *names, "--output", str(table)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == table.read_text()
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["llama", "fused"] in [row[:2] for row in rows]
    assert ["blt", "right,", "not", "fused"] in [row[:4] for row in rows]
    assert "built 2 of 2: 1 fused, 1 right, not fused, 0 no head, 0 WRONG" in done.stdout
