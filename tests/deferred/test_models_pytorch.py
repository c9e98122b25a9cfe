"""`swap` in small models of PyTorch: hooks, other weights, compilers, Lightning."""

import copy

import pytest
import torch
from swapped_models import (
    IDS,
    IGNORED_WARNINGS,
    LABELS,
    SWAP_BEFORE_OR_AFTER,
    Pair,
    Step,
    V,
    assert_agree,
    assert_no_larger_errors,
    loss_in_model,
    loss_of_lm,
    make_causal,
    make_lm,
    run_step,
    shifted_loss,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

import torch_nnmath
from torch_nnmath.deferred import MaterializedLogits
from torch_nnmath.swapping import Report

pytestmark = IGNORED_WARNINGS


def test_comparison_fails_if_swap_does_nothing(monkeypatch):
    with pytest.raises(AssertionError, match="fused 0"):
        Pair(make_lm(), head=None).assert_trains_alike(loss_of_lm)
    monkeypatch.setattr(torch_nnmath, "swap", lambda model: Report())
    with pytest.raises(AssertionError, match="fused 0"):
        Pair(make_lm()).assert_trains_alike(loss_of_lm)
    with pytest.raises(AssertionError, match="logits were made: "):
        Pair(make_lm()).assert_no_logits(loss_of_lm)


# torch.compile


@SWAP_BEFORE_OR_AFTER
def test_compiled_body_keeps_the_fused_head(when):
    torch.compiler.reset()

    def change(model):
        model.model = torch.compile(model.model, backend="aot_eager")

    pair = Pair(make_causal(num_hidden_layers=1), change, when)
    pair.plain.model = pair.plain.model._orig_mod
    pair.assert_trains_alike(loss_in_model)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of Dynamo
def test_body_compiled_by_inductor_keeps_the_fused_head():
    torch.compiler.reset()
    pair = Pair(make_lm())
    pair.swapped.body = torch.compile(pair.swapped.body)
    pair.assert_trains_alike(loss_of_lm)


# Lightning


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning_reaches_the_same_weights(tmp_path, precision):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def training_step(self, batch, _):
            ids, labels = batch
            return shifted_loss(self.model(ids), labels)

        def validation_step(self, batch, _):
            ids, labels = batch
            self.log("hits", (self.model(ids).argmax(-1) == labels).float().mean())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.5)

    def train(module, precision):
        data = torch.utils.data.TensorDataset(IDS.repeat(3, 1), LABELS.repeat(3, 1))
        loaders = [torch.utils.data.DataLoader(data, batch_size=2) for _ in range(2)]
        disabled = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        trainer = lightning.Trainer(
            accelerator="cpu",
            precision=precision,
            max_epochs=1,
            **{"default_root_dir": tmp_path, **dict.fromkeys(disabled, False)},
        )
        trainer.fit(module, *loaders)
        return Step(None, {name: p.detach() for name, p in module.named_parameters()})

    model = make_lm()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    truth = train(Module(copy.deepcopy(model)), "64-true")
    pair = Pair(Module(model.float()))
    plain, swapped = train(pair.plain, precision), train(pair.swapped, precision)
    if precision == "32-true":
        assert_agree(swapped.gradients, plain.gradients)
    assert_no_larger_errors(swapped, plain, truth, 3)
    assert pair.fused == 3
    assert all("argmax" in reason for reason in pair.reasons)


# Hooks, other weights, other heads


def register(kind, hook):
    return lambda model: getattr(model.lm_head, f"register_{kind}_hook")(hook)


@SWAP_BEFORE_OR_AFTER
@pytest.mark.parametrize(
    ("kind", "hook", "reason"),
    [
        ("forward", lambda module, args, out: None, "forward hooks of the head"),
        ("forward", lambda module, args, out: out * 2, "forward hooks of the head"),
        ("forward_pre", lambda module, args: (args[0] * 2,), None),
        ("full_backward", lambda module, dx, dz: (dx[0] * 3,), "grad_fn"),
        ("full_backward_pre", lambda module, dz: (dz[0] * 3,), "grad_fn"),
    ],
)
def test_hooks_on_the_head_run(when, kind, hook, reason):
    pair = Pair(make_lm(), register(kind, hook), when)
    pair.assert_trains_alike(loss_of_lm, fused=not reason, reason=reason)


def test_warning_names_the_users_line_once():
    model = make_lm()
    torch_nnmath.swap(model)
    with pytest.warns(MaterializedLogits, match=r"exp at .*test_models_pytorch.py:\d+"):
        run_step(model, lambda model: model(IDS).exp().mean())
    run_step(model, lambda model: model(IDS).exp().mean())


