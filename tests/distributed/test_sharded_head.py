"""The head over sharded classes against one process in float64: values, first and second order."""

import itertools
import math

import pytest
from worker_tasks import LAYOUTS, D

# the options that differ from the default
OPTIONS = (
    {"target": "ignored"},
    {"target": "probabilities"},
    {"target": "replicated probabilities"},
    {"weight": "replicated"},
    {"weight": "sharded"},
    {"row_weight": "replicated"},
    {"row_weight": "sharded"},
    {"divisor": 7.5},
    {"divisor": "replicated"},
    {"label_smoothing": 0.2},
    {"bias": True},
    {"logit_scale": -0.7},
    {"logit_scale": "learnt"},
    {"softcap": 1.5},
    {"z_loss": 0.3},
    {"return_stats": True},
    {"base": 2.0},
    {"reduction": "sum"},
    {"reduction": "none"},
)
PAIRS = [
    a | b
    for a, b in itertools.combinations(OPTIONS, 2)
    if not a.keys() & b.keys()
    and (a | b).keys() & {"divisor", "reduction"} != {"divisor", "reduction"}
]


def check(workers, cases):
    for lines in workers.run("compare_head", cases):
        assert not lines, "\n".join(lines)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_option_in_each_layout_equals_one_process(workers, layout):
    check(workers, [(layout, options) for options in ({}, *OPTIONS)])


@pytest.mark.parametrize("part", range(4))
def test_each_pair_of_options_equals_one_process(workers, part):
    """The layouts take turns."""
    layouts = itertools.cycle(LAYOUTS)
    check(workers, [*zip(layouts, PAIRS, strict=False)][part::4])


@pytest.mark.parametrize("function", ["log_probs", "log_sum_exp"])
def test_other_functions_equal_one_process(workers, function):
    options = [{}, {"bias": True, "softcap": 1.5}, {"logit_scale": "learnt"}]
    if function == "log_probs":
        options += [{"target": "ignored", "base": 2.0}, {"return_entropy": True, "softcap": 2.0}]
        options += [{"row_weight": "sharded", "return_entropy": True}]
    check(workers, [(layout, {"function": function} | o) for layout in LAYOUTS for o in options])


def test_several_outputs_equal_one_process(workers):
    turns = itertools.cycle([{}, *OPTIONS])
    cases = [(layout, {"positions": (2,)} | next(turns)) for layout in [*LAYOUTS] * 2]
    check(workers, cases)


@pytest.mark.parametrize("positions", [(), (2,)])
def test_cross_entropy_on_split_logits_equals_one_process(workers, positions):
    """Each option in each layout, and pairs in turns; logits have no axis that both dims split."""
    layouts = [name for name in LAYOUTS if "sequence" not in name]
    options = [{}, *OPTIONS] if not positions else []
    pairs = zip(itertools.cycle(layouts), PAIRS[:: 1 + 3 * bool(positions)], strict=False)
    cases = [(layout, o) for layout in layouts for o in options] + [*pairs]
    common = {"function": "cross_entropy", "positions": positions}
    check(workers, [(layout, common | o) for layout, o in cases if "bias" not in o])


@pytest.mark.parametrize("target", ["first rows ignored", "all ignored"])
def test_ranks_without_rows_equal_one_process(workers, target):
    options = [
        {"reduction": reduction, "z_loss": 0.3, "return_stats": True, "label_smoothing": 0.1}
        for reduction in ("mean", "sum", "none")
    ]
    check(workers, [(layout, {"target": target} | o) for layout in LAYOUTS for o in options])


def test_bfloat16_is_as_exact_as_in_one_process(workers):
    options = [
        {},
        {"bias": True, "softcap": 2.0, "z_loss": 0.1},
        {"target": "probabilities", "reduction": "none"},
        {"label_smoothing": 0.1, "weight": "replicated", "logit_scale": 0.5},
    ]
    cases = [(layout, o) for layout in LAYOUTS for o in options]
    on_logits = {"function": "cross_entropy", "z_loss": 0.1, "label_smoothing": 0.1}
    cases += [(layout, on_logits) for layout in LAYOUTS if "sequence" not in layout]
    for lines in workers.run("compare_bfloat16", cases):
        assert not lines, "\n".join(lines)


