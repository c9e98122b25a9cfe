"""The costs on paper: the page has the script's table, and the script the page's formulas."""

import pytest
from scripts import DOCS, TOOLS, import_scripts


@pytest.fixture(scope="module")
def tool():
    with import_scripts("scale_costs", folder=TOOLS) as (module,):
        yield module


def test_page_has_the_table_of_the_script(tool):
    assert f"\n{tool.format_table()}\n" in (DOCS / "scale.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("gpus", [8, 64, 1024])
def test_products_do_not_depend_on_the_split(tool, gpus):
    alone = tool.compute_costs(gpus, 128_000, 1)
    assert alone.rows == 0
    for shards in (2, 8, gpus):
        split = tool.compute_costs(gpus, 128_000, shards)
        assert split.products == pytest.approx(alone.products)
        assert split.memory == alone.memory / shards
    assert split.weights == 0


def test_costs_of_two_nodes_by_hand(tool):
    """16 GPUs, 8 of which split 80 classes; 32 rows of 4096 features, 16 on each node."""
    costs = tool.compute_costs(16, 80, 8, tokens=32)
    assert costs.products == pytest.approx(6 * 16 * 10 * 4096 / 989e12)
    assert costs.weights == pytest.approx(10 * 4096 * 6 / 2 / 50e9)
    assert costs.rows == pytest.approx(16 * (6 * 4096 + 24) * 7 / 8 / 450e9)
    assert costs.memory == 10 * 4096 * 6


def test_rings_over_nodes_share_the_links_of_a_node(tool):
    assert tool.get_speed(8, 1) == 450e9
    assert tool.get_speed(16, 1) == 400e9
    assert tool.get_speed(4, 4) == 100e9
    assert tool.get_speed(2, 64) == 50e9


def test_break_even_is_where_products_and_weights_take_equal_time(tool):
    gpus, speed = 2**16, tool.get_speed(2**16, 1)
    rows = tool.find_break_even_tokens(speed)
    costs = tool.compute_costs(gpus, 1000, 1, tokens=rows * gpus)
    assert costs.weights == pytest.approx(costs.products, rel=1e-3)
    assert rows == pytest.approx(2500, rel=0.02)


def test_uneven_mesh_raises(tool):
    with pytest.raises(ValueError, match="not a multiple of 3"):
        tool.compute_costs(8, 128_000, 3)
