"""What users do around a formula: transforms over batches, compilers, autocast, edits in place."""

import math

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch._subclasses.fake_tensor import FakeTensorMode

from torch_nnmath import formulas, nn
from torch_nnmath import functional as F
from torch_nnmath.formulas.feedforward import ACTIVATIONS

Y = torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize("head", [False, True])
def test_the_mean_of_nothing_inside_compile(head):
    torch._dynamo.reset()
    W = torch.randn(3, 4, requires_grad=True)

    def loss(x, y):
        return F.linear_cross_entropy(x, W, y) if head else F.cross_entropy(x @ W.T, y)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for n in (2, 3, 0):
        x, y = torch.randn(n, 4, requires_grad=True), torch.zeros(n, dtype=torch.long)
        c = compiled(x, y)
        torch.testing.assert_close(c, loss(x, y), equal_nan=True)
        torch.testing.assert_close(
            torch.autograd.grad(c, W)[0], torch.autograd.grad(loss(x, y), W)[0], equal_nan=True
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
def test_a_loss_may_be_divided_in_place(loss):
    x = torch.randn(4, 3, requires_grad=True)
    (want,) = torch.autograd.grad(loss(x) / 4, x)
    divided = loss(x)
    divided /= 4
    torch.testing.assert_close(torch.autograd.grad(divided, x)[0], want)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 4, 3), (0, 2, 3)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "layer",
    [nn.Linear, lambda n, m, b: nn.Feedforward((n, m), output_activation="identity", bias=b)],
)
def test_what_a_layer_gives_may_be_changed_in_place(layer, shape, bias):
    """Its output is no view of something that a Function made."""
    layer, x = layer(3, 2, bias), torch.randn(shape)
    plain = torch.nn.Linear(3, 2, bias)
    plain.load_state_dict({k.removeprefix("layers.0."): v for k, v in layer.state_dict().items()})
    results = []
    for net in (layer, plain):
        y = net(x)
        y += torch.ones(2)
        y[..., 0] *= 3
        results.append([y, *torch.autograd.grad(y.square().sum(), [*net.parameters()])])
    for found, want in zip(*results, strict=True):
        torch.testing.assert_close(found, want)


def test_only_what_backward_reads_is_saved():
    x, W = torch.randn(2, 3, requires_grad=True), torch.randn(4, 3)
    z = F.linear(x, W)
    with torch.no_grad():
        x.add_(1)  # W is frozen: nothing reads x
    torch.testing.assert_close(torch.autograd.grad(z.sum(), x)[0], W.sum(0).expand(2, 3))
    features = torch.randn(2, 3)
    W.requires_grad_()
    z = F.linear(features, W)
    with torch.no_grad():
        W.add_(1)  # the features are data: nothing reads W
    torch.testing.assert_close(
        torch.autograd.grad(z.sum(), W)[0], features.sum(0).expand(4, 3), rtol=1e-6, atol=1e-6
    )
    y = nn.Feedforward((3, 4, 2), output_activation="identity")(features)
    y += 1
    y.sum().backward()


