"""The example of handwritten digits: it learns, agrees with PyTorch and draws a picture."""

import matplotlib.image
import pytest
import torch
from scripts import EXAMPLES, has_ink, import_scripts, list_files, run_script, split_quarters


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    with import_scripts("digits") as (digits,):
        out = tmp_path_factory.mktemp("digits")
        # Small batches give many steps from few digits.
        small = ["--epochs", "6", "--batch-size", "4", "--limit", "400", "--accelerator", "cpu"]
        yield digits.main([*small, "--out", str(out)])


@pytest.mark.parametrize("section", ["5.1", "5.2"])
def test_network_learns_digits(results, section):
    ours = results.problems[section].ours
    first, *_, last = ours.losses.mean(1)
    assert ours.losses.shape == (6, 75)
    assert last < first / 3
    # Chance is 10 %. A network of 64 hidden units reaches over 90 % on these 100 test digits.
    assert ours.accuracy > 0.85


@pytest.mark.parametrize("section", ["5.1", "5.2"])
def test_losses_and_predictions_equal_those_of_pytorch(results, section):
    c = results.problems[section]
    # Losses of about 1, from sums of 64 products, differ by a few eps of rounding. Both descend to
    # the same minimum, so the differences do not accumulate over the 450 steps. Measured: 4 eps.
    # A relative error of 1e-4 in a gradient gives over 300.
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(c.ours.losses, c.pytorch.losses, rtol=0, atol=32 * eps)
    assert c.difference == (c.ours.losses - c.pytorch.losses).abs().max()
    # Rounding may decide a digit between two classes.
    assert (c.ours.predictions != c.pytorch.predictions).sum() <= 1


def test_all_quarters_of_picture_have_ink(results):
    image = matplotlib.image.imread(results.picture)[..., :3]
    assert all(map(has_ink, split_quarters(image)))


def test_command_prints_table_and_leaves_only_picture(tmp_path):
    arguments = ["--epochs", "1", "--limit", "100", "--accelerator", "cpu"]
    done = run_script(EXAMPLES / "digits.py", *arguments, folder=tmp_path)
    rows = [line.split() for line in done.stdout.splitlines()]
    for row in ("5.1 sigmoid and squared error", "5.2 softmax and cross entropy"):
        (numbers,) = (line[5:] for line in rows if line[:5] == row.split())
        ours, pytorch, difference = numbers
        assert ours == pytorch
        assert float(difference) < 1e-5
    # The bars write a line for each of the four trainings to a pipe, not one for each update.
    assert len(done.stdout.splitlines()) < 30
    assert list_files(tmp_path) == ["digits_out", "digits_out/digits.png"]
