"""A swapped model under `torch.compile`: the head is fused where the graph may break."""

import copy

import pytest
import torch
from swapped_models import (
    IDS,
    IGNORED_WARNINGS,
    LABELS,
    SWAP_BEFORE_OR_AFTER,
    Pair,
    assert_agree,
    loss_in_model,
    loss_of_lm,
    make_batch,
    make_causal,
    make_lm,
    run_step,
    shifted_loss,
)
from swapping_helpers import needs_deferral_in_compiled_models
from torch import nn
from torch.utils.checkpoint import checkpoint

import torch_nnmath
from torch_nnmath.deferred import MaterializedLogits

pytestmark = [
    *IGNORED_WARNINGS,
    needs_deferral_in_compiled_models,
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),  # of Dynamo
]
UNBROKEN = "a compiled graph that may not break"


@pytest.fixture(autouse=True)
def new_graphs():
    torch.compiler.reset()


def compile_plainly(function, **options):
    """Compiles without generating code, which takes longer than all else here."""
    return torch.compile(function, **{"backend": "aot_eager"} | options)


def compile_pair(model, when="after", **options):
    """Returns the pair of an uncompiled model and its compiled and swapped copy."""
    pair = Pair(model, lambda m: compile_plainly(m, **options), when)
    pair.plain = pair.plain._orig_mod
    return pair


@SWAP_BEFORE_OR_AFTER
def test_compiled_model_keeps_the_fused_head(when):
    pair = compile_pair(make_causal(num_hidden_layers=1), when)
    prefix = "_orig_mod." * (when == "after")
    assert [*pair.report.heads] == [f"{prefix}lm_head"]
    pair.assert_trains_alike(loss_in_model)
    pair.assert_same_logits(lambda model: model(input_ids=IDS).logits)


@pytest.mark.parametrize("options", [{}, {"mode": "reduce-overhead"}, {"dynamic": True}], ids=str)
def test_model_compiled_by_inductor_keeps_the_fused_head(options):
    compile_pair(make_lm(), backend="inductor", **options).assert_trains_alike(loss_of_lm)


def test_model_compiled_in_place_keeps_the_fused_head():
    pair = Pair(make_lm())
    pair.swapped.compile(backend="aot_eager")
    pair.assert_trains_alike(loss_of_lm)


@pytest.mark.parametrize("target", ["loss", "both", "step"])
def test_compiled_loss_is_fused(target):
    """The loss is compiled alone, with the model, or inside one function with it."""
    pair = Pair(make_lm())
    compiled_loss = compile_plainly(shifted_loss)
    model = compile_plainly(pair.swapped) if target == "both" else pair.swapped
    compute = compile_plainly(loss_of_lm)

    def loss_of(plain_or_swapped):
        if plain_or_swapped is pair.plain:
            return loss_of_lm(plain_or_swapped)
        return compute(model) if target == "step" else compiled_loss(model(IDS))

    pair.assert_trains_alike(loss_of)


def use_checkpoints(model):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return compile_plainly(model)


def test_compiled_model_with_gradient_checkpointing_keeps_the_fused_head():
    pair = Pair(make_causal(), use_checkpoints)
    pair.plain = pair.plain._orig_mod
    pair.assert_trains_alike(loss_in_model)


class HeadInContext(nn.Module):
    """A model whose head is called inside a context manager."""

    def __init__(self, lm):
        super().__init__()
        self.lm = lm

    def forward(self, ids):
        h = self.lm.body(self.lm.embed(ids))
        with torch.enable_grad():
            return self.lm.lm_head(h)


def test_head_called_inside_a_context_manager_is_fused():
    compile_pair(HeadInContext(make_lm())).assert_trains_alike(loss_of_lm)


class CheckpointedHead(nn.Module):
    def __init__(self, lm):
        super().__init__()
        self.lm = lm

    def forward(self, ids):
        return checkpoint(self.lm, ids, use_reentrant=False)


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_graph_that_may_not_break_has_plain_logits_and_is_reported(is_checkpointed):
    lm = make_lm()
    model = CheckpointedHead(lm) if is_checkpointed else lm
    pair = compile_pair(model, fullgraph=not is_checkpointed)
    with pytest.warns(MaterializedLogits, match=rf"{UNBROKEN}.*Swap .*\(docs/swapping.md\)"):
        run_step(pair.swapped, loss_of_lm)
    pair.assert_trains_alike(loss_of_lm, fused=0, reason=UNBROKEN)
    assert UNBROKEN in repr(pair.report)
    pair.assert_same_logits(lambda model: model(IDS))


