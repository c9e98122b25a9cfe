"""The formulas inside a user's graph: in-place edits, saved tensors, autocast, infinite logits."""

import functools
import inspect
import math

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functionalize, grad, jvp, vjp
from torch.fx.experimental.proxy_tensor import make_fx

from torch_nnmath import _torch, formulas, nn
from torch_nnmath import functional as F
from torch_nnmath.formulas._formula import Formula
from torch_nnmath.formulas.feedforward import ACTIVATIONS

Y = torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize("head", [False, True])
def test_compiled_mean_of_empty_batch_equals_eager(head):
    torch._dynamo.reset()
    W = torch.randn(3, 4, requires_grad=True)

    def loss(x, y):
        return F.linear_cross_entropy(x, W, y) if head else F.cross_entropy(x @ W.T, y)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for n in (2, 3, 0):
        x, y = torch.randn(n, 4, requires_grad=True), torch.zeros(n, dtype=torch.long)
        result, expected = compiled(x, y), loss(x, y)
        torch.testing.assert_close(result, expected, equal_nan=True)
        torch.testing.assert_close(
            torch.autograd.grad(result, W)[0], torch.autograd.grad(expected, W)[0], equal_nan=True
        )


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: F.cross_entropy(x, Y),
        lambda x: F.cross_entropy(x, Y, reduction="sum"),
        lambda x: F.mse_loss(x, x.detach() + 1),
        lambda x: F.squared_error(x, x.detach() + 1),
        lambda x: F.linear_cross_entropy(x, torch.eye(3), Y),
        lambda x: F.categorical_cross_entropy(x.softmax(-1), Y),
    ],
)
def test_loss_divided_in_place_has_the_scaled_gradient(loss):
    x = torch.randn(4, 3, requires_grad=True)
    (expected,) = torch.autograd.grad(loss(x) / 4, x)
    divided = loss(x)
    divided /= 4
    torch.testing.assert_close(torch.autograd.grad(divided, x)[0], expected)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 4, 3), (0, 2, 3)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "layer",
    [nn.Linear, lambda n, m, b: nn.Feedforward((n, m), output_activation="identity", bias=b)],
)
def test_layer_output_changed_in_place_has_the_right_gradient(layer, shape, bias):
    """A Function whose output is a view would forbid the change."""
    layer, x = layer(3, 2, bias), torch.randn(shape)
    reference = torch.nn.Linear(3, 2, bias)
    state = {name.removeprefix("layers.0."): v for name, v in layer.state_dict().items()}
    reference.load_state_dict(state)
    results = []
    for net in (layer, reference):
        y = net(x)
        y += torch.ones(2)
        y[..., 0] *= 3
        results.append([y, *torch.autograd.grad(y.square().sum(), [*net.parameters()])])
    for result, expected in zip(*results, strict=True):
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("is_weight_batched", [True, False])
def test_vmap_of_linear_beside_a_frozen_input_has_the_gradient(is_weight_batched):
    """An ensemble of layers on fixed features, and a batch of features through a frozen layer."""
    frozen, batch = torch.randn(4, 3), torch.randn(5, 4, 3, requires_grad=True)

    def compute(v):
        return F.linear(frozen, v) if is_weight_batched else F.linear(v, frozen)

    losses = torch.vmap(lambda v: compute(v).square().sum())(batch)
    looped = torch.stack([compute(v).square().sum() for v in batch])
    torch.testing.assert_close(losses, looped)
    results = [torch.autograd.grad(c.sum(), batch)[0] for c in (losses, looped)]
    torch.testing.assert_close(*results)


def test_linear_saves_only_what_its_backward_reads():
    x, W = torch.randn(2, 3, requires_grad=True), torch.randn(4, 3)
    z = F.linear(x, W)
    with torch.no_grad():
        x.add_(1)  # W is frozen, so the backward does not read x
    torch.testing.assert_close(torch.autograd.grad(z.sum(), x)[0], W.sum(0).expand(2, 3))
    features = torch.randn(2, 3)
    W.requires_grad_()
    z = F.linear(features, W)
    with torch.no_grad():
        W.add_(1)  # the features need no gradient, so the backward does not read W
    torch.testing.assert_close(
        torch.autograd.grad(z.sum(), W)[0], features.sum(0).expand(4, 3), rtol=1e-6, atol=1e-6
    )
    y = nn.Feedforward((3, 4, 2), output_activation="identity")(features)
    y += 1
    y.sum().backward()


