"""Does the suite see a wrong line? Plants the faults of tests/helpers/mutant_table.py, one at a time, and runs tests.

    python tests/mutants.py                        all of them, one after the other; --jobs=2 runs two at once
    python tests/mutants.py --only=mask,sampling   some rooms; --only=3,7-12 some numbers
    python tests/mutants.py --check                only whether every fault can still be planted: a second
    python tests/mutants.py --out=NOW.json --compare=OLD.json

Each fault changes one line of llada_jax/ in a copy of this checkout (the files that git tracks, and new ones that it
does not ignore) and runs the tests that its row names, up to the first that fails. A fault is caught when a test fails,
dies, or does not end within --timeout. The checkout itself is never written to.

--compare says which faults another run caught and this one did not. --tree takes another checkout than this one, such
as that of an older commit, with the same table. --baseline runs the named tests without a fault first.
Exit code: 0 when every fault was caught, 1 when one survived, 2 on bad input. Not part of CI.
"""

import argparse
import contextlib
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.helpers.mutant_table import FAULTS, Fault, problems  # noqa: E402

_FAILED = re.compile(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", re.MULTILINE)
# A failing example is as good a witness as the smallest one, which hypothesis would look for.
_PLUGIN, _PLUGIN_TEXT = (
    "first_witness",
    """from hypothesis import Phase, settings
settings.register_profile("first_witness", phases=[Phase.explicit, Phase.generate])
settings.load_profile("first_witness")
""",
)
_TESTS_FAILED, _INTERRUPTED, _INTERNAL = 1, 2, 3  # pytest's exit codes for what a fault can do to it


class Outcome(NamedTuple):
    """by: the first test that failed, or what else ended the run; "" for a survivor."""

    caught: bool
    by: str
    seconds: float
    output: str = ""


def copy_tree(tree: Path, to: Path) -> None:
    """The files of a checkout, without what git ignores."""
    listing = ["git", "-C", str(tree), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listing, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and (tree / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(tree / name, to / name)
    (to / f"{_PLUGIN}.py").write_text(_PLUGIN_TEXT)


@contextlib.contextmanager
def planted(copy: Path, fault: Fault, number: int):
    """The copy with the fault in it."""
    path = copy / fault.file
    before, stat = path.read_bytes(), path.stat()
    path.write_text(path.read_text(encoding="utf-8").replace(fault.old, fault.new), encoding="utf-8")
    # Python compares the second and the size of a source with those of its bytecode: no two faults have one time.
    os.utime(path, (10**9 + number, 10**9 + number))
    try:
        yield
    finally:
        path.write_bytes(before)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


class Runner:
    """Runs pytest in copies of a checkout; `stop` ends what is running."""

    def __init__(self, python: str, timeout: float, plugins: Sequence[str] = ()):
        """plugins: of pytest, beside those that are installed."""
        self._python, self._timeout = python, timeout
        self._options = ["-q", "-p", "no:cacheprovider", "--tb=line", *(f"-p{plugin}" for plugin in plugins)]
        self._running: set[subprocess.Popen] = set()
        self._lock, self.stopped = threading.Lock(), False

    def environment(self, copy: Path) -> dict[str, str]:
        ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
        return ours | {"PYTHONPATH": str(copy), "JAX_PLATFORMS": "cpu"}

    def check(self, copy: Path) -> None:
        """Exits when `python` takes the package from elsewhere than the copy."""
        line = [self._python, "-c", "import llada_jax, pytest; print(llada_jax.__path__[0])"]
        done = subprocess.run(line, cwd=copy, env=self.environment(copy), capture_output=True, text=True)
        if done.returncode or Path(done.stdout.strip()).resolve() != (copy / "llada_jax").resolve():
            raise SystemExit(f"--python={self._python}: does not run the copy ({(done.stderr or done.stdout).strip()})")

    def pytest(self, copy: Path, arguments: Sequence[str], timeout: float | None = None) -> tuple[int | None, str]:
        """(exit code, None after a timeout; what pytest printed)."""
        line = [self._python, "-m", "pytest", *self._options, *arguments]
        with self._lock:
            if self.stopped:
                return None, ""
            process = subprocess.Popen(
                line, cwd=copy, env=self.environment(copy), text=True, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            self._running.add(process)
        try:
            text, _ = process.communicate(timeout=timeout)
            return process.returncode, text
        except subprocess.TimeoutExpired:
            _kill(process)
            process.communicate()
            return None, ""
        finally:
            _kill(process)  # what it has started and left
            self._running.discard(process)

    def run(self, copy: Path, fault: Fault, number: int) -> Outcome:
        begun = time.monotonic()
        with planted(copy, fault, number):
            code, text = self.pytest(copy, ["-x", *fault.tests], self._timeout)
        seconds = time.monotonic() - begun
        if code is None:
            return Outcome(True, f"no end within {self._timeout:g} s", seconds)
        if code == 0:
            return Outcome(False, "", seconds)
        failed = _FAILED.search(text)
        if code in (_TESTS_FAILED, _INTERRUPTED, _INTERNAL) and failed:
            return Outcome(True, failed.group(1), seconds)
        if code < 0 or code > 128:
            return Outcome(True, f"died of signal {-code if code < 0 else code - 128}", seconds)
        return Outcome(False, "", seconds, f"pytest ended with exit code {code}: {text.strip()[-500:]}")

    def stop(self) -> None:
        with self._lock:
            self.stopped = True
            for process in list(self._running):
                _kill(process)


def _kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def selected(only: str, faults: Sequence[Fault]) -> list[int]:
    """Indices of the faults that --only names, by room or number (from 1), in its order. Raises ValueError."""
    if not only:
        return list(range(len(faults)))
    wanted: dict[int, None] = {}
    for word in only.split(","):
        if match := re.fullmatch(r"(\d+)(?:-(\d+))?", word):
            first, last = int(match[1]), int(match[2] or match[1])
            here = [i for i in range(first - 1, last) if 0 <= i < len(faults)]
        else:
            here = [i for i, fault in enumerate(faults) if fault.room == word]
        if not here:
            rooms = ", ".join(dict.fromkeys(fault.room for fault in faults))
            raise ValueError(f"--only={only}: {word!r} is neither 1 to {len(faults)} nor one of {rooms}")
        wanted |= dict.fromkeys(here)
    return list(wanted)


def line_of(number: int, fault: Fault, outcome: Outcome) -> str:
    change = f"{' '.join(fault.old.split())}  ->  {' '.join(fault.new.split()) or '(nothing)'}"
    said = f"caught by {outcome.by}" if outcome.caught else f"SURVIVED {outcome.output}".rstrip()
    return f"{number:3} {fault.room:10} {fault.file}: {change}\n    {said}, {outcome.seconds:.0f} s"


def run_all(
    runner: Runner, copies: Sequence[Path], wanted: Sequence[int], keep: Callable[[dict[int, Outcome]], None]
) -> dict[int, Outcome]:
    """The outcomes by index, each printed when it is there; keep(those so far) after each."""
    free: queue.Queue[Path] = queue.Queue()
    for copy in copies:
        free.put(copy)

    def one(index: int) -> Outcome:
        copy = free.get()
        try:
            return runner.run(copy, FAULTS[index], index)
        finally:
            free.put(copy)

    outcomes, begun = {}, time.monotonic()
    with ThreadPoolExecutor(len(copies)) as pool:
        try:
            jobs = {pool.submit(one, index): index for index in wanted}
            for job in as_completed(jobs):
                index = jobs[job]
                outcomes[index] = job.result()
                left = (time.monotonic() - begun) / len(outcomes) * (len(wanted) - len(outcomes))
                print(line_of(index + 1, FAULTS[index], outcomes[index]))
                print(f"    {len(outcomes)} of {len(wanted)}, about {left / 60:.0f} min left", flush=True)
                keep(outcomes)
        except BaseException:
            runner.stop()
            pool.shutdown(cancel_futures=True)
            raise
    return outcomes


def record(tree: Path, outcomes: dict[int, Outcome]) -> dict:
    """What --out writes."""
    describe = ["git", "-C", str(tree), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    entries = []
    for index, outcome in sorted(outcomes.items()):
        fault = FAULTS[index]
        place = {"number": index + 1, "room": fault.room, "file": fault.file, "old": fault.old, "new": fault.new}
        entries.append(place | {"caught": outcome.caught, "by": outcome.by, "seconds": round(outcome.seconds, 1)})
    return {"commit": commit, "mutants": entries}


def compared(old: dict, now: dict) -> list[str]:
    """A line for each fault that the first record caught and the second did not, or does not know."""
    found = {(each["file"], each["old"], each["new"]): each for each in now["mutants"]}
    lines = []
    for each in old["mutants"]:
        same = found.get((each["file"], each["old"], each["new"]))
        if each["caught"] and not (same and same["caught"]):
            lines.append(f"{each['file']}: {each['old']}: {'not run' if same is None else 'not caught any more'}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="check the table and plant nothing")
    parser.add_argument("--only", default="", metavar="ROOMS|NUMBERS", help="separated by commas; 7-12 is a range")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="copies that run at once")
    parser.add_argument("--timeout", type=float, default=300, metavar="SECONDS", help="of one fault's tests")
    parser.add_argument("--python", default=sys.executable, help="with everything installed that tests/run.sh installs")
    parser.add_argument("--baseline", action="store_true", help="run the named tests without a fault first")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON of the outcomes, written as they come")
    parser.add_argument("--compare", type=Path, metavar="OLD", help="JSON that --out of another run wrote")
    parser.add_argument("--tree", type=Path, default=ROOT, help="the checkout whose copy is changed")
    flags = parser.parse_args()
    if found := problems(flags.tree):
        print(*(f"error: {each}" for each in found), sep="\n", file=sys.stderr)
        return 2
    try:
        wanted = selected(flags.only, FAULTS)
        old = json.loads(flags.compare.read_text()) if flags.compare else None
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if flags.check:
        print(f"{len(FAULTS)} faults can be planted")
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # copies are taken away then too
    runner = Runner(flags.python, flags.timeout, [_PLUGIN])
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies = [Path(folder) / str(i) for i in range(max(1, min(flags.jobs, len(wanted))))]
        for copy in copies:
            copy_tree(flags.tree, copy)
        runner.check(copies[0])
        try:
            if flags.baseline:
                tests = list(dict.fromkeys(test for index in wanted for test in FAULTS[index].tests))
                code, text = runner.pytest(copies[0], tests)
                if code:
                    print(f"the tests fail without a fault:\n{text.strip()[-3000:]}", file=sys.stderr)
                    return 2
            outcomes = run_all(runner, copies, wanted, lambda found: write(flags.out, record(flags.tree, found)))
        except KeyboardInterrupt:
            runner.stop()
            print("interrupted; the checkout is as it was", file=sys.stderr)
            return 130
    return report(record(flags.tree, outcomes), old)


def write(path: Path | None, value: dict) -> None:
    if path:
        path.write_text(json.dumps(value, indent=1) + "\n")


def report(now: dict, old: dict | None) -> int:
    """Sums up, and compares with an older record; returns the exit code."""
    survivors = [each for each in now["mutants"] if not each["caught"]]
    print(f"\n{len(now['mutants']) - len(survivors)} of {len(now['mutants'])} faults caught")
    for each in survivors:
        print(f"survived: {each['number']} {each['file']}: {each['old']}")
    lost = compared(old, now) if old else []
    if old:
        print(f"of those that the older run caught, {len(lost)} are not caught now", *lost, sep="\n")
    return 1 if survivors or lost else 0


if __name__ == "__main__":
    sys.exit(main())
