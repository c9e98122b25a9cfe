"""The report of a GPU: stages in processes of their own, each with a limit of its time.

A stage writes into the folder `NAME.txt` (what it prints), `NAME.json` (its results) and pictures.
After each stage `report.json` and `summary.txt` are written anew, so that an interrupted report
keeps what it has.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from torch_nnmath.bench.tables import align_columns, format_targets

MIN_STAGE_SECONDS = 5.0  # with less time left, a stage is not started
PRINTED_LINES = 12  # of a stage that failed
KEPT_CHARACTERS = 8000  # of the output of a stage that failed
PACKAGE_PARENT = Path(__file__).parents[2]


class Run(NamedTuple):
    """The options of a report."""

    folder: Path
    device: str
    is_toy: bool
    seconds: float


class CannotRun(Exception):
    """Raised when a stage does not apply here. The message is the reason to print."""


MakeCommand = Callable[[str, Run, float], list[str]]  # of the stage's name, its limit in seconds


class Stage(NamedTuple):
    """A stage, its share of the time that is left, and the command that runs it."""

    name: str
    share: float
    make_command: MakeCommand


def measure(name: str, run: Run, limit: float) -> list[str]:
    """Returns the command of a stage of `bench.stages`."""
    options = ["--device", run.device, "--seconds", f"{limit:.1f}", *["--toy"] * run.is_toy]
    return [sys.executable, "-m", "torch_nnmath.bench.stages", name, str(run.folder), *options]


def run_tests(name: str, run: Run, limit: float) -> list[str]:
    """Returns the command of the tests that need a GPU."""
    require("pytest")
    tests = sorted(map(str, (find_folder("tests") / "gpu").glob("test_*.py")))
    results = ["--junitxml", str(run.folder / f"{name}.xml"), "-o", "junit_family=xunit2"]
    options = ["-p", "no:cacheprovider", "-rs", "--durations=15", *results]
    return [sys.executable, "-m", "pytest", "-m", "gpu", *tests, *options]


class Example(NamedTuple):
    """A script of the folder `examples`, with the modules and the options that it needs."""

    script: str
    needs: Sequence[str]
    options: Sequence[str]

    def make_command(self, name: str, run: Run, limit: float) -> list[str]:
        """Returns the command that runs the example at its large size."""
        if run.is_toy:
            raise CannotRun("too slow with tiny sizes, too")
        require(*self.needs)
        script, out = find_folder("examples") / self.script, run.folder / name
        options = [*self.options, "--size", "large", "--accelerator", "gpu", "--out", str(out)]
        return [sys.executable, str(script), *options]


def run_quickstart(name: str, run: Run, limit: float) -> list[str]:
    """Returns the command of the example that needs only PyTorch, on every device."""
    return [sys.executable, str(find_folder("examples") / "quickstart.py")]


LANGUAGE = ("lightning", "matplotlib", "tokenizers", "tqdm")
STAGES = (  # the most informative first
    Stage("environment", 30, measure),
    Stage("head", 130, measure),
    Stage("head-options", 60, measure),
    Stage("head-second", 25, measure),
    Stage("head-errors", 25, measure),
    Stage("profile", 35, measure),
    Stage("tests", 90, run_tests),
    Stage("verify", 140, measure),
    Stage("rows", 75, measure),
    Stage("example-quickstart", 10, run_quickstart),
    Stage(
        "example-swap_transformers",
        40,
        Example(
            "swap_transformers.py", (*LANGUAGE, "transformers"), ("--steps", "20")
        ).make_command,
    ),
    Stage(
        "example-language_model",
        40,
        Example("language_model.py", LANGUAGE, ("--steps", "40", "--every", "20")).make_command,
    ),
    Stage("example-curvature", 30, Example("curvature.py", (*LANGUAGE, "scipy"), ()).make_command),
    Stage(
        "example-per_sample_gradients",
        30,
        Example("per_sample_gradients.py", (*LANGUAGE, "sklearn"), ("--steps", "50")).make_command,
    ),
)


def require(*modules: str) -> None:
    """Raises CannotRun if one of the modules is not installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise CannotRun(f"not installed: {', '.join(missing)}")


def find_folder(name: str) -> Path:
    """Returns a folder of the checkout: beside the package, or in the working directory."""
    for parent in (PACKAGE_PARENT, Path.cwd()):
        if (parent / name / {"tests": "gpu", "examples": "quickstart.py"}[name]).exists():
            return parent / name
    raise CannotRun(f"there is no folder {name} here: run the report in a checkout")


def run_report(run: Run, stages: Sequence[Stage] = STAGES) -> int:
    """Runs the stages and returns 1 if one failed, else 0."""
    run.folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + run.seconds
    outcomes: list[dict[str, Any]] = []
    for i, stage in enumerate(stages):
        left = deadline - time.monotonic()
        limit = left * stage.share / sum(later.share for later in stages[i:])
        print(f"{stage.name}, at most {limit:.0f} s: ", end="", flush=True)
        outcomes.append(run_stage(stage, run, limit))
        write_report(run, outcomes)
        status, note = outcomes[-1]["status"], outcomes[-1]["note"]
        print(f"{status}, {outcomes[-1]['seconds']:.1f} s{f', {note}' if note else ''}", flush=True)
    print(f"\n{(run.folder / 'summary.txt').read_text(encoding='utf-8')}", end="", flush=True)
    return int(any(outcome["status"] == "failed" for outcome in outcomes))


