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

from configs.schema.checkpoint import KeepSection
from trainer.checkpoint.format import disk
from trainer.checkpoint.format.boxes import GROUPS
from trainer.checkpoint.format.errors import BadCheckpoint, SaveError, Superseded, has_no_room
from trainer.checkpoint.format.manifest import CHECKSUMS, digest_in
from trainer.checkpoint.format.pieces import Piece
from trainer.checkpoint.format.writing import write_bytes
from trainer.checkpoint.keep.removal import Removal
from trainer.checkpoint.keep.shelf import KEEP, Shelf, ask_to_keep
from trainer.checkpoint.load.checkpoint import Checkpoint
from trainer.checkpoint.save.assemble import RunState, assemble
from trainer.checkpoint.save.carry import Base, Carrying, Job, carry_out, plan_carrying
from trainer.checkpoint.save.messages import Messages
from trainer.checkpoint.save.share import PlannedFile, WrittenFile, plan_files, write_files
from trainer.checkpoint.save.staging import HostCopy
from trainer.checkpoint.save.streaming import Copies, copies_from
from trainer.life.entries import MANIFEST, checkpoint_name

FRESH_EVERY = 10  # carried files are copied at every n-th save, so that one bad block is not in all
_WRITING_ERRORS = (OSError, SaveError, BadCheckpoint, ValueError, RuntimeError)
_FOLDER_APPEARS_S = 30.0


