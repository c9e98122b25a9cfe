"""The mean over all tokens that are not ignored, over ranks and accumulated micro-batches."""

import pytest
import torch

from torch_nnmath.parallel import count_tokens_per_rank

WRAPPERS = pytest.mark.parametrize(
    "wrapper", ["ddp", "fsdp2", "fsdp2, head alone", "fsdp2, head with classes split"]
)
MICRO_BATCHES = pytest.mark.parametrize("micro_batches", [1, 3])


@WRAPPERS
@MICRO_BATCHES
def test_mean_of_means_is_not_the_mean_over_all_tokens(workers, wrapper, micro_batches):
    """The fault that `count_tokens_per_rank` corrects."""
    for loss_error, gradient_error in workers.run(
        "compare_mean", wrapper, micro_batches, "of means"
    ):
        assert loss_error > 1e-4
        assert gradient_error > 0.05


@WRAPPERS
@MICRO_BATCHES
@pytest.mark.parametrize("mean", ["sum, divided", "mean"])
def test_counted_mean_equals_one_process(workers, wrapper, micro_batches, mean):
    for loss_error, gradient_error in workers.run("compare_mean", wrapper, micro_batches, mean):
        assert loss_error < 1e-12
        assert gradient_error < 1e-12


def test_count_is_over_the_group(workers):
    of_all, of_group, weighted = zip(*workers.run("count_weighted_tokens"), strict=True)
    assert of_all == (2.5,) * 4  # (1 + 2 + 3 + 4) / 4
    assert of_group == (1.5, 1.5, 3.5, 3.5)
    # the second micro-batch has class 0 as often as the first has tokens, and IGNORE elsewhere
    weights = [0.5, 1.5, 3.5, 7.5], [0.5, 1.0, 1.5, 2.0]
    first, second = ([(w[0] + w[1]) / 2] * 2 + [(w[2] + w[3]) / 2] * 2 for w in weights)
    assert weighted == tuple(a + b for a, b in zip(first, second, strict=True))


def test_count_in_one_process_is_the_divisor_of_the_mean():
    """With class weights, of which the ignored class's is not counted."""
    torch.manual_seed(0)
    z, weight = torch.randn(12, 5, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    y = torch.arange(12) % 5
    loss = torch.nn.functional.cross_entropy
    for w in (None, weight):
        total = loss(z, y, w, ignore_index=3, reduction="sum")
        divisor = count_tokens_per_rank(y.split(5), ignore_index=3, weight=w)
        torch.testing.assert_close(total / divisor, loss(z, y, w, ignore_index=3))


def test_count_of_no_token_is_zero():
    assert count_tokens_per_rank(torch.full((3,), -100)).item() == 0


def test_invalid_targets_raise():
    with pytest.raises(ValueError, match="at least one micro-batch"):
        count_tokens_per_rank([])
    with pytest.raises(TypeError, match=r"integer type, got torch\.float32"):
        count_tokens_per_rank(torch.ones(3))