def test_formula_has_the_tangents_of_one_process(workers):
    layouts = "two equal shards", "three uneven shards", "empty shard", "one class"
    options = {}, {"softcap": 1.5}, {"ignored": True}
    for lines in workers.run(
        "compare_tangents", [(layout, o) for layout in layouts for o in options]
    ):
        assert not lines, "\n".join(lines)


@pytest.mark.parametrize("use_local_output", [True, False])
@pytest.mark.parametrize("layout", ["empty shard", "three uneven shards", "sequence parallel"])
def test_parallelised_module_trains_as_in_one_process(workers, layout, use_local_output):
    for lines in workers.run("compare_module", layout, use_local_output):
        assert not lines, "\n".join(lines)


def test_ranks_with_fewer_classes_have_the_blocks_of_the_others(workers):
    for lines in workers.run("compare_large_blocks"):
        assert not lines, "\n".join(lines)


def test_results_of_reductions_are_used_only_after_they_ended(workers):
    layouts = "two equal shards", "empty shard", "data x classes, sequence parallel"
    cases = [(layout, o) for layout in layouts for o in ({}, *OPTIONS)]
    cases += [("two equal shards", {"function": "log_probs", "return_entropy": True})]
    for lines in workers.run("compare_with_late_reductions", cases):
        assert not lines, "\n".join(lines)


# Communication


def get_blocks(rows):
    """The number of rows of each block of at most 32."""
    count = math.ceil(rows / 32)
    size = math.ceil(rows / count / 32) * 32
    return [min(size, rows - i) for i in range(0, rows, size)]


def expect_pipeline(rows, sum_columns):
    """Each block's sums are reduced during the next block's logits, its maximum before."""
    blocks = get_blocks(rows)
    events = [("MAX", (blocks[0], 1), "float32")]
    for i, size in enumerate(blocks):
        events += [("wait",), ("SUM", (size, sum_columns), "float32")]
        events += [("MAX", (n, 1), "float32") for n in blocks[i + 1 : i + 2]]
        events += [("wait",)]
    return events


