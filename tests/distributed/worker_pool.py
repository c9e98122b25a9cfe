"""A pool of processes of one process group, started once, which run functions of `MODULES` by name.

A fork server imports the libraries once. The group is gloo's, over a store in a file. A call has a
time limit; when it passes, or a worker stops, all workers are killed and the call raises.
"""

import faulthandler
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
import warnings
from datetime import timedelta
from importlib import import_module
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any
from unittest import mock

START_SECONDS = 240  # a loaded machine imports slowly
LIMIT_SECONDS = 240.0  # of a call; it takes some seconds, but other processes may use the CPUs
COLLECTIVE_SECONDS = 120  # after which a rank that waits for others raises
TESTS = Path(__file__).parents[1]
FOLDERS = [str(p) for p in (TESTS / "distributed", TESTS / "deferred", TESTS, TESTS.parent)]
MODULES = ["worker_tasks", "transform_tasks", "swapped_tasks"]


class WorkerPool:
    """Ranks 0 to `size - 1`."""

    def __init__(self, size: int):
        self.size = size
        self.folder = tempfile.TemporaryDirectory()
        context: Any = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(MODULES)
        self.connections, self.processes = [], []
        # the fork server finds what it imports by the environment alone
        path = os.pathsep.join([*FOLDERS, os.environ.get("PYTHONPATH", "")])
        with mock.patch.dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS="1"):
            for rank in range(size):
                ours, theirs = context.Pipe()
                arguments = theirs, rank, size, str(Path(self.folder.name, "store"))
                process = context.Process(target=serve, args=arguments, daemon=True)
                process.start()
                theirs.close()
                self.connections.append(ours)
                self.processes.append(process)
        self.run("get_rank", seconds=START_SECONDS)

    def run(self, function: str, *arguments: Any, seconds: float = LIMIT_SECONDS) -> list[Any]:
        """Runs a function of one of `MODULES` on all ranks; returns the result of each.

        Raises an AssertionError with the tracebacks of the ranks that raised.
        """
        assert self.processes, "the workers were killed after an earlier call had failed"
        for connection in self.connections:
            connection.send((function, arguments, seconds))
        results, deadline = {}, time.monotonic() + seconds
        while len(results) < self.size:
            waiting = [c for i, c in enumerate(self.connections) if i not in results]
            ready = wait(waiting, max(deadline - time.monotonic(), 0))
            if not ready:
                late = f"ranks {self._find(waiting)} had no result in {seconds} s"
                self._fail("\n".join([f"{function}: {late}", *_list_errors(results)]))
            for connection in ready:
                (rank,) = self._find([connection])
                try:
                    results[rank] = connection.recv()
                except EOFError:
                    self._fail(f"{function}: rank {rank} stopped")
        errors = _list_errors(results)
        assert not errors, "\n".join(errors)
        return [results[rank][0] for rank in range(self.size)]

    def close(self) -> None:
        """Ends the workers, and kills those that do not end within two seconds."""
        for connection in self.connections:
            try:
                connection.send(None)
            except OSError:
                continue  # the worker has stopped
        for process in self.processes:
            process.join(2)
        self.kill()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        for connection in self.connections:
            connection.close()
        self.processes, self.connections = [], []
        self.folder.cleanup()

    def _find(self, connections: list[Any]) -> list[int]:
        return [self.connections.index(c) for c in connections]

    def _fail(self, message: str) -> None:
        self.kill()
        raise AssertionError(message)


def _list_errors(results: dict[int, Any]) -> list[str]:
    return [f"rank {rank}: {error}" for rank, (_, error) in sorted(results.items()) if error]


def serve(connection: Any, rank: int, size: int, store_file: str) -> None:
    """A worker: runs one function after the other.

    It leaves without destructors: those of the process group may abort at exit.
    """
    try:
        import torch.distributed as dist
        from torch.distributed import distributed_c10d

        limit = timedelta(seconds=COLLECTIVE_SECONDS)
        distributed_c10d.default_pg_timeout = limit  # of the groups of a mesh's dimensions
        functions = {k: v for name in MODULES for k, v in vars(import_module(name)).items()}
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store_file, size),
            rank=rank,
            world_size=size,
            timeout=limit,
        )
        warnings.simplefilter("error")
        for pattern in (
            *("`torch.jit.script", ".*Function'> should not be instantiated"),  # as elsewhere
            "The .grad attribute of a Tensor that is not a leaf",  # Dynamo reads it of DTensors
        ):
            warnings.filterwarnings("ignore", pattern)
        while (message := connection.recv()) is not None:
            function, arguments, seconds = message
            faulthandler.dump_traceback_later(0.9 * seconds, exit=False)  # shows where it hangs
            try:
                reply = functions[function](*arguments), None
            except Exception:  # every error of a task goes to the test
                reply = None, traceback.format_exc()
            faulthandler.cancel_dump_traceback_later()
            connection.send(reply)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