def test_saved_weight_changed_in_place_makes_backward_raise():
    x, W = torch.randn(2, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    z = F.linear(x, W)
    with torch.no_grad():
        W.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_feedforward_with_frozen_layers_computes_one_product_in_backward():
    net = nn.Feedforward((3, 4, 4, 2), dtype=torch.float64)
    for parameter in net.layers[:2].parameters():
        parameter.requires_grad_(False)
    x = torch.randn(5, 3, dtype=torch.float64)
    output = net(x)
    with torch.profiler.profile(acc_events=True) as profile:
        output.sum().backward()
    products = [e.count for e in profile.key_averages() if e.key in ("aten::mm", "aten::addmm")]
    assert sum(products) == 1
    assert net.layers[0].weight.grad is None
    delta = output.detach() * (1 - output.detach())
    hidden = x
    for layer in net.layers[:2]:
        hidden = torch.sigmoid(hidden @ layer.weight.T + layer.bias)
    torch.testing.assert_close(net.layers[2].weight.grad, delta.T @ hidden)


@pytest.mark.parametrize("z", [1e-12, 1e-8, 1e-5, 1e-3, 3.0])
def test_second_derivative_of_tanh_near_0_keeps_its_digits(z):
    z = torch.tensor(z, dtype=torch.float32, requires_grad=True)
    (g,) = torch.autograd.grad(F.tanh(z), z, create_graph=True)
    (h,) = torch.autograd.grad(g, z)
    a = torch.tanh(z.detach().double())
    torch.testing.assert_close(h.double(), -2 * a * (1 - a * a), rtol=1e-5, atol=0)


def test_second_derivative_of_relu_is_0():
    x = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
    (g,) = torch.autograd.grad((F.relu(x) * x.detach()).sum(), x, create_graph=True)
    (h,) = torch.autograd.grad(g.sum(), x)
    assert torch.equal(h, torch.zeros(3))


def test_third_order_of_head_inside_autocast_equals_outside():
    x, W = torch.randn(4, 3, requires_grad=True), torch.randn(3, 3, requires_grad=True)

    def third(loss, autocast):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            (g,) = torch.autograd.grad(loss, W, create_graph=True)
            (h,) = torch.autograd.grad((g * g.detach().cos()).sum(), W, create_graph=True)
            return torch.autograd.grad((h * h.detach().cos()).sum(), (x, W))

    loss = F.linear_cross_entropy(x, W, Y)
    torch.testing.assert_close(third(loss, True), third(loss, False), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("head", [False, True])
def test_logit_of_minus_infinity_with_weight_or_target_0_leaves_no_nan(head):
    z = torch.tensor([[0.0, 1.0, -math.inf]], dtype=torch.float64)

    def loss(t, w):
        if head:
            x, W = torch.zeros(1, 1).double(), torch.zeros(3, 1).double()
            return F.linear_cross_entropy(x, W, t, linear_bias=z[0], weight=w)
        return F.cross_entropy(z, t, w)

    l = z.log_softmax(-1)[0]
    t, w = torch.tensor([[0.5, 0.5, 0.0]]).double(), torch.ones(3).double().requires_grad_()
    (dw,) = torch.autograd.grad(loss(t, w), w)
    torch.testing.assert_close(dw, torch.tensor([-0.5 * l[0], -0.5 * l[1], 0.0]).double())
    t, w = t.requires_grad_(), torch.tensor([1.0, 1.0, 0.0]).double()
    (dt,) = torch.autograd.grad(loss(t, w), t)
    torch.testing.assert_close(dt, torch.tensor([[-l[0], -l[1], 0.0]]).double())


def test_ignored_row_beside_an_infinite_weight_has_gradient_0():
    x = torch.randn(2, 3, requires_grad=True)
    W = torch.randn(4, 3)
    W[2] = math.inf
    y = torch.tensor([0, -100])
    loss = F.linear_cross_entropy(x, W, y, reduction="sum")
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    assert torch.equal(dx[1], torch.zeros(3))
    losses = F.linear_cross_entropy(x, W, y, reduction="none")
    assert math.copysign(1, losses[1].item()) == 1  # 0, not -0


def test_weighted_target_passes_gradcheck():
    t, w = (torch.rand(2, 3).double().requires_grad_(), torch.rand(1, 3).double().requires_grad_())
    assert torch.autograd.gradcheck(formulas.WeightedTarget.apply, (t, w), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(formulas.WeightedTarget.apply, (t, w))


@pytest.fixture
def make_cuda_tensor():
    """Makes fake CUDA tensors, with CUDA's autocast on: no device is needed."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.float16)
    try:
        with FakeTensorMode():
            yield lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device="cuda")
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_cuda_autocast_casts_as_pytorch_lists(make_cuda_tensor, dtype):
    """Products in float16, softmax and losses in float32; float64 stays."""
    x, W, t = (make_cuda_tensor(*shape, dtype=dtype) for shape in ((4, 3), (5, 3), (4, 3)))
    wide = torch.promote_types(dtype, torch.float32)
    assert F.linear(x, W).dtype == (torch.float64 if dtype == torch.float64 else torch.float16)
    assert F.softmax(x, -1).dtype == wide
    assert F.cross_entropy(x, t).dtype == wide
    assert F.mse_loss(x, t).dtype == wide
    for elementwise in (F.sigmoid, F.tanh, F.relu):
        assert elementwise(x).dtype == dtype


def test_feedforward_in_half_precision_with_float32_softmax_stays_accurate(monkeypatch):
    """As CUDA's autocast has it: products in half precision, softmax in float32."""
    softmax = ACTIVATIONS["softmax"]
    float32_softmax = softmax._replace(f=lambda z: softmax.f(z.float()))
    monkeypatch.setitem(ACTIVATIONS, "softmax", float32_softmax)
    torch.manual_seed(0)
    shapes = (4, 3), (5, 3), (2, 5), (5,), (2,)
    points = [torch.randn(shape).bfloat16().double() for shape in shapes]
    t = torch.randn(4, 2, dtype=torch.float64)

    def network(x, *parameters):
        return F.feedforward(x, parameters[:2], parameters[2:], output_activation="softmax")

    def compute_results(dtype):
        leaves = [v.to(dtype).requires_grad_() for v in points]
        a = network(*leaves)
        gradients = torch.autograd.grad((a * t.to(a.dtype)).sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.double().sin().sum() for g in gradients), leaves)
        with fwAD.dual_level():
            duals = [fwAD.make_dual(v.detach(), torch.ones_like(v)) for v in leaves]
            tangent = fwAD.unpack_dual(network(*duals)).tangent
        assert tangent.dtype == a.dtype
        return a.detach(), tangent, *gradients, *second

    results = compute_results(torch.bfloat16)
    assert results[0].dtype == torch.float32
    monkeypatch.setitem(ACTIVATIONS, "softmax", softmax)
    for result, expected in zip(results, compute_results(torch.float64), strict=True):
        scale = expected.detach().abs().max().item()
        torch.testing.assert_close(result.double(), expected, rtol=0, atol=0.05 * scale)


FUNCTIONALIZED = {
    "linear": lambda z, W: F.linear(z, W),
    "relu_": lambda z, W: F.relu(z @ W, inplace=True),
    "head": lambda z, W: F.linear_cross_entropy(z, W, Y, z_loss=0.1, reduction="sum"),
    "log-probabilities": lambda z, W: sum(F.linear_log_probs(z, W, Y, return_entropy=True)),
    "cross_entropy": lambda z, W: F.cross_entropy(z @ W, Y),
    "squared_error": lambda z, W: F.squared_error(z @ W, z.cos()),
    "log-sum-exp": lambda z, W: F.linear_log_sum_exp(z, W, softcap=2.0, temperature=0.7),
}


@pytest.mark.parametrize("name", FUNCTIONALIZED)
def test_functionalized_function_has_value_and_two_orders(name):
    """Alone, inside and outside of grad, on leaves of autograd, and under make_fx."""
    z, W = torch.randn(4, 3, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)

    def compute(z, W):
        return FUNCTIONALIZED[name](z, W).sin().sum()

    def differentiate(f):
        gradient = grad(f, (0, 1))
        return grad(lambda z, W: sum(g.cos().sum() for g in gradient(z, W)), (0, 1))

    functional, outer = functionalize(compute), functionalize(differentiate(compute))
    expected = compute(z, W), *differentiate(compute)(z, W)
    for value, gradients in [
        (functional, outer),
        (functional, differentiate(functional)),
        (make_fx(functional)(z, W), make_fx(outer)(z, W)),
    ]:
        torch.testing.assert_close((value(z, W), *gradients(z, W)), expected)
    leaves = [x.clone().requires_grad_() for x in (z, W)]
    torch.testing.assert_close(
        torch.autograd.grad(functional(*leaves), leaves),
        grad(compute, (0, 1))(z, W),
    )


PROBS = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])
REDUCED_LOSSES = {
    "cross_entropy": lambda z, **kw: F.cross_entropy(z, Y[:2], **kw),
    "cross_entropy with z-loss": lambda z, **kw: F.cross_entropy(z, Y[:2], z_loss=0.1, **kw),
    "cross_entropy of a row": lambda z, **kw: F.cross_entropy(z[0], Y[0], z_loss=0.1, **kw),
    "linear_cross_entropy": lambda z, **kw: F.linear_cross_entropy(
        z, PROBS.to(z).mT @ PROBS.to(z), Y[:2], z_loss=0.1, softcap=2.0, **kw
    ),
    "linear_cross_entropy of a row": lambda z, **kw: F.linear_cross_entropy(
        z[0], PROBS.to(z), Y[0], z_loss=0.1, **kw
    ),
    "mse_loss": lambda z, **kw: F.mse_loss(z, PROBS.to(z), **kw),
    "mse_loss with weight": lambda z, **kw: F.mse_loss(z, 0 * z, weight=PROBS.to(z), **kw),
    "mse_loss of a number": lambda z, **kw: F.mse_loss(z[0, 0], PROBS.to(z)[0, 0], **kw),
    "squared_error": lambda z, **kw: F.squared_error(z, PROBS.to(z), **kw),
    "sigmoid_squared_error": lambda z, **kw: F.sigmoid_squared_error(z, PROBS.to(z), **kw),
    "categorical_cross_entropy": lambda z, **kw: F.categorical_cross_entropy(
        z.softmax(1), Y[:2], base=3, **kw
    ),
    "categorical_cross_entropy of a number": lambda z, **kw: F.categorical_cross_entropy(
        z[0, 0].sigmoid(), PROBS.to(z)[0, 0], dim=0, base=3, **kw
    ),
}


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("name", REDUCED_LOSSES)
def test_tangents_of_a_float32_loss_are_float32(name, reduction):
    """A tensor () times or divided by a Python float has a float64 tangent in PyTorch."""
    results = []
    for dtype in (torch.float32, torch.float64):
        z = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
        loss = functools.partial(REDUCED_LOSSES[name], reduction=reduction)
        u, dz = loss(z).cos(), z.cos()

        def pull_back(u, z, loss=loss):
            return vjp(loss, z)[1](u)[0]

        def push_forward(z, dz=dz, loss=loss):
            return jvp(loss, (z,), (dz,))[1]

        results.append(
            [
                push_forward(z),
                jvp(push_forward, (z,), (dz,))[1],
                jvp(functools.partial(pull_back, z=z), (u,), (u.sin(),))[1],
                jvp(pull_back, (u, z), (u.sin(), dz))[1],
            ]
        )
    assert {x.dtype for x in results[0]} == {torch.float32}
    for result, expected in zip(*results, strict=True):
        torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-5)


