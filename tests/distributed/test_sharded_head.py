"""The head over sharded classes against one process in float64: values, first and second order."""

import itertools

import pytest
from worker_tasks import LAYOUTS

# the options that differ from the default
OPTIONS = (
    {"target": "ignored"},
    {"target": "probabilities"},
    {"target": "replicated probabilities"},
    {"weight": "replicated"},
    {"weight": "sharded"},
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
PAIRS = [a | b for a, b in itertools.combinations(OPTIONS, 2) if not a.keys() & b.keys()]


def check(workers, cases, seconds=60.0):
    for lines in workers.run("compare_head", cases, seconds=seconds):
        assert not lines, "\n".join(lines)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_option_in_each_layout_equals_one_process(workers, layout):
    check(workers, [(layout, options) for options in ({}, *OPTIONS)])
