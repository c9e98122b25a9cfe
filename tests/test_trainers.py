"""tools/trainers.py on some rows, with every outcome that it distinguishes."""

import json
import re
from importlib.util import find_spec

import pytest
import torch
from scripts import DOCS, EXAMPLES, TOOLS, import_scripts, run_script

from torch_nnmath import swap

pytest.importorskip("transformers")

# Trainers and adapters warn of their own future.
pytestmark = pytest.mark.filterwarnings("ignore")
needs_trl = pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed")
RESULTS = EXAMPLES / "results" / "trainers.json"


@pytest.fixture(scope="module")
def trl_head():
    with import_scripts("trl_head") as (module,):
        yield module


@pytest.fixture(scope="module")
def trainers(trl_head):
    with import_scripts("trainers", folder=TOOLS) as (module,):
        yield module


@pytest.fixture(scope="module")
def models(trainers, tmp_path_factory):
    return trainers.Models(tmp_path_factory.mktemp("models"))


def compare(trainers, models, name):
    (case,) = (case for case in trainers.CASES if f"{case.trainer}: {case.path}" == name)
    return trainers.compare(case, models)


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("Trainer: the model's loss, soft cap", "fused", ""),
        ("Trainer: gradient accumulation", "fused", ""),
        ("Trainer: label smoothing", "fused", ""),
        ("Trainer: `compute_loss_func`", "fused", ""),
        ("Trainer: LoRA, also on the head", "fused", ""),
        ("Trainer: evaluation, argmax in `preprocess_logits_for_metrics`", "blocks", ""),
        ("Trainer: evaluation, logits in `compute_metrics`", "logits", "nested_numpify"),
    ],
)
def test_outcome_of_trainer_of_transformers(trainers, models, name, kind, reason):
    outcome = compare(trainers, models, name)
    assert outcome.kind == kind
    assert reason in outcome.reason
    assert 0 < outcome.float32["weights"] < 2e-5


@needs_trl
@pytest.mark.parametrize(
    ("name", "alone", "kind"),
    [
        ("SFT: nll, soft cap", "TRL's head", "fused"),
        ("SFT: dft", "TRL's head", "fused"),
        ("DPO: sigmoid, WPO's weights", "TRL's head", "fused"),
        ("DPO: sigmoid, soft cap", "TRL's head", "blocks"),
        ("GRPO: beta 0.1, LoRA", "TRL's head", "fused"),
        ("GRPO: entropy bonus", "TRL's head", "fused"),
        ("Distillation: beta 0.5, scaled logits", "TRL's head", "fused"),
        ("Reward: pairs", "plain", "plain"),
        ("CPO: sigmoid", "blocks", "blocks"),
    ],
)
def test_outcome_of_trainer_of_trl(trainers, models, name, alone, kind):
    outcome = compare(trainers, models, name)
    assert (outcome.swap_alone, outcome.kind, outcome.reason) == (alone, kind, "")
    assert max(outcome.float64.values()) < 1e-11


# A broken swap or function must be WRONG


def test_wrong_gradient_is_wrong(trainers, models, monkeypatch):
    def swap_and_scale_gradient(model):
        model.get_output_embeddings().weight.register_hook(lambda gradient: 1.001 * gradient)
        return swap(model)

    monkeypatch.setattr(trainers, "swap_at_any_size", swap_and_scale_gradient)
    outcome = compare(trainers, models, "Trainer: `compute_loss_func`")
    assert outcome.kind == "WRONG"
    assert "weights differ by" in outcome.reason
    assert "the error of weights is" in outcome.reason


def test_swap_that_does_nothing_is_wrong(trainers, models, monkeypatch):
    monkeypatch.setattr(trainers, "swap_at_any_size", lambda model: swap(model, head=None))
    outcome = compare(trainers, models, "Trainer: the model's loss")
    assert outcome.kind == "WRONG"
    assert outcome.reason.startswith("aten.mm.default of (")


def test_recorder_without_logits_is_wrong(trainers, models, monkeypatch):
    monkeypatch.setattr(trainers.LogitsRecorder, "list_logits", lambda self: [])
    outcome = compare(trainers, models, "Trainer: the model's loss")
    assert outcome.kind == "WRONG"
    assert "no logits were recorded in the plain training" in outcome.reason


@needs_trl
@pytest.mark.parametrize("name", ["log_probs", "entropy"])
def test_wrong_function_for_trl_is_wrong(trainers, trl_head, models, monkeypatch, name):
    def compute(*args):
        log_probs, entropy, *others = trl_head.compute_log_probs(*args)
        if name == "log_probs":
            return 1.001 * log_probs, entropy, *others
        return log_probs, 1.001 * entropy, *others

    monkeypatch.setattr(trainers, "FUSED", (compute, trl_head.compute_divergence))
    outcome = compare(trainers, models, "GRPO: entropy bonus")
    assert outcome.kind == "WRONG"
    assert "weights differ by" in outcome.reason


