"""Every kind of fault in every place of a checkpoint, met by two ranks. If the checkpoint is named, it is refused. If a
run continues, all ranks fall back, recover the file or refuse, and all do the same. Nothing but a whole checkpoint is
loaded."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from test_faults import flip, signed, truncate, whole

from configs.config import Config
from configs.errors import UserError
from configs.schema.checkpoint import KeepSection
from tests.distributed import run_ranks, tiny, train
from trainer.checkpoint.keep.shelf import Shelf
from trainer.checkpoint.save.assemble import RunState
from trainer.checkpoint.save.store import CheckpointStore
from trainer.engines.base import Engine
from trainer.life.entries import checkpoint_name
from trainer.life.stop import StopWish
from trainer.run import Run
from trainer.start import start

STEPS = (1, 2)
FALLS_BACK, RECOVERS, LOADS, REFUSED = "falls back", "recovers", "loads", "refused"
PLACES = ("model", "header", "frozen", "optim", "checksums.json", "manifest.json")


@dataclass(frozen=True)
class Cell:
    """One fault of the newest checkpoint: what continuing from the checkpoint does, and what naming it does."""

    kind: str
    place: str
    continuing: str
    named: str = REFUSED

    @property
    def name(self) -> str:
        return f"{self.kind}, {self.place}"


def in_place(folder: Path, place: str) -> Path:
    """The file in a place of the checkpoint."""
    group = "model" if place == "header" else place
    return folder / place if place.endswith(".json") else sorted((folder / group).iterdir())[0]


def other(path: Path, base: Path, step: int = 1) -> Path:
    """The same file of another checkpoint."""
    return base / checkpoint_name(step) / path.relative_to(path.parents[0 if path.suffix == ".json" else 1])


def instead(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def device(path: Path) -> None:
    """Make a device that never ends; a socket where devices cannot be made."""
    try:
        os.mknod(path, 0o020666, os.makedev(1, 5))
    except PermissionError:
        a_socket(path)


def a_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the names of sockets must be short
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as made:
        made.bind(path.name)
    os.chdir(here)


def linked(path: Path) -> None:
    shutil.move(path, path.parent / "elsewhere")
    path.symlink_to("elsewhere")


Damage = Callable[[Path, Path], object]  # (the file, a folder with another model's checkpoint)
KINDS: dict[str, Damage] = {
    "truncated": lambda path, _: truncate(path, -3),
    "emptied": lambda path, _: truncate(path, 0),
    "first half alone": lambda path, _: truncate(path, path.stat().st_size // 2),
    "bit flipped": lambda path, _: flip(path, path.stat().st_size // 2),
    "last bit flipped": lambda path, _: flip(path, -1, 0),
    "zero-filled": lambda path, _: path.write_bytes(bytes(path.stat().st_size)),
    "missing": lambda path, _: path.unlink(),
    "of another step": lambda path, _: shutil.copy(other(path, path.parents[1 if path.suffix == ".json" else 2]), path),
    "of another model": lambda path, foreign: shutil.copy(in_place(foreign, place_of(path)), path),
    "permission denied": lambda path, _: path.chmod(0),
    "a symbolic link": lambda path, _: linked(path),
    "a dangling link": lambda path, _: instead(path, lambda p: p.symlink_to("nowhere")),
    "a pipe": lambda path, _: instead(path, os.mkfifo),
    "a socket": lambda path, _: instead(path, a_socket),
    "a device": lambda path, _: instead(path, device),
    "a folder": lambda path, _: instead(path, Path.mkdir),
}
HEADER_KINDS: dict[str, Damage] = {
    "bit flipped": lambda path, _: flip(path, 30),
    "length's bit flipped": lambda path, _: flip(path, 0, 0),
    "huge length": lambda path, _: path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:]),
    "zero-filled": lambda path, _: path.write_bytes(bytes(200) + path.read_bytes()[200:]),
}


def place_of(path: Path) -> str:
    return path.name if path.suffix == ".json" else path.parent.name


def resign(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    fields = json.loads((folder / "manifest.json").read_bytes())
    change(fields)
    (folder / "manifest.json").write_bytes(signed(fields))


def move_out(folder: Path, path: str) -> None:
    """Move a right file out of the folder. A manifest with a right digest names its new place."""
    file = in_place(folder, "model")
    shutil.copy(file, folder.parent / "outside.safetensors")
    resign(folder, lambda m: rename_file(m, str(file.relative_to(folder)), path.format(parent=folder.parent)))


def rename_file(manifest: dict[str, Any], old: str, new: str) -> None:
    next(file for file in manifest["files"] if file["path"] == old)["path"] = new


def folder_elsewhere(folder: Path) -> None:
    shutil.move(folder / "model", folder.parent / "elsewhere")
    (folder / "model").symlink_to("../elsewhere")


WHOLE: dict[str, tuple[Callable[[Path, Path], object], str, str]] = {
    "a path with ..": (lambda f, _: move_out(f, "model/../../outside.safetensors"), FALLS_BACK, REFUSED),
    "an absolute path": (lambda f, _: move_out(f, "{parent}/outside.safetensors"), FALLS_BACK, REFUSED),
    "a linked folder": (lambda f, _: folder_elsewhere(f), FALLS_BACK, REFUSED),
    "a file for a folder": (lambda f, _: (shutil.rmtree(f / "optim"), (f / "optim").touch()), FALLS_BACK, REFUSED),
    "a folder missing": (lambda f, _: shutil.rmtree(f / "optim"), FALLS_BACK, REFUSED),
    "no permission for a folder": (lambda f, _: (f / "model").chmod(0), REFUSED, REFUSED),
    "a step's name on another's": (
        lambda f, _: (shutil.rmtree(f), shutil.copytree(f.with_name(checkpoint_name(1)), f)),
        FALLS_BACK,
        REFUSED,  # a copy may have any name except that of another step
    ),
    "another model": (lambda f, foreign: (shutil.rmtree(f), shutil.copytree(foreign, f)), REFUSED, REFUSED),
    "signed again, another step in its loop": (
        lambda f, _: resign(f, lambda m: m["loop"].update(step=1)),
        FALLS_BACK,
        REFUSED,
    ),
    "signed again, the data from its beginning": (
        lambda f, _: resign(f, lambda m: m["loop"].update(consumed_samples=0)),
        FALLS_BACK,
        REFUSED,
    ),
    "extra files": (
        lambda f, _: [p.write_bytes(b"extra") for p in (f / "x", f / "model/x", f / "model/z.safetensors")],
        LOADS,
        LOADS,
    ),
    "nothing at all": (lambda f, _: None, LOADS, LOADS),
}


def cell_of(kind: str, place: str) -> Cell:
    if kind == "permission denied":
        return Cell(kind, place, REFUSED)
    if place != "frozen":
        return Cell(kind, place, FALLS_BACK)
    if kind == "of another step":  # frozen: the same bytes
        return Cell(kind, place, LOADS, LOADS)
    return Cell(kind, place, REFUSED if kind == "a folder" else RECOVERS)  # a folder is not renamed over


CELLS = [
    *(cell_of(kind, place) for kind in KINDS for place in PLACES if place != "header"),
    *(Cell(kind, "header", FALLS_BACK) for kind in HEADER_KINDS),
    *(Cell(kind, "whole", continuing, named) for kind, (_, continuing, named) in WHOLE.items()),
]
# Every test run checks some cells of each place, `make faults` all of them.
PARAMETERS = [
    pytest.param(cell, id=cell.name, marks=() if cell.place == "whole" or index % 4 == 0 else pytest.mark.full)
    for index, cell in enumerate(CELLS)
]


def damage(cell: Cell, folder: Path, foreign: Path) -> None:
    if cell.place == "whole":
        WHOLE[cell.kind][0](folder, foreign)
    else:
        kinds = HEADER_KINDS if cell.place == "header" else KINDS
        kinds[cell.kind](in_place(folder, cell.place), foreign)


# ---- on the ranks


def obey_permissions() -> None:
    """Drop the capabilities that let root ignore mode bits."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    held = (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.capget(header, held) == 0
    for capability in (1, 2):  # DAC_OVERRIDE, DAC_READ_SEARCH
        held[0] &= ~(1 << capability)
    assert libc.capset(header, held) == 0


