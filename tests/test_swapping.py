"""`swap` and `unswap`: the numbers agree with PyTorch's, and nothing but the class changes."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.utils.parametrize as parametrize
from torch import nn
from torch.nn.utils import parametrizations, prune

import torch_nnmath
from torch_nnmath import swap, unswap
from torch_nnmath.swapping import Change, Report

pytestmark = pytest.mark.filterwarnings("ignore::torch_nnmath.deferred.MaterializedLogits")
HAS_HEAD = hasattr(nn, "LinearCrossEntropyLoss")
KINDS = ["Linear", "Sigmoid", "Tanh", "ReLU", "Softmax", "MSELoss", "CrossEntropyLoss"]
KINDS += ["LinearCrossEntropyLoss"] * HAS_HEAD
WEIGHT = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)


class Everything(nn.Module):
    """Every kind that swap knows, with a shared module, a container and a dropout."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5, bias=False), nn.ReLU(), nn.Dropout(0.0)
        )
        self.again = self.body[1]
        self.gate = nn.ModuleDict({"linear": nn.Linear(5, 3), "sigmoid": nn.Sigmoid()})
        self.softmax = nn.Softmax(dim=-1)
        self.mse = nn.MSELoss(reduction="sum")
        self.ce = nn.CrossEntropyLoss(weight=WEIGHT.clone(), ignore_index=1, label_smoothing=0.1)
        if HAS_HEAD:
            self.head = nn.LinearCrossEntropyLoss(5, 3, bias=True, weight=WEIGHT.clone())
        self.double()

    def forward(self, x, target):
        features = self.again(self.body(x))
        logits = self.gate["linear"](features)
        losses = [self.ce(logits, target)]
        losses.append(self.mse(self.softmax(logits), self.gate["sigmoid"](logits)))
        if HAS_HEAD:
            losses.append(self.head(features, target))
        return torch.stack(losses)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Everything()


@pytest.fixture
def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double()


@pytest.fixture
def batch():
    x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([0, 1, 2, 0, 2, 1])


def ours(name):
    return getattr(torch_nnmath.nn, name)


def theirs(name):
    return getattr(nn, name)


def types(model):
    return [type(module) for module in model.modules()]


def results(model, x, target):
    """Losses, and the gradients in the input and in every parameter."""
    x = x.clone().requires_grad_()
    losses = model(x, target)
    return losses, *torch.autograd.grad(losses.square().sum(), [x, *model.parameters()])


def agree(found, truth):
    for f, t in zip(found, truth, strict=True):
        torch.testing.assert_close(f, t, rtol=1e-12, atol=1e-14)


def every_key(model):
    return [list(vars(module)) for module in model.modules()]


def changed(report):
    return [row.name for row in report]


# The numbers and the report


def test_values_and_gradients_are_pytorchs_before_during_and_after(model, batch):
    truth = results(copy.deepcopy(model), *batch)
    swap(model)
    agree(results(model, *batch), truth)
    unswap(model)
    agree(results(model, *batch), truth)


def test_it_is_our_arithmetic_that_runs(small, batch):
    truth = small(batch[0])
    swap(small)
    found = small(batch[0])
    assert type(found.grad_fn) is not type(truth.grad_fn)
    unswap(small)
    assert type(small(batch[0]).grad_fn) is type(truth.grad_fn)


def test_each_kind_becomes_ours_of_the_same_name(model):
    report = swap(model)
    for row in report:
        kind = type(model.get_submodule(row.name))
        assert kind is ours(kind.__name__)
        assert row.before == f"torch.nn.{kind.__name__}"
        assert row.after == f"torch_nnmath.nn.{kind.__name__}"
    assert {row.after.rpartition(".")[2] for row in report} == set(KINDS)
    others = [m for m in model.modules() if type(m).__name__ not in KINDS]
    assert [type(m) for m in others] == [Everything, nn.Sequential, nn.Dropout, nn.ModuleDict]


def test_unswap_reports_the_same_rows_turned_round(model):
    report = swap(model)
    assert unswap(model) == tuple(Change(n, after, before) for n, before, after in report)


def test_a_shared_module_changes_once_and_is_reported_once(model):
    names = changed(swap(model))
    assert "body.1" in names
    assert "again" not in names
    assert model.again is model.body[1]
    assert names == list(dict.fromkeys(names))


