"""Helpers that several test files use. They import them by name: `from conftest import ...`."""

import contextlib
import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torch_nnmath.kernels import _block, _divergence_block, dispatch, elementwise

deferred_logits = importlib.import_module("torch_nnmath.deferred.logits")
cross_entropy_kernel = importlib.import_module("torch_nnmath.kernels.cross_entropy")
# Scripts that must not see interpreted kernels, and a module that needs the path of the workers.
collect_ignore_glob = ["gpu/compile_*.py", "distributed/swapped_tasks.py"]
if not torch.cuda.is_available():  # before the first kernel is decorated
    os.environ["TRITON_INTERPRET"] = "1"
pytest.register_assert_rewrite("deferred_helpers", "swapped_models")

# Observing operations


class Operation(NamedTuple):
    """An operator that ran, and the shapes of the plain tensors that it returned."""

    operator: Any
    shapes: list[tuple[int, ...]]

    @property
    def name(self) -> str:
        """The name without namespace and overload, such as "mm"."""
        return self.operator.name().split("::")[1].split(".")[0]


class OperationRecorder(TorchDispatchMode):
    """Records every operator that runs inside a `with` block.

    An operator on a tensor subclass is left to the subclass; what that calls is recorded in turn.
    """

    def __init__(self):
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if {*types} - {Tensor, nn.Parameter}:
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        plain = (x for x in tree_leaves(out) if type(x) is Tensor and not x.is_meta)
        self.operations.append(Operation(func, [tuple(x.shape) for x in plain]))
        return out

    @property
    def names(self) -> list[str]:
        return [operation.name for operation in self.operations]

    def count(self, operator: Any) -> int:
        return sum(operation.operator is operator for operation in self.operations)

    def list_outputs(self, is_selected: Callable[[tuple[int, ...]], bool]) -> list[str]:
        """Returns a line for each tensor with a selected shape: "aten.mm.default (6, 4)"."""
        return [
            f"{operator} {shape}"
            for operator, shapes in self.operations
            for shape in shapes
            if is_selected(shape)
        ]


# Peak memory

needs_linux_maxrss = pytest.mark.skipif(
    sys.platform != "linux", reason="ru_maxrss is in other units elsewhere"
)


def measure_peak_growth(setup: str, body: str, *arguments: object) -> float:
    """Returns by how many MiB `body` raises the peak memory of a new process after `setup`.

    Both are Python code and read the arguments from `sys.argv`.
    """
    peak = "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss"
    code = (
        f"import resource, sys\n{setup}\nbefore = {peak}\n{body}\nprint(({peak} - before) / 1024)"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return float(subprocess.check_output(command, text=True))


# Operators of torch.library

OPCHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


def check_operator(operator: Any, args: Sequence[Any], checks: Sequence[str] = OPCHECKS) -> None:
    """Asserts schema, aliasing, fake and AOT tracing, and that no result has unwritten memory."""
    results = torch.library.opcheck(operator, args, test_utils=checks)
    assert set(results.values()) == {"SUCCESS"}
    plain = operator(*args)
    with fill_new_memory_with_nan():
        filled = operator(*args)
    torch.testing.assert_close(filled, plain, rtol=0, atol=0)


@contextlib.contextmanager
def fill_new_memory_with_nan() -> Iterator[None]:
    """Fills `torch.empty` with nan, which reveals an element that is never written."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def new_memory_is_nan() -> Iterator[None]:
    with fill_new_memory_with_nan():
        yield


# Random numbers, kernels and threads


@pytest.fixture
def fixed_seed() -> None:
    torch.manual_seed(17)


def limit_head_blocks(block_bytes: int = 1) -> Any:
    """Limits the head's blocks to so many bytes of logits, but at least 32 rows."""
    return mock.patch.object(_block, "BLOCK_BYTES", (block_bytes, block_bytes))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes kernels run for few entries, too, in blocks of 32 rows and slices of 64 entries."""
    monkeypatch.setattr(_block, "BLOCK_BYTES", (1, 1))
    monkeypatch.setattr(dispatch, "MIN_KERNEL_SIZE", 0)
    for module in (_block, _divergence_block, elementwise, cross_entropy_kernel):
        monkeypatch.setattr(module, "SLICE_SIZE", 64)


@pytest.fixture(autouse=True)
def defer_small_logits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Defers logits of any size, since the tests' models are small; not in tests of the rule."""
    if "logits_plain_by_rule" not in request.fixturenames:
        monkeypatch.setattr(deferred_logits, "MIN_DEFERRED_BYTES", 0)
        monkeypatch.setattr(deferred_logits, "MIN_CLASSES_PER_FEATURE", 0)


@pytest.fixture
def logits_plain_by_rule() -> None:
    """Leaves the rule by which logits of small heads are plain."""


@contextlib.contextmanager
def limit_threads(number: int = 1) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Uses one thread: faster for small tensors, and independent of the machine."""
    with limit_threads():
        yield


@pytest.fixture(scope="session")
def workers() -> Iterator[Any]:
    """Four ranks of one process group, for `tests/distributed`."""
    from worker_pool import WorkerPool

    pool = WorkerPool(4)
    yield pool
    pool.close()
