"""The examples of Hessian spectra and per-sample gradients, on small models."""

import sys
from importlib.util import find_spec

import matplotlib.image
import pytest
import torch
import torch.nn.functional as F
from scripts import has_ink, import_scripts, split_quarters

pytest.importorskip("tokenizers")

MODULES = "text_model", "curvature", "per_sample_gradients"


@pytest.fixture(scope="module")
def modules():
    """The examples on little text."""
    with import_scripts(*MODULES) as modules:
        modules = dict(zip(MODULES, modules, strict=True))
        texts = [text for _, text in sorted(modules["text_model"].topics.items())]
        modules["text_model"].load_corpus = lambda size: (texts[:60], texts[60:70])
        yield modules


@pytest.fixture(scope="module")
def text_model(modules):
    return modules["text_model"]


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
def test_eigenvalues_from_products_equal_those_of_matrix(spectra, name):
    # The matrix is PyTorch's Hessian of the plain loss. Both in float64; measured: 3e-15.
    dense, tiny = spectra.dense[name], spectra.tiny[name]
    torch.testing.assert_close(tiny.largest, dense.largest, rtol=1e-11, atol=0)
    if name == "whole":  # the head's is a multiple eigenvalue 0, of which there is only a bound
        torch.testing.assert_close(tiny.smallest, dense.smallest, rtol=1e-11, atol=0)
    assert tiny.smallest > dense.smallest - 1e-12


def test_smallest_eigenvalue_is_negative_only_for_whole(spectra):
    assert abs(spectra.dense["head"].smallest) < 1e-14
    assert spectra.dense["whole"].smallest < -0.01
    assert spectra.larger["whole"].smallest < -0.01


@pytest.mark.parametrize("name", ["head", "whole"])
@pytest.mark.parametrize("model", ["tiny", "larger"])
def test_density_integrates_to_one(curvature, spectra, model, name):
    spectrum = getattr(spectra, model)[name]
    assert spectrum.weights.min() >= 0
    width = curvature.select_width(spectrum)
    grid = curvature.make_grid(spectrum, width)
    density = spectrum.compute_density(grid, width)
    assert torch.trapezoid(density, grid).item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", ["head", "whole"])
def test_density_is_close_to_that_of_matrix(curvature, spectra, name):
    dense, tiny = spectra.dense[name], spectra.tiny[name]
    # From five random vectors. Measured: 0.01.
    assert curvature.compute_distance(tiny, dense) < 0.04
    squares = [s.weights @ s.nodes**2 for s in (tiny, dense)]
    torch.testing.assert_close(*squares, rtol=0.3, atol=0)


def test_lanczos_of_diagonal_matrix(curvature):
    λ = torch.linspace(-1, 2, 40, dtype=torch.float64)
    v = torch.linspace(1, 2, 40, dtype=torch.float64)
    nodes, weights = curvature.lanczos(lambda x: λ * x, v, 40)
    torch.testing.assert_close(nodes, λ, rtol=0, atol=1e-12)
    torch.testing.assert_close(weights, v**2 / v.square().sum(), rtol=0, atol=1e-12)
    # It ends when the Krylov space is exhausted: v lies in three eigenspaces.
    λ[:] = torch.tensor([1.0, 2, 3, 3]).repeat(10)
    nodes, weights = curvature.lanczos(lambda x: λ * x, v, 40)
    assert len(nodes) == 3
    # With m steps Gauss quadrature is exact for polynomials up to degree 2 m - 1.
    λ = torch.linspace(-1, 2, 40, dtype=torch.float64)
    nodes, weights = curvature.lanczos(lambda x: λ * x, v, 3)
    for power in range(6):
        moment = (v**2 / v.square().sum()) @ λ**power
        torch.testing.assert_close(weights @ nodes**power, moment)