def test_exported_model_has_plain_logits_and_no_report():
    pair = Pair(make_lm())
    for strict in (False, True):
        exported = torch.export.export(pair.swapped, (IDS,), strict=strict).module()
        assert_agree({"logits": exported(IDS)}, {"logits": pair.plain(IDS)})
    assert not pair.fused
    assert not pair.reasons


# Graphs


def count_graphs(model, lengths):
    """Returns the number of new graphs of the body at each step of a compiled model."""
    graphs = []

    def backend(graph, inputs):
        if any(node.target is torch.nn.functional.embedding for node in graph.graph.nodes):
            graphs.append(graph)
        return graph.forward

    compiled, counts = compile_plainly(model, backend=backend), []
    for length in lengths:
        count = len(graphs)
        ids, labels = make_batch(length=length)
        shifted_loss(compiled(ids), labels).backward()
        counts.append(len(graphs) - count)
    return counts


def test_swap_adds_no_recompilation():
    """A repeated length needs no new graph, and a new one no more than in the plain model."""
    lengths = (9, 9, 9, 11, 11, 17, 23, 9)
    plain = make_lm()
    swapped = copy.deepcopy(plain)
    report = torch_nnmath.swap(swapped)
    plain_counts = count_graphs(plain, lengths)
    assert plain_counts == [1, 0, 0, 1, 0, 0, 0, 0]
    torch.compiler.reset()
    assert count_graphs(swapped, lengths) == plain_counts
    assert report.heads["lm_head"].fused == len(lengths)


def test_step_with_known_shapes_recompiles_nothing():
    model = make_lm()
    torch_nnmath.swap(model)
    compiled = compile_plainly(model)
    for length in (9, 11, 17):  # afterwards the length is a symbol in every frame
        ids, labels = make_batch(length=length)
        shifted_loss(compiled(ids), labels).backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (9, 23, 23, 17):
            ids, labels = make_batch(length=length)
            shifted_loss(compiled(ids), labels).backward()


# Trainers


def test_trainer_with_torch_compile_reaches_the_same_weights(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    rows = [{"input_ids": row, "labels": label} for row, label in zip(IDS, LABELS, strict=True)]

    def train(model, **options):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=1,
            num_train_epochs=2,
            optim="sgd",
            learning_rate=0.1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            **options,
        )
        transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()
        return {name: p.detach() for name, p in model.named_parameters()}

    plain = make_causal(num_hidden_layers=1)
    swapped = copy.deepcopy(plain)
    report = torch_nnmath.swap(swapped)
    weights = train(swapped, torch_compile=True, torch_compile_backend="aot_eager")
    assert_agree(weights, train(plain))
    assert report.heads["lm_head"].fused == 4
    assert not report.heads["lm_head"].materialized


@pytest.mark.parametrize("target", ["model", "module", "in place"])
def test_compiled_lightning_module_reaches_the_same_weights(tmp_path, target):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def training_step(self, batch, _):
            ids, labels = batch
            return shifted_loss(self.model(ids), labels)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.5)

    def train(module):
        data = torch.utils.data.TensorDataset(IDS.repeat(3, 1), LABELS.repeat(3, 1))
        disabled = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        options = {"default_root_dir": tmp_path, "max_epochs": 1, **dict.fromkeys(disabled, False)}
        trainer = lightning.Trainer(accelerator="cpu", precision="64-true", **options)
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=2))

    module = Module(make_lm())
    plain = copy.deepcopy(module)
    report = torch_nnmath.swap(module)
    train(plain)
    if target == "model":
        module.model = compile_plainly(module.model)
    elif target == "in place":
        module.model.compile(backend="aot_eager")
    train(compile_plainly(module) if target == "module" else module)
    named = {name.replace("_orig_mod.", ""): p for name, p in module.named_parameters()}
    assert_agree(named, dict(plain.named_parameters()))
    log = report.heads["model.lm_head"]
    assert log.fused == 3
    assert not log.materialized
