"""What is called with a small but real run folder, in which some bytes or entries are not what a run wrote.

Each target returns whether the input was used; else it was refused with words. Any exception is a defect.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from configs.errors import UserError, printable
from configs.load import load
from configs.schema.checkpoint import KeepSection
from launch.look import run_folder
from launch.verbs import run_verb
from muster.command import VERBS
from slurm.job import lives
from tests.fuzz.targets import apply, goes_on_as_it_says, sealed, seems_same
from trainer.checkpoint.format.errors import BadCheckpoint
from trainer.checkpoint.keep.shelf import Shelf
from trainer.checkpoint.load.checkpoint import Checkpoint
from trainer.life import attempts as life
from trainer.life.entries import MANIFEST, newest_checkpoint
from trainer.life.entries import entries as entries_of
from trainer.life.folder import RunFolder
from trainer.life.lease import Lease
from trainer.life.rows import PassedOver, facts_in, read_rows, rows_backwards
from trainer.preflight import check
from trainer.progress import Progress

RUN = Path(__file__).with_name("run")  # two attempts, two checkpoints of 58 KiB, as a run left them
STORED = {path.relative_to(RUN): path.read_bytes() for path in sorted(RUN.rglob("*")) if path.is_file()}
NEWEST = Path("checkpoints/step-00000004")
UNSIGNED = STORED[NEWEST / MANIFEST].partition(b',"digest":')[0] + b"}"
FILES = (  # small files that another process wrote
    *("metrics.jsonl", "events/node1-rank00000.jsonl", "events/node1-launcher.jsonl", "gpu/node1.jsonl"),
    *("attempts/001/end.json", "attempts/001/start.json", "attempts/000/end.json", "attempts/000/start.json"),
    *("LEASE", "slurm/job.json", "slurm/lives/12-0/outcome.json"),
)


@contextmanager
def a_run() -> Iterator[Path]:
    """A new copy of the run folder."""
    home = Path(tempfile.mkdtemp(prefix="muster-fuzz-"))
    try:
        root = home / "run"
        for name, content in STORED.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)
        yield root
    finally:
        for place, folders, _ in os.walk(home):
            for folder in folders:
                if not os.path.islink(os.path.join(place, folder)):
                    os.chmod(os.path.join(place, folder), 0o700)
        shutil.rmtree(home)


def typed(*words: object) -> tuple[int, str]:
    """Run what a person types after `muster`; returns the exit code and all output."""
    told = io.StringIO()
    with redirect_stdout(told), redirect_stderr(told):
        code = run_verb("muster", "", VERBS, [str(word) for word in words])
    assert told.getvalue().strip(), f"{words}: exit code {code} without a word"
    return code, told.getvalue()


def looks(root: Path) -> str:
    """The output of all commands that look at a run."""
    return "".join(typed(*words)[1] for words in (("report", root), ("watch", root, "--once"), ("status", root)))


# ---- rows and small files --------------------------------------------------------------------------------------------


def rows(data: bytes) -> bool:
    """Input: the first line names the file, the other lines are its content."""
    first, _, content = data.partition(b"\n")
    name = first.decode("ascii", "replace")
    if name not in FILES:
        return False
    with a_run() as root:
        (root / name).write_bytes(content)
        bad = _bad_rows(root / name, content) if name.endswith(".jsonl") else _bad_facts(root / name, content)
        told = looks(root)
        assert not bad or ("passed over" in told and Path(name).name in told), f"{bad} of {name} passed over in silence"
        _resumes(RunFolder(root))
        return not bad


def _bad_rows(path: Path, content: bytes) -> int:
    """How many lines are no rows. Each line is a row, no row, or blank. The last line may be half written."""
    over, back = PassedOver(), PassedOver()
    found = read_rows(path, over)
    *whole, last = content.split(b"\n")
    written = sum(1 for line in whole if line.strip())
    assert len(found) + over.rows[path] in (written, written + bool(last.strip())), "lines are lost"
    if max(map(len, [*whole, last])) < 1 << 20:
        assert list(rows_backwards(path, back))[::-1] == found, "from the end it has other rows"
    assert all(isinstance(row, dict) for row in found)
    no_objects = sum(1 for line in whole if line.strip() and not isinstance(_json(line), dict))
    assert over.rows[path] >= no_objects, "what is no JSON object was taken for a row"
    return over.rows[path]


def _bad_facts(path: Path, content: bytes) -> int:
    over = PassedOver()
    found = facts_in(path, over)
    meant = _json(content)
    assert found == meant or not isinstance(meant, dict), "not what the file holds"
    assert bool(over) == (bool(content.strip()) and not isinstance(meant, dict)), "a bad file is not noted"
    return int(bool(over))


def _json(text: bytes) -> Any:
    try:
        return json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError):
        return None


def _resumes(folder: RunFolder) -> None:
    """Call the readers of these files when a run goes on, or a job is over."""
    for number in life.numbers(folder):
        attempt, seen = life.Attempt(folder, number), run_folder.attempt_view(folder, number)
        assert attempt.start_step == seen.start_step
        assert (attempt.end is None) <= (seen.reason is None), "an end that counts for nothing is shown"
    life.attempts_without_progress(folder)
    lives.failures_without_progress(folder, 4)
    said = io.StringIO()
    was = folder.lease.read_bytes() if folder.lease.is_file() else b""
    try:
        with redirect_stdout(said):
            Lease.take(folder, "node2", 2, print)
    except UserError:
        return
    assert said.getvalue() or not was.strip(), "a lease was taken over in silence"


# ---- manifests that are signed again ---------------------------------------------------------------------------------


def signed(body: bytes) -> bool:
    """Input: a list of changes {"at": [key or index, ...], "value": anything} of a real manifest, which is then signed
    again. All readers must refuse it alike, or take its values and go on where it says."""
    changes, tree = apply(json.loads(UNSIGNED), body)
    if not changes:
        return False
    with a_run() as root:
        place = root / NEWEST
        text = json.dumps(tree, separators=(",", ":")).encode()
        (place / MANIFEST).write_bytes(sealed(text))
        try:
            opened: Checkpoint | None = Checkpoint(place)
        except (BadCheckpoint, UserError):
            opened = None
        listed, shown, verified = (typed("checkpoint", *words)[0] for words in _looks_at(root, place))
        assert (opened is None) == (listed != 0) == (shown != 0), "list, show and opening disagree"
        assert opened is not None or verified != 0, "verify calls good what does not open"
        said: list[str] = []
        found = Shelf(root / "checkpoints", KeepSection(), said.append).newest_good()
        assert found is not None
        assert found.step == (4 if opened else 2)
        assert opened or said, "a bad checkpoint is set aside in silence"
        if opened is None or verified != 0:
            return False
        read = opened.manifest.model_dump(mode="json")
        assert seems_same(read, json.loads(text)), "it means something else"
        goes_on_as_it_says(read, Progress.of(opened.manifest))
        return True


def _looks_at(root: Path, place: Path) -> tuple[tuple[object, ...], ...]:
    return ("list", root), ("show", place), ("verify", place)


# ---- entries ---------------------------------------------------------------------------------------------------------


def entries(data: bytes) -> bool:
    """Input: a line for each change of the run folder, such as ["link", "checkpoints/step-00000009", "/"]."""
    with a_run() as root:
        done = [_do(root, line) for line in data.split(b"\n")[:20]]
        if not any(done):
            return False
        _mentions(root)
        looks(root)
        for words in (("prune", root, "--dry-run"), ("show", root)):
            typed("checkpoint", *words)
        return _goes_on(root)


def _do(root: Path, line: bytes) -> bool:
    step = _json(line)
    if not isinstance(step, list) or not 2 <= len(step) <= 3 or not all(isinstance(word, str) for word in step):
        return False
    what, name, more = (*step, "")[:3]
    try:
        path, other = _inside(root, name), _inside(root, more) if what in ("move", "copy") else root
        if path is None or other is None:
            return False
        if what in ("folder", "file", "pipe", "link", "gone"):
            _clear(path)
        _make(what, path, more, other)
    except (OSError, ValueError):  # no filesystem has such a name
        return False
    return True


def _inside(root: Path, name: str) -> Path | None:
    """The path, or None when it is outside, also through a link."""
    if "\0" in name or os.path.isabs(name):
        return None
    path = root / name
    parent = os.path.realpath(path.parent)
    inside = parent == str(root) or parent.startswith(f"{root}{os.sep}")
    return path if inside and path.name not in ("", ".", "..") and path != root else None


def _clear(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(path):
        if stat.S_ISDIR(os.lstat(path).st_mode):
            shutil.rmtree(path)
        else:
            path.unlink()


def _make(what: str, path: Path, more: str, other: Path) -> None:
    if what == "folder":
        path.mkdir()
    elif what == "file":
        path.write_bytes(more.encode("utf-8", "surrogatepass"))
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "link":
        path.symlink_to(more)
    elif what == "move":
        path.rename(other)
    elif what == "copy" and not other.is_relative_to(path):
        shutil.copytree(path, other, symlinks=True)
    elif what == "closed" and not path.is_symlink():
        os.chmod(path, 0)


def _mentions(root: Path) -> None:
    """Check that `list` and `verify` name every entry that may be a checkpoint."""
    shelf = root / "checkpoints"
    (listed, told), (verified, faults) = (typed("checkpoint", verb, root) for verb in ("list", "verify"))
    try:
        names = {name for name in os.listdir(shelf) if name.startswith("step-")}
    except OSError:
        return
    if not names:
        return
    as_json = json.loads(typed("checkpoint", "list", root, "--json")[1])
    assert {row["name"] for row in as_json[0]["checkpoints"]} == names, "list leaves entries out"
    good = [row["good"] for row in as_json[0]["checkpoints"] if row["kind"] in ("committed", "unusable")]
    assert listed == (0 if all(good) else 1), told
    for entry in entries_of(shelf) if verified != 2 else []:  # verify refuses all where one file may not be read
        if entry.kind.word in ("committed", "unusable"):
            assert printable(str(entry.path)) in faults, f"verify leaves {entry.path.name} out"
    assert all(good) or verified != 0, "verify calls good what list calls bad"


def _goes_on(root: Path) -> bool:
    """Whether a run may go on here. The check before a start and the start itself must agree."""
    problems = check(load("demo", [f"run.dir={root}"]), 1, RunFolder(root), paths=False)
    in_the_way = [problem.text for problem in problems if "begun with another config" not in problem.text]
    try:
        newest = newest_checkpoint(root / "checkpoints")
        said: list[str] = []
        found = Shelf(root / "checkpoints", KeepSection(), said.append).newest_good()
    except UserError:
        return False
    except OSError:
        assert in_the_way, "the check before sees nothing of what ends the run"
        return False
    assert newest is None or (found is not None and (found.path == newest or said)), "an older one is taken in silence"
    steps = [re.fullmatch(r"step-(\d{1,18})", entry.path.name) for entry in entries_of(root / "checkpoints")]
    past = [step[0] for step in steps if step and int(step[1]) > (found.step if found is not None else -1)]
    assert not past, f"it goes on past {past}"
    return not in_the_way