def test_the_report_prints_as_a_table(small):
    assert str(swap(small)).splitlines() == [
        "0  torch.nn.Linear  ->  torch_nnmath.nn.Linear",
        "1  torch.nn.ReLU    ->  torch_nnmath.nn.ReLU",
        "2  torch.nn.Linear  ->  torch_nnmath.nn.Linear  head",
        "3 modules changed",
    ]


def test_a_report_of_nothing_says_so(small):
    for report in (unswap(small), swap(small, include=()), Report()):
        assert len(report) == 0
        assert str(report) == repr(report) == "no modules changed"


def test_a_report_is_a_sequence(small):
    report = swap(small)
    assert len(report) == 3
    assert list(report)[1] == report[1]
    assert report[1] == ("1", "torch.nn.ReLU", "torch_nnmath.nn.ReLU")
    assert pickle.loads(pickle.dumps(report)) == report


# What stays


def test_only_classes_change(model):
    def everything():
        found = [*model.modules(), *model.parameters(), *model.buffers()]
        names = [n for n, _ in [*model.named_parameters(), *model.named_buffers()]]
        attributes = [
            {k: id(v) for k, v in vars(m).items() if k != "_nnmath_swapped"}
            for m in model.modules()
        ]
        return list(map(id, found)), names, attributes, repr(model)

    model.body.eval()
    model.ce.note = object()
    before, keys, kinds = everything(), every_key(model), types(model)
    swap(model)
    assert everything() == before
    unswap(model)
    assert everything() == before
    assert every_key(model) == keys
    assert types(model) == kinds


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_training_flag_dtype_device_and_requires_grad_stay(dtype):
    model = nn.Sequential(nn.Linear(3, 2, dtype=dtype, device="meta"), nn.ReLU(inplace=True)).eval()
    model[0].bias.requires_grad_(False)
    swap(model)
    assert [m.training for m in model.modules()] == [False] * 3
    assert (model[0].weight.dtype, model[0].weight.device.type) == (dtype, "meta")
    assert [p.requires_grad for p in model.parameters()] == [True, False]
    assert model[1].inplace


def test_state_dicts_keep_their_keys_and_load_both_ways(model):
    plain = Everything()
    swap(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert "ce.weight" in model.state_dict()
    assert model.state_dict()._metadata == plain.state_dict()._metadata
    plain.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(Everything().state_dict(), strict=True)
    unswap(model)
    model.load_state_dict(plain.state_dict(), strict=True)


def test_a_criterion_with_class_weights_loads_into_a_swapped_one_and_back():
    """R17: no key is added, whether the criterion has class weights or not."""
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


def exercise(model, batch):
    x, target = batch
    model(x.clone().requires_grad_(), target).sum().backward()
    model.load_state_dict(model.state_dict())


# Called twice in a forward, and read by its owner without being called.
ODD_ONES_OUT = {"body.1", "head.linear"}


def hooked(model):
    return {
        name: Hooks(module)
        for name, module in model.named_modules()
        if type(module).__name__ in KINDS and name not in ODD_ONES_OUT
    }


def test_hooks_of_all_kinds_fire_once_before_during_and_after(model, batch):
    """R16: and none is lost, doubled or made deaf to its handle."""
    hooks = hooked(model)
    for step in (lambda _: None, swap, swap, unswap, unswap, swap):
        step(model)
        exercise(model, batch)
        for name, found in hooks.items():
            assert found.calls == dict.fromkeys(found.calls, 1), name
            found.reset()


@pytest.mark.parametrize("steps", [(swap,), (swap, unswap)])
def test_handles_still_remove_their_hooks(model, batch, steps):
    hooks = hooked(model)
    for step in steps:
        step(model)
    for found in hooks.values():
        for handle in found.handles:
            handle.remove()
    exercise(model, batch)
    assert all(not any(found.calls.values()) for found in hooks.values())


def test_hooks_added_while_swapped_survive_unswap(model, batch):
    swap(model)
    hooks = hooked(model)
    unswap(model)
    exercise(model, batch)
    for found in hooks.values():
        assert found.calls == dict.fromkeys(found.calls, 1)


def test_a_hook_that_is_always_called_hears_of_an_error_of_ours():
    layer = nn.Linear(3, 2)
    swap(layer)
    calls = []
    layer.register_forward_hook(lambda *args: calls.append(args), always_call=True)
    with pytest.raises(RuntimeError, match="shape"):
        layer(torch.ones(1, 4))
    assert len(calls) == 1


def test_hooks_may_change_inputs_and_outputs(batch):
    layer = nn.Linear(4, 2).double()
    layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    layer.register_forward_hook(lambda module, args, out: out + 1)
    truth = layer(batch[0])
    swap(layer)
    agree([layer(batch[0])], [truth])


# What is left alone


class Own(nn.Linear):
    def forward(self, input):
        return super().forward(input) + 1


def quantized():
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 3)), {nn.Linear})[0]


