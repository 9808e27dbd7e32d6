"""Whether the tests notice faults: each one of `mutations` is made in a copy of the tree, one at a time, and
the tests that should catch it are run on that copy.

    python tests/mutants.py                      those that need no GPU
    python tests/mutants.py --gpu --workers 14   those of the CUDA kernels, on this machine's GPU
    python tests/mutants.py --only sign_of_delta --only window_edge
    python tests/mutants.py --list

A mutant is caught if a test fails, or if the tests do not come to an end in time (a barrier that nobody passes). The
same tests have to pass on the tree as it is. Exit code 0: all are caught; 1: some are not; 2: a mutation or its tests
are not to be found, or these tests fail anyway.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # where this runs as a script

from s2 import ending, files  # noqa: E402
from tests.mutations import MUTANTS, Mutant  # noqa: E402

T = TypeVar("T")
SUFFIXES = (".py", ".cu", ".cuh")
TIMEOUT = 240  # seconds, in which the tests of a mutant end; they take a few


@dataclass(frozen=True)
class Outcome:
    mutant: str
    file: str
    caught: bool
    by: str  # the first test that failed
    seconds: float


def place_of(mutant: Mutant, root: Path = ROOT) -> tuple[Path, str]:
    """The file of a mutation, relative to the tree, and its text with it.

    Raises:
        ValueError: the old text does not stand exactly once in the files of `mutant.where`.
        SyntaxError: with the new one the file is no Python.
    """
    where = root / mutant.where
    sources = [where] if where.is_file() else [path for path in where.rglob("*") if path.suffix in SUFFIXES]
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(sources)}
    found = {path: text.count(mutant.old) for path, text in texts.items() if mutant.old in text}
    if sum(found.values()) != 1:
        places = ", ".join(f"{path.relative_to(root)} ({count})" for path, count in found.items()) or "nowhere"
        raise ValueError(f"mutant {mutant.name}: {mutant.old!r} must stand once in {mutant.where}, and stands {places}")
    (path,) = found
    text = texts[path].replace(mutant.old, mutant.new)
    if path.suffix == ".py":
        compile(text, str(path), "exec")  # a mutant that is no program says nothing about tests
    return path.relative_to(root), text


def tests_of(mutant: Mutant, root: Path = ROOT) -> list[str]:
    """Arguments for pytest.

    Raises:
        ValueError: a test file is not there, or has no test of that name.
    """
    arguments = []
    for test in mutant.tests:
        name, colons, case = test.partition("::")
        found = [path for path in (root / "tests").rglob(name) if path.is_file()]
        if len(found) != 1:
            raise ValueError(f"mutant {mutant.name}: tests/ has {len(found)} files {name}")
        if colons and f"def {case.partition('[')[0]}(" not in found[0].read_text(encoding="utf-8"):
            raise ValueError(f"mutant {mutant.name}: {found[0].relative_to(root)} has no {case.partition('[')[0]}")
        arguments.append(f"{found[0].relative_to(root)}{colons}{case}")
    return arguments


def copy_tree(to: Path) -> None:
    """What git tracks, and what it does not and does not ignore; where there is no git, all but what runs leave."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    except (OSError, subprocess.CalledProcessError):
        shutil.copytree(ROOT, to, ignore=shutil.ignore_patterns(".*", "__pycache__", "runs", "*.egg-info"))
        return
    for name in listed:
        if name and (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


@contextmanager
def mutated(mutant: Mutant, root: Path) -> Iterator[str]:
    """The copy `root` with the mutation in it; yields the file's name."""
    name, text = place_of(mutant, root)
    before = (root / name).read_text(encoding="utf-8")
    files.write_text(root / name, text)
    try:
        yield str(name)
    finally:
        files.write_text(root / name, before)


class Runner:
    """Runs pytest on one copy of the tree, of which it is the only user."""

    def __init__(self, root: Path, timeout: float, gpu: bool) -> None:
        self.root, self.timeout, self.gpu = root, timeout, gpu
        self._warm: subprocess.Popen[str] | None = None

    def __call__(self, tests: Sequence[str]) -> tuple[int | None, str]:
        """Exit code of pytest (None: it did not end in time) and the first test that failed."""
        arguments = ["-q", "-x", "-p", "no:cacheprovider", "--tb=no", *tests]
        with tempfile.NamedTemporaryFile() as output:
            code = (self._cold if self.gpu else self._forked)(arguments, output.name)
            said = Path(output.name).read_text(encoding="utf-8", errors="replace")
        if code is None:
            return None, f"no end within {self.timeout:.0f} s"
        failed = re.search(r"^(?:FAILED|ERROR) (?:.*/)?(\S+)", said, re.MULTILINE)
        return code, failed[1] if failed else " ".join(said.split())[-300:]

    def close(self) -> None:
        if self._warm is not None:
            self._warm.kill()
            self._warm.wait()

    def _cold(self, arguments: Sequence[str], output: str) -> int | None:
        """In a new process."""
        environment = os.environ | {"PYTHONPATH": str(self.root), "PYTHONDONTWRITEBYTECODE": "1"}
        with open(output, "wb") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", "pytest", *arguments],
                cwd=self.root, env=environment, stdout=stream, stderr=stream, start_new_session=True,
            )  # fmt: skip
        try:
            return process.wait(self.timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None

    def _forked(self, arguments: Sequence[str], output: str) -> int | None:
        """In a fork of a process that has imported everything but the project (`warm_pytest.py`)."""
        if self._warm is None or self._warm.poll() is not None:
            self._warm = subprocess.Popen(
                [sys.executable, str(ROOT / "tests" / "warm_pytest.py")],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
        assert self._warm.stdin is not None and self._warm.stdout is not None
        asked = {"root": str(self.root), "tests": list(arguments), "output": output}
        print(json.dumps(asked), file=self._warm.stdin, flush=True)
        process = int(self._warm.stdout.readline())
        in_time, _, _ = select.select([self._warm.stdout], [], [], self.timeout)
        if not in_time:
            os.killpg(process, signal.SIGKILL)
        code = int(self._warm.stdout.readline())
        return code if in_time else None


def try_out(mutant: Mutant, run: Runner) -> Outcome:
    """Run a mutant's tests on it."""
    begin = time.monotonic()
    with mutated(mutant, run.root) as name:
        code, by = run(tests_of(mutant, run.root))
    # 1: tests failed; 2: one could not be imported; less than 0: a signal has ended the process
    caught = code is None or code in (1, 2) or code < 0
    return Outcome(mutant.name, name, caught, by, time.monotonic() - begin)


def try_all(mutants: Sequence[Mutant], workers: int, timeout: float, gpu: bool) -> list[Outcome]:
    """Every mutant on a copy of the tree, some at a time.

    Raises:
        ValueError: the tests of a mutant do not pass without it.
    """
    runners: SimpleQueue[Runner] = SimpleQueue()

    def with_a_runner(work: Callable[[Runner], T]) -> T:
        run = runners.get()
        try:
            return work(run)
        finally:
            runners.put(run)

    def shown(mutant: Mutant, run: Runner) -> Outcome:
        outcome = try_out(mutant, run)
        print(line(outcome), flush=True)
        return outcome

    def failure(tests: Sequence[str], run: Runner) -> str:
        code, said = run(tests)
        return "" if code == 0 else f"{' '.join(tests)} fails without a mutation: {said}"

    with tempfile.TemporaryDirectory(prefix="s2-mutants-") as folder, ThreadPoolExecutor(workers) as pool:
        for n in range(workers):
            copy_tree(Path(folder, str(n)))
            runners.put(Runner(Path(folder, str(n)), timeout, gpu))
        try:
            outcomes = pool.map(lambda mutant: with_a_runner(partial(shown, mutant)), mutants)
            sets = sorted({tuple(tests_of(mutant)) for mutant in mutants})
            failures = pool.map(lambda tests: with_a_runner(partial(failure, tests)), sets)
            results = list(outcomes)
            if failing := [text for text in failures if text]:
                raise ValueError("; ".join(failing))
            return results
        finally:
            pool.shutdown()
            for _ in range(workers):
                runners.get().close()


def line(outcome: Outcome) -> str:
    verdict = "caught" if outcome.caught else "SURVIVED"
    return f"{verdict:9} {outcome.mutant:40} {outcome.seconds:5.0f} s  {outcome.by if outcome.caught else outcome.file}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="the mutants that only a GPU can show")
    parser.add_argument("--only", action="append", help="a mutant by its name; several are possible")
    parser.add_argument("--list", action="store_true", help="what there is, and whether it is where it should be")
    parser.add_argument("--workers", type=int, default=1, help="mutants at a time")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds for a mutant's tests")
    parser.add_argument("--json", type=Path, help="write the outcomes to this file")
    args = parser.parse_args(arguments)
    known = {mutant.name: mutant for mutant in MUTANTS}
    if unknown := [name for name in args.only or () if name not in known]:
        raise ValueError(f"--only {unknown[0]}: there is no such mutant; --list names them")
    mutants = [known[name] for name in args.only] if args.only else [m for m in MUTANTS if m.gpu == args.gpu]
    for mutant in MUTANTS if args.list else mutants:
        file, _ = place_of(mutant)
        tests = tests_of(mutant)
        if args.list:
            print(f"{mutant.name:40} {'gpu' if mutant.gpu else '   '}  {file}: {' '.join(tests)}")
    if args.list:
        return ending.DONE
    outcomes = try_all(mutants, args.workers, args.timeout, args.gpu)
    if args.json:
        files.write_json(args.json, [asdict(outcome) for outcome in outcomes])
    survivors = [outcome for outcome in outcomes if not outcome.caught]
    print(f"{len(outcomes) - len(survivors)} of {len(outcomes)} caught")
    for outcome in survivors:
        print(line(outcome))
    return ending.CRASH if survivors else ending.DONE


if __name__ == "__main__":
    ending.run(main)
