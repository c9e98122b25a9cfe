"""`swap` and `unswap`: values agree with PyTorch's, and nothing but classes changes."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.utils.parametrize as parametrize
from swapping_helpers import (
    HAS_HEAD,
    Everything,
    Subclass,
    changed_names,
    list_types,
    make_patched_linear,
    make_small,
)
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

import torch_nnmath
from torch_nnmath import swap, unswap
from torch_nnmath.deferred import mark
from torch_nnmath.swapping import Change, Report

pytestmark = pytest.mark.filterwarnings("ignore::torch_nnmath.deferred.MaterializedLogits")
KINDS = ["Linear", "Sigmoid", "Tanh", "ReLU", "Softmax", "MSELoss", "CrossEntropyLoss"]
KINDS += ["LinearCrossEntropyLoss"] * HAS_HEAD


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Everything()


@pytest.fixture
def small():
    return make_small()


@pytest.fixture
def batch():
    x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([0, 1, 2, 0, 2, 1])


def get_nnmath_class(name):
    return getattr(torch_nnmath.nn, name)


def get_torch_class(name):
    return getattr(nn, name)


def compute_results(model, x, target):
    """Returns the losses, and their gradients in the input and in every parameter."""
    x = x.clone().requires_grad_()
    losses = model(x, target)
    return losses, *torch.autograd.grad(losses.square().sum(), [x, *model.parameters()])


def assert_agree(results, truth):
    for result, expected in zip(results, truth, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-14)


def list_attributes(model):
    return [list(vars(module)) for module in model.modules()]


# Values and the report


def test_values_and_gradients_agree_after_swap_and_unswap(model, batch):
    truth = compute_results(copy.deepcopy(model), *batch)
    swap(model)
    assert_agree(compute_results(model, *batch), truth)
    unswap(model)
    assert_agree(compute_results(model, *batch), truth)


def test_swap_changes_the_functions_that_run(small, batch):
    truth = small(batch[0])
    swap(small)
    result = small(batch[0])
    assert type(result.grad_fn) is not type(truth.grad_fn)
    unswap(small)
    assert type(small(batch[0]).grad_fn) is type(truth.grad_fn)


def test_each_class_is_replaced_by_ours_of_the_same_name(model):
    report = swap(model)
    for row in report:
        kind = type(model.get_submodule(row.name))
        assert kind is get_nnmath_class(kind.__name__)
        assert row.before == f"torch.nn.{kind.__name__}"
        assert row.after == f"torch_nnmath.nn.{kind.__name__}"
    assert {row.after.rpartition(".")[2] for row in report} == set(KINDS)
    others = [m for m in model.modules() if type(m).__name__ not in KINDS]
    assert [type(m) for m in others] == [Everything, nn.Sequential, nn.Dropout, nn.ModuleDict]


def test_unswap_reports_the_reversed_changes(model):
    report = swap(model)
    assert unswap(model) == tuple(Change(n, after, before) for n, before, after in report)


def test_shared_module_is_reported_once(model):
    names = changed_names(swap(model))
    assert "body.1" in names
    assert "again" not in names
    assert model.again is model.body[1]
    assert names == list(dict.fromkeys(names))


def test_report_prints_as_a_table(small):
    assert str(swap(small)).splitlines() == [
        "0  torch.nn.Linear  ->  torch_nnmath.nn.Linear",
        "1  torch.nn.ReLU    ->  torch_nnmath.nn.ReLU",
        "2  torch.nn.Linear  ->  torch_nnmath.nn.Linear  head",
        "3 modules changed",
    ]


def test_empty_report_prints_no_modules_changed(small):
    for report in (unswap(small), swap(small, include=()), Report()):
        assert len(report) == 0
        assert str(report) == repr(report) == "no modules changed"


def test_report_is_a_sequence(small):
    report = swap(small)
    assert len(report) == 3
    assert list(report)[1] == report[1]
    assert report[1] == ("1", "torch.nn.ReLU", "torch_nnmath.nn.ReLU")
    assert pickle.loads(pickle.dumps(report)) == report


# Attributes, state dicts and hooks


def test_everything_but_classes_stays_the_same_object(model):
    def everything():
        objects = [*model.modules(), *model.parameters(), *model.buffers()]
        names = [n for n, _ in [*model.named_parameters(), *model.named_buffers()]]
        attributes = [
            {k: id(v) for k, v in vars(m).items() if k != mark.ATTRIBUTE} for m in model.modules()
        ]
        return list(map(id, objects)), names, attributes, repr(model)

    model.body.eval()
    model.ce.note = object()
    before, keys, kinds = everything(), list_attributes(model), list_types(model)
    swap(model)
    assert everything() == before
    unswap(model)
    assert everything() == before
    assert list_attributes(model) == keys
    assert list_types(model) == kinds


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_flags_dtype_and_device_stay(dtype):
    model = nn.Sequential(nn.Linear(3, 2, dtype=dtype, device="meta"), nn.ReLU(inplace=True)).eval()
    model[0].bias.requires_grad_(False)
    swap(model)
    assert [m.training for m in model.modules()] == [False] * 3
    assert (model[0].weight.dtype, model[0].weight.device.type) == (dtype, "meta")
    assert [p.requires_grad for p in model.parameters()] == [True, False]
    assert model[1].inplace


def test_state_dicts_keep_their_keys_and_load_into_each_other(model):
    plain = Everything()
    swap(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert "ce.weight" in model.state_dict()
    assert model.state_dict()._metadata == plain.state_dict()._metadata
    plain.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(Everything().state_dict(), strict=True)
    unswap(model)
    model.load_state_dict(plain.state_dict(), strict=True)


def test_state_dict_of_a_loss_has_the_same_keys_with_and_without_weight():
    for weight in (None, torch.ones(3)):
        plain, swapped = nn.CrossEntropyLoss(weight), nn.CrossEntropyLoss(weight)
        swap(swapped)
        assert swapped.state_dict().keys() == plain.state_dict().keys()
        swapped.load_state_dict(plain.state_dict(), strict=True)
        plain.load_state_dict(swapped.state_dict(), strict=True)


class Hooks:
    """Every kind of hook on one module, each counting its calls."""

    def __init__(self, module):
        self.calls = {}
        with_kwargs, count = {"with_kwargs": True}, self.counter
        add_state_dict_post = module.register_state_dict_post_hook
        self.handles = [
            module.register_forward_pre_hook(count("forward pre")),
            module.register_forward_pre_hook(count("forward pre kwargs"), **with_kwargs),
            module.register_forward_hook(count("forward")),
            module.register_forward_hook(count("forward kwargs"), **with_kwargs),
            module.register_forward_hook(count("forward always"), always_call=True),
            module.register_full_backward_pre_hook(count("backward pre")),
            module.register_full_backward_hook(count("backward")),
            module.register_state_dict_pre_hook(count("state dict pre")),
            add_state_dict_post(count("state dict post")),
            module.register_load_state_dict_pre_hook(count("load pre")),
            module.register_load_state_dict_post_hook(count("load post")),
        ]
        for name, parameter in module.named_parameters(recurse=False):
            self.handles.append(parameter.register_hook(count(f"{name} gradient")))
            self.handles.append(
                parameter.register_post_accumulate_grad_hook(count(f"{name} accumulated"))
            )

    def counter(self, kind):
        self.calls[kind] = 0

        def hook(*args):
            self.calls[kind] += 1

        return hook

    def reset(self):
        self.calls.update(dict.fromkeys(self.calls, 0))


def train_and_load(model, batch):
    x, target = batch
    model(x.clone().requires_grad_(), target).sum().backward()
    model.load_state_dict(model.state_dict())


# One is called twice in a forward, one is read by its owner without being called.
NOT_CALLED_ONCE = {"body.1", "head.linear"}


def add_hooks(model):
    return {
        name: Hooks(module)
        for name, module in model.named_modules()
        if type(module).__name__ in KINDS and name not in NOT_CALLED_ONCE
    }


def test_hooks_fire_once_after_each_swap_and_unswap(model, batch):
    hooks = add_hooks(model)
    for step in (lambda _: None, swap, swap, unswap, unswap, swap):
        step(model)
        train_and_load(model, batch)
        for name, module_hooks in hooks.items():
            assert module_hooks.calls == dict.fromkeys(module_hooks.calls, 1), name
            module_hooks.reset()


@pytest.mark.parametrize("steps", [(swap,), (swap, unswap)])
def test_handles_remove_hooks_after_swap(model, batch, steps):
    hooks = add_hooks(model)
    for step in steps:
        step(model)
    for module_hooks in hooks.values():
        for handle in module_hooks.handles:
            handle.remove()
    train_and_load(model, batch)
    assert all(not any(module_hooks.calls.values()) for module_hooks in hooks.values())


def test_hooks_added_after_swap_fire_after_unswap(model, batch):
    swap(model)
    hooks = add_hooks(model)
    unswap(model)
    train_and_load(model, batch)
    for module_hooks in hooks.values():
        assert module_hooks.calls == dict.fromkeys(module_hooks.calls, 1)


def test_always_call_hook_runs_after_an_error_of_ours():
    layer = nn.Linear(3, 2)
    swap(layer)
    calls = []
    layer.register_forward_hook(lambda *args: calls.append(args), always_call=True)
    with pytest.raises(RuntimeError, match="shape"):
        layer(torch.ones(1, 4))
    assert len(calls) == 1


def test_hooks_change_inputs_and_outputs(batch):
    layer = nn.Linear(4, 2).double()
    layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    layer.register_forward_hook(lambda module, args, out: out + 1)
    truth = layer(batch[0])
    swap(layer)
    assert_agree([layer(batch[0])], [truth])


# Modules that are left unchanged


def make_quantized_linear():
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 3)), {nn.Linear})[0]


UNCHANGED = {
    "subclass": lambda: Subclass(4, 3),
    "named alike": lambda: type("Linear", (nn.Linear,), {})(4, 3),
    "not ours to change": lambda: nn.Sequential(nn.Conv1d(1, 1, 1), nn.ReLU6(), nn.LogSoftmax(-1)),
    "not dynamically quantizable": lambda: nn.MultiheadAttention(4, 2),
    "parametrized": lambda: parametrizations.orthogonal(nn.Linear(4, 4)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 3)),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(4, 3)),
    "lazy": lambda: nn.LazyLinear(3),
    "quantized": make_quantized_linear,
    "scripted": lambda: torch.jit.script(nn.Sequential(nn.Linear(4, 3), nn.ReLU())),
    "forward on the instance": make_patched_linear,
    "ours already": lambda: torch_nnmath.nn.CrossEntropyLoss(base=2),
}


@pytest.mark.parametrize("make", UNCHANGED.values(), ids=UNCHANGED)
@pytest.mark.filterwarnings("ignore:.*(deprecat|Lazy)")  # torch.ao, torch.jit and lazy modules
def test_modules_of_other_classes_are_left_unchanged(make):
    for model in (make(), nn.Sequential(make())):
        kinds, keys = list_types(model), list_attributes(model)
        assert len(swap(model)) == len(unswap(model)) == 0
        assert (list_types(model), list_attributes(model)) == (kinds, keys)


@pytest.mark.filterwarnings("ignore:.*Lazy")
def test_lazy_layer_is_replaced_after_it_became_a_linear():
    model = nn.Sequential(nn.LazyLinear(3))
    model(torch.ones(1, 4))
    assert changed_names(swap(model)) == ["0"]


@pytest.mark.filterwarnings("ignore:.*deprecated")  # the older weight_norm, which is a hook
@pytest.mark.parametrize(
    "apply",
    [
        torch.nn.utils.weight_norm,
        torch.nn.utils.spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 5),
    ],
    ids=["weight_norm", "spectral_norm", "pruned"],
)
def test_hook_based_reparametrization_works_in_a_swapped_layer(apply, batch):
    torch.manual_seed(0)
    layer = apply(nn.Linear(4, 3).double()).eval()

    def outcome():
        out = layer(batch[0])
        return [out, *torch.autograd.grad(out.square().sum(), list(layer.parameters()))]

    truth = outcome()
    assert len(swap(layer)) == 1
    assert_agree(outcome(), truth)
    unswap(layer)
    assert type(layer) is nn.Linear


def test_pruning_can_be_made_permanent_in_a_swapped_layer(batch):
    layer = prune.l1_unstructured(nn.Linear(4, 3).double(), "weight", 5)
    truth = layer(batch[0])
    swap(layer)
    prune.remove(layer, "weight")
    assert_agree([layer(batch[0])], [truth])
    unswap(layer)
    assert type(layer) is nn.Linear


@pytest.mark.parametrize("grad", [False, True])
def test_transformer_encoder_agrees_with_and_without_fast_path(grad):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        8, 2, 16, dropout=0, activation=nn.ReLU(), batch_first=True, dtype=torch.float64
    )
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        truth = model(x)
        names = changed_names(swap(model))
        assert_agree([model(x)], [truth])
    assert "layers.0.linear1" in names
    assert not any("self_attn" in name for name in names)
    assert type(model.layers[0].self_attn.out_proj).__name__ == "NonDynamicallyQuantizableLinear"


# unswap


@pytest.mark.parametrize("name", KINDS)
def test_bare_module_is_replaced_and_restored(name):
    arguments = {"Linear": (2, 3), "LinearCrossEntropyLoss": (2, 3), "Softmax": (-1,)}
    module = get_torch_class(name)(*arguments.get(name, ()))
    keys = list_attributes(module)
    assert swap(module)[0] == ("", f"torch.nn.{name}", f"torch_nnmath.nn.{name}")
    assert type(module) is get_nnmath_class(name)
    lines = str(unswap(module)).splitlines()
    assert lines[0].split() == ["(root)", f"torch_nnmath.nn.{name}", "->", f"torch.nn.{name}"]
    if name != "LinearCrossEntropyLoss":  # which has a Linear inside
        assert lines[1:] == ["1 module changed"]
    assert type(module) is get_torch_class(name)
    assert list_attributes(module) == keys


def test_second_swap_and_second_unswap_change_nothing(model):
    keys, kinds = list_attributes(model), list_types(model)
    first = swap(model)
    swapped = list_types(model)
    assert len(swap(model)) == 0
    assert list_types(model) == swapped
    assert len(unswap(model)) == len(first)
    assert len(unswap(model)) == 0
    assert (list_types(model), list_attributes(model)) == (kinds, keys)


def test_second_swap_replaces_added_modules(small):
    swap(small)
    small.append(nn.Linear(2, 2))
    assert changed_names(swap(small)) == ["3"]
    assert changed_names(unswap(small)) == ["0", "1", "2", "3"]


def test_unswap_of_a_submodule_restores_it_alone(small):
    swap(small)
    assert changed_names(unswap(small[2])) == [""]
    assert list_types(small)[1:] == [
        get_nnmath_class("Linear"),
        get_nnmath_class("ReLU"),
        nn.Linear,
    ]


def test_modules_constructed_from_our_classes_stay():
    model = nn.Sequential(
        nn.Linear(2, 2),
        get_nnmath_class("Linear")(2, 2),
        get_nnmath_class("CrossEntropyLoss")(base=2),
    )
    model.append(get_nnmath_class("Feedforward")([2, 3, 2]))
    kinds, keys = list_types(model), list_attributes(model)
    assert changed_names(swap(model)) == ["0"]
    assert changed_names(unswap(model)) == ["0"]
    assert (list_types(model), list_attributes(model)) == (kinds, keys)
    assert model[2].base == 2


@pytest.mark.skipif(not HAS_HEAD, reason="nn.LinearCrossEntropyLoss came with PyTorch 2.13")
def test_linear_inside_our_loss_is_replaced_and_restored():
    loss = get_nnmath_class("LinearCrossEntropyLoss")(3, 4, base=2)
    kind = type(loss.linear)
    assert changed_names(swap(loss)) == changed_names(unswap(loss)) == ["linear"]
    assert (type(loss), type(loss.linear), loss.base) == (
        get_nnmath_class(type(loss).__name__),
        kind,
        2,
    )


def copy_by_pickle(model):
    return pickle.loads(pickle.dumps(model))


def copy_by_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("clone", [copy.deepcopy, copy_by_pickle, copy_by_file])
def test_copies_and_pickles_can_be_unswapped(model, batch, clone):
    model.ours = get_nnmath_class("Linear")(2, 2)
    truth, kinds, keys = model(*batch), list_types(model), list_attributes(model)
    swap(model)
    swapped = list_types(model)
    other = clone(model)
    assert list_types(other) == swapped
    assert_agree([other(*batch)], [truth])
    unswap(other)
    assert (list_types(other), list_attributes(other)) == (kinds, keys)
    assert_agree([other(*batch)], [truth])
    assert list_types(model) == swapped
    unswap(model)
    assert list_types(model) == kinds


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight

    def right_inverse(self, weight):
        return weight / 2


@pytest.mark.parametrize("again", [False, True])
def test_unswap_of_a_layer_parametrized_after_swap_restores_its_base(batch, again):
    layer = nn.Linear(4, 3).double()
    keys, truth = list_attributes(layer), layer(batch[0])
    swap(layer)
    parametrize.register_parametrization(layer, "weight", Double())
    if again:
        assert len(swap(layer)) == 0
    other = copy.deepcopy(layer)
    assert unswap(layer) == (Change("", "torch_nnmath.nn.Linear", "torch.nn.Linear"),)
    assert parametrize.is_parametrized(layer, "weight")
    assert type(layer).__name__ == "ParametrizedLinear"
    assert type(layer).__bases__ == (nn.Linear,)
    assert type(layer).__module__ == type(other).__module__
    assert_agree([layer(batch[0])], [truth])
    assert type(layer(batch[0]).grad_fn) is type(truth.grad_fn)
    assert_agree([copy.deepcopy(layer)(batch[0])], [truth])
    with pytest.raises(RuntimeError, match="parametrized"):
        pickle.dumps(layer)
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is nn.Linear
    assert sorted(list_attributes(layer)[0]) == sorted(keys[0])
    assert_agree([layer(batch[0])], [truth])

    # The copy shares the class that was undone, and keeps it.
    assert isinstance(other, get_nnmath_class("Linear"))
    assert_agree([other(batch[0])], [truth])
    parametrize.remove_parametrizations(other, "weight")
    assert type(other) is get_nnmath_class("Linear")
    unswap(other)
    assert type(other) is nn.Linear


def test_unswap_after_parametrization_was_removed_restores_the_class():
    layer = nn.Linear(4, 3)
    swap(layer)
    parametrizations.weight_norm(layer)
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is get_nnmath_class("Linear")
    unswap(layer)
    assert type(layer) is nn.Linear


class Sharded:
    """As by fully_shard: one class derived from a mixin and the class of the modules."""

    def sharded(self):
        return self.weight.shape


def test_unswap_keeps_a_shared_derived_class_shared(small, batch):
    truth = small(batch[0])
    swap(small)
    kind = type("ShardedLinear", (Sharded, get_nnmath_class("Linear")), {"note": 1})
    further = type("FurtherLinear", (kind,), {})
    small[0].__class__, small[2].__class__ = kind, kind
    small.append(nn.Linear(2, 2).double())
    swap(small)
    small[3].__class__ = further
    unswap(small)
    assert type(small[0]) is type(small[2])
    assert type(small[0]).__bases__ == (Sharded, nn.Linear)
    assert type(small[3]).__bases__ == (type(small[0]),)
    assert (type(small[0]).__name__, small[0].note) == ("ShardedLinear", 1)
    assert small[0].sharded() == (3, 4)
    assert_agree([small[:3](batch[0])], [truth])


def test_unswap_removes_the_mark_of_a_class_restored_by_hand():
    layer = nn.Linear(2, 2)
    keys = list_attributes(layer)
    swap(layer)
    layer.__class__ = nn.Linear
    assert len(unswap(layer)) == 0
    assert list_attributes(layer) == keys


# Selectors


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (None, None, "0 1 2"),
        ("0", None, "0"),
        ("*", "2", "0 1"),
        (["0", "1"], None, "0 1"),
        (("0", ["1"]), None, "0 1"),
        ([], None, ""),
        (None, [], "0 1 2"),
        (nn.Linear, None, "0 2"),
        (torch_nnmath.nn.Linear, None, "0 2"),
        (nn.Module, torch_nnmath.nn.ReLU, "0 2"),
        (nn.Conv1d, None, ""),
        (nn.Sequential, None, ""),
        ([nn.ReLU, "2"], None, "1 2"),
        (lambda name, module: getattr(module, "in_features", 0) == 3, None, "2"),
        (nn.Linear, lambda name, module: name == "0", "2"),
        (nn.Linear, nn.Linear, ""),
        ("nothing like it", None, ""),
        (None, "nothing like it", "0 1 2"),
        ("", None, ""),
        (None, "*", ""),
    ],
)
def test_include_and_exclude_select_modules(small, include, exclude, expected):
    assert changed_names(swap(small, include=include, exclude=exclude)) == expected.split()
    assert [str(i) for i in range(3) if type(small[i]).__module__ == "torch_nnmath.nn"] == (
        expected.split()
    )


def test_patterns_match_dots_and_the_empty_one_is_the_root(model):
    assert changed_names(swap(model, include="body.*")) == ["body.0", "body.1", "body.2", "body.3"]
    assert changed_names(swap(model, include="*.linear", exclude="head*")) == ["gate.linear"]
    assert changed_names(swap(nn.Linear(2, 2), include="")) == [""]
    assert changed_names(swap(nn.Linear(2, 2), exclude="")) == []
    assert changed_names(swap(nn.Sequential(nn.Linear(2, 2)), exclude="")) == ["0"]
    assert changed_names(swap(nn.ModuleDict({"Big": nn.ReLU()}), include="big")) == []


def test_shared_module_is_selected_by_any_of_its_names(model):
    assert len(swap(model, include=nn.Tanh, exclude="again")) == 0
    assert len(swap(model, include="body.1", exclude="again")) == 0
    assert changed_names(swap(model, include="again")) == ["again"]
    assert changed_names(unswap(model)) == ["body.1"]


def test_predicate_that_raises_leaves_the_model_unchanged(small):
    def predicate(name, module):
        return 1 / (2 - int(name))

    kinds, keys = list_types(small), list_attributes(small)
    with pytest.raises(ZeroDivisionError):
        swap(small, include=predicate)
    assert (list_types(small), list_attributes(small)) == (kinds, keys)


@pytest.mark.parametrize("wrong", [3, int, nn.ReLU(), {"0"}, ["0", 3], [[None]], True])
@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_selector_of_another_type_raises(small, argument, wrong):
    kinds = list_types(small)
    with pytest.raises(TypeError, match=f"{argument} must be a name pattern.*got"):
        swap(small, **{argument: wrong})
    assert list_types(small) == kinds


@pytest.mark.parametrize("wrong", [nn.Linear, None, [nn.Linear(2, 2)], torch.ones(2), "model"])
@pytest.mark.parametrize("function", [swap, unswap])
def test_model_of_another_type_raises(function, wrong):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got"):
        function(wrong)


# Use of a swapped model


class Classifier(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net, self.loss = net, nn.CrossEntropyLoss(ignore_index=2)

    def forward(self, x, target):
        return self.loss(self.net(x), target)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # Dynamo does it to Functions
@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_compiled_model_is_recompiled_after_swap(small, batch, how):
    torch._dynamo.reset()
    ours_ran = []

    def backend(graph, inputs):
        def run(*args):
            ours_ran.append("autograd_function_apply" in graph.code)
            return graph(*args)

        return run

    model = Classifier(small)
    kinds, truth = list_types(model), model(*batch)
    if how == "wrapped":
        compiled = torch.compile(model, backend=backend, fullgraph=True)
    else:
        compiled = model
        model.compile(backend=backend, fullgraph=True)
    for step in (lambda _: None, swap, unswap):
        step(compiled)
        assert_agree([compiled(*batch)], [truth])
    assert ours_ran == [False, True, False]
    assert list_types(model) == kinds


def test_functional_call_with_other_parameters_agrees(small, batch):
    parameters = {name: 2 * p.detach() for name, p in small.named_parameters()}
    truth = torch.func.functional_call(small, parameters, (batch[0],))
    swap(small)
    assert_agree([torch.func.functional_call(small, parameters, (batch[0],))], [truth])


def test_per_sample_gradients_agree(small, batch):
    def gradients(model):
        def loss(parameters, x):
            return torch.func.functional_call(model, parameters, (x,)).square().sum()

        parameters = {name: p.detach() for name, p in model.named_parameters()}
        return torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, batch[0]).values()

    truth = list(gradients(small))
    swap(small)
    assert_agree(gradients(small), truth)


@pytest.mark.parametrize("head", ["auto", "2", None])
def test_call_for_per_sample_grads_agrees(small, batch, head):
    x, t = batch

    def gradients(model):
        logits = call_for_per_sample_grads(model)(x)
        loss = nn.functional.cross_entropy(logits, t % 2, reduction="sum")
        loss.backward()
        samples = [p.grad_sample for p in model.parameters()]
        for p in model.parameters():
            del p.grad_sample
        return loss, *samples

    truth = gradients(small)
    swap(small, head=head)
    assert_agree(gradients(small), truth)
    assert len(truth[1]) == len(x)


@pytest.mark.filterwarnings("ignore")  # of Opacus
@pytest.mark.parametrize("is_registered", [False, True])
def test_per_sample_gradients_of_opacus_agree(small, batch, monkeypatch, is_registered):
    grad_sample = pytest.importorskip("opacus.grad_sample")
    samplers = dict(grad_sample.GradSampleModule.GRAD_SAMPLERS)
    monkeypatch.setattr(grad_sample.GradSampleModule, "GRAD_SAMPLERS", samplers)
    if is_registered:
        samplers[torch_nnmath.nn.Linear] = samplers[nn.Linear]

    def gradients(model):
        wrapped = grad_sample.GradSampleModule(model)
        nn.functional.cross_entropy(wrapped(batch[0]), batch[1] % 2).backward()
        return [p.grad_sample for p in wrapped.parameters()]

    truth = gradients(copy.deepcopy(small))
    swap(small)
    assert_agree(gradients(small), truth)


def test_optimizer_made_before_swap_trains_alike(model, batch):
    other = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    reference = torch.optim.Adam(other.parameters(), lr=0.1)
    for step in (lambda _: None, swap, unswap):
        step(model)
        for network, adam in ((model, optimizer), (other, reference)):
            adam.zero_grad()
            network(*batch).sum().backward()
            adam.step()
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
    assert (model.body[0].weight - Everything().body[0].weight).abs().max() > 0.1


def test_swapped_model_moves_and_casts(small, batch):
    swap(small)
    assert small.float()(batch[0].float()).dtype == torch.float32
    assert list_types(small)[1:] == [
        get_nnmath_class("Linear"),
        get_nnmath_class("ReLU"),
        get_nnmath_class("Linear"),
    ]
    assert changed_names(unswap(small.to("meta"))) == ["0", "1", "2"]