def patched():
    layer = nn.Linear(4, 3)
    layer.forward = lambda input: input
    return layer


LEFT_ALONE = {
    "subclass": lambda: Own(4, 3),
    "named alike": lambda: type("Linear", (nn.Linear,), {})(4, 3),
    "not ours to change": lambda: nn.Sequential(nn.Conv1d(1, 1, 1), nn.ReLU6(), nn.LogSoftmax(-1)),
    "not dynamically quantizable": lambda: nn.MultiheadAttention(4, 2),
    "parametrized": lambda: parametrizations.orthogonal(nn.Linear(4, 4)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 3)),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(4, 3)),
    "lazy": lambda: nn.LazyLinear(3),
    "quantized": quantized,
    "scripted": lambda: torch.jit.script(nn.Sequential(nn.Linear(4, 3), nn.ReLU())),
    "forward on the instance": patched,
    "ours already": lambda: torch_nnmath.nn.CrossEntropyLoss(base=2),
}


@pytest.mark.parametrize("make", LEFT_ALONE.values(), ids=LEFT_ALONE)
@pytest.mark.filterwarnings("ignore:.*(deprecat|Lazy)")  # torch.ao, torch.jit and lazy modules
def test_what_is_not_exactly_pytorchs_is_left_alone(make):
    for model in (make(), nn.Sequential(make())):
        kinds, keys = types(model), every_key(model)
        assert len(swap(model)) == len(unswap(model)) == 0
        assert (types(model), every_key(model)) == (kinds, keys)


@pytest.mark.filterwarnings("ignore:.*Lazy")
def test_a_lazy_layer_changes_once_it_is_a_linear():
    model = nn.Sequential(nn.LazyLinear(3))
    model(torch.ones(1, 4))
    assert changed(swap(model)) == ["0"]


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
def test_hook_based_reparametrizations_go_on_in_a_swapped_layer(apply, batch):
    torch.manual_seed(0)
    layer = apply(nn.Linear(4, 3).double()).eval()

    def outcome():
        out = layer(batch[0])
        return [out, *torch.autograd.grad(out.square().sum(), list(layer.parameters()))]

    truth = outcome()
    assert len(swap(layer)) == 1
    agree(outcome(), truth)
    unswap(layer)
    assert type(layer) is nn.Linear


def test_a_pruned_layer_can_be_made_permanent_while_swapped(batch):
    layer = prune.l1_unstructured(nn.Linear(4, 3).double(), "weight", 5)
    truth = layer(batch[0])
    swap(layer)
    prune.remove(layer, "weight")
    agree([layer(batch[0])], [truth])
    unswap(layer)
    assert type(layer) is nn.Linear


@pytest.mark.parametrize("grad", [False, True])
def test_a_transformer_encoder_works_on_its_fast_path_and_off_it(grad):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        8, 2, 16, dropout=0, activation=nn.ReLU(), batch_first=True, dtype=torch.float64
    )
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        truth = model(x)
        names = changed(swap(model))
        agree([model(x)], [truth])
    assert "layers.0.linear1" in names
    assert not any("self_attn" in name for name in names)
    assert type(model.layers[0].self_attn.out_proj).__name__ == "NonDynamicallyQuantizableLinear"


# Undoing