@dataclass(frozen=True)
class SaveResult:
    """How a save went. All fields but the times are the same on all ranks.

    bytes_written: of all ranks, without hard links. seconds: until the commit. stall_s: how long training waited, which
    includes the wait for the save before this one."""

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

    word: str  # under which ranks speak of it; another one at a second try
    step: int
    metric: float | None
    state: RunState
    pieces: list[Piece]
    carried: dict[str, str] = field(default_factory=dict)
    carrying: Carrying | None = None
    planned: list[PlannedFile] = field(default_factory=list)
    held: dict[str, memoryview] = field(default_factory=dict)
    copies: Copies | None = None
    files: list[WrittenFile] = field(default_factory=list)
    error: str | None = None
    no_room: bool = False
    began: float = 0.0
    seconds: float = 0.0
    stall_s: float = 0.0
    result: SaveResult | None = None


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
        reference: bool = False,
    ) -> None:
        """`kv` is needed when world_size > 1. `still_newest` is asked by rank 0 before a commit. `timeout_s` is how
        long a rank waits for word from another before the save has failed. With `reference`, frozen parameters stay in
        the checkpoint of another run that they came from."""
        if world_size > 1 and kv is None:
            raise ValueError("saving from several ranks needs a store")
        self.root = Path(root)
        self.shelf = Shelf(self.root, keep or KeepSection(), say)
        self._rank, self._world_size, self._attempt = rank, world_size, attempt
        self._messages = Messages(kv if world_size > 1 else None, attempt, timeout_s)
        self._asynchronous = asynchronous
        self._reference = reference
        self._still_newest = still_newest
        self._say = say
        self._copy = HostCopy(say)
        self._removal = Removal(say)
        self._job: _Job | None = None
        self._thread: threading.Thread | None = None
        self._results: list[SaveResult] = []
        self._saves = 0
        self._words: list[str] = []  # of saves of which messages are still in the store
        self._base: Base | None = None  # rank 0's
        self._carried: dict[str, str] = {}  # name here -> name in the base; every rank's

    def adopt(self, checkpoint: Checkpoint | None, carried: dict[str, str], lineage: bool, foreign: bool) -> None:
        """From now on saves take these tensors (name here -> name there) over from `checkpoint`, which rank 0 gives.
        `lineage`: its steps are those of this run; `foreign`: it lies in another run's folder. Every rank calls it."""
        self._join()
        self._carried = dict(carried)
        self._base = Base.of(checkpoint, lineage, foreign) if checkpoint is not None else None
        if self._base is not None and self._reference:
            self._ask_to_keep(self._base)

    def _ask_to_keep(self, base: Base) -> None:
        """What this run will refer to must not be pruned by the run that it belongs to."""
        plan = plan_carrying(base, self._carried, reference=True)
        for path in dict.fromkeys(source.path for source, _ in plan.references):
            try:
                ask_to_keep(Path(path), self.root)
            except OSError as error:
                self._say(f"{path}/{KEEP} cannot be written ({error.strerror}): see that nothing prunes it there")

    def carried_bytes(self) -> int:
        """What rank 0 will write at the first save of what is carried."""
        if self._base is None:
            return 0
        plan = plan_carrying(self._base, self._carried, reference=self._reference)
        return sum(job.source_size for job in plan.jobs[0])

    def reserve(self, pieces: Sequence[Piece]) -> None:
        """Hold the host memory for saves of such pieces, before the first step: on a GPU that takes seconds."""
        self._copy.reserve(plan_files(pieces, self._rank))

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
        written = [piece for piece in pieces if not (piece.group == "frozen" and piece.key in self._carried)]
        rounded = [piece.key for piece in written if not piece.original]
        if rounded:
            raise ValueError(f"{rounded[0]}: neither the original is here nor a checkpoint that holds it")
        job = _Job(str(self._saves), step, metric, state.frozen_copy(), written, dict(self._carried), began=began)
        try:
            job.planned = plan_files(job.pieces, self._rank)
            job.held = self._copy.take(job.planned)
            job.copies = copies_from(piece.tensor for piece in written if piece.group == "frozen")
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

    def close(self) -> None:
        """Return once old checkpoints are gone. The last call; it waits for no save, which may wait for a dead rank."""
        self._removal.end()

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
        try:
            share = self._lead if self._rank == 0 else self._follow
            outcome = share(job)
            if outcome.get("again"):
                self._removal.wait()
                job.word += "-again"
                outcome = share(job)
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
        """Rank 0: make the folder, write, hear the others, commit, tell them, prune. When the disk was full while old
        checkpoints were being deleted, "again" tells all ranks to try once more."""
        removing = False
        self._words.append(job.word)
        partial = self.root / f"{checkpoint_name(job.step)}.partial-{self._attempt:03d}-{job.word}"
        outcome: dict[str, Any]
        try:
            removing = self._removal.beside(self.root, self._base.stored_bytes if self._base is not None else 0)
            if self.shelf.path(job.step).exists():
                outcome = {"bytes": 0, "there": True}  # this very step is committed already
                self._messages.put(f"{job.word}/go", {"there": True})
            else:
                self._make_folders(partial)
                self._plan_carrying(job)
                self._messages.put(f"{job.word}/go", {"folder": partial.name, "carry": job.carrying is not None})
                outcome = self._write_and_commit(job, partial)
        except Exception as error:  # noqa: BLE001 - every kind of failure is told to all ranks
            again = removing and (job.no_room or has_no_room(error))
            outcome = {"error": _text(error), "superseded": isinstance(error, Superseded), "again": again}
            if again:
                self._say(f"{checkpoint_name(job.step)}: {_text(error)}; once more, when older ones are deleted")
            self._discard(partial)
            self._messages.tell(f"{job.word}/go", outcome)
        self._messages.tell(f"{job.word}/done", outcome)
        job.seconds = time.monotonic() - job.began
        if "error" not in outcome and "there" not in outcome:
            self._after_commit(job)
        return outcome

    def _write_and_commit(self, job: _Job, partial: Path) -> dict[str, Any]:
        failures: list[dict[str, Any]] = []
        try:
            self._write_share(job, partial, job.carrying.jobs[0] if job.carrying else [])
        except _WRITING_ERRORS as error:
            failures.append(self._failure(error))
        files = list(job.files)
        for rank in range(1, self._world_size):
            report = self._messages.get(f"{job.word}/rank-{rank}", f"rank {rank}")
            failures += [report] if "error" in report else []
            files += [WrittenFile.from_json(file) for file in report.get("files", [])]
        self._forget()
        if failures:
            job.no_room = any(failure["no_room"] for failure in failures)
            self._mend({Path(failure["bad"]) for failure in failures if failure["bad"]})
            raise SaveError(failures[0]["error"])
        self._commit(job, partial, files)
        return {"bytes": sum(file.size for file in files if file.written)}

    def _follow(self, job: _Job) -> dict[str, Any]:
        """The other ranks: write, report, hear how it ended."""
        go = self._messages.get(f"{job.word}/go", "rank 0")
        if "error" in go:
            return dict(go)
        if "folder" in go:
            report: dict[str, Any]
            try:
                jobs = self._messages.get(f"{job.word}/carry-{self._rank}", "rank 0") if go["carry"] else []
                self._write_share(job, self.root / go["folder"], [Job.from_json(content) for content in jobs])
                report = {"files": [file.to_json() for file in job.files]}
            except _WRITING_ERRORS as error:
                report = self._failure(error)
            self._messages.put(f"{job.word}/rank-{self._rank}", report)
        outcome: dict[str, Any] = self._messages.get(f"{job.word}/done", "rank 0")
        if "error" not in outcome and "there" not in outcome:
            self._carry_on(job)
        return outcome

    def _failure(self, error: Exception) -> dict[str, Any]:
        """What is told of a rank that could not write its share."""
        bad = str(error.path) if isinstance(error, BadCheckpoint) else None
        return {"error": f"rank {self._rank}: {_text(error)}", "bad": bad, "no_room": has_no_room(error)}

    def _mend(self, found_bad: set[Path]) -> None:
        """Files that were to be taken over are bad: where there are copies the next save will find them whole."""
        if self._base is not None and not self._base.foreign:
            self.shelf.mend(self._base.manifest.step, found_bad)

    def _plan_carrying(self, job: _Job) -> None:
        """Decide which rank takes over which file of the base, and tell them."""
        base = self._base
        if base is None or not job.carried:
            return
        link = base.links + 1 < FRESH_EVERY
        beside_new = any(piece.group == "frozen" for piece in job.pieces)
        job.carrying = plan_carrying(base, job.carried, self._world_size, link, self._reference, beside_new)
        for rank in range(1, self._world_size):
            self._messages.put(f"{job.word}/carry-{rank}", [one.to_json() for one in job.carrying.jobs[rank]])

    def _make_folders(self, partial: Path) -> None:
        if not self.root.is_dir():
            disk.mkdir(str(self.root))
            disk.fsync_dir(str(self.root.parent))
        disk.mkdir(str(partial))
        for group in GROUPS:
            disk.mkdir(str(partial / group))

    def _write_share(self, job: _Job, partial: Path, carry: list[Job]) -> None:
        """Write this rank's files. A folder that another node made may take a while to appear here."""
        if job.error:
            raise SaveError(job.error)
        deadline = time.monotonic() + _FOLDER_APPEARS_S
        while not partial.is_dir() and time.monotonic() < deadline:
            time.sleep(0.1)
        job.files = write_files(str(partial), job.planned, job.held, job.copies) + carry_out(str(partial), carry)

    def _carry_on(self, job: _Job) -> None:
        """After a commit, everything frozen is in a file: later saves take it over from there, not from memory."""
        frozen = [piece.key for piece in job.pieces if piece.group == "frozen"]
        self._carried = {key: key for key in [*job.carried, *frozen]}

    def _commit(self, job: _Job, partial: Path, files: list[WrittenFile]) -> None:
        """The rename is the commit; everything that it makes visible is durable before it."""
        carrying, state = job.carrying or Carrying([], [], {}, {}), job.state
        state.trained_steps.update(carrying.trained_steps)
        state.step_counts.update(carrying.step_counts)
        manifest, sums = assemble(job.step, self._attempt, job.metric, state, files, job.pieces, carrying.references)
        text = manifest.encode()
        write_bytes(str(partial / CHECKSUMS), sums)
        write_bytes(str(partial / MANIFEST), text)
        disk.fsync_dir(str(partial))
        if not self._still_newest():
            raise Superseded(
                f"a newer attempt than {self._attempt} owns {self.root.parent}; step {job.step} is not saved"
            )
        target = self.shelf.path(job.step)
        disk.rename(str(partial), str(target))
        disk.fsync_dir(str(self.root))
        names = [stored.name for stored in manifest.files]
        every = [*files, *(file for _, file in carrying.references)]
        hashes = dict(zip(names, [file.hashes for file in every], strict=True))
        linked = any(not file.written for file in files)
        links = self._base.links + 1 if self._base is not None and linked else 0
        self._base = Base(target.resolve(), manifest, hashes, digest_in(text), lineage=True, own=True, links=links)

    def _after_commit(self, job: _Job) -> None:
        """Pruning; what goes wrong in it does not undo the commit."""
        self._carry_on(job)
        self.shelf.forget(job.step)
        try:
            tag = f"{self._attempt:03d}"
            self.shelf.prune(tag, self._removal.begin if self._asynchronous else disk.remove_tree)
        except OSError as error:
            self._say(f"old checkpoints could not be removed: {_text(error)}")

    def _discard(self, partial: Path) -> None:
        """Remove what a failed save left. A rank that still writes may put this off to the next start's `clean`."""
        try:
            disk.remove_tree(str(partial))
        except OSError as error:
            self._say(f"{partial.name} stays until the next start: {_text(error)}")

    def _forget(self) -> None:
        """Once all ranks reported on a save they have read everything about those before."""
        ranks = range(1, self._world_size)
        names = ["go", "done", *(f"{kind}-{r}" for kind in ("rank", "carry") for r in ranks)]
        *before, newest = self._words
        for message in [f"{word}/{name}" for word in before for name in names]:
            self._messages.drop(message)
        self._words = [newest]


def _text(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