def content_of(engine: Engine) -> str:
    """A digest of everything that this rank holds."""
    found = xxhash.xxh3_64()
    for piece in sorted(engine.pieces(), key=lambda p: p.label):
        found.update(f"{piece.label} {piece.tensor.dtype}".encode())
        found.update(piece.tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return str(found.hexdigest())


def go_through(config: dict[str, Any], sound: Path, folder: Path, names: list[str]) -> Any:
    """On each rank: build the run once, then begin for each cell, in a folder with its damage."""
    obey_permissions()
    results: dict[str, Any] = {}

    class Table(Run):
        def build(self) -> None:
            super().build()
            results["right"] = {
                step: self.begin_in(sound, f"right {step}", lambda root, s=step: keep(root, s)) for step in STEPS
            }
            for cell in CELLS:
                if cell.name in names:
                    results[cell.name] = [self.continuing(cell), self.named(cell)]

        def continuing(self, cell: Cell) -> Any:
            return self.begin_in(
                sound,
                f"{cell.name} continuing",
                lambda root: damage(cell, root / checkpoint_name(2), sound / "foreign"),
            )

        def named(self, cell: Cell) -> Any:
            config = self.config
            path = folder / f"{cell.name} named" / "other" / checkpoint_name(2)
            change = {"from_": str(path), "take": "everything"}
            self.beginning.config = config.model_copy(update={"start": config.start.model_copy(update=change)})

            def make(root: Path) -> None:
                root.rename(root.with_name("other"))
                damage(cell, path, sound / "foreign")

            try:
                return self.begin_in(sound, f"{cell.name} named", make)
            finally:
                self.beginning.config = config

        def begin_in(self, sound: Path, name: str, make: Callable[[Path], object]) -> Any:
            root, said = folder / name / "checkpoints", list[str]()

            def copied() -> None:
                shutil.copytree(sound / "checkpoints", root)  # no links, so that each file is separate
                make(root)

            self.world.from_first(copied)
            self.store.shelf = Shelf(root, KeepSection(last=9), said.append)
            try:
                origin, self.progress = self.beginning.begin()
            except UserError as error:
                return REFUSED, str(error), error.agreed
            assert origin.path is not None
            return origin.path.name, " ".join(said), content_of(self.engine), self.progress.step

    code = start(Config.model_validate(config), StopWish(), Table)
    return code, results


def keep(root: Path, step: int) -> None:
    for entry in root.iterdir():
        if entry.name != checkpoint_name(step):
            shutil.rmtree(entry)


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Every requested cell, as each rank saw it."""
    callspecs = [getattr(item, "callspec", None) for item in request.session.items if item.path == request.path]
    names = [spec.params["cell"].name for spec in callspecs if spec is not None and "cell" in spec.params]
    folder = tmp_path_factory.mktemp("faults")
    config = tiny(folder, freeze__frozen=["embed.*"], checkpoint__every_steps=1, train__steps=2)
    config["train"]["time_limit_s"] = None
    assert train(config) == [0]
    sound = folder / "sound"
    shutil.copytree(folder / "run/checkpoints", sound / "checkpoints")
    store = CheckpointStore(sound / "other", asynchronous=False, say=lambda line: None)
    groups = [whole(f"x{i}", group, torch.arange(40.0)) for i, group in enumerate(("model", "frozen"))]
    groups.append(whole("x0.m", "optim", torch.arange(40.0)))
    fields = json.loads((sound / "checkpoints/step-00000002/manifest.json").read_bytes())
    loop, data = fields["loop"], fields["data"]
    store.save(2, groups, RunState(step_counts={"x0": 2}, loop=loop, data=data, position=fields["position"]))
    assert store.wait()[0].ok
    shutil.move(sound / "other/step-00000002", sound / "foreign")
    found = run_ranks(2, go_through, config, sound, folder / "cells", names, timeout_s=280)
    assert [code for code, _ in found] == [0, 0]
    return [results for _, results in found]


@pytest.mark.parametrize("cell", PARAMETERS)
def test_fault(table: list[dict[str, Any]], cell: Cell) -> None:
    for rank, results in enumerate(table):
        right = {step: (found[2], found[3]) for step, found in results["right"].items()}
        assert right[1] != right[2]
        for way, expected in enumerate((cell.continuing, cell.named)):
            found = results[cell.name][way]
            if expected == REFUSED:
                assert found[0] == REFUSED, found
                assert found[2], "not agreed by all ranks"
                assert "\n" not in found[1].strip().replace("\n", "", 1), "two lines at most"
                assert cell.place == "whole" or place_in(cell) in found[1], found[1]
                continue
            step = 1 if expected == FALLS_BACK else 2
            assert found[2:] == right[step], (way, found)
            assert found[0] == checkpoint_name(2 if way else step)
            if rank == 0:
                assert (expected == FALLS_BACK) == ("set aside" in found[1]), found[1]
                assert (expected == RECOVERS) == ("is whole again" in found[1]), found[1]


def place_in(cell: Cell) -> str:
    return "model" if cell.place == "header" else cell.place