def list_formulas(base=Formula):
    for formula in base.__subclasses__():
        yield formula
        yield from list_formulas(formula)


def test_signature_of_every_forward_is_derived_once():
    """PyTorch's `apply` asks for it in each call."""
    forwards = [vars(f)["forward"].__func__ for f in list_formulas() if "forward" in vars(f)]
    assert len(forwards) > 15
    for forward in forwards:
        names = inspect.getfullargspec(inspect.unwrap(forward))
        parameters = [*names.args, *[names.varargs] * (names.varargs is not None)]
        assert [*vars(forward)["__signature__"].parameters] == parameters, forward


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_plain_cross_entropy_asks_once_whether_it_is_observed(monkeypatch, reduction):
    z = torch.randn(4, 3, requires_grad=True)
    questions, is_observed = [], _torch.is_observed
    monkeypatch.setattr(_torch, "is_observed", lambda: questions.append(0) or is_observed())
    loss = F.cross_entropy(z, Y, reduction=reduction)
    assert len(questions) == 1
    with_options = F.cross_entropy(z, Y, reduction=reduction, ignore_index=2)  # is in Y
    assert len(questions) > 2
    losses = F.cross_entropy(z, Y, reduction="none")
    expected = losses.mean() if reduction == "mean" else losses.sum()
    torch.testing.assert_close(loss, expected)
    rows = losses[Y != 2]
    torch.testing.assert_close(with_options, rows.mean() if reduction == "mean" else rows.sum())


@pytest.mark.parametrize("options", [{}, {"weight": torch.ones(3)}, {"temperature": 2.0}])
@pytest.mark.parametrize("bad_class", [3, -1])
def test_class_out_of_range_raises_the_same_with_and_without_options(options, bad_class):
    z, y = torch.randn(4, 3, requires_grad=True), Y.clone()
    y[1] = bad_class
    with pytest.raises(IndexError, match=f"Target {bad_class} is out of bounds.*ignore_index=-100"):
        F.cross_entropy(z, y, **options)