@pytest.mark.parametrize("name", KINDS)
def test_a_bare_module_changes_itself_and_back(name):
    arguments = {"Linear": (2, 3), "LinearCrossEntropyLoss": (2, 3), "Softmax": (-1,)}
    module = theirs(name)(*arguments.get(name, ()))
    keys = every_key(module)
    assert swap(module)[0] == ("", f"torch.nn.{name}", f"torch_nnmath.nn.{name}")
    assert type(module) is ours(name)
    lines = str(unswap(module)).splitlines()
    assert lines[0].split() == ["(root)", f"torch_nnmath.nn.{name}", "->", f"torch.nn.{name}"]
    if name != "LinearCrossEntropyLoss":  # which has a Linear inside
        assert lines[1:] == ["1 module changed"]
    assert type(module) is theirs(name)
    assert every_key(module) == keys


def test_swapping_twice_is_harmless(model):
    keys, kinds = every_key(model), types(model)
    first = swap(model)
    swapped = types(model)
    assert len(swap(model)) == 0
    assert types(model) == swapped
    assert len(unswap(model)) == len(first)
    assert len(unswap(model)) == 0
    assert (types(model), every_key(model)) == (kinds, keys)


def test_a_second_swap_changes_what_came_in_since(small):
    swap(small)
    small.append(nn.Linear(2, 2))
    assert changed(swap(small)) == ["3"]
    assert changed(unswap(small)) == ["0", "1", "2", "3"]


def test_unswap_works_on_a_part(small):
    swap(small)
    assert changed(unswap(small[2])) == [""]
    assert types(small)[1:] == [ours("Linear"), ours("ReLU"), nn.Linear]


def test_modules_that_the_user_made_of_ours_stay():
    model = nn.Sequential(nn.Linear(2, 2), ours("Linear")(2, 2), ours("CrossEntropyLoss")(base=2))
    model.append(ours("Feedforward")([2, 3, 2]))
    kinds, keys = types(model), every_key(model)
    assert changed(swap(model)) == ["0"]
    assert changed(unswap(model)) == ["0"]
    assert (types(model), every_key(model)) == (kinds, keys)
    assert model[2].base == 2


@pytest.mark.skipif(not HAS_HEAD, reason="nn.LinearCrossEntropyLoss came with PyTorch 2.13")
def test_a_layer_inside_a_module_of_the_users_goes_there_and_back():
    loss = ours("LinearCrossEntropyLoss")(3, 4, base=2)
    kind = type(loss.linear)
    assert changed(swap(loss)) == changed(unswap(loss)) == ["linear"]
    assert (type(loss), type(loss.linear), loss.base) == (ours(type(loss).__name__), kind, 2)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("clone", [copy.deepcopy, pickled, saved])
def test_copies_and_pickles_remember(model, batch, clone):
    model.ours = ours("Linear")(2, 2)
    truth, kinds, keys = model(*batch), types(model), every_key(model)
    swap(model)
    swapped = types(model)
    other = clone(model)
    assert types(other) == swapped
    agree([other(*batch)], [truth])
    unswap(other)
    assert (types(other), every_key(other)) == (kinds, keys)
    agree([other(*batch)], [truth])
    assert types(model) == swapped
    unswap(model)
    assert types(model) == kinds


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight

    def right_inverse(self, weight):
        return weight / 2


@pytest.mark.parametrize("again", [False, True])
def test_a_layer_parametrized_after_the_swap_is_undone_below(batch, again):
    layer = nn.Linear(4, 3).double()
    keys, truth = every_key(layer), layer(batch[0])
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
    agree([layer(batch[0])], [truth])
    assert type(layer(batch[0]).grad_fn) is type(truth.grad_fn)
    agree([copy.deepcopy(layer)(batch[0])], [truth])
    with pytest.raises(RuntimeError, match="parametrized"):
        pickle.dumps(layer)
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is nn.Linear
    assert sorted(every_key(layer)[0]) == sorted(keys[0])
    agree([layer(batch[0])], [truth])

    # The copy shares the class that was undone, and keeps it.
    assert isinstance(other, ours("Linear"))
    agree([other(batch[0])], [truth])
    parametrize.remove_parametrizations(other, "weight")
    assert type(other) is ours("Linear")
    unswap(other)
    assert type(other) is nn.Linear


def test_a_layer_parametrized_and_freed_while_swapped_comes_back():
    layer = nn.Linear(4, 3)
    swap(layer)
    parametrizations.weight_norm(layer)
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is ours("Linear")
    unswap(layer)
    assert type(layer) is nn.Linear


