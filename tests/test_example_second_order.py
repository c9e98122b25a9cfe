"""The examples of second order and of per-sample gradients, run small, beside what is known."""

import sys
from importlib.util import find_spec

import matplotlib.image
import pytest
import torch
import torch.nn.functional as F
from scripts import scripts

pytest.importorskip("tokenizers")

MODULES = "language_model", "curvature", "per_sample_gradients"


@pytest.fixture(scope="module")
def modules():
    """On little text."""
    with scripts(*MODULES) as modules:
        found = dict(zip(MODULES, modules, strict=True))
        texts = [text for _, text in sorted(found["language_model"].topics.items())]
        found["language_model"].corpus = lambda size: (texts[:60], texts[60:70])
        yield found


# The Hessian


@pytest.fixture(scope="module")
def curvature(modules):
    return modules["curvature"]


@pytest.fixture(scope="module")
def spectra(curvature, tmp_path_factory):
    out = tmp_path_factory.mktemp("curvature")
    arguments = ["--size", "quick", "--lanczos", "30", "--accelerator", "cpu", "--out", str(out)]
    return curvature.main(arguments)


@pytest.mark.parametrize("name", ["head", "whole"])
def test_eigenvalues_are_those_of_the_matrix(spectra, name):
    # The matrix is PyTorch's, of the plain expression. Both in float64; measured: 3e-15.
    dense, tiny = spectra.dense[name], spectra.tiny[name]
    torch.testing.assert_close(tiny.largest, dense.largest, rtol=1e-11, atol=0)
    if name == "whole":  # the head's is 0 many times over, and only bounded from above
        torch.testing.assert_close(tiny.smallest, dense.smallest, rtol=1e-11, atol=0)
    assert tiny.smallest > dense.smallest - 1e-12


def test_the_head_is_convex_and_the_whole_is_not(spectra):
    assert abs(spectra.dense["head"].smallest) < 1e-14
    assert spectra.dense["whole"].smallest < -0.01
    assert spectra.larger["whole"].smallest < -0.01


@pytest.mark.parametrize("name", ["head", "whole"])
@pytest.mark.parametrize("which", ["tiny", "larger"])
def test_density_is_one(curvature, spectra, which, name):
    spectrum = getattr(spectra, which)[name]
    assert spectrum.weights.min() >= 0
    width = curvature.width_of(spectrum)
    grid = curvature.grid_of(spectrum, width)
    density = spectrum.density(grid, width)
    assert torch.trapezoid(density, grid).item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", ["head", "whole"])
def test_density_is_that_of_the_eigenvalues(curvature, spectra, name):
    dense, tiny = spectra.dense[name], spectra.tiny[name]
    # Of five random vectors. Measured: 0.01.
    assert curvature.distance(tiny, dense) < 0.04
    squares = [s.weights @ s.nodes**2 for s in (tiny, dense)]
    torch.testing.assert_close(*squares, rtol=0.3, atol=0)


def test_lanczos_of_a_diagonal(curvature):
    λ = torch.linspace(-1, 2, 40, dtype=torch.float64)
    v = torch.linspace(1, 2, 40, dtype=torch.float64)
    nodes, weights = curvature.lanczos(lambda x: λ * x, v, 40)
    torch.testing.assert_close(nodes, λ, rtol=0, atol=1e-12)
    torch.testing.assert_close(weights, v**2 / v.square().sum(), rtol=0, atol=1e-12)
    # An exhausted space ends it: v has three eigenvectors.
    λ[:] = torch.tensor([1.0, 2, 3, 3]).repeat(10)
    nodes, weights = curvature.lanczos(lambda x: λ * x, v, 40)
    assert len(nodes) == 3
    # fewer steps than eigenvalues: Gauss quadrature, right for polynomials of degree 2 m - 1
    λ = torch.linspace(-1, 2, 40, dtype=torch.float64)
    nodes, weights = curvature.lanczos(lambda x: λ * x, v, 3)
    for power in range(6):
        moment = (v**2 / v.square().sum()) @ λ**power
        torch.testing.assert_close(weights @ nodes**power, moment)


