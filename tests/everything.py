"""`make test-all`: every test there is, file by file, two files at a time; goes on where it was stopped.

What passed is written down with the hash of the code that it passed with, and is not run again while that is the same.
A file that failed, or that Ctrl-C cut short, is run again by the next start. The table at the end says what ran when,
at which commit.
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
_COUNTS = re.compile(r"(\d+) (passed|failed|errors?|skipped)")


@dataclass(frozen=True)
class Part:
    """A file of tests, as the last run of it ended."""

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
    names = files_of_tests()
    left = [name for name in names if name in ALWAYS or not ((p := known.get(name)) and p.good and p.code == code)]
    seconds = recorded("full")
    left.sort(key=lambda name: -seconds.get(name, UNKNOWN_S))
    print(f"{len(names)} files of tests, {len(names) - len(left)} passed with this code; logs in {PLACE}", flush=True)
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


def files_of_tests() -> list[str]:
    """Every file of tests but those that need a GPU."""
    found = (path.relative_to(ROOT) for path in (ROOT / "tests").rglob("test_*.py"))
    return sorted(str(path) for path in found if path.parts[1] != "gpu")


def run_all(names: list[str], code: str, commit: str) -> Iterator[Part]:
    """Each file by a pytest of its own, as they end. The cluster's files come one after the other: there is one cluster
    on a machine."""
    running: set[subprocess.Popen[bytes]] = set()
    cluster = threading.Lock()
    stopped = threading.Event()

    def run(name: str) -> Part | None:
        if not name.startswith("tests/slurm/"):
            return one(name)
        with cluster:
            return one(name)

    def one(name: str) -> Part | None:
        if stopped.is_set():
            return None
        began = time.monotonic()
        command = [sys.executable, "-m", "pytest", name, "--full"]
        with open(log_of(name), "wb") as log:
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
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
            for done in as_completed([workers.submit(run, name) for name in names]):
                part = done.result()
                if part is not None:
                    yield part
        except BaseException:  # Ctrl-C, too: what runs is ended and not written down
            stopped.set()
            for process in list(running):
                os.killpg(process.pid, signal.SIGTERM)
            raise


def log_of(name: str) -> Path:
    """Where a file's output goes."""
    return PLACE / (name.removeprefix("tests/").removesuffix(".py").replace("/", "-") + ".log")


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
    lines.append(f"\n{good} of {len(parts)} files passed, {total / 60:.0f} minutes of tests in all.\n")
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        print("\nstopped; the next start goes on", file=sys.stderr)
        raise SystemExit(130) from None