# The functions for TRL on their own


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0, "softcap": None, "scale": 1.0},
        {"temperature": 0.7, "softcap": 3.0, "scale": 0.5},
    ],
)
@pytest.mark.parametrize(("rows", "has_bias"), [(300, False), (300, True), (0, True)])
def test_log_probs_for_trl_equal_those_of_logits(trainers, trl_head, options, rows, has_bias):
    torch.manual_seed(0)
    x, W = (torch.randn(n, 5, dtype=torch.float64, requires_grad=True) for n in (rows, 11))
    b = torch.randn(11, dtype=torch.float64, requires_grad=True) if has_bias else None
    y, inputs = torch.randint(11, (rows,)), [v for v in (x, W, b) if v is not None]
    for outputs in (
        ("log_probs",),
        ("log_probs", "entropy"),
        ("log_probs", "entropy", "is_top1", "mean_logits", "log_sum_sq_probs"),
    ):
        arguments = {"chunk_size": 4, **options, "outputs": outputs}
        results, expected = (
            compute(x, W, b, y, **arguments)
            for compute in (trl_head.compute_log_probs, trainers.compute_plain_log_probs)
        )
        names = "log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"
        for name, result, value in zip(names, results, expected, strict=True):
            assert (result is not None) == (name in outputs)
            if result is not None:
                torch.testing.assert_close(result, value, rtol=1e-12, atol=1e-12)
        has_entropy = len(outputs) == 2  # with a gradient
        gradients = [
            torch.autograd.grad((v[0].sin() + (v[1] if has_entropy else 0)).sum(), inputs)
            for v in (results, expected)
        ]
        torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("has_bias", [False, True])
def test_divergence_for_trl_equals_that_of_logits(trainers, trl_head, beta, has_bias):
    torch.manual_seed(0)
    shapes = (30, 5), (11, 5), (11,), (30, 4), (11, 4), (11,)
    heads: list = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    inputs = heads[:3] if has_bias else heads[:2]
    if not has_bias:
        heads[2] = heads[5] = None
    arguments = (*heads, beta, 0.7, 0.5, None, 1.5, None)
    results, expected = (
        compute(*arguments)
        for compute in (trl_head.compute_divergence, trainers.compute_plain_divergence)
    )
    torch.testing.assert_close(results, expected, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(v[0].sin().sum(), inputs) for v in (results, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-12)
    with pytest.raises(NotImplementedError, match="capped"):
        trl_head.compute_divergence(*heads, beta, 0.7, 0.5, 3.0)


# The command, and the table of the page


def test_command_prints_and_writes_table(tmp_path):
    files = [tmp_path / "table.json", tmp_path / "table.md"]
    done = run_script(
        TOOLS / "trainers.py",
        *("Trainer: gradient", "--json", str(files[0]), "--markdown", str(files[1])),
        folder=tmp_path,
    )
    assert done.stdout == files[1].read_text(encoding="utf-8")
    assert [row["path"] for row in json.loads(files[0].read_text(encoding="utf-8"))["rows"]] == [
        "gradient accumulation",
        "gradient checkpointing",
    ]
    assert "2 fused, 0 blocks, 0 logits, 0 plain, 0 WRONG" in done.stdout


PAGE = (DOCS / "tuning.md").read_text(encoding="utf-8")


@needs_trl
def test_recipe_of_page_replaces_functions_of_trl(trl_head):
    calls = []

    class Trainer:
        """A trainer that looks up TRL's Functions when it trains."""

        @staticmethod
        def train():
            from trl.trainer import distillation_trainer, utils

            calls.append(utils._ChunkedLogProbFunction.apply)
            calls.append(distillation_trainer.ChunkedDivergenceFunction.apply)

    (code,) = re.findall(r"```python\n(from trl_head.*?)```", PAGE, re.DOTALL)
    exec(code, {"trainer": Trainer})
    assert calls == [trl_head.compute_log_probs, trl_head.compute_divergence]
    Trainer.train()
    assert not {*calls[2:]} & {*calls[:2]}


def test_table_of_page_is_that_of_results(trainers):
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    outcomes = [trainers.Outcome(**row) for row in rows]
    assert trainers.format_table(outcomes) in PAGE
    assert not [outcome for outcome in outcomes if outcome.kind == "WRONG"]
    cases = [(case.trainer, case.path) for case in trainers.CASES]
    assert [(outcome.trainer, outcome.path) for outcome in outcomes] == cases
