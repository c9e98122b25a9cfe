"""The head over sharded classes under transforms, compilers and checkpointing; its memory."""

import itertools
import sys

import pytest
from transform_tasks import TRANSFORMS
from worker_tasks import LAYOUTS

OPTIONS = (
    {"target": "ignored", "z_loss": 0.3},
    {"target": "probabilities", "bias": True},
    {"weight": "sharded", "label_smoothing": 0.2},
    {"row_weight": "sharded", "base": 2.0},
    {"logit_scale": "learnt", "softcap": 1.5},
    {"return_stats": True, "reduction": "sum"},
)
ON_LOGITS = {"function": "cross_entropy"}


def check(lines_of_ranks):
    """Asserts that no rank has a line, which says what differs."""
    for lines in lines_of_ranks:
        assert not lines, "\n".join(lines)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transform_equals_one_process(workers, transform):
    """In each layout, with the options in turns."""
    if transform == "jacobians":
        few_rows = [name for name, layout in LAYOUTS.items() if layout.row_count <= 7]
        cases = [(transform, layout, {"reduction": "none"}) for layout in few_rows]
    else:
        turns = itertools.cycle([{}, *OPTIONS])
        cases = [(transform, layout, next(turns)) for layout in LAYOUTS]
        on_logits = [layout for layout in LAYOUTS if "sequence" not in layout]
        cases += [
            (transform, layout, ON_LOGITS | {k: v for k, v in next(turns).items() if k != "bias"})
            for layout in on_logits
        ]
    check(workers.run("compare_transforms", cases))


def test_per_sample_gradients_of_a_parallelised_module_equal_one_process(workers):
    check(workers.run("compare_per_sample_gradients"))


def test_autocast_equals_one_process(workers):
    check(workers.run("compare_autocast"))


def test_transforms_that_dtensors_lack_raise_with_an_explanation(workers):
    expected = {
        "vmap over a split axis": "ValueError: input has placements (Shard(dim=0),), which split",
        "vmap of plain features": "TypeError: input and linear_weight must both be DTensors",
        "is_grads_batched": "TypeError: the gradient of a DTensor must be a DTensor, too",
        "plain upstream gradient": "TypeError: the gradient of a DTensor must be a DTensor, too",
        "hvp, of third order": "NotImplementedError: the head over split classes has derivatives",
        "parts of another size": "ValueError: linear_weight of shape (6, 4) and placements",
    }
    for messages in workers.run("collect_transform_errors"):
        assert "compile without fullgraph=True" in messages.pop("one graph")
        assert messages.keys() == expected.keys()
        for name, message in messages.items():
            assert message.startswith(expected[name]), (name, message)


# Compilers

COMPILED = (
    ("aot_eager", "sequence parallel", {"return_stats": True, "weight": "sharded"}),
    ("inductor", "two equal shards", ON_LOGITS | {"label_smoothing": 0.1, "target": "ignored"}),
)


@pytest.mark.parametrize("case", COMPILED, ids=lambda case: f"{case[0]}, {case[1]}")
def test_compiled_head_equals_one_process(workers, case):
    check(workers.run("compare_compiled", *case))


def test_graphs_end_at_each_head_over_dtensors(workers):
    for counts in workers.run("count_graphs")[:2]:
        assert len(counts) == 4
        assert min(counts) > 1


# Memory


@pytest.mark.skipif(sys.platform != "linux", reason="the CPU's peak is restarted on Linux only")
@pytest.mark.parametrize("order", [1, 2])
def test_no_rank_has_memory_of_rows_times_classes(workers, order):
    """The test first measures the logits in memory, to show that it would see them."""
    assert min(workers.run("measure_memory", order, False)) > 1
    assert max(workers.run("measure_memory", order, True)) < 0.5
