"""Saving and loading against the plainest way to move the same bytes, and against torch.distributed.checkpoint.

    python benchmarks/checkpoint.py [--pairs 7] [--gb 2.3] [--only saving loading ...] [--dir DIR] [--json FILE]

One process; fp32 parameters with two moments, in the shapes of Llama 3.2 1B with fewer blocks and words. Each pair runs
ours and the other; the two take turns to run first. The figures are medians. Both sides use the same tensors, whose
memory was touched before, and as many files of the same size.

    saving    the whole save, staging to commit; other: `write` of the same tensors into files that are fsynced
    loading   opening, reading and checking; other: `readinto` of the files into the same memory; warm page cache.
              Layouts: as written; written as 4 ranks' rows and read whole, by 3 ranks, by 2 ranks as columns. Columns
              lie in another order in the files: for them also one `pread` per run of bytes into the same tensors
    cold      as loading, without the page cache; other: O_DIRECT into the same memory, 8 MiB at a time. For columns
              each of the two readers wants a part of every page: there also O_DIRECT once by each reader
    dcp       other: torch.distributed.checkpoint, FileSystemWriter (which fsyncs) and FileSystemReader (warm)

    converting    from Muster to Muster, torch.save and DCP; other: `cp` of the checkpoint, then fsync of each file
    frozen    (printed) bytes of the second save, of the first one's, with 90 % of the parameters frozen after training

CPU-seconds are those of the process, user and system, all threads.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from benchmarks.plain import PAGE, Layout, cut, forget, read_directly, read_plainly, read_runs, runs_of
from benchmarks.table import show
from configs.schema.checkpoint import KeepSection
from launch.checkpoint.convert.convert import convert
from trainer.checkpoint.format.boxes import Group, Wanted
from trainer.checkpoint.format.pieces import Piece
from trainer.checkpoint.format.writing import bytes_of
from trainer.checkpoint.load.checkpoint import Checkpoint
from trainer.checkpoint.load.kinds import Kind
from trainer.checkpoint.save.assemble import RunState
from trainer.checkpoint.save.store import CheckpointStore
from trainer.life.entries import checkpoint_name

KINDS = ("saving", "loading", "cold", "dcp", "converting", "frozen")
SLACK_BYTES = 64 << 20  # the files' headers and the gaps to the next page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--gb", type=float, default=2.3, help="bytes of state, 1e9 each")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--dir", help="where to write (default: the folder for temporary files)")
    parser.add_argument("--json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="muster-checkpoint-", dir=options.dir) as folder:
        bench = Bench(Path(folder), options.gb, options.pairs)
        for kind in options.only:
            getattr(bench, kind)()
    show(f"checkpoints of {bench.state.nbytes / 1e9:.2f} GB", bench.rows, options.json)


class State:
    """Named tensors in the shapes of Llama 3.2 1B, next to each other in a page-aligned buffer that was touched."""

    def __init__(self, target_bytes: float) -> None:
        ends = [(8192, 2048), (2048,), (8192, 2048)]
        block = [(2048, 2048)] * 2 + [(512, 2048)] * 2 + [(8192, 2048)] * 2 + [(2048, 8192)] + [(2048,)] * 2
        count = max(1, round((target_bytes / 12 - sum(map(prod, ends))) / sum(map(prod, block))))
        shapes: dict[str, tuple[int, ...]] = {f"ends.{i}": shape for i, shape in enumerate(ends)}
        shapes |= {f"blocks.{b}.{i}": shape for b in range(count) for i, shape in enumerate(block)}
        shapes = {key + state: n for state in ("", ".exp_avg", ".exp_avg_sq") for key, n in sorted(shapes.items())}
        self.nbytes = 4 * sum(map(prod, shapes.values()))
        raw = torch.zeros(self.nbytes + SLACK_BYTES + PAGE, dtype=torch.uint8)
        raw.fill_(1)
        self.memory = bytes_of(raw)[-raw.data_ptr() % PAGE :]
        self.tensors: dict[str, torch.Tensor] = {}
        position = 0
        for key, shape in shapes.items():
            flat = torch.frombuffer(self.memory, dtype=torch.float32, count=prod(shape), offset=position)
            self.tensors[key] = flat.view(shape)
            position += 4 * prod(shape)


class Bench:
    def __init__(self, folder: Path, gb: float, pairs: int) -> None:
        self.folder, self.pairs = folder, pairs
        self.rows: list[dict[str, Any]] = []
        self.state, self.target = State(gb * 1e9), State(gb * 1e9)
        for tensor in self.state.tensors.values():
            tensor.normal_()
        self._layouts: list[Layout] = []

    def compare(self, what: str, ours: Callable[[], Any], other: Callable[[], Any], prepare: Callable[[], Any]) -> None:
        """Add a row: the two take turns to run first, each after `prepare`. One more run of each is not counted."""
        measured: list[list[tuple[float, float]]] = [[], []]
        for pair in range(-1, self.pairs):
            for side in (0, 1) if pair % 2 == 0 else (1, 0):
                prepare()
                began, cpu = time.perf_counter(), time.process_time()
                (ours, other)[side]()
                if pair >= 0:
                    measured[side].append((time.perf_counter() - began, time.process_time() - cpu))
        ratios = sorted(b[0] / a[0] for a, b in zip(*measured, strict=True))
        seconds = [statistics.median(time for time, _ in side) for side in measured]
        cpus = [statistics.median(cpu for _, cpu in side) for side in measured]
        gb = self.state.nbytes / 1e9
        self.rows.append(
            {
                "what": what,
                "pairs": self.pairs,
                "GB/s (first)": gb / seconds[0],
                "GB/s (second)": gb / seconds[1],
                "ratio (median)": statistics.median(ratios),
                "ratio (min)": ratios[0],
                "ratio (max)": ratios[-1],
                "CPU-s/GB (first)": cpus[0] / gb,
                "CPU-s/GB (second)": cpus[1] / gb,
            }
        )
        print(self.rows[-1], file=sys.stderr, flush=True)

    # ---- saving

    def saving(self) -> None:
        ours = self.saver("saving")
        self.compare("saving / write and fsync", ours, self.write_plainly, self.clear)
        background = CheckpointStore(self.folder / "waiting", keep=KeepSection(last=1, best=False))
        stalls = []
        for step in range(1, 5):
            background.save(step, self.pieces(), RunState())
            stalls += [result.stall_s for result in background.wait()]
        background.close()
        print(f"training waits {statistics.median(stalls[1:]):.2f} s for the copy, {stalls[0]:.2f} s the first time")
        shutil.rmtree(self.folder / "waiting")

    def saver(self, name: str) -> Callable[[], None]:
        store = CheckpointStore(self.folder / name, asynchronous=False, keep=KeepSection(last=1000))
        steps = iter(range(1, 1000))

        def save() -> None:
            store.save(next(steps), self.pieces(), RunState())
            (result,) = store.wait()
            assert result.ok, result.error

        return save

    def clear(self) -> None:
        """Remove what earlier saves wrote, and wait until the disk is idle."""
        (self.folder / "saving").mkdir(exist_ok=True)
        for path in self.folder.glob("saving/step-*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name in ("plain", "dcp"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        os.sync()

    def pieces(self, rank: int = 0, world_size: int = 1) -> list[Piece]:
        """A rank's rows of every tensor."""
        found = []
        for key, tensor in self.state.tensors.items():
            offset, rows = cut(tensor.shape[0], world_size, rank)
            group: Group = "optim" if "exp_avg" in key else "model"
            offsets = (offset, *(0 for _ in tensor.shape[1:]))
            part = tensor[offset : offset + rows]
            found.append(Piece(key, group, part, tuple(tensor.shape), offsets, tuple(part.shape)))
        return found

    def write_plainly(self) -> None:
        """Write the same tensors into as many files as a save has: parameters and moments."""
        (self.folder / "plain").mkdir()
        for name, moments in (("model", False), ("optim", True)):
            with (self.folder / "plain" / name).open("wb", buffering=0) as file:
                for key, tensor in self.state.tensors.items():
                    view = bytes_of(tensor) if ("exp_avg" in key) == moments else memoryview(b"")
                    while len(view):
                        view = view[file.write(view) :]
                os.fsync(file.fileno())

    # ---- loading

    def loading(self) -> None:
        for layout in self.layouts():
            self.compare(f"loading, {layout.name} / readinto", layout.load, partial(self.read, layout), _nothing)
        same, columns = self.layouts()[0], self.layouts()[-1]
        runs = runs_of(columns)
        self.compare(f"loading, {columns.name} / pread of each run", columns.load, lambda: read_runs(runs), _nothing)
        self.check(columns)
        self.compare(f"loading, {same.name} / readinto by 4 threads", same.load, lambda: self.read(same, 4), _nothing)

    def cold(self) -> None:
        for layout in self.layouts():
            direct = partial(self.read, layout, direct=True)
            self.compare(f"cold loading, {layout.name} / O_DIRECT", layout.load, direct, partial(forget, layout))
        columns = self.layouts()[-1]

        def twice() -> None:
            for _ in columns.readers:
                self.read(columns, direct=True)

        what = f"cold loading, {columns.name} / O_DIRECT by each reader"
        self.compare(what, columns.load, twice, lambda: forget(columns))

    def layouts(self) -> list[Layout]:
        """The layouts, written once; each is read and checked once."""
        if not self._layouts:
            one, four = self.written_by(1), self.written_by(4)
            self._layouts = [
                Layout("same layout", one, [self.boxes(0, 1)]),
                Layout("4 ranks' rows read whole", four, [self.boxes(0, 1)]),
                Layout("4 ranks' rows read by 3", four, [self.boxes(rank, 3) for rank in range(3)]),
                Layout("4 ranks' rows read by 2 as columns", four, [self.boxes(rank, 2, dim=1) for rank in range(2)]),
            ]
            for layout in self._layouts:
                layout.load()
                self.check(layout)
        return self._layouts

    def written_by(self, world_size: int) -> Path:
        if (path := self.folder / f"by-{world_size}" / checkpoint_name(1)).exists():
            return path
        master = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        root = self.folder / f"by-{world_size}"
        stores = [CheckpointStore(root, rank, world_size, kv=master) for rank in range(world_size)]
        for rank, store in enumerate(stores):
            store.save(1, self.pieces(rank, world_size), RunState())
        assert all(result.ok for store in stores for result in store.wait())
        return stores[0].shelf.path(1)

    def boxes(self, rank: int, world_size: int, dim: int = 0) -> list[Wanted]:
        """A rank's part of every tensor. The parts of all ranks together fill the target's memory."""
        wanted = []
        for key, tensor in self.target.tensors.items():
            d = min(dim, tensor.ndim - 1)
            offset, length = cut(tensor.shape[d], world_size, rank)
            offsets = tuple(offset if i == d else 0 for i in range(tensor.ndim))
            sizes = tuple(length if i == d else n for i, n in enumerate(tensor.shape))
            row = tensor.numel() // tensor.shape[d]
            wanted.append(
                Wanted(key, tensor.view(-1)[offset * row : (offset + length) * row].view(sizes), offsets, sizes)
            )
        return wanted

    def check(self, layout: Layout) -> None:
        for wanted in itertools.chain(*layout.readers):
            inside = tuple(slice(o, o + n) for o, n in zip(wanted.offsets, wanted.sizes, strict=True))
            assert torch.equal(wanted.out, self.state.tensors[wanted.key][inside]), (layout.name, wanted.key)
            wanted.out.zero_()

    def read(self, layout: Layout, threads: int = 1, direct: bool = False) -> None:
        """Read all files of a checkpoint into the target's memory, one file after the other."""
        tasks, position = [], 0
        for file in layout.files():
            size = file.stat().st_size
            parts = max(1, min(threads, size >> 20))
            for begin, length in (cut(-(-size // PAGE), parts, part) for part in range(parts)):
                end = min((begin + length) * PAGE, size)
                tasks.append((file, begin * PAGE, self.target.memory[position + begin * PAGE : position + end]))
            position += -(-size // PAGE) * PAGE
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda task: (read_directly if direct else read_plainly)(*task), tasks))

    # ---- torch.distributed.checkpoint

    def dcp(self) -> None:
        folder = self.folder / "dcp"
        save = lambda: dcp_save(  # noqa: E731
            self.state.tensors, storage_writer=FileSystemWriter(folder), no_dist=True
        )
        self.compare("saving / DCP save", self.saver("saving"), save, self.clear)
        self.clear()
        save()
        reader = lambda: dcp_load(  # noqa: E731
            self.target.tensors, storage_reader=FileSystemReader(folder), no_dist=True
        )
        self.compare("loading, same layout / DCP load", self.layouts()[0].load, reader, _nothing)

    # ---- converting, freezing

    def converting(self) -> None:
        source = self.written_by(1)
        kinds: tuple[Kind, ...] = ("muster", "torch", "dcp")
        for kind in kinds:
            run = lambda to=kind: convert(source, self.folder / "saving/step-1", to)  # noqa: E731
            self.compare(f"converting, Muster to {kind} / cp and fsync", run, lambda: self.copy(source), self.clear)

    def copy(self, source: Path) -> None:
        subprocess.run(["cp", "-r", str(source), str(self.folder / "plain")], check=True)
        for path in (self.folder / "plain").rglob("*"):
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)

    def frozen(self) -> None:
        """Save after all parameters trained, freeze nine tenths of them, keep their moments, and save again."""
        names = [key for key in self.state.tensors if "exp_avg" not in key]
        room, trained = 0.1 * self.state.nbytes / 3, set[str]()
        for name in sorted(names, key=lambda name: self.state.tensors[name].nbytes, reverse=True):
            if self.state.tensors[name].nbytes <= room:
                trained.add(name)
                room -= self.state.tensors[name].nbytes
        trained |= {f"{name}.{state}" for name in trained for state in ("exp_avg", "exp_avg_sq")}
        store = CheckpointStore(self.folder / "frozen", asynchronous=False, attempt=1)
        whole = Checkpoint(self.written_by(1))
        store.adopt(whole, {key: key for key in self.state.tensors if key not in trained}, lineage=True, foreign=False)
        written = []
        for step in (2, 3):
            store.save(step, [piece for piece in self.pieces() if piece.key in trained], RunState())
            (result,) = store.wait()
            assert result.ok, result.error
            written.append(result.bytes_written)
        Checkpoint(store.shelf.path(3)).verify()
        first, second = written
        print(f"90 % frozen: the first save writes {first / 1e9:.2f} GB, the second {second / first:.3f} of it")


def _nothing() -> None:
    return


if __name__ == "__main__":
    main()