class Sharded:
    """What fully_shard does: one derived class for all modules of a class, a mixin first."""

    def sharded(self):
        return self.weight.shape


def test_a_derived_class_that_modules_share_stays_shared(small, batch):
    truth = small(batch[0])
    swap(small)
    kind = type("ShardedLinear", (Sharded, ours("Linear")), {"note": 1})
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
    agree([small[:3](batch[0])], [truth])


def test_a_class_put_back_by_hand_leaves_no_mark():
    layer = nn.Linear(2, 2)
    keys = every_key(layer)
    swap(layer)
    layer.__class__ = nn.Linear
    assert len(unswap(layer)) == 0
    assert every_key(layer) == keys


# Choosing


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
def test_include_and_exclude(small, include, exclude, expected):
    assert changed(swap(small, include=include, exclude=exclude)) == expected.split()
    assert [str(i) for i in range(3) if type(small[i]).__module__ == "torch_nnmath.nn"] == (
        expected.split()
    )


def test_patterns_cross_dots_and_the_empty_one_is_the_root(model):
    assert changed(swap(model, include="body.*")) == ["body.0", "body.1", "body.2", "body.3"]
    assert changed(swap(model, include="*.linear", exclude="head*")) == ["gate.linear"]
    assert changed(swap(nn.Linear(2, 2), include="")) == [""]
    assert changed(swap(nn.Linear(2, 2), exclude="")) == []
    assert changed(swap(nn.Sequential(nn.Linear(2, 2)), exclude="")) == ["0"]
    assert changed(swap(nn.ModuleDict({"Big": nn.ReLU()}), include="big")) == []


def test_a_shared_module_goes_by_any_of_its_names(model):
    assert len(swap(model, include=nn.Tanh, exclude="again")) == 0
    assert len(swap(model, include="body.1", exclude="again")) == 0
    assert changed(swap(model, include="again")) == ["again"]
    assert changed(unswap(model)) == ["body.1"]


def test_a_predicate_that_raises_leaves_the_model_as_it_was(small):
    def predicate(name, module):
        return 1 / (2 - int(name))

    kinds, keys = types(small), every_key(small)
    with pytest.raises(ZeroDivisionError):
        swap(small, include=predicate)
    assert (types(small), every_key(small)) == (kinds, keys)


@pytest.mark.parametrize("wrong", [3, int, nn.ReLU(), {"0"}, ["0", 3], [[None]], True])
@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_selector_of_another_kind_raises(small, argument, wrong):
    kinds = types(small)
    with pytest.raises(TypeError, match=f"{argument} must be a name pattern.*got"):
        swap(small, **{argument: wrong})
    assert types(small) == kinds


@pytest.mark.parametrize("wrong", [nn.Linear, None, [nn.Linear(2, 2)], torch.ones(2), "model"])
@pytest.mark.parametrize("function", [swap, unswap])
def test_what_is_no_module_raises(function, wrong):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got"):
        function(wrong)


def heads(report):
    return list(report.heads)


class Declares(nn.Module):
    """Its output embedding is not its last Linear."""

    def __init__(self, output="lm_head"):
        super().__init__()
        self.lm_head, self.body = nn.Linear(4, 9), nn.Linear(4, 4)
        self.output = output

    def get_output_embeddings(self):
        return getattr(self, self.output) if self.output else None

    def forward(self, x):
        return self.lm_head(self.body(x))


class Asks(Declares):
    def get_output_embeddings(self, which):
        return self.lm_head


class HasNone(Declares):
    def get_output_embeddings(self):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), ["2"]),
        (lambda: nn.Sequential(nn.Linear(4, 3), Own(3, 2)), []),  # the last is none of ours
        (lambda: nn.Linear(4, 3), [""]),
        (lambda: nn.Sequential(nn.ReLU()), []),
        (Everything, ["gate.linear"]),  # the loss reads its own Linear without calling it
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 1)), ["0"]),
        (lambda: nn.Sequential(nn.Linear(4, 4), torch_nnmath.nn.Feedforward([4, 4])), ["0"]),
        (Declares, ["lm_head"]),
        (lambda: nn.ModuleDict({"a": Declares(), "b": nn.Linear(4, 3)}), ["a.lm_head"]),
        (lambda: nn.ModuleList([Declares(), Declares("body")]), ["0.lm_head", "1.body"]),
        (lambda: Declares(output=None), ["body"]),
        (Asks, ["body"]),
        (HasNone, ["body"]),
    ],
)
def test_which_linear_is_the_head(model, expected):
    assert heads(swap(model())) == expected


