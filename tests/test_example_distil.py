"""The example that distils a language model, on small models: both losses agree, and it helps."""

import sys

import matplotlib.image
import pytest
import torch
from scripts import EXAMPLES, has_ink, import_scripts, list_files, run_script

pytest.importorskip("tokenizers")

SMALL = [
    *("--vocabulary", "600", "--width", "16", "--layers", "1", "--heads", "2"),
    *("--context", "32", "--batch-size", "16", "--accelerator", "cpu", "--lr", "1e-2"),
    *("--teacher-width", "32", "--teacher-layers", "1", "--teacher-steps", "60"),
]


@pytest.fixture(scope="module")
def distil():
    with (
        import_scripts("text_model", "distil") as (text_model, module),
        pytest.MonkeyPatch.context() as patch,
    ):
        # A sixth of the text is enough, and takes a sixth of the time.
        texts = tuple(part[::6] for part in text_model.load_corpus())
        patch.setattr(text_model, "load_corpus", lambda size="small": texts)
        yield module


@pytest.fixture(scope="module")
def calls():
    return []


@pytest.fixture(scope="module")
def results(distil, calls, tmp_path_factory):
    """The results of the command; `calls` gets the shapes of the fused loss's arguments."""
    real = distil.linear_kl_div

    def record(*heads, **options):
        calls.append([tuple(x.shape) for x in heads])
        return real(*heads, **options)

    out = tmp_path_factory.mktemp("distil")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distil, "linear_kl_div", record)
        return distil.main([*SMALL, "--steps", "40", "--every", "20", "--out", str(out)])


def test_losses_of_distillation_agree(results, calls):
    # Measured: 2e-6. A wrong gradient is tested below.
    assert results.difference < 5e-5
    for run in (results.labels, results.fused, results.plain):
        assert len(run.losses) == 40
        assert run.validation_steps == [20, 40]
        assert run.validation_losses[1] < run.validation_losses[0]
    torch.testing.assert_close(
        results.fused.validation_losses, results.plain.validation_losses, atol=5e-5, rtol=0
    )
    assert results.teacher_loss < results.fused.validation_losses[1]
    assert calls == [[(512, 16), (600, 16), (512, 32), (600, 32)]] * 40


def test_wrong_gradient_changes_losses(distil, results, tmp_path, monkeypatch):
    real = distil.linear_kl_div

    def shift_gradient(*heads, alpha, **options):
        """The loss with the gradient of another alpha."""
        other = real(*heads, alpha=alpha + 0.01, **options)
        return real(*heads, alpha=alpha, **options).detach() + other - other.detach()

    monkeypatch.setattr(distil, "linear_kl_div", shift_gradient)
    wrong = distil.main([*SMALL, "--steps", "40", "--out", str(tmp_path)])
    assert wrong.plain.losses == pytest.approx(results.plain.losses, abs=1e-6)
    assert wrong.difference > 2e-4


@pytest.mark.parametrize(("alpha", "temperature"), [(0.0, 1.0), (0.3, 2.0), (1.0, 2.0)])
def test_losses_and_gradients_agree_in_float64(distil, alpha, temperature):
    torch.manual_seed(0)
    shapes = (9, 4), (50, 4), (9, 6), (50, 6)
    x, W, xt, Wt = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    y = torch.randint(50, (9,))
    results = []
    for name in ("fused", "plain"):
        leaves = [x.clone().requires_grad_(), W.clone().requires_grad_()]
        cost = distil.make_losses(alpha, temperature)[name](*leaves, xt, Wt, y)
        results.append([cost, *torch.autograd.grad(cost, leaves)])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-13)


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory of a CPU is measured on Linux")
def test_fused_loss_needs_less_memory(distil, tmp_path):
    arguments = [*SMALL, "--vocabulary", "4096", "--context", "64", "--batch-size", "32"]
    results = distil.main([*arguments, "--teacher-steps", "2", "--steps", "6",
                           "--out", str(tmp_path)])  # fmt: skip
    # The logits of each model take 32 MiB, and the student's gradient, too.
    assert results.plain.peak > 3 * 2**25
    assert results.fused.peak < results.plain.peak / 2


def test_thirds_of_picture_have_ink(results):
    image = matplotlib.image.imread(results.picture)[..., :3]
    width = image.shape[1] // 3
    assert all(has_ink(image[:, i * width : (i + 1) * width]) for i in range(3))


def test_command_prints_table_and_writes_picture(tmp_path):
    # Every process loads the text, so it is short.
    command = tmp_path / "command.py"
    command.write_text(
        f"import sys\nsys.path.insert(0, {str(EXAMPLES)!r})\nimport text_model\n"
        "texts = [f'{i} times {i} is {i * i}.' for i in range(300)]\n"
        "text_model.load_corpus = lambda size: (texts, texts)\n"
        "import distil\ndistil.main()\n",
        encoding="utf-8",
    )
    options = ["--vocabulary", "300", "--teacher-steps", "2", "--steps", "2"]
    done = run_script(command, *SMALL, *options, folder=tmp_path)
    assert "validation loss of the teacher" in done.stdout
    assert list_files(tmp_path / "distil_out") == ["distil.png"]


def test_command_line_defaults_and_errors(distil, capsys):
    large = distil.parse_arguments(["--size", "large", "--width", "96"])
    assert (large.teacher_width, large.width) == (distil.SIZES["large"]["teacher_width"], 96)
    for arguments, message in [
        (["--teacher-width", "97"], "--teacher-width must be a multiple of --heads"),
        (["--alpha", "1.5"], "--alpha must be in [0, 1]"),
        (["--temperature", "0"], "--temperature must be positive and finite"),
    ]:
        with pytest.raises(SystemExit) as done:
            distil.parse_arguments(arguments)
        assert done.value.code == 2
        assert message in capsys.readouterr().err
