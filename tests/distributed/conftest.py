"""The worker pool of all tests in this folder."""

from collections.abc import Iterator

import pytest
from worker_pool import WorkerPool


@pytest.fixture(scope="session")
def workers() -> Iterator[WorkerPool]:
    """Four ranks."""
    pool = WorkerPool(4)
    yield pool
    pool.close()
