"""Each private PyTorch API in `torch_nnmath/_torch.py` still does what its docstring says."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from torch_nnmath import _torch


class Double(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return 2 * g


class DispatchMode(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return "overridden"


x = torch.tensor([1.0, 2.0])


def test_is_transformed():
    answers = []

    def f(x):
        answers.append(_torch.is_transformed())
        return x.sum()

    f(x)
    torch.func.grad(f)(x)
    torch.func.vmap(f)(x[:, None])
    torch.func.jvp(f, (x,), (x,))
    with forward_ad.dual_level():
        f(x)
    f(x)
    assert answers == [False, True, True, True, True, False]


def test_is_functionalized():
    answers = []

    def f(x):
        answers.append(_torch.is_functionalized())
        return x.sum()

    f(x)
    torch.func.grad(f)(x)
    torch.func.functionalize(f)(x)
    torch.func.functionalize(torch.func.grad(f))(x)
    torch.func.grad(torch.func.functionalize(f))(x)
    assert answers == [False, False, True, True, True]


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
def test_is_observed():
    answers = []

    def f(x):
        answers.append(_torch.is_observed())
        return x.sum()

    f(x)
    torch.func.vmap(f)(x[:, None])
    with forward_ad.dual_level():
        f(x)
    with DispatchMode():
        f(x)
    torch.jit.trace(f, x, check_trace=False)
    f(x)
    assert answers == [False, True, True, True, True, False]


def test_is_dynamo_tracing():
    answers = []

    class Rule:
        def __get__(self, instance, owner):
            answers.append(_torch.is_dynamo_tracing())
            return torch.autograd.Function.jvp

    class Function(Double):
        jvp = Rule()

    leaf = x.clone().requires_grad_()
    torch.compile(lambda x: Function.apply(x), backend="eager", fullgraph=True)(leaf)
    assert True in answers
    assert not _torch.is_dynamo_tracing()


def test_is_dynamo_loaded():
    code = (
        "import torch; from torch_nnmath import _torch; before = _torch.is_dynamo_loaded();"
        "torch.compiler.disable(print); print(before, _torch.is_dynamo_loaded())"
    )
    printed = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert printed.split() == ["False", "True"]


def test_is_exporting():
    class Module(torch.nn.Module):
        def forward(self, x):
            return x + 1 if _torch.is_exporting() else x + 2

    x, module = torch.zeros(2), Module()
    assert module(x)[0] == 2
    assert torch.compile(module, backend="eager", fullgraph=True)(x)[0] == 2
    for strict in (False, True):
        exported = torch.export.export(module, (x,), strict=strict).module()
        assert exported(x)[0] == 1


def test_may_break_graph():
    """False where a break raises an error."""

    def f(x):
        if _torch.may_break_graph():
            torch._dynamo.graph_break()
            return x + 1
        return x + 2

    @torch._dynamo.error_on_graph_break(True)
    def forbid_break(x):
        return f(x)

    def inside_checkpoint(x):
        return checkpoint(f, x, use_reentrant=False)

    for function, options, change in (
        (f, {}, 1),
        (lambda x: f(x), {}, 1),
        (f, {"fullgraph": True}, 2),
        (forbid_break, {}, 2),
        (inside_checkpoint, {"fullgraph": True}, 2),
        (inside_checkpoint, {}, 2),
    ):
        torch.compiler.reset()
        compiled = torch.compile(function, backend="eager", **options)
        torch.testing.assert_close(compiled(x), x + change)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
def test_is_jit_tracing():
    answers = []

    def f(x):
        answers.append(_torch.is_jit_tracing())
        return x + 1

    f(x)
    torch.jit.trace(f, (x,), check_trace=False)
    assert answers == [False, True]


def test_is_fx_tracing():
    answers = []

    def f(x):
        answers.append(_torch.is_fx_tracing())
        return x + 1

    f(x)
    make_fx(f)(x)
    assert answers == [False, True]


def test_has_dispatch_mode():
    assert not _torch.has_dispatch_mode()
    with DispatchMode():
        assert _torch.has_dispatch_mode()


def test_unwrap_transformed():
    answers = []

    def f(x):
        answers.append(_torch.unwrap_transformed(x))
        return x.sum()

    batch = torch.arange(6.0).view(2, 3)
    torch.func.vmap(torch.func.grad(f), in_dims=1)(batch)
    (wrapped, axis), inner = answers[0], _torch.unwrap_transformed(answers[0][0])
    assert axis is None  # of `grad`, the inner transform
    assert wrapped.shape == (2,)
    assert inner[0] is batch
    assert inner[1] == 1
    assert _torch.unwrap_transformed(batch) is None


def test_is_legacy_batch():
    answers = []

    class Function(Double):
        @staticmethod
        def backward(ctx, g):
            answers.append(_torch.is_legacy_batch(g))
            return 2 * g

    leaf = x.clone().requires_grad_()
    y = Function.apply(leaf)
    torch.autograd.grad(y, leaf, torch.ones(2), retain_graph=True)
    (g,) = torch.autograd.grad(y, leaf, torch.eye(2), is_grads_batched=True)
    assert answers == [False, True]
    assert torch.equal(g, 2 * torch.eye(2))


def test_get_attribute():
    class Fallback(torch.nn.Linear):
        def __getattr__(self, name):
            calls.append(name)
            return super().__getattr__(name)

    calls = []
    module = Fallback(2, 3)
    module.register_buffer("buffer", x)
    module.number = 5
    calls.clear()
    assert _torch.get_attribute(module, "weight", None) is module._parameters["weight"]
    assert _torch.get_attribute(module, "buffer", None) is x
    assert _torch.get_attribute(module, "number", None) == 5
    assert _torch.get_attribute(module, "missing", 7) == 7
    assert not calls


def test_apply_without_signature():
    leaf = x.clone().requires_grad_()
    leaked = []
    torch.func.grad(lambda v: (leaked.append(v), v.sum())[1])(x)
    assert _torch.apply_without_signature(Double, (leaked[0],)).grad_fn is None
    y = _torch.apply_without_signature(Double, (leaf,))
    assert torch.equal(y, 2 * x)
    (g,) = torch.autograd.grad(y.sum(), leaf)
    assert torch.equal(g, torch.tensor([2.0, 2.0]))


class Cube(torch.autograd.Function):
    """x³. Its `jvp` calls operations with forward mode enabled or disabled."""

    is_enabled = True
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx, dx):
        (x,) = ctx.saved_tensors
        if not Cube.is_enabled:
            return 3 * x * x * dx
        with _torch.enable_forward_mode():
            x = _torch.drop_tangent(x)
            return 3 * x * x * dx


@pytest.mark.parametrize("is_enabled", [True, False])
def test_enable_forward_mode(monkeypatch, is_enabled):
    """Without it, a jvp of a jvp loses its second term without an error."""
    monkeypatch.setattr(Cube, "is_enabled", is_enabled)

    def first(x):
        return torch.func.jvp(Cube.apply, (x,), (torch.ones(2),))[1]

    _, second = torch.func.jvp(first, (x,), (torch.ones(2),))
    assert torch.equal(second, 6 * x) == is_enabled


@pytest.mark.parametrize("is_batched", [False, True])
def test_drop_tangent(is_batched):
    def f(x):
        return x * _torch.drop_tangent(x)

    g = torch.func.vmap(f) if is_batched else f
    value, tangent = torch.func.jvp(g, (x,), (torch.ones(2),))
    assert torch.equal(value, x * x)
    assert torch.equal(tangent, x)  # and not 2 x


def test_drop_view_mark():
    """A Function's output that is a view cannot be modified in place; this can."""

    class Function(Double):
        @staticmethod
        def forward(x):
            return _torch.drop_view_mark((2 * x).view(2, 1))

        @staticmethod
        def backward(ctx, g):
            return 2 * g.view(2)

    leaf = x.clone().requires_grad_()
    y = Function.apply(leaf)
    y += 1
    (g,) = torch.autograd.grad(y.sum(), leaf)
    assert torch.equal(g, torch.tensor([2.0, 2.0]))


