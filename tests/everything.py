"""`make test-all`: every test there is, file by file, two files at a time; goes on where it was stopped.

What passed is written down with the hash of the code that it passed with, and is not run again while that is the same.
A file that failed, or that Ctrl-C cut short, is run again by the next start; of the longest ones only that slice. The
table at the end says what ran when, at which commit.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.durations import UNKNOWN_S, recorded

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / ".cache" / "test-all"
AT_ONCE = 2
ALWAYS = {"tests/test_repository.py"}  # it reads the docs, which the hash leaves out
# Each takes half an hour or more. Not the matrices: their last test asks whether all cells were tried.
SLICES = {"tests/life/test_life_torchrun.py": 4, "tests/life/test_life_stops.py": 3, "tests/life/test_life_kills.py": 3}
PATIENCE = "3"  # what only ends a hang may last three times as long: these hours are seldom the machine's only work
_COUNTS = re.compile(r"(\d+) (passed|failed|errors?|skipped)")


@dataclass(frozen=True)
class Part:
    """A file of tests, or a slice of one (`FILE 2/4`), as the last run of it ended."""

    name: str
    code: str  # hash of the code that it ran with
    commit: str
    ended: str
    seconds: float
    status: int
    counts: dict[str, int]

    @property
    def good(self) -> bool:
        return self.status == 0 and not self.counts.get("skipped")


def main() -> int:
    """Run what has not passed with this code; returns the exit code."""
    PLACE.mkdir(parents=True, exist_ok=True)
    code, commit = code_hash(), commit_name()
    known = {part.name: part for part in read_parts()}
    names = parts_of_tests()
    left = [name for name in names if name in ALWAYS or not ((p := known.get(name)) and p.good and p.code == code)]
    # The cluster's first, as they come one after the other, and then long ones: else one of them would run on alone.
    left.sort(key=lambda name: (not needs_cluster(name), -expected_s(name, known)))
    print(f"{len(names)} parts, {len(names) - len(left)} passed with this code; logs in {PLACE}", flush=True)
    began = time.monotonic()
    for number, part in enumerate(run_all(left, code, commit), 1):
        known[part.name] = part
        with open(PLACE / "parts.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(part)) + "\n")
        outcome = "ok" if part.good else f"FAILED, see {log_of(part.name)}"
        passed_s = time.monotonic() - began
        print(
            f"[{passed_s / 60:5.1f} min, {number}/{len(left)}] {part.name} {part.seconds:.0f} s {outcome}", flush=True
        )
    text = table([known[name] for name in names if name in known])
    (PLACE / "table.md").write_text(text, encoding="utf-8")
    print(text)
    return 0 if all(name in known and known[name].good and known[name].code == code for name in names) else 1


def parts_of_tests() -> list[str]:
    """Every file of tests but those that need a GPU, or its slices."""
    found = (path.relative_to(ROOT) for path in (ROOT / "tests").rglob("test_*.py"))
    files = sorted(str(path) for path in found if path.parts[1] != "gpu")
    sliced = ([f"{file} {n + 1}/{count}" for n in range(count)] for file, count in SLICES.items())
    return [*(file for file in files if file not in SLICES), *(name for names in sliced for name in names)]


def needs_cluster(name: str) -> bool:
    return name.startswith("tests/slurm/")


def expected_s(name: str, known: dict[str, Part]) -> float:
    """As long as the last time here, or else as recorded."""
    if name in known:
        return known[name].seconds
    file = name.split()[0]
    return recorded("full").get(file, UNKNOWN_S) / SLICES.get(file, 1)


def run_all(names: list[str], code: str, commit: str) -> Iterator[Part]:
    """Each part by a pytest of its own, as they end. The cluster's files come one after the other: there is one cluster
    on a machine. While one of them runs, the other worker takes what needs none."""
    running: set[subprocess.Popen[bytes]] = set()
    left, taking, cluster = list(names), threading.Lock(), threading.Lock()
    stopped = threading.Event()

    def run() -> Part | None:
        with taking:
            name = next((name for name in left if not (needs_cluster(name) and cluster.locked())), left[0])
            left.remove(name)
            held = needs_cluster(name) and cluster.acquire(blocking=False)
        if not needs_cluster(name):
            return one(name)
        if not held:  # nothing else is left
            cluster.acquire()
        try:
            return one(name)
        finally:
            cluster.release()

    def one(name: str) -> Part | None:
        if stopped.is_set():
            return None
        began = time.monotonic()
        file, _, piece = name.partition(" ")
        command = [sys.executable, "-m", "pytest", file, "--full", *(["--slice", piece] if piece else [])]
        env = {"MUSTER_TEST_PATIENCE": PATIENCE, **os.environ}
        with open(log_of(name), "wb") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True)
            running.add(process)
            status = process.wait()
            running.discard(process)
        if stopped.is_set():
            return None
        counts = {word.rstrip("s"): int(n) for n, word in _COUNTS.findall(last_line(log_of(name)))}
        ended = time.strftime("%Y-%m-%d %H:%M")
        return Part(name, code, commit, ended, round(time.monotonic() - began, 1), status, counts)

    with ThreadPoolExecutor(AT_ONCE) as workers:
        try:
            for done in as_completed([workers.submit(run) for _ in names]):
                part = done.result()
                if part is not None:
                    yield part
        except BaseException:  # Ctrl-C, too: what runs is ended and not written down
            stopped.set()
            for process in list(running):
                os.killpg(process.pid, signal.SIGTERM)
            raise


def log_of(name: str) -> Path:
    """Where a part's output goes."""
    return PLACE / (re.sub(r"[/ ]", "-", name.removeprefix("tests/").replace(".py", "")) + ".log")


def last_line(path: Path) -> str:
    lines = path.read_text("utf-8", errors="replace").splitlines()
    return next((line for line in reversed(lines) if _COUNTS.search(line)), "")


def read_parts() -> list[Part]:
    """What is written down, the latest last."""
    path = PLACE / "parts.jsonl"
    if not path.exists():
        return []
    return [Part(**json.loads(line)) for line in path.read_text("utf-8").splitlines()]


def code_hash() -> str:
    """Of every file that git tracks or would track, but texts for people."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    digest = hashlib.sha256()
    for name in sorted(name for name in names if name and not name.endswith((b".md", b".svg", b".png"))):
        path = ROOT / os.fsdecode(name)
        if path.is_file():
            digest.update(name + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def commit_name() -> str:
    """The commit, with a `+` when files were changed since."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=7", "--exclude=*"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def table(parts: list[Part]) -> str:
    """What ran when, at which commit, in Markdown."""
    lines = ["| tests | passed | not | seconds | ended | commit |", "| --- | ---: | ---: | ---: | --- | --- |"]
    for part in parts:
        passed = part.counts.get("passed", 0)
        bad = sum(part.counts.values()) - passed
        wrong = str(bad) if bad or part.good else f"exit {part.status}"
        lines.append(f"| {part.name} | {passed} | {wrong} | {part.seconds:.0f} | {part.ended} | {part.commit} |")
    total = sum(part.seconds for part in parts)
    good = sum(part.good for part in parts)
    lines.append(f"\n{good} of {len(parts)} parts passed, {total / 60:.0f} minutes of tests in all.\n")
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        print("\nstopped; the next start goes on", file=sys.stderr)
        raise SystemExit(130) from None
