"""The examples do what they say: run small, they learn, agree with PyTorch and draw it."""

import os
import subprocess
import sys

import matplotlib.image
import pytest
import torch
from scripts import EXAMPLES, ROOT, scripts

DIGITS = EXAMPLES / "digits.py"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    with scripts("digits") as (digits,):
        out = tmp_path_factory.mktemp("digits")
        # Small batches make many steps of few digits.
        small = ["--epochs", "6", "--batch-size", "4", "--limit", "400", "--accelerator", "cpu"]
        yield digits.main([*small, "--out", str(out)])


@pytest.mark.parametrize("section", ["5.1", "5.2"])
def test_digits_are_learned(results, section):
    ours = results.problems[section].ours
    first, *_, last = ours.losses.mean(1)
    assert ours.losses.shape == (6, 75)
    assert last < first / 3
    # Guessing gets 10 %. A network of 64 hidden units gets over 90 % of these 100 test digits.
    assert ours.accuracy > 0.85


@pytest.mark.parametrize("section", ["5.1", "5.2"])
def test_digits_agree_with_pytorch(results, section):
    c = results.problems[section]
    # Losses of about 1, from sums of 64 products, differ by a few eps when the order of rounding
    # does; descent pulls both to the same minimum, so that the differences do not add up over the
    # 450 steps. Measured: 4 eps. A gradient that is wrong by 1e-4 of itself gives over 300.
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(c.ours.losses, c.pytorch.losses, rtol=0, atol=32 * eps)
    assert c.difference == (c.ours.losses - c.pytorch.losses).abs().max()
    # A digit on the border of two classes may fall to either side.
    assert (c.ours.predictions != c.pytorch.predictions).sum() <= 1


def test_digits_picture_shows_something(results):
    image = matplotlib.image.imread(results.picture)[..., :3]
    height, width, _ = image.shape
    quarters = [
        image[y : y + height // 2, x : x + width // 2]
        for y in (0, height // 2)
        for x in (0, width // 2)
    ]
    # Both graphs and the digits on either side: ink, on a white page.
    for quarter in quarters:
        ink = (quarter.min(-1) < 0.9).mean()
        assert 0.02 < ink < 0.5


def test_digits_as_a_command(tmp_path):
    arguments = ["--epochs", "1", "--limit", "100", "--accelerator", "cpu"]
    done = subprocess.run(
        [sys.executable, str(DIGITS), *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},  # also where the package is not installed
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    for row in ("5.1 sigmoid and squared error", "5.2 softmax and cross entropy"):
        (numbers,) = (line[5:] for line in rows if line[:5] == row.split())
        ours, pytorch, difference = numbers
        assert ours == pytorch
        assert float(difference) < 1e-5
    # Into a file the bars write a line for each of the four runs, not one for each state.
    assert len(done.stdout.splitlines()) < 30
    # Nothing is left behind but the picture.
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == [
        "digits_out",
        "digits_out/digits.png",
    ]
