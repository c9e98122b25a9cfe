"""Swapped models over several ranks against one process in float64."""

import pytest
from swapping_helpers import needs_deferral_in_compiled_models

FUSED = ["ddp", "root", "head alone, kept", "head in a group"]
FUSED += ["classes", "root x classes", "head alone x classes"]
SHARDED = ["root", "head alone, kept", "root x classes"]
STEPS = 2
FREED = "by FSDP2, which frees the head's weight after the head's forward"
DTENSOR = "by a weight that is a DTensor"


def train(workers, *arguments):
    """Returns rank 0's results, after asserting that the errors of all ranks are of rounding."""
    results = workers.run("train", *arguments)
    assert all(result["error"] < 1e-12 for result in results), results
    assert not results[0]["types left"]
    return results[0]


def train_fused(workers, *arguments, losses=1):
    """Asserts that two steps of as many losses, and an evaluation, take no logits."""
    result = train(workers, *arguments)
    assert result["fused"] == STEPS * losses + 1
    assert not result["computed"]


# Steps


@pytest.mark.parametrize("loss", ["outside", "inside"])
@pytest.mark.parametrize("wrapper", FUSED)
def test_training_without_logits_equals_one_process(workers, wrapper, loss):
    train_fused(workers, wrapper, loss)


@pytest.mark.parametrize("loss", ["policy", "two losses"])
@pytest.mark.parametrize("wrapper", SHARDED)
def test_several_losses_of_the_same_logits_equal_one_process(workers, wrapper, loss):
    train_fused(workers, wrapper, loss, losses=2)


@pytest.mark.parametrize("wrapper", FUSED)
def test_training_with_logits_equals_one_process(workers, wrapper):
    result = train(workers, wrapper, "read")
    assert result["computed"] == ["sin"]


@pytest.mark.parametrize("features", ["checkpoint True", "checkpoint False", "frozen body"])
@pytest.mark.parametrize("wrapper", SHARDED)
def test_checkpointed_and_frozen_layers_equal_one_process(workers, wrapper, features):
    train_fused(workers, wrapper, "outside", (features,))


@pytest.mark.parametrize("feature", ["freed", "kept", "losses first"])
@pytest.mark.parametrize("wrapper", SHARDED)
def test_accumulated_gradients_equal_one_process(workers, wrapper, feature):
    """FSDP2 gathers the weights for each micro-batch, or once.

    The backward of the policy's loss needs them, also after that of another micro-batch.
    """
    train_fused(workers, wrapper, "policy", ("accumulate", feature), losses=4)


@pytest.mark.parametrize("feature", ["losses first", "frozen body"])
@pytest.mark.parametrize("wrapper", ["root", "head alone, kept"])
def test_distillation_equals_one_process(workers, wrapper, feature):
    features = ("accumulate", feature) if feature == "losses first" else (feature,)
    train_fused(workers, wrapper, "divergence", features, losses=len(features))


@needs_deferral_in_compiled_models
def test_compiled_model_equals_one_process(workers):
    train_fused(workers, "root x classes", "outside", ("compiled",))


@pytest.mark.parametrize("wrapper", ["root", "tied classes"])
def test_tied_embeddings_equal_one_process(workers, wrapper):
    train_fused(workers, wrapper, "outside", ("tied",))


@pytest.mark.parametrize("wrapper", SHARDED)
def test_mixed_precision_is_as_exact_as_without_swap(workers, wrapper):
    """Parameters and logits in bfloat16; the truth is in float64."""
    allowed, result = (
        workers.run("train", wrapper, "outside", ("bfloat16",), when)[0]
        for when in ("never", "before")
    )
    assert result["fused"] == STEPS + 1
    assert not result["computed"]
    assert 1e-4 < result["error"] < 1.05 * allowed["error"]


