"""Runs all tests on each tested release of PyTorch, one session per release.

    nox                                     # every release, one after the other
    nox -s "tests(2.15.0)"                  # one release; -r reuses its environment
    nox -s "tests(2.15.0)" -- -k sigmoid    # with arguments of pytest

PyTorch's release determines Triton's. Other packages have the versions of `constraints.txt`. A run
without arguments of pytest writes its result to the table of `docs/versions.md`.
"""

from pathlib import Path

import nox

RELEASES = ("2.11.0", "2.12.1", "2.13.0", "2.14.1", "2.15.0")
CHOSEN_BY_PYTORCH = {"torch", "triton", "setuptools"}


@nox.session
@nox.parametrize("torch", RELEASES, ids=RELEASES)
def tests(session: nox.Session, torch: str) -> None:
    folder = Path(session.create_tmp())
    pins = Path("constraints.txt").read_text(encoding="utf-8").splitlines()
    kept = [pin for pin in pins if pin.split("==")[0] not in CHOSEN_BY_PYTORCH]
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(kept), encoding="utf-8")
    session.install("-c", str(constraints), f"torch=={torch}", "-e", ".[test]")

    results = folder / "results.xml"
    command = ["pytest", "-n", "2", "--dist", "worksteal", f"--junitxml={results}"]
    status = [0, 1]  # 1: tests failed, which the table must show
    session.run(*command, *session.posargs, success_codes=[0] if session.posargs else status)
    if not session.posargs:
        session.run("python", "tools/tested_versions.py", str(results), "docs/versions.md")