def test_get_base():
    owner = torch.zeros(3)
    assert _torch.get_base(owner[1:]) is owner
    assert _torch.get_base(owner) is None


def test_get_version():
    owner = torch.zeros(3)
    before = _torch.get_version(owner)
    owner.view(3).add_(1)
    assert _torch.get_version(owner) == before + 1


def test_get_storage_id():
    owner, other = (torch.zeros(3, device="meta") for _ in range(2))
    assert _torch.get_storage_id(owner[1:]) == _torch.get_storage_id(owner)
    assert _torch.get_storage_id(owner) != _torch.get_storage_id(other)


def test_assert_async():
    _torch.assert_async(torch.tensor(True), "not raised")
    with pytest.raises(RuntimeError, match="class index"):
        _torch.assert_async(torch.tensor(False), "a class index")


def test_find_process_group(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        group = torch.distributed.group.WORLD
        assert _torch.find_process_group(group.group_name) is group
    finally:
        torch.distributed.destroy_process_group()


def test_wait_for_collective():
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    x = torch.ones(2)
    waited = _torch.wait_for_collective(AsyncCollectiveTensor(x))
    assert type(waited) is Tensor
    assert waited.tolist() == [1, 1]
    assert _torch.wait_for_collective(x) is x


def test_support_dual_dtensors():
    from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        v = distribute_tensor(torch.arange(3.0), DeviceMesh("cpu", [0]), [Shard(0)])
        _torch.support_dual_dtensors()
        _, tangent = torch.func.jvp(torch.sin, (v,), (v,))
        assert torch.equal(tangent.full_tensor(), torch.arange(3.0) * torch.arange(3.0).cos())
    finally:
        dist.destroy_process_group()


def test_list_forward_hooks():
    layer = torch.nn.Linear(1, 1)
    assert _torch.list_forward_hooks(layer) == []
    layer.register_forward_hook(print)
    assert _torch.list_forward_hooks(layer) == [print]


def test_frees_parameters(tmp_path):
    """FSDP2 frees those of a module that is wrapped inside of another, unless told otherwise."""
    from torch.distributed.fsdp import fully_shard

    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(2)))
        fully_shard(model[0])
        fully_shard(model[1], reshard_after_forward=False)
        fully_shard(model)
        model(torch.ones(1, 2))  # makes `model` the outermost module
        assert [*map(_torch.frees_parameters, (*model, model))] == [True, False, False]
    finally:
        torch.distributed.destroy_process_group()