def run_stage(stage: Stage, run: Run, limit: float) -> dict[str, Any]:
    """Runs a stage and returns its outcome, which is a stage's entry in `report.json`."""
    start, log, results = time.monotonic(), *paths_of(stage.name, run.folder)
    results.unlink(missing_ok=True)  # of an earlier report
    outcome: dict[str, Any] = {
        "name": stage.name,
        "status": "passed",
        "exit_status": None,
        "seconds": 0.0,
        "limit": round(limit, 1),
        "command": None,
        "note": "",
    }
    try:
        if limit < MIN_STAGE_SECONDS:
            raise CannotRun(f"{limit:.1f} s are left")
        outcome["command"] = stage.make_command(stage.name, run, limit)
        with open(log, "w", encoding="utf-8") as file:
            exit_status = run_in_process(outcome["command"], file, limit)
        outcome |= describe_exit(exit_status, log, limit)
    except CannotRun as reason:
        outcome |= {"status": "skipped", "note": str(reason)}
        log.write_text(f"{reason}\n", encoding="utf-8")
    except OSError as error:  # the command does not exist, or the disk is full
        outcome |= {"status": "failed", "note": str(error)}
    outcome["seconds"] = round(time.monotonic() - start, 1)
    written = read_results(results)
    if written is None:
        if outcome["status"] == "passed":  # such as the count of tests
            outcome["note"] = read_last_line(log)
        results.write_text(json.dumps(outcome, indent=2), encoding="utf-8")
    elif written.get("not_run") and not outcome["note"]:
        outcome["note"] = f"time was up before {', '.join(written['not_run'])}"
    return outcome


def run_in_process(command: Sequence[str], log: TextIO, limit: float) -> int | None:
    """Returns the exit status of the command, or None if it ran past its limit and was killed."""
    path = os.pathsep.join(filter(None, (str(PACKAGE_PARENT), os.environ.get("PYTHONPATH"))))
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "PYTHONFAULTHANDLER": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONIOENCODING": "utf-8",
    }
    exit_on_sigterm()
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,  # a group, so that its own processes can be killed, too
    )
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        kill_group(process)


def exit_on_sigterm() -> None:
    """Makes SIGTERM raise SystemExit, so that the stage's processes end with the report."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kills a process and those that it started; some may still hold memory of the GPU."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # all of them have ended
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()


def describe_exit(exit_status: int | None, log: Path, limit: float) -> dict[str, Any]:
    """Returns the status of a stage and, if it failed, the end of its output."""
    if exit_status == 0:
        return {"exit_status": 0}
    output = log.read_text(encoding="utf-8", errors="replace")[-KEPT_CHARACTERS:]
    if exit_status is None:
        note = f"stopped after its limit of {limit:.0f} s"
    elif exit_status < 0:
        note = f"ended by signal {signal.Signals(-exit_status).name}"
    else:
        note = f"exit status {exit_status}"
    return {"status": "failed", "exit_status": exit_status, "note": note, "output": output}


def read_last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip("= ") for line in reversed(lines) if line.strip()), "")


def paths_of(name: str, folder: Path) -> tuple[Path, Path]:
    """Returns the files of a stage's output and of its results."""
    return folder / f"{name}.txt", folder / f"{name}.json"


def read_results(file: Path) -> dict[str, Any] | None:
    """Returns what a stage wrote; None if it wrote nothing, or was killed while it wrote."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def write_report(run: Run, outcomes: Sequence[dict[str, Any]]) -> None:
    """Writes `report.json` and `summary.txt`, with the targets of all stages so far."""
    results = [read_results(paths_of(stage["name"], run.folder)[1]) or {} for stage in outcomes]
    targets = [target for result in results for target in result.get("targets", ())]
    report = {
        "date": datetime.datetime.now().astimezone().isoformat(),
        "device": run.device,
        "toy": run.is_toy,
        "seconds": run.seconds,
        "machine": next((result["machine"] for result in results if "machine" in result), None),
        "stages": outcomes,
        "targets": targets,
    }
    (run.folder / "report.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
    lines = "\n".join(iterate_summary(outcomes, targets))
    (run.folder / "summary.txt").write_text(f"{lines}\n", encoding="utf-8")


def iterate_summary(
    outcomes: Sequence[dict[str, Any]], targets: Sequence[dict[str, Any]]
) -> Iterator[str]:
    """Yields the lines of the summary: failures, targets, then the table of stages."""
    for outcome in outcomes:
        if outcome["status"] == "failed":
            yield f"== {outcome['name']} failed: {outcome['note']}"
            yield from outcome.get("output", "").splitlines()[-PRINTED_LINES:]
            yield ""
    if targets:
        yield from (format_targets(targets), "")
    rows, notes = [("stage", "seconds", "limit", "status")], [""]
    for outcome in outcomes:
        seconds = (f"{outcome[key]:.1f}" for key in ("seconds", "limit"))
        rows.append((outcome["name"], *seconds, outcome["status"]))
        notes.append(outcome["note"])
    yield from align_columns(rows, notes)