def test_a_declared_output_that_is_no_linear_leaves_the_model_without_head():
    model = Declares("both")
    model.both = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 9))
    report = swap(model)
    assert heads(report) == []
    assert report.left == {"both": "torch.nn.modules.container.Sequential is no torch.nn.Linear"}


@pytest.mark.parametrize("elsewhere", [nn.Linear(4, 9), nn.Sequential(nn.Linear(4, 9))])
def test_a_declared_output_outside_of_the_model_is_none(elsewhere):
    model = Declares()
    model.get_output_embeddings = lambda: elsewhere
    assert heads(swap(model)) == ["body"]


class Agreeing(nn.Module):
    """Whose == makes a module, as a torchmetrics.Metric's does: true of anything."""

    __hash__ = nn.Module.__hash__

    def __eq__(self, other):
        return Agreeing()


@pytest.mark.parametrize("head", ["auto", "body"])
def test_a_module_that_is_equal_to_any_is_no_head(head):
    def marked():
        return [n for n, module in model.named_modules() if "_nnmath_swapped" in vars(module)]

    model = nn.Sequential()
    model.metric, model.body, model.after = Agreeing(), nn.Linear(4, 9), Agreeing()
    for _ in range(2):  # the second finds what the first made
        assert heads(swap(model, head=head)) == ["body"]
        assert marked() == ["body"]
    with pytest.raises(ValueError, match="must be a torch"):
        swap(model, head=model.metric)
    unswap(model)
    assert marked() == []


def test_a_declared_output_of_another_kind_is_changed_but_no_head():
    model = nn.Module()
    model.act = model.out = nn.Tanh()
    model.get_output_embeddings = lambda: model.act
    report = swap(model, include="out")
    assert heads(report) == []
    assert report.left == {}
    assert type(model.act) is torch_nnmath.nn.Tanh
    assert vars(model.act)["_nnmath_swapped"] is True


def test_a_layer_of_ours_with_a_forward_of_its_own_is_no_head():
    model = nn.Sequential(torch_nnmath.nn.Linear(4, 3))
    model[0].forward = lambda input: input
    report = swap(model)
    assert heads(report) == []
    assert report.left == {"0": "its instance has a forward of its own"}


def is_deferred(z):
    return type(z).__name__ == "DeferredLogits"


def test_a_head_by_name_or_module_and_none(small):
    x = torch.randn(5, 4, dtype=torch.float64)
    assert heads(swap(small, head="0")) == ["0"]
    assert is_deferred(small[0](x))
    assert heads(swap(small)) == ["0"], "a head that there is stays"
    assert heads(swap(small, include="2")) == ["0"], "also where it is not included"
    report = swap(small, head=small[2])
    assert heads(report) == ["2"]
    assert str(report) == "no modules changed\nhead 2: no losses without logits so far"
    assert not is_deferred(small[0](x))
    assert is_deferred(small(x))
    assert heads(swap(small, head=None)) == []
    assert not is_deferred(small(x))
    assert changed(unswap(small)) == ["0", "1", "2"]
    assert types(small)[1:] == [nn.Linear, nn.ReLU, nn.Linear]


def test_a_named_head_is_changed_also_where_it_is_not_included(small):
    assert swap(small, include="1", head="0") == (
        ("0", "torch.nn.Linear", "torch_nnmath.nn.Linear"),
        ("1", "torch.nn.ReLU", "torch_nnmath.nn.ReLU"),
    )


def test_a_head_that_is_not_included_is_none(small):
    assert heads(swap(small, exclude="2")) == []
    assert type(small[2]) is nn.Linear


def test_a_layer_of_ours_that_the_user_made_can_be_the_head_and_stays_ours():
    model = nn.Sequential(nn.ReLU(), torch_nnmath.nn.Linear(4, 3))
    report = swap(model)
    assert heads(report) == ["1"]
    assert is_deferred(model(torch.randn(2, 4)))
    assert changed(unswap(model)) == ["0"]
    assert type(model[1]) is torch_nnmath.nn.Linear
    assert "_nnmath_swapped" not in vars(model[1])
    assert not is_deferred(model(torch.randn(2, 4)))


