"""Rows and small files that a crash, another version or a person left: skipped, counted, and never waited for."""

from __future__ import annotations

import io
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from configs.errors import UserError
from launch.look import report
from launch.look.goodput import goodput
from launch.look.run_folder import outcomes, view
from launch.look.watch import Watcher
from launch.monitor.ask import collectives
from launch.monitor.rows import newest_rows
from slurm.job.lives import Left, Life
from slurm.look import status
from tests import made_up
from trainer.life import attempts as life
from trainer.life.attempts import Attempt, End
from trainer.life.events import append_row, read_events
from trainer.life.folder import RunFolder
from trainer.life.lease import Lease
from trainer.life.rows import PassedOver, facts_in, record, row_in, rows_backwards
from trainer.life.rows import read_rows as read

END = End("failed", 40, None, True, "rank_failed")
BAD_ROWS = [
    b"\xff",
    b"[1,2]",
    b"7",
    b'"x"',
    b"null",
    b'{"time_s": 1.0, "event": "\xc3"}',  # half a character
    b"[" * 10_000,
    b'{"a":' * 10_000,
    b'{"time_s": 1e300, "attempt": 0, "event": "x", "step": 1, "loss": 1.0}',
    b'{"time_s": -1.0, "attempt": 0, "event": "x", "step": 1, "loss": 1.0}',
    b'{"time_s": NaN, "attempt": 0, "event": "x", "step": 1, "loss": 1.0}',
    b'{"time_s": "now", "attempt": 0, "event": "x", "step": 1, "loss": 1.0}',
    b'{"time_s": 1.0, "attempt": "0", "event": "x", "step": 1, "loss": 1.0}',
    b'{"time_s": 1.0, "attempt": 0, "event": ["x"], "step": 1, "loss": 1.0}',
    b'{"time_s": 1.0, "attempt": 0, "event": "x", "step": true, "loss": 1.0}',
    b'{"time_s": 1.0, "attempt": 0, "event": "x", "step": 1' + b"0" * 40 + b', "loss": 1.0}',
    b'{"time_s": 1.0, "attempt": 0, "event": "x", "step": 1, "loss": "low"}',
    b'{"time_s": 1.0, "attempt": 0, "event": "x", "step": 1, "loss": 1' + b"0" * 5000 + b"}",
    b'{"time_s": 1.0, "attempt": 0, "event": "x", "step": 1, "loss": 1.0, "phases_s": [1]}',
    b'{"time_s": 1.0, "attempt": 0, "event": "x", "step": 1, "loss": 1.0, "phases_s": {"computing": "long"}}',
    b'{"time_s": 1.0, "attempt": 0, "event": "x", "step": 1, "loss": 1.0, "phases_s": {"computing": 1e300}}',
]


@pytest.fixture
def nothing_waits() -> None:
    """Opening a pipe would wait for ever."""
    signal.alarm(20)
    yield
    signal.alarm(0)


@pytest.mark.parametrize("bad", BAD_ROWS)
def test_a_row_that_nobody_of_ours_wrote_is_passed_over_and_counted(bad: bytes, tmp_path: Path) -> None:
    path, good = tmp_path / "rows", b'{"time_s": 2.0, "attempt": 0, "event": "y", "step": 2, "loss": 2.0}'
    path.write_bytes(b"\n".join([good, bad, good, b""]))
    for reading in (read, lambda *a: list(rows_backwards(*a))):
        over = PassedOver()
        assert [row["step"] for row in reading(path, over)] == [2, 2]
        assert over.told(tmp_path) == "passed over, as it cannot be read: 1 row of rows"