class Tripled(torch.autograd.Function):
    """The identity, with the gradient times 3."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return 3 * gradient


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (lambda head, x: Tripled.apply(head(x)), "TripledBackward stands between"),
        (lambda head, x: checkpoint(head, x, use_reentrant=True), "CheckpointFunctionBackward"),
        (lambda head, x: checkpoint(head, x, use_reentrant=False), None),
        (lambda head, x: checkpoint(lambda y: head(y) / 2, x, use_reentrant=False), None),
    ],
    ids=["function", "reentrant", "not reentrant", "scaled"],
)
def test_function_or_checkpoint_between_head_and_loss_runs(between, reason):
    def loss_of(model):
        return shifted_loss(between(model.lm_head, model.body(model.embed(IDS))))

    Pair(make_lm()).assert_trains_alike(loss_of, fused=not reason, reason=reason)


@SWAP_BEFORE_OR_AFTER
@pytest.mark.parametrize("kind", ["own", "devices"])
def test_hooks_of_accelerate_run(when, kind):
    """They set `forward` on the instance: a head that has one already is left unchanged."""
    hooks = pytest.importorskip("accelerate.hooks")

    class Doubled(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            return (args[0] * 2, *args[1:]), kwargs

    hook = Doubled() if kind == "own" else hooks.AlignDevicesHook("cpu", io_same_device=True)

    def change(model):
        model.lm_head = hooks.add_hook_to_module(model.lm_head, hook)

    pair = Pair(make_lm(), change, when)
    pair.assert_trains_alike(loss_of_lm, fused=when == "before")
    left = {"lm_head": "its instance has a forward of its own"}
    assert pair.report.left == (left if when == "after" else {})


@SWAP_BEFORE_OR_AFTER
@pytest.mark.parametrize(
    "norm", [parametrizations.weight_norm, parametrizations.orthogonal, "pruned", "old"]
)
def test_parametrized_head_is_fused_if_swapped_before(when, norm):
    """One that was parametrised before is left unchanged."""
    norms = {"pruned": lambda m: prune.l1_unstructured(m, "weight", 0.3)}
    norms["old"] = nn.utils.weight_norm
    norm = norms.get(norm, norm)

    def change(model):
        model.lm_head = norm(model.lm_head)

    pair = Pair(make_lm(bias=False), change, when)
    is_left = when == "after" and norm not in norms.values()
    pair.assert_trains_alike(loss_of_lm, fused=not is_left)
    left = {"lm_head": "torch.nn.utils.parametrize.ParametrizedLinear is a class of its own"}
    assert pair.report.left == (left if is_left else {})


class Wrapped(Tensor):
    """A tensor subclass that holds another tensor, as those of quantised weights do."""

    @staticmethod
    def __new__(cls, inner):
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def unwrap(x):
            return x.inner if isinstance(x, Wrapped) else x

        out = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {}))
        name = func.overloadpacket.__name__
        return Wrapped(out) if name in ("detach", "alias", "clone") else out


class Named(Tensor):
    """A tensor subclass without rules of its own."""


@SWAP_BEFORE_OR_AFTER
@pytest.mark.parametrize("wrap", [Wrapped, lambda w: w.as_subclass(Named)])
def test_weight_of_a_tensor_subclass_gives_plain_logits(when, wrap):
    def change(model):
        model.lm_head.weight = nn.Parameter(wrap(model.lm_head.weight.detach()))

    Pair(make_lm(), change, when).assert_trains_alike(loss_of_lm, fused=0)


@pytest.mark.parametrize("when", ["after", "unswapped", "before"])
def test_dynamic_quantisation_needs_unswap(when):
    """A quantised head is left unchanged; PyTorch does not quantise a swapped one."""
    quantization = pytest.importorskip("torch.ao.quantization")
    if not hasattr(quantization, "quantize_dynamic"):
        pytest.skip("this PyTorch quantises no modules")

    def change(model):
        if when == "unswapped":
            torch_nnmath.unswap(model)
        return quantization.quantize_dynamic(model.float().eval(), {nn.Linear})

    pair = Pair(make_causal(), change, "after" if when == "after" else "before")
    if when == "after":
        ((name, reason),) = pair.report.left.items()
        assert name == "lm_head"
        assert "is not a torch.nn.Linear" in reason
    if when == "before":
        assert type(pair.swapped.lm_head) is torch_nnmath.nn.Linear
        pair.plain = make_causal()


def test_functional_call_with_other_parameters_agrees():
    """Under `torch.func.grad` logits are plain."""
    pair = Pair(make_lm())

    def loss_of(parameters, model):
        return shifted_loss(torch.func.functional_call(model, parameters, (IDS,)))

    def with_autograd(model):
        others = {n: (1.5 * p).detach().requires_grad_() for n, p in model.named_parameters()}
        loss = loss_of(others, model)
        return dict(zip(others, torch.autograd.grad(loss, [*others.values()]), strict=True))

    def with_func(model):
        return torch.func.grad(loss_of)(dict(model.named_parameters()), model)

    assert_agree(with_autograd(pair.swapped), with_autograd(pair.plain))
    assert pair.fused == 1
    assert_agree(with_func(pair.swapped), with_func(pair.plain))
    assert pair.fused == 1


# Other heads


def test_model_without_a_linear_trains_alike():
    pair = Pair(nn.Sequential(nn.Embedding(V, V), nn.Tanh()).double())
    assert pair.report.heads == pair.report.left == {}
    pair.assert_trains_alike(loss_of_lm, fused=0)


def test_hidden_layer_as_head_is_materialized_and_agrees():
    pair = Pair(make_lm(), head="body.0.0")
    with pytest.warns(MaterializedLogits):
        step = run_step(pair.swapped, loss_of_lm)
    assert_agree(step.gradients, run_step(pair.plain, loss_of_lm).gradients)
    assert not pair.fused
    assert len(pair.reasons) == 1