@pytest.mark.parametrize(
    ("options", "sum_columns"),
    [
        ({}, 2),  # Σ e^v and the logit of the class
        ({"z_loss": 0.1, "bias": True, "softcap": 2.0, "base": 2.0}, 2),
        ({"return_stats": True}, 3),  # the entropy's sum
        ({"label_smoothing": 0.1}, 3),  # t·v
        ({"label_smoothing": 0.1, "return_stats": True}, 4),
        ({"target": "probabilities"}, 2),
    ],
)
def test_a_step_sends_one_maximum_and_one_sum_for_each_block(workers, options, sum_columns):
    rows = LAYOUTS["two equal shards"].row_count
    for step in workers.run("record_step", "two equal shards", options, 1)[:2]:
        forward, backward = step
        expected = expect_pipeline(rows, sum_columns)
        has_dense_part = options.keys() & {"label_smoothing"} or "target" in options
        if has_dense_part:  # Σ t, once a call
            total = (rows, 1) if "target" in options else (1, 1)
            expected = [("SUM", total, "float32"), ("wait",), *expected]
        if options.get("return_stats"):  # the predicted class, once a call
            expected += [("MIN", (rows, 1), "int64"), ("wait",)]
        assert forward == expected
        assert backward == [("SUM", (rows, D), "float32"), ("wait",)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_sent_does_not_depend_on_the_number_of_classes(workers, layout):
    """So no logits, gradients of logits or weights travel; only dW over ranks with other rows."""
    options = {"label_smoothing": 0.1, "return_stats": True, "z_loss": 0.1}
    few, many = (workers.run("record_step", layout, options, 2, classes) for classes in (4, 400))
    has_row_dims = "data" in layout
    for few_of_rank, many_of_rank in zip(few, many, strict=True):
        for events, more_events in zip(few_of_rank, many_of_rank, strict=True):
            assert len(events) == len(more_events)
            for event, other in zip(events, more_events, strict=True):
                is_dW = len(event) > 1 and event[1][-1:] == (D,) and event != other
                assert event == other or (has_row_dims and is_dW and other[1][-1] == D), other
    assert few[0][0]


def test_dtensor_itself_sends_nothing(workers):
    """The messages that other tests count are all."""
    options = {"label_smoothing": 0.1, "z_loss": 0.1, "weight": "sharded", "bias": True}
    cases = [(layout, o) for layout in LAYOUTS for o in ({}, options)]
    for lines in workers.run("record_dtensor_messages", cases):
        assert not lines, "\n".join(lines)


def test_second_order_sends_one_more_sum_for_each_block(workers):
    rows = LAYOUTS["two equal shards"].row_count
    second = workers.run("record_step", "two equal shards", {}, 2)[0][2]
    blocks = get_blocks(rows)
    messages = [event for event in second if event != ("wait",)]
    expected = []
    for i, size in enumerate(blocks):
        expected += [("MAX", (size, 1))] if i == 0 else []
        expected += [("SUM", (size, 2))]
        expected += [("MAX", (n, 1)) for n in blocks[i + 1 : i + 2]]
        expected += [("SUM", (size, 2))]  # a·r and r_y
    expected.append(("SUM", (rows, D)))
    assert [(name, shape) for name, shape, _ in messages] == expected


def test_sequence_parallel_gathers_features_once_and_scatters_their_gradient(workers):
    rows = LAYOUTS["sequence parallel"].row_count
    forward, backward = workers.run("record_step", "sequence parallel", {}, 1)[0]
    gathered = [event for event in forward if "gather" in event[0]]
    assert gathered == [("all_gather", (rows // 2, D), "float32")]
    assert backward == [("reduce_scatter", (rows, D), "float32")]


# Failures


@pytest.mark.parametrize("index", [7, -1])
def test_class_index_out_of_range_raises_on_every_rank(workers, index):
    for layout in ("data x classes", "classes x data"):
        for message in workers.run("raise_index_error", layout, index):
            assert f"Target {index} is out of bounds" in message
            assert "[0, 7)" in message


@pytest.mark.parametrize("place", ["before the call", "second block", "backward"])
def test_every_rank_raises_if_one_fails(workers, place):
    results = workers.run("fail_on_one_rank", place)
    messages, seconds = zip(*results, strict=True)
    assert messages[1] == "ValueError: rank 1 failed"
    for rank in (0, 2, 3):
        assert "RuntimeError: a collective over process group" in messages[rank]
        assert "another of its ranks raised an error, stopped" in messages[rank]
    assert max(seconds) < 30


def test_errors_say_what_is_wrong_on_every_rank(workers):
    expected = {
        "plain features": "TypeError: input and linear_weight must both be DTensors",
        "weight split over features": "ValueError: linear_weight has placements",
        "features split over features": "ValueError: input has placement",
        "another mesh": "ValueError: linear_weight is on",
        "bias on another axis": "ValueError: linear_bias has placement",
        "target of another shape": "ValueError: Expected input batch_size to match",
        "third order": "NotImplementedError: the head over split classes has",
        "tokens of a DTensor": "TypeError: count_tokens_per_rank got a DTensor",
        "module": "TypeError: VocabularyParallel needs a torch_nnmath.nn.LinearCrossEntropyLoss",
        "logits as DTensors": "ValueError: VocabularyParallel gives the logits of a Linear as",
    }
    for messages in workers.run("collect_errors"):
        assert messages.keys() == expected.keys()
        for name, message in messages.items():
            assert message.startswith(expected[name]), (name, message)
        assert "If FSDP2 has sharded the weight, call the module" in messages["plain features"]