OTHER_CASES = [  # arguments of `train`; losses without logits, and why logits were computed
    ("root", "outside", (), "after", 3, []),
    ("head alone, kept", "outside", (), "after", 3, []),
    ("classes", "outside", (), "after", 3, []),
    ("root x classes", "outside", (), "after", 3, []),
    # these wrappers read `grad_fn` of the model's outputs
    ("ddp, unused", "inside", ("unused",), "before", 2, ["grad_fn of logits"]),
    ("ddp, unused", "outside", ("unused",), "after", 0, ["grad_fn of logits"]),
    ("ddp, static", "outside", (), "before", 2, ["grad_fn of logits"]),
    # the weight is freed or a DTensor: the report says what to change
    ("head alone", "outside", (), "before", 0, [FREED]),
    ("head alone", "inside", (), "before", 0, [FREED]),
    ("classes by ColwiseParallel", "outside", (), "before", 0, [DTENSOR]),
    ("classes by ColwiseParallel", "inside", (), "after", 0, [DTENSOR]),
]
REMEDIES = {
    FREED: "fully_shard(head, reshard_after_forward=False)",
    DTENSOR: 'parallelize_module(model, mesh, {"lm_head": VocabularyParallel()})',
}


@pytest.mark.parametrize("case", OTHER_CASES, ids=lambda case: f"{case[0]}, {case[1]}, {case[3]}")
def test_other_wrappers_equal_one_process(workers, case):
    *arguments, fused, computed = case
    result = train(workers, *arguments)
    assert (result["fused"], result["computed"]) == (fused, computed)
    for reason in computed:
        assert REMEDIES.get(reason, "") in result["report"]


# The mean over all tokens, of deferred logits


MEAN_WRAPPERS = pytest.mark.parametrize("wrapper", ["ddp", "root", "root x classes"])


@MEAN_WRAPPERS
def test_mean_over_all_tokens_without_logits_equals_one_process(workers, wrapper):
    train_fused(workers, wrapper, "sum", ("accumulate", "all tokens"), losses=2)


@MEAN_WRAPPERS
def test_mean_of_means_without_logits_differs(workers, wrapper):
    """The control: without `count_tokens_per_rank`, the test above would fail."""
    result = workers.run("train", wrapper, "outside", ("accumulate", "all tokens"))[0]
    assert result["error"] > 0.01


# Split classes


@pytest.mark.parametrize("part", range(2))
def test_losses_of_deferred_logits_over_split_classes_equal_one_process(workers, part):
    for lines in workers.run("compare_deferred_losses", part):
        assert not lines, "\n".join(lines)


@pytest.mark.parametrize(("ranks", "classes"), [(3, 301), (4, 5)])
def test_uses_of_split_logits_equal_one_process(workers, ranks, classes):
    """Five classes over four ranks: the last one has none."""
    for lines in workers.run("compare_uses", ranks, classes):
        assert not lines, "\n".join(lines)


def test_deferred_logits_send_what_the_split_head_sends(workers):
    for steps in workers.run("record_collectives")[:3]:
        of_head, of_deferred_logits = steps
        assert of_deferred_logits == of_head
        assert {name for name, *_ in of_head} == {"MAX", "SUM", "wait"}


@pytest.mark.parametrize("is_autocast", [False, True])
def test_split_head_in_bfloat16_is_as_exact_as_in_one_process(workers, is_autocast):
    for lines in workers.run("compare_half_precision", is_autocast):
        assert not lines, "\n".join(lines)


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_split_linear_equals_one_process(workers, axis):
    for lines in workers.run("compare_split_linear", axis):
        assert not lines, "\n".join(lines)


# Errors


def test_logits_whose_weight_was_freed_or_changed_raise(workers):
    freed = "parameters' memory has since been freed, as FSDP does"
    changed = "its features, weight or bias, or a scale, row or tensor applied to the logits, were"
    expected = {
        "loss outside": freed,
        "read after backward": freed,
        "read after the next forward": changed,
        "the step itself": "no error",
        "detached, read after a step": freed,
        "split, read after a step": changed,
        "split, changed": changed,
    }
    for messages in workers.run("collect_logit_errors"):
        assert messages.keys() == expected.keys()
        for name, message in messages.items():
            assert expected[name] in message, (name, message)
        assert "reshard_after_forward=False" in messages["loss outside"]