@pytest.mark.parametrize(
    ("head", "error", "sentence"),
    [
        ("3", ValueError, "no module named '3'"),
        ("lm_haed", ValueError, "near it are 'lm_head'"),
        ("body.1", ValueError, "must be a torch.nn.Linear"),
        ("own", ValueError, "test_swapping.Own is a class of its own"),
        ("patched", ValueError, "forward of its own"),
        (nn.Linear(2, 2), ValueError, "not in the model"),
        (False, TypeError, "a name, a module"),
        (3, TypeError, "a name, a module"),
        (nn.Linear, TypeError, "a name, a module"),
    ],
)
def test_a_head_that_cannot_be_raises_and_nothing_is_changed(head, error, sentence):
    modules = {"body": nn.Sequential(nn.Linear(4, 4), nn.ReLU()), "own": Own(4, 4)}
    model = nn.ModuleDict({**modules, "patched": patched(), "lm_head": nn.Linear(4, 3)})
    before = types(model)
    with pytest.raises(error, match=sentence):
        swap(model, head=head)
    assert types(model) == before


def test_the_report_says_what_was_left_and_what_became_of_the_logits():
    model = nn.Sequential(Own(4, 4), patched(), nn.Linear(4, 7))
    report = swap(model)
    assert report.left == {
        "0": "test_swapping.Own is a class of its own",
        "1": "its instance has a forward of its own",
    }
    x, target = torch.randn(3, 4), torch.tensor([0, 6, 2])
    nn.functional.cross_entropy(model[2](x), target).backward()
    nn.functional.cross_entropy(model[2](x).exp(), target).backward()
    lines = str(report).splitlines()
    assert lines[:5] == [
        "2  torch.nn.Linear  ->  torch_nnmath.nn.Linear  head",
        "1 module changed",
        "left as it was: 0: test_swapping.Own is a class of its own",
        "left as it was: 1: its instance has a forward of its own",
        "head 2: 1 loss without logits so far",
    ]
    assert lines[5].startswith("  logits computed 1 x: exp at ")
    assert "test_swapping.py" in lines[5]


# In use


class Classifier(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net, self.loss = net, nn.CrossEntropyLoss(ignore_index=2)

    def forward(self, x, target):
        return self.loss(self.net(x), target)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # Dynamo does it to Functions
@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_a_compiled_model_is_compiled_anew(small, batch, how):
    torch._dynamo.reset()
    ours_ran = []

    def backend(graph, inputs):
        def run(*args):
            ours_ran.append("autograd_function_apply" in graph.code)
            return graph(*args)

        return run

    model = Classifier(small)
    kinds, truth = types(model), model(*batch)
    if how == "wrapped":
        compiled = torch.compile(model, backend=backend, fullgraph=True)
    else:
        compiled = model
        model.compile(backend=backend, fullgraph=True)
    for step in (lambda _: None, swap, unswap):
        step(compiled)
        agree([compiled(*batch)], [truth])
    assert ours_ran == [False, True, False]
    assert types(model) == kinds


def test_functional_call_takes_other_parameters(small, batch):
    parameters = {name: 2 * p.detach() for name, p in small.named_parameters()}
    truth = torch.func.functional_call(small, parameters, (batch[0],))
    swap(small)
    agree([torch.func.functional_call(small, parameters, (batch[0],))], [truth])


def test_per_sample_gradients_through_a_swapped_model(small, batch):
    def gradients(model):
        def loss(parameters, x):
            return torch.func.functional_call(model, parameters, (x,)).square().sum()

        parameters = {name: p.detach() for name, p in model.named_parameters()}
        return torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, batch[0]).values()

    truth = list(gradients(small))
    swap(small)
    agree(gradients(small), truth)


def test_an_optimizer_made_before_trains_on(model, batch):
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


def test_moving_and_casting_a_swapped_model(small, batch):
    swap(small)
    assert small.float()(batch[0].float()).dtype == torch.float32
    assert types(small)[1:] == [ours("Linear"), ours("ReLU"), ours("Linear")]
    assert changed(unswap(small.to("meta"))) == ["0", "1", "2"]