def test_make_wrapper():
    class Wrapper(Tensor):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise NotImplementedError

    wrapper = _torch.make_wrapper(Wrapper, torch.Size([3, 2]), dtype=torch.float64)
    assert type(wrapper) is Wrapper
    assert wrapper.shape == (3, 2)
    assert wrapper.dtype == torch.float64


def test_forbid_memory_access():
    plain = torch.ones(2)
    assert torch.from_dlpack(plain).equal(plain)
    _torch.forbid_memory_access(plain)
    with pytest.raises(RuntimeError, match="Cannot access data pointer"):
        torch.utils.dlpack.to_dlpack(plain)


def test_disable_torch_function():
    subclass = x.as_subclass(Subclass)
    assert torch.add(subclass, 1) == "overridden"
    with _torch.disable_torch_function():
        assert isinstance(torch.add(subclass, 1), Tensor)


def test_share_per_sample_gradient():
    def linear(input, weight):
        return torch.overrides.handle_torch_function(linear, (weight,), input, weight)

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.eye(3))

        def forward(self, input):
            return linear(input, self.weight)

    layer, rows = Layer(), torch.arange(6.0).view(2, 3)
    with pytest.raises(RuntimeError, match="cannot handle function linear"):
        call_for_per_sample_grads(layer)(rows)
    _torch.share_per_sample_gradient(torch.sigmoid, linear)  # has no rule
    _torch.share_per_sample_gradient(torch.nn.functional.linear, linear)
    call_for_per_sample_grads(layer)(rows).sum().backward()
    expected = rows[:, None].expand(2, 3, 3)
    torch.testing.assert_close(layer.weight.grad_sample, expected, rtol=0, atol=0)