def test_larger_model_agrees_with_plain_products(curvature):
    """In float32, where no matrix is: along one direction."""
    _, setting = curvature.SIZES["quick"]
    model = curvature.made(setting, 0)
    ids = torch.randint(setting.vocabulary, (4, 33), generator=torch.Generator().manual_seed(0))
    for task in curvature.tasks(model, ids).values():
        v = torch.randn(task.size)
        ours = curvature.Hessian(task.ours, task.params).of(v)
        theirs = curvature.Hessian(task.plain, task.params).of(v)
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are of Linux")
def test_memory_is_less(spectra):
    cases = {(name, rows) for name, rows, _ in spectra.peaks}
    assert cases == {(name, rows) for name in ("head", "whole") for rows in (256, 1024)}
    for name, rows in cases:
        ours, plain = (spectra.peaks[name, rows, fused] for fused in (True, False))
        assert 0 < ours < 0.8 * plain
    # The plain head holds logits, of 4 MiB here, several times; measured: 36 MiB, ours 14.
    assert spectra.peaks["head", 1024, False] > 16 * 2**20


@pytest.mark.parametrize(
    ("name", "package"), [("head", "curvlinops"), ("whole", "hessian_eigenthings")]
)
def test_packages_agree(spectra, name, package):
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    torch.testing.assert_close(
        spectra.packages[name, package], spectra.dense[name].largest, rtol=1e-9, atol=0
    )


# Gradients of single examples


@pytest.fixture(scope="module")
def per_sample(modules):
    return modules["per_sample_gradients"]


@pytest.fixture(scope="module")
def gradients(per_sample, tmp_path_factory):
    out = tmp_path_factory.mktemp("gradients")
    small = ["--size", "quick", "--epochs", "10", "--steps", "20", "--sequences", "20"]
    return per_sample.main([*small, "--accelerator", "cpu", "--out", str(out)])


@pytest.mark.parametrize("name", ["digits", "text"])
def test_mean_of_gradients_is_the_batch_gradient(gradients, name):
    its = getattr(gradients, name).its
    assert sum(g.square().sum() for g in its.batch.values()) > 0
    # Measured: 2 to 4e-7, float32.
    assert its.difference < 5e-6
    for key, g in its.batch.items():
        torch.testing.assert_close(its.mean[key], g, rtol=1e-4, atol=1e-6)


def test_norms_are_those_of_single_gradients(per_sample):
    torch.manual_seed(0)
    net = per_sample.Digits(16).double()
    x, y = torch.rand(11, 64).double(), torch.randint(10, (11,))
    its = per_sample.per_sample(net, (x, y), chunk=4, title="test")
    W, b = net.head.linear.weight, net.head.linear.bias
    for i in range(11):
        c = F.cross_entropy(F.linear(net.body(x[i]), W, b), y[i])
        single = torch.autograd.grad(c, list(net.parameters()))
        norm = torch.cat([g.flatten() for g in single]).norm()
        torch.testing.assert_close(its.norms[i], norm, rtol=1e-12, atol=0)
        torch.testing.assert_close(its.losses[i], c.detach(), rtol=1e-12, atol=0)
    assert its.hardest == its.norms.argsort(descending=True).tolist()
    assert its.difference < 1e-14


def test_norms_of_text_are_those_of_single_gradients(per_sample, curvature):
    setting = curvature.SIZES["quick"][0]
    model = curvature.made(setting, 0).double()
    ids = torch.randint(setting.vocabulary, (5, 17), generator=torch.Generator().manual_seed(0))
    its = per_sample.per_sample(curvature.LossOf(model), (ids,), chunk=2, title="test")
    for i, sequence in enumerate(ids):
        c = F.cross_entropy(model(sequence[None, :-1])[0], sequence[1:])
        single = torch.autograd.grad(c, list(model.parameters()))
        norm = torch.cat([g.flatten() for g in single]).norm()
        torch.testing.assert_close(its.norms[i], norm, rtol=1e-10, atol=0)


def test_hardest_digits_are_misread(gradients):
    d = gradients.digits
    wrong = d.read != d.y
    assert len(wrong) == 899
    assert wrong.double().mean() < 0.15
    assert wrong[d.its.hardest[:18]].double().mean() > 0.7


@pytest.mark.parametrize("which", ["spectra", "gradients"])
def test_picture_shows_something(request, which):
    image = matplotlib.image.imread(request.getfixturevalue(which).picture)[..., :3]
    height, width, _ = image.shape
    for y in (0, height // 2):
        for x in (0, width // 2):
            quarter = image[y : y + height // 2, x : x + width // 2]
            assert 0.02 < (quarter.min(-1) < 0.9).mean() < 0.5  # ink, on a white page