def test_what_backward_reads_may_not_be_edited():
    x, W = torch.randn(2, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    z = F.linear(x, W)
    with torch.no_grad():
        W.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_gradients_of_frozen_layers_are_not_computed():
    """A network of which only the last layer learns costs one product in backward."""
    net = nn.Feedforward((3, 4, 4, 2), dtype=torch.float64)
    for parameter in net.layers[:2].parameters():
        parameter.requires_grad_(False)
    x = torch.randn(5, 3, dtype=torch.float64)
    out = net(x)
    with torch.profiler.profile(acc_events=True) as profile:
        out.sum().backward()
    products = [e.count for e in profile.key_averages() if e.key in ("aten::mm", "aten::addmm")]
    assert sum(products) == 1
    hidden = net(x).detach()
    assert hidden.shape == (5, 2)
    assert net.layers[0].weight.grad is None
    delta = out.detach() * (1 - out.detach())
    below = torch.sigmoid(x @ net.layers[0].weight.T + net.layers[0].bias)
    below = torch.sigmoid(below @ net.layers[1].weight.T + net.layers[1].bias)
    torch.testing.assert_close(net.layers[2].weight.grad, delta.T @ below)


@pytest.mark.parametrize("z", [1e-12, 1e-8, 1e-5, 1e-3, 3.0])
def test_the_second_derivative_of_tanh_near_0(z):
    z = torch.tensor(z, dtype=torch.float32, requires_grad=True)
    (g,) = torch.autograd.grad(F.tanh(z), z, create_graph=True)
    (h,) = torch.autograd.grad(g, z)
    a = torch.tanh(z.detach().double())
    torch.testing.assert_close(h.double(), -2 * a * (1 - a * a), rtol=1e-5, atol=0)


def test_relu_has_a_second_derivative_of_0():
    x = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
    (g,) = torch.autograd.grad((F.relu(x) * x.detach()).sum(), x, create_graph=True)
    (h,) = torch.autograd.grad(g.sum(), x)
    assert torch.equal(h, torch.zeros(3))


def test_third_order_of_the_head_inside_autocast():
    x, W = torch.randn(4, 3, requires_grad=True), torch.randn(3, 3, requires_grad=True)

    def third(loss, autocast):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            (g,) = torch.autograd.grad(loss, W, create_graph=True)
            (h,) = torch.autograd.grad((g * g.detach().cos()).sum(), W, create_graph=True)
            return torch.autograd.grad((h * h.detach().cos()).sum(), (x, W))

    loss = F.linear_cross_entropy(x, W, Y)
    torch.testing.assert_close(third(loss, True), third(loss, False), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("head", [False, True])
def test_a_forbidden_class_of_weight_or_target_0_leaves_no_nan(head):
    z = torch.tensor([[0.0, 1.0, -math.inf]], dtype=torch.float64)

    def loss(t, w):
        if head:
            eye, bias = torch.zeros(3, 1).double(), z[0]
            x = torch.zeros(1, 1).double()
            return F.linear_cross_entropy(x, eye, t, linear_bias=bias, weight=w)
        return F.cross_entropy(z, t, w)

    l = z.log_softmax(-1)[0]
    t, w = torch.tensor([[0.5, 0.5, 0.0]]).double(), torch.ones(3).double().requires_grad_()
    (dw,) = torch.autograd.grad(loss(t, w), w)
    torch.testing.assert_close(dw, torch.tensor([-0.5 * l[0], -0.5 * l[1], 0.0]).double())
    t, w = t.requires_grad_(), torch.tensor([1.0, 1.0, 0.0]).double()
    (dt,) = torch.autograd.grad(loss(t, w), t)
    torch.testing.assert_close(dt, torch.tensor([[-l[0], -l[1], 0.0]]).double())


def test_an_ignored_row_is_clean_beside_an_infinite_weight():
    x = torch.randn(2, 3, requires_grad=True)
    W = torch.randn(4, 3)
    W[2] = math.inf
    loss = F.linear_cross_entropy(x, W, torch.tensor([0, -100]), reduction="sum")
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    assert torch.equal(dx[1], torch.zeros(3))
    none = F.linear_cross_entropy(x, W, torch.tensor([0, -100]), reduction="none")
    assert math.copysign(1, none[1].item()) == 1


def test_the_derivative_of_a_product_of_class_weights():
    t, w = (torch.rand(2, 3).double().requires_grad_(), torch.rand(1, 3).double().requires_grad_())
    assert torch.autograd.gradcheck(formulas.Weighted.apply, (t, w), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(formulas.Weighted.apply, (t, w))


@pytest.fixture
def cuda_autocast():
    """Autocast on for CUDA, whose tensors are fake where there is no device."""
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
def test_the_rule_of_autocast_for_cuda(cuda_autocast, dtype):
    """PyTorch's lists: products in float16, softmax and losses in float32, float64 left alone."""
    x, W, t = (cuda_autocast(*shape, dtype=dtype) for shape in ((4, 3), (5, 3), (4, 3)))
    wide = torch.promote_types(dtype, torch.float32)
    assert F.linear(x, W).dtype == (torch.float64 if dtype == torch.float64 else torch.float16)
    assert F.softmax(x, -1).dtype == wide
    assert F.cross_entropy(x, t).dtype == wide
    assert F.mse_loss(x, t).dtype == wide
    for elementwise in (F.sigmoid, F.tanh, F.relu):
        assert elementwise(x).dtype == dtype


def test_a_network_whose_softmax_autocast_takes_to_float32(monkeypatch):
    """As CUDA's autocast does; its products are half."""
    plain = ACTIVATIONS["softmax"]
    wide = plain._replace(f=lambda z: plain.f(z.float()))
    monkeypatch.setitem(ACTIVATIONS, "softmax", wide)
    torch.manual_seed(0)
    shapes = (4, 3), (5, 3), (2, 5), (5,), (2,)
    exact = [torch.randn(shape).bfloat16().double() for shape in shapes]
    t = torch.randn(4, 2, dtype=torch.float64)

    def network(x, *parameters):
        return F.feedforward(x, parameters[:2], parameters[2:], output_activation="softmax")

    def results(dtype):
        leaves = [v.to(dtype).requires_grad_() for v in exact]
        a = network(*leaves)
        gradients = torch.autograd.grad((a * t.to(a.dtype)).sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.double().sin().sum() for g in gradients), leaves)
        with fwAD.dual_level():
            duals = [fwAD.make_dual(v.detach(), torch.ones_like(v)) for v in leaves]
            tangent = fwAD.unpack_dual(network(*duals)).tangent
        assert tangent.dtype == a.dtype
        return a.detach(), tangent, *gradients, *second

    half = results(torch.bfloat16)
    assert half[0].dtype == torch.float32
    monkeypatch.setitem(ACTIVATIONS, "softmax", plain)
    for got, want in zip(half, results(torch.float64), strict=True):
        scale = want.detach().abs().max().item()
        torch.testing.assert_close(got.double(), want, rtol=0, atol=0.05 * scale)