def test_disable_dispatch_modes():
    with DispatchMode() as mode:
        torch.add(x, 1)
        assert mode.calls == 1
        with _torch.disable_dispatch_modes():
            torch.add(x, 1)
        assert mode.calls == 1


@pytest.mark.parametrize(
    ("call", "is_random"),
    [
        (lambda: torch.nn.functional.dropout(x), True),
        (lambda: torch.rand(2, generator=torch.Generator()), True),
        (lambda: torch.empty(2).normal_(), True),
        (lambda: x.sin(), False),
    ],
)
def test_random_operator_watch(call, is_random):
    with _torch.RandomOperatorWatch() as watch:
        call()
    assert watch.is_random == is_random


def test_result_hook():
    shapes = []
    x = torch.ones(2, 3)
    with _torch.ResultHook(lambda y: shapes.append(tuple(y.shape))):
        y = (x + torch.zeros(3)).view(6).relu_()
        y.topk(2)
    assert shapes == [(2, 3), (6,), (2,), (2,)]
    with _torch.ResultHook(lambda y: y.mul_(2)):
        assert torch.equal(x.sum(0), torch.full((3,), 4.0))


def test_tree_leaves():
    assert _torch.tree_leaves([1, (2, {"a": 3})]) == [1, 2, 3]


def test_tree_leaves_with_keys():
    leaves = _torch.tree_leaves_with_keys([1, {"a": (2, None)}])
    assert leaves == [("[0]", 1), ("[1]['a'][0]", 2), ("[1]['a'][1]", None)]


def test_tree_map():
    assert _torch.tree_map(lambda v: v + 1, [1, (2, {"a": 3})]) == [2, (3, {"a": 4})]


def test_make_fake_tensor_mode():
    with _torch.make_fake_tensor_mode() as mode:
        y = mode.from_tensor(x) + x  # x is a real tensor
    assert y.fake_mode is mode
    assert y.shape == x.shape


@pytest.mark.parametrize("mode", ["real", "symbolic"])
def test_trace_with_fx(mode):
    constant = torch.ones_like(x)
    graph = _torch.trace_with_fx(lambda v: v + constant, mode)(x)
    torch.testing.assert_close(graph(2 * x), 2 * x + 1)


def test_get_compiler_backend():
    compiled = torch.compile(torch.sin, backend=_torch.get_compiler_backend("eager"))
    torch.testing.assert_close(compiled(x), x.sin())


def test_get_node_function():
    node = Double.apply(x.clone().requires_grad_()).grad_fn
    assert _torch.get_node_function(node) is Double


def test_get_gradient_dtype():
    leaf = x.clone().double().requires_grad_()
    y = Double.apply(leaf.float())  # up to PyTorch 2.12, a node dies with its output
    conversion, index = y.grad_fn.next_functions[0]
    assert _torch.get_gradient_dtype(conversion, index) == torch.float32
    accumulation, index = conversion.next_functions[0]
    assert _torch.get_gradient_dtype(accumulation, index) == torch.float64


def test_every_function_has_a_test():
    functions = {
        name
        for name, f in vars(_torch).items()
        if inspect.isfunction(f) and f.__module__ == _torch.__name__
    }
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert functions <= tested, functions - tested


PRIVATE = r"torch\._[a-zA-Z]|torch(\.\w+)+\._\w+|from torch\._|from torch(\.\w+)* import _"


def test_no_other_module_uses_a_private_api():
    package = Path(_torch.__file__).parent
    command = ["grep", "-rnE", "--include=*.py", PRIVATE, str(package)]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    others = [line for line in lines if "/_torch.py:" not in line]
    assert not others, "\n".join(others)
    assert lines, "the pattern finds nothing"


def test_import_loads_no_optional_dependency():
    optional = ["lightning", "triton", "torch._dynamo"]
    code = f"import sys, torch_nnmath.testing; print([m for m in {optional} if m in sys.modules])"
    found = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert found.strip() == "[]"