def test_product_of_larger_model_equals_plain_product(curvature, text_model):
    _, setting = text_model.SIZES["quick"]
    model = text_model.build_transformer(setting, 0)
    ids = torch.randint(setting.vocabulary, (4, 33), generator=torch.Generator().manual_seed(0))
    for task in curvature.build_tasks(model, ids).values():
        v = torch.randn(task.size)
        fused, plain = (
            curvature.Hessian(loss, task.params).multiply(v) for loss in (task.fused, task.plain)
        )
        assert (fused - plain).norm() < 1e-5 * plain.norm()


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory of a CPU is measured on Linux")
def test_fused_product_needs_less_memory(spectra):
    cases = {(name, rows) for name, rows, _ in spectra.peaks}
    assert cases == {(name, rows) for name in ("head", "whole") for rows in (256, 1024)}
    for name, rows in cases:
        fused, plain = (spectra.peaks[name, rows, is_fused] for is_fused in (True, False))
        assert 0 < fused < 0.8 * plain
    # The plain head holds several tensors as large as the logits (4 MiB). Measured: 36 and 14 MiB.
    assert spectra.peaks["head", 1024, False] > 16 * 2**20


@pytest.mark.parametrize(
    ("name", "package"), [("head", "curvlinops"), ("whole", "hessian_eigenthings")]
)
def test_eigenvalues_from_other_packages_agree(spectra, name, package):
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
def test_mean_of_gradients_equals_batch_gradient(gradients, name):
    norms = getattr(gradients, name).norms
    assert sum(g.square().sum() for g in norms.batch.values()) > 0
    # Measured: 2 to 4e-7, float32.
    assert norms.difference < 5e-6
    for key, g in norms.batch.items():
        torch.testing.assert_close(norms.mean[key], g, rtol=1e-4, atol=1e-6)


def test_norms_of_digits_equal_those_of_single_backward_passes(per_sample):
    torch.manual_seed(0)
    net = per_sample.Digits(16).double()
    x, y = torch.rand(11, 64).double(), torch.randint(10, (11,))
    norms = per_sample.compute_norms(net, (x, y), chunk=4, title="test")
    W, b = net.head.linear.weight, net.head.linear.bias
    for i in range(11):
        c = F.cross_entropy(F.linear(net.body(x[i]), W, b), y[i])
        single = torch.autograd.grad(c, list(net.parameters()))
        norm = torch.cat([g.flatten() for g in single]).norm()
        torch.testing.assert_close(norms.norms[i], norm, rtol=1e-12, atol=0)
        torch.testing.assert_close(norms.losses[i], c.detach(), rtol=1e-12, atol=0)
    assert norms.hardest == norms.norms.argsort(descending=True).tolist()
    assert norms.difference < 1e-14


def test_norms_of_text_equal_those_of_single_backward_passes(per_sample, text_model):
    setting = text_model.SIZES["quick"][0]
    model = text_model.build_transformer(setting, 0).double()
    ids = torch.randint(setting.vocabulary, (5, 17), generator=torch.Generator().manual_seed(0))
    norms = per_sample.compute_norms(text_model.NextTokenLoss(model), (ids,), chunk=2, title="test")
    for i, sequence in enumerate(ids):
        c = F.cross_entropy(model(sequence[None, :-1])[0], sequence[1:])
        single = torch.autograd.grad(c, list(model.parameters()))
        norm = torch.cat([g.flatten() for g in single]).norm()
        torch.testing.assert_close(norms.norms[i], norm, rtol=1e-10, atol=0)


def test_most_of_hardest_digits_are_wrong(gradients):
    digits = gradients.digits
    is_wrong = digits.predictions != digits.y
    assert len(is_wrong) == 899
    assert is_wrong.double().mean() < 0.15
    assert is_wrong[digits.norms.hardest[:18]].double().mean() > 0.7


@pytest.mark.parametrize("results", ["spectra", "gradients"])
def test_all_quarters_of_picture_have_ink(request, results):
    image = matplotlib.image.imread(request.getfixturevalue(results).picture)[..., :3]
    assert all(map(has_ink, split_quarters(image)))
