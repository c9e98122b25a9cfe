"""tools/architectures.py on a few architectures, with every outcome that it distinguishes."""

import pytest
from scripts import TOOLS, import_scripts, run_script

import torch_nnmath

pytest.importorskip("transformers")

# The table shows what this warning says.
pytestmark = pytest.mark.filterwarnings("ignore::torch_nnmath.deferred.MaterializedLogits")


@pytest.fixture(scope="module")
def architectures():
    with import_scripts("architectures", folder=TOOLS) as (module,):
        yield module


@pytest.fixture(scope="module")
def llama(architectures):
    model, _ = architectures.build("llama")
    return model, architectures.run_reference(model)


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("gemma2", "fused", ""),
        ("gpt2", "fused", ""),
        ("mamba", "fused", ""),
        ("blt", "correct, not fused", "patcher"),
        ("musicgen", "no head", "not a torch.nn.Linear"),
    ],
)
def test_outcome_of_architecture(architectures, name, kind, reason):
    outcome = architectures.compare(architectures.build(name)[0])
    assert outcome.kind == kind
    assert reason in outcome.reason
    assert all(size < 1e-5 for size in outcome.sizes.values())


def test_empty_swap_is_not_fused(architectures, llama):
    model, reference = llama
    outcome = architectures.compare(model, architectures.swap_nothing, reference)
    assert outcome.kind == "no head"
    assert set(outcome.sizes.values()) == {0.0}


def test_recorder_without_logits_is_wrong(architectures, llama, monkeypatch):
    monkeypatch.setattr(
        architectures.ShapeRecorder, "find_logits", lambda self, classes, tokens: []
    )
    outcome = architectures.compare(llama[0], architectures.swap_nothing, llama[1])
    assert outcome.kind == "WRONG"
    assert "no logits were recorded in the unswapped model" in outcome.reason
    assert "neither logits were recorded nor a fused loss reported" in outcome.reason


def scale_gradient(model):
    model.get_output_embeddings().weight.register_hook(lambda gradient: 1.001 * gradient)


def scale_logits(model):
    model.get_output_embeddings().register_forward_hook(lambda module, x, z: 1.001 * z)


def flip_logits_in_eval(model):
    def flip(module, x, z):
        return z if module.training else z.flip(-1)

    model.get_output_embeddings().register_forward_hook(flip)


def freeze_weight(model):
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)


def raise_error(model):
    raise RuntimeError("planted")


@pytest.mark.parametrize(
    ("break_model", "reason"),
    [
        (scale_gradient, "gradients lm_head.weight by"),
        (scale_logits, "loss by"),
        (flip_logits_in_eval, "generated tokens"),
        (freeze_weight, "gradients model.layers.0.mlp.up_proj.weight"),
        (raise_error, "RuntimeError: planted"),
    ],
)
def test_broken_swap_is_wrong(architectures, llama, break_model, reason):
    def swap(model):
        report = torch_nnmath.swap(model)
        break_model(model)
        return report

    outcome = architectures.compare(llama[0], swap, llama[1])
    assert outcome.kind == "WRONG"
    assert reason in outcome.reason


def test_command_prints_and_writes_table(tmp_path):
    table = tmp_path / "table.txt"
    script = TOOLS / "architectures.py"
    done = run_script(script, "llama", "blt", "--output", str(table), folder=tmp_path)
    assert done.stdout == table.read_text()
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["llama", "fused"] in [row[:2] for row in rows]
    assert ["blt", "correct,", "not", "fused"] in [row[:4] for row in rows]
    assert "built 2 of 2: 1 fused, 1 correct, not fused, 0 no head, 0 WRONG" in done.stdout
