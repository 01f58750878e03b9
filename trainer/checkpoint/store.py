"""Saving: every rank writes its share, rank 0 commits by one rename, and training goes on meanwhile.

The main thread takes a host copy and leaves; a saver thread per rank does the rest. Saver threads run no collectives:
they tell each other through a store how it went. A save is whole or it is not there: any error on any rank removes the
partial folder, and every rank hears of it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch.distributed import Store  # type: ignore[attr-defined]

from configs.schema import KeepSection
from trainer.checkpoint import disk
from trainer.checkpoint.assemble import RunState, assemble
from trainer.checkpoint.errors import SaveError, Superseded
from trainer.checkpoint.files import write_bytes
from trainer.checkpoint.manifest import CHECKSUMS, MANIFEST
from trainer.checkpoint.messages import Messages
from trainer.checkpoint.pieces import GROUPS, Piece
from trainer.checkpoint.share import FrozenBase, PlannedFile, WrittenFile, plan_files, signature_of, write_files
from trainer.checkpoint.shelf import Shelf
from trainer.checkpoint.staging import HostCopy
from trainer.folder import checkpoint_name

FRESH_EVERY = 10  # frozen tensors are written anew at every n-th save, so that one bad block is not in all
_FOLDER_APPEARS_S = 30.0


@dataclass(frozen=True)
class SaveResult:
    """How a save went, the same on all ranks but for the times. `bytes_written` is over all ranks, links excluded;
    `seconds` ends with the commit, before pruning; `stall_s` is how long training stood still, waiting for the save
    before this one included."""

    step: int
    ok: bool
    error: str | None
    seconds: float
    stall_s: float
    bytes_written: int
    superseded: bool = False


@dataclass
class _Job:
    """One save of this rank."""

    number: int
    step: int
    metric: float | None
    state: RunState
    pieces: list[Piece]
    planned: list[PlannedFile] = field(default_factory=list)
    copies: dict[str, memoryview] = field(default_factory=dict)
    files: list[WrittenFile] = field(default_factory=list)
    error: str | None = None
    began: float = 0.0
    seconds: float = 0.0
    stall_s: float = 0.0
    result: SaveResult | None = None

    @property
    def frozen(self) -> list[PlannedFile]:
        return [file for file in self.planned if file.group == "frozen"]


class CheckpointStore:
    """The checkpoints of a run. Every rank has one; `save`, `poll`, `wait` are called by the main thread of each.

    `shelf` (list, clean, newest good, prune, space) is for rank 0 alone.
    """

    def __init__(
        self,
        root: str | Path,
        rank: int = 0,
        world_size: int = 1,
        kv: Store | None = None,
        attempt: int = 0,
        keep: KeepSection | None = None,
        asynchronous: bool = True,
        still_newest: Callable[[], bool] = lambda: True,
        say: Callable[[str], None] = print,
        timeout_s: float = 1800.0,
    ) -> None:
        """`kv` is needed when world_size > 1. `still_newest` is asked by rank 0 before a commit. `timeout_s` is how
        long a rank waits for word from another before the save has failed."""
        if world_size > 1 and kv is None:
            raise ValueError("saving from several ranks needs a store")
        self.root = Path(root)
        self.shelf = Shelf(self.root, keep or KeepSection(), say)
        self._rank, self._world_size, self._attempt = rank, world_size, attempt
        self._messages = Messages(kv if world_size > 1 else None, attempt, timeout_s)
        self._asynchronous = asynchronous
        self._still_newest = still_newest
        self._say = say
        self._copy = HostCopy()
        self._job: _Job | None = None
        self._thread: threading.Thread | None = None
        self._results: list[SaveResult] = []
        self._saves = 0
        self._base: FrozenBase | None = None

    def save(self, step: int, pieces: Sequence[Piece], state: RunState, metric: float | None = None) -> None:
        """Begin to save; every rank calls it at the same step. Returns when the tensors may change again.

        `pieces` are this rank's, `metric` is what `keep.best` compares (lower is better). Errors come from `poll` and
        `wait`, on all ranks alike; only a contradiction in the arguments is raised here, as ValueError.
        """
        began = time.monotonic()
        for piece in pieces:
            piece.check()
        self._join()
        self._saves += 1
        metric = metric if metric is not None and metric == metric and abs(metric) != float("inf") else None
        job = _Job(self._saves, step, metric, state.frozen_copy(), list(pieces), began=began)
        try:
            job.planned = plan_files(job.pieces, self._rank)
            changing = [file for file in job.planned if file.group != "frozen"]
            views = self._copy.take([file.layout for file in changing])
            job.copies = dict(zip([file.path for file in changing], views, strict=True))
        except (RuntimeError, MemoryError) as error:  # no memory: told to the others, not left for them to wait on
            job.error = _text(error)
        self._job = job
        if self._asynchronous:
            self._thread = threading.Thread(target=self._run, args=(job,), name="muster-saver", daemon=True)
            self._thread.start()
        else:
            self._run(job)
        job.stall_s = time.monotonic() - began
        if not self._asynchronous:
            self._join()

    def poll(self) -> list[SaveResult]:
        """Results of saves that ended and were not told yet, oldest first; never waits. Raises Superseded when a newer
        attempt has taken the run over."""
        if self._job is not None and self._job.result is not None:
            self._join()
        results, self._results = self._results, []
        if any(result.superseded for result in results):
            raise Superseded(str(next(result.error for result in results if result.superseded)))
        return results

    def wait(self) -> list[SaveResult]:
        """As `poll`, after the save in flight has ended."""
        self._join()
        return self.poll()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._job is not None:
            result = self._job.result
            assert result is not None
            self._results.append(replace(result, stall_s=self._job.stall_s))
            self._job = None

    def _run(self, job: _Job) -> None:
        """The saver thread: whatever happens ends in a result."""
        outcome: dict[str, Any]
        try:
            outcome = self._lead(job) if self._rank == 0 else self._follow(job)
        except Exception as error:  # noqa: BLE001 - a saver thread must end in a result, or training waits for ever
            outcome = {"error": _text(error)}
        job.result = SaveResult(
            step=job.step,
            ok="error" not in outcome,
            error=outcome.get("error"),
            seconds=job.seconds or time.monotonic() - job.began,
            stall_s=0.0,
            bytes_written=outcome.get("bytes", 0),
            superseded=outcome.get("superseded", False),
        )

    def _lead(self, job: _Job) -> dict[str, Any]:
        """Rank 0: make the folder, write, hear the others, commit, tell them, prune."""
        partial = self.root / f"{checkpoint_name(job.step)}.partial-{self._attempt:03d}-{job.number}"
        outcome: dict[str, Any]
        try:
            if self.shelf.path(job.step).exists():
                outcome = {"bytes": 0}  # this very step is committed already
                self._messages.put(f"{job.number}/go", {"there": True})
            else:
                self._make_folders(partial)
                self._messages.put(f"{job.number}/go", {"folder": partial.name})
                outcome = self._write_and_commit(job, partial)
        except Exception as error:  # noqa: BLE001 - every kind of failure is told to all ranks
            outcome = {"error": _text(error), "superseded": isinstance(error, Superseded)}
            self._discard(partial)
            self._messages.tell(f"{job.number}/go", outcome)
        self._messages.tell(f"{job.number}/done", outcome)
        job.seconds = time.monotonic() - job.began
        if "error" not in outcome:
            self._after_commit(job)
        return outcome

    def _write_and_commit(self, job: _Job, partial: Path) -> dict[str, Any]:
        own_error: str | None = None
        try:
            self._write_share(job, partial)
        except (OSError, SaveError, ValueError, RuntimeError) as error:
            own_error = f"rank 0: {_text(error)}"
        reports = [self._messages.get(f"{job.number}/rank-{r}", f"rank {r}") for r in range(1, self._world_size)]
        self._forget(job.number)
        errors = [own_error, *(report.get("error") for report in reports)]
        failed = next((error for error in errors if error), None)
        if failed:
            raise SaveError(failed)
        files = job.files + [WrittenFile.from_json(file) for report in reports for file in report["files"]]
        self._commit(job, partial, files)
        return {"bytes": sum(file.size for file in files if file.written)}

    def _follow(self, job: _Job) -> dict[str, Any]:
        """The other ranks: write, report, hear how it ended."""
        go = self._messages.get(f"{job.number}/go", "rank 0")
        if "error" in go:
            return dict(go)
        if "folder" in go:
            report: dict[str, Any]
            try:
                self._write_share(job, self.root / go["folder"])
                report = {"files": [file.to_json() for file in job.files]}
            except (OSError, SaveError, ValueError, RuntimeError) as error:
                report = {"error": f"rank {self._rank}: {_text(error)}"}
            self._messages.put(f"{job.number}/rank-{self._rank}", report)
        outcome: dict[str, Any] = self._messages.get(f"{job.number}/done", "rank 0")
        if "error" not in outcome:
            self._keep_base(job)
        return outcome

    def _make_folders(self, partial: Path) -> None:
        if not self.root.is_dir():
            disk.mkdir(str(self.root))
            disk.fsync_dir(str(self.root.parent))
        disk.mkdir(str(partial))
        for group in GROUPS:
            disk.mkdir(str(partial / group))

    def _write_share(self, job: _Job, partial: Path) -> None:
        """Write this rank's files. A folder that another node made may take a while to appear here."""
        if job.error:
            raise SaveError(job.error)
        deadline = time.monotonic() + _FOLDER_APPEARS_S
        while not partial.is_dir() and time.monotonic() < deadline:
            time.sleep(0.1)
        job.files = write_files(str(partial), job.planned, job.copies, self._base_for(job))

    def _base_for(self, job: _Job) -> FrozenBase | None:
        base = self._base
        if base is None or base.links + 1 >= FRESH_EVERY:
            return None
        return base if base.signature == signature_of(job.frozen, job.state.trained_steps) else None

    def _keep_base(self, job: _Job) -> None:
        """After a commit: later saves may link to its files of frozen tensors."""
        files = [file for file in job.files if file.path.startswith("frozen/")]
        if files:
            links = 0 if files[0].written or self._base is None else self._base.links + 1
            signature = signature_of(job.frozen, job.state.trained_steps)
            self._base = FrozenBase(str(self.shelf.path(job.step)), files, signature, links)

    def _commit(self, job: _Job, partial: Path, files: list[WrittenFile]) -> None:
        """The rename is the commit; everything that it makes visible is durable before it."""
        manifest, sums = assemble(job.step, self._attempt, job.metric, job.state, files, job.pieces)
        write_bytes(str(partial / CHECKSUMS), sums)
        write_bytes(str(partial / MANIFEST), manifest)
        disk.fsync_dir(str(partial))
        if not self._still_newest():
            raise Superseded(
                f"a newer attempt than {self._attempt} owns {self.root.parent}; step {job.step} is not saved"
            )
        disk.rename(str(partial), str(self.shelf.path(job.step)))
        disk.fsync_dir(str(self.root))

    def _after_commit(self, job: _Job) -> None:
        """Pruning; what goes wrong in it does not undo the commit."""
        self._keep_base(job)
        self.shelf.remember(job.step, job.metric)
        try:
            self.shelf.prune(f"{self._attempt:03d}")
        except OSError as error:
            self._say(f"old checkpoints could not be removed: {_text(error)}")

    def _discard(self, partial: Path) -> None:
        """Remove what a failed save left. A rank that still writes may put this off to the next start's `clean`."""
        try:
            disk.remove_tree(str(partial))
        except OSError as error:
            self._say(f"{partial.name} stays until the next start: {_text(error)}")

    def _forget(self, number: int) -> None:
        """Once all ranks reported on a save they have read everything about the one before."""
        names = ["go", "done", *(f"rank-{r}" for r in range(1, self._world_size))]
        for name in names if number > 1 else []:
            self._messages.drop(f"{number - 1}/{name}")


def _text(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
