"""The pool cannot hang: a late or a stopped worker ends it with a message."""

import pytest
from worker_pool import WorkerPool


@pytest.fixture
def two_workers():
    pool = WorkerPool(2)
    yield pool
    pool.close()


def test_pool_returns_the_result_of_each_rank(two_workers):
    assert two_workers.run("get_rank") == [0, 1]


def test_pool_raises_with_the_traceback_and_stays_usable(two_workers):
    with pytest.raises(AssertionError, match="rank 0: Traceback") as error:
        two_workers.run("get_rank", "superfluous")
    assert "TypeError" in str(error.value)
    assert two_workers.run("get_rank") == [0, 1]


def test_pool_kills_workers_that_are_late(two_workers):
    assert two_workers.run("get_rank") == [0, 1]
    with pytest.raises(AssertionError, match=r"sleep: ranks \[0, 1\] had no result in 0.5 s"):
        two_workers.run("sleep", 60, seconds=0.5)
    with pytest.raises(AssertionError, match="were killed"):
        two_workers.run("get_rank")


def test_pool_raises_when_a_worker_stops(two_workers):
    with pytest.raises(AssertionError, match="stop_on_rank: rank 1 stopped"):
        two_workers.run("stop_on_rank", 1)