def test_half_a_row_at_the_end_is_being_written(tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes(b'{"step": 1}\n\n{"step": 2')
    for reading in (read, lambda *a: list(rows_backwards(*a))):
        over = PassedOver()
        assert reading(tmp_path / "rows", over) == [{"step": 1}]
        assert not over


def test_a_row_without_end_costs_only_itself(tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes(b'{"step": 1}\n{"a": "' + b"x" * (3 << 20) + b'"}\n{"step": 2}\n')
    over = PassedOver()
    assert read(tmp_path / "rows", over) == [{"step": 1}, {"step": 2}]
    assert over.rows[tmp_path / "rows"] == 1


@given(st.binary(max_size=40) | st.text(max_size=40).map(lambda text: text.encode()))
def test_any_bytes_are_a_row_or_none(data: bytes) -> None:
    assert row_in(data) is None or isinstance(row_in(data), dict)


def a_run(root: Path) -> RunFolder:
    """Two attempts, metrics, events, a monitor's rows, a lease and the life of a job."""
    folder = RunFolder(root)
    made_up.attempt(root, 0, END, job="7", world_size=2)
    made_up.attempt(root, 1, None, job="7", start_step=40, world_size=2)
    made_up.rows(root, range(1, 61), phases_s={"computing": 50.0}, consumed_samples=8)
    made_up.rows(root, range(41, 50), number=1, phases_s={"computing": 9.0}, consumed_samples=8)
    made_up.lease(root, "7")
    made_up.outcome(root, "7", 0, "failed", "rank_failed", age_s=50)
    for path in (folder.events, folder.gpu):
        path.mkdir()
    append_row(folder.events / "a.jsonl", {"time_s": time.time() - 5, "attempt": 1, "event": "saved"})
    append_row(folder.gpu / "node1.jsonl", {"kind": "node", "version": 1, "node": "node1"})
    append_row(folder.gpu / "node1.jsonl", made_up.second(1, 2, 1.0))
    return folder


def all_readers(folder: RunFolder) -> str:
    """The output of `report`, `watch` and `slurm status`, in one text."""
    console = Console(width=200, file=io.StringIO(), highlight=False)
    console.print(Watcher(folder).look(None))
    assert isinstance(console.file, io.StringIO)
    found = view(folder.root)
    rows = [status.Row(folder.root, found, None, "7", "running", True)]
    notes = status._notes(rows, status.Queue({}, None), None)
    told = [*report.lines(goodput(folder)), *status.table_of(rows), *notes, *status.history(found, None)]
    life.attempts_without_progress(folder)
    outcomes(folder)
    return "\n".join([console.file.getvalue(), *told])


@pytest.mark.parametrize("bad", BAD_ROWS[:9])
@pytest.mark.parametrize("name", ["metrics.jsonl", "events/a.jsonl", "gpu/node1.jsonl"])
def test_all_who_look_pass_over_the_same_row_and_say_so(name: str, bad: bytes, tmp_path: Path) -> None:
    folder = a_run(tmp_path)
    before = all_readers(folder)
    assert "passed over" not in before
    path = tmp_path / name
    lines = path.read_bytes().splitlines()
    if name.startswith("gpu"):  # a reader of that file reads lines of one kind only
        bad = bad if bad.startswith(b'{"time_s": 1e300') else b'{"kind": "second", ' + bad
    path.write_bytes(b"\n".join([*lines[:-1], bad, lines[-1], bad, b""]))
    told = all_readers(folder)
    assert f"{2} rows of {name}" in told
    same = lambda text: [line for line in text.splitlines() if line.startswith(("goodput", "bought"))]  # noqa: E731
    assert same(told) == same(before)


@pytest.mark.parametrize(
    "content", [b"[]", b"7", b'"x"', b"\xff", b"[" * 10_000, b'{"reason": 7}', b'{"time_s": 1e300}']
)
@pytest.mark.parametrize(
    "name",
    ["attempts/000/end.json", "attempts/001/start.json", "LEASE", "slurm/lives/7-0/outcome.json", "slurm/job.json"],
)
def test_a_small_file_that_is_none_of_ours_says_nothing(name: str, content: bytes, tmp_path: Path) -> None:
    folder = a_run(tmp_path)
    (tmp_path / name).write_bytes(content)
    told = all_readers(folder)
    if content in (b"[]", b"7", b'"x"', b"\xff"):
        assert name in told


def fifo_or_folder(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


@pytest.mark.usefixtures("nothing_waits")
@pytest.mark.parametrize(
    ("make", "what"),
    [
        (os.mkfifo, "it is a pipe, not a file"),
        (Path.mkdir, "it is a folder, not a file"),
        (lambda path: path.symlink_to(path), "it is a link that cannot be followed: Too many levels of symbolic links"),
    ],
)
@pytest.mark.parametrize(
    "name",
    [
        *("metrics.jsonl", "events/a.jsonl", "gpu/node1.jsonl", "LEASE"),
        *("attempts/000/end.json", "attempts/001/start.json", "slurm/lives/7-0/outcome.json"),
    ],
)
def test_no_reader_waits_for_a_pipe(name: str, make: Callable[[Path], object], what: str, tmp_path: Path) -> None:
    folder = a_run(tmp_path)
    fifo_or_folder(tmp_path / name, make)
    told = all_readers(folder)
    assert f"{name} ({what})" in told


def test_an_end_that_is_none_is_a_failure_and_may_be_written_anew(tmp_path: Path) -> None:
    attempt = Attempt(RunFolder(tmp_path), 0)
    made_up.attempt(tmp_path, 0, END)
    assert attempt.end == END
    whole = {"reason": "failed", "step": 4, "checkpoint": None, "requeue": False}
    for bad in ([], {"reason": "won"}, whole | {"step": "4"}, whole | {"reason": "won"}, whole | {"time_s": 1e300}):
        (attempt.path / "end.json").write_text(json.dumps(bad))
        assert attempt.end is None
        assert life.attempts_without_progress(RunFolder(tmp_path)) == 1
        found = view(tmp_path)  # readers of the run and the decision agree
        assert found.newest is not None
        assert (found.newest.reason, found.newest.requeue) == (None, False)
        assert found.passed_over.files == {attempt.path / "end.json": "not what we write there"}
    attempt.write_end(END)
    assert attempt.end == END


def test_only_our_spelling_of_a_number_is_an_attempt(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for name in ("000", "001", "1", "0002", "²", "٠٠٣", "9" * 40, "new"):
        (folder.attempts / name).mkdir(parents=True)
    assert life.numbers(folder) == [0, 1]
    (folder.attempts / "002").touch()  # no attempt can get this number now
    assert Attempt.open(folder).number == 3


@pytest.mark.usefixtures("nothing_waits")
def test_a_lease_that_no_launcher_made_is_refused_by_name(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)

    def refused(why: str) -> None:
        with pytest.raises(UserError, match=why):
            Lease.take(folder, "here", 0, print)

    folder.lease.write_text("[1]")
    refused("LEASE: it does not say who holds the run folder; if you know that no run holds the folder, remove it")
    folder.lease.write_text('{"token": "t", "pid": "x"}')
    refused("cannot be asked from here")
    fifo_or_folder(folder.lease, os.mkfifo)
    refused("it is a pipe, not a file; if you know")
    folder.lease.unlink()  # as advised
    for torn in (b"", b'{"token": "t', b"\0" * 100):
        folder.lease.write_bytes(torn)
        Lease.take(folder, "here", 0, print).release()


def test_words_of_nodes_that_are_none(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (tmp_path / "slurm").mkdir()
    one = Life(folder, "7", 0)
    one.leave(Left("node1", 1, -1))
    for number, bad in enumerate(([1], {"node": "node2"}, {"node": "node2", "code": "1", "before": 0})):
        (one.path / f"node-{number}.json").write_text(json.dumps(bad))
    assert one.left() == {"node1": Left("node1", 1, -1)}
    (one.path / "outcome.json").write_text('{"job": "7", "reason": "failed", "cause": null, "time_s": 1.0}')
    assert outcomes(folder) == view(tmp_path).outcomes == ()
    assert list(view(tmp_path).passed_over.files) == [one.path / "outcome.json"]


def test_an_event_without_a_time_or_a_name_is_none(tmp_path: Path) -> None:
    folder, over = RunFolder(tmp_path), PassedOver()
    folder.events.mkdir()
    (folder.events / "a.jsonl").write_text('{"event": "x"}\n{"time_s": 1}\n{"time_s": 2, "event": "y"}\n')
    assert [row["event"] for row in read_events(folder, over)] == ["y"]
    assert over.rows[folder.events / "a.jsonl"] == 2


@pytest.mark.parametrize(
    "bad",
    [{"ranks": 7}, {"ranks": [7]}, {"gpus": None}, {"host": []}, {"ranks": [{"rank": 0}]}, {"time_s": None}]
    + [{"ranks": [{"rank": 0, "step": 1, "still_s": 0.0, "phase": phase}]} for phase in ("dreaming", 7, None)],
)
def test_a_row_of_a_monitor_holds_what_every_one_does(bad: dict[str, object], tmp_path: Path) -> None:
    path, over = tmp_path / "node1.jsonl", PassedOver()
    append_row(path, {"kind": "node", "version": 1})
    append_row(path, made_up.second(1, 2, 2.0))
    append_row(path, made_up.second(1, 2, 1.0) | bad)
    assert len(newest_rows(path, "second", 2, over)) == 1
    assert over.rows[path] == 1


def test_a_record_has_every_field_of_its_type() -> None:
    assert record(Left, {"node": "a", "code": 1, "before": -1, "more": 2}) == Left("a", 1, -1)
    for bad in (None, [], {}, {"node": "a", "code": True, "before": -1}, {"node": 1, "code": 1, "before": -1}):
        assert record(Left, bad) is None


def test_what_a_hung_rank_answered_may_be_anything() -> None:
    for bad in (b"", b"[]", b'{"entries": 7}', b"\xff", b"[" * 10_000):
        assert collectives(bad) is None
    one = {"process_group": ["0"], "collective_seq_id": 3}
    told = json.dumps({"entries": [7, {}, one, {"collective_seq_id": "4"}]})
    assert collectives(told.encode()) == 3


def test_what_was_passed_over_is_one_line_that_moves_no_cursor(tmp_path: Path) -> None:
    over = PassedOver()
    for number in range(9):
        over.rows[tmp_path / f"events/\x1b[2J{number}\n.jsonl"] += 1
    assert over.told(tmp_path).endswith(" and of 6 more files")
    assert "\x1b" not in over.told(tmp_path)
    assert facts_in(tmp_path / "nothing", over) == {}
