"""New random inputs cause no traceback, hang or silence. And the fuzzer finds defects that are put in on purpose."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any

import pytest
from yaml.representer import SafeRepresenter

from configs.load import _Dumper, in_shell
from tests.fuzz import drive as driver
from tests.fuzz.drive import Tally, drive, fresh, keep, table
from tests.fuzz.kinds import KINDS, SIX, Kind
from trainer.life.entries import Kind as Entry
from trainer.life.entries import entries

FEW = {"rows": 25, "signed": 25, "entries": 20}  # 60 for other kinds: each of these copies a run folder
MANY = 10_000  # over the six kinds
MOST_S = 5.0


def sound(found: Tally, count: int) -> None:
    assert [(data[:200], told) for data, told in found.defects] == []
    assert found.inputs == count
    assert found.slowest_s < MOST_S


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_inputs_find_nothing(kind: str) -> None:
    count = FEW.get(kind, 60)
    found = drive(KINDS[kind], fresh(KINDS[kind], count, seed=0))
    sound(found, count)
    if kind in SIX:
        assert min(found.used, found.refused) > count // 20, "nearly all are alike"


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_ten_thousand_inputs_find_nothing() -> None:
    found = [drive(KINDS[kind], fresh(KINDS[kind], -(-MANY // len(SIX)), seed=1)) for kind in SIX]
    print(table(found))
    assert sum(tally.inputs for tally in found) >= MANY
    for tally in found:
        sound(tally, -(-MANY // len(SIX)))


# ---- it finds --------------------------------------------------------------------------------------------------------


def turns(data: bytes) -> bool:
    """A target with one kind of defect for each text."""
    if data == b"raises":
        raise KeyError("x")
    if data == b"silent":
        assert data == b"told"
    while data == b"spins":
        pass
    if data == b"waits":
        time.sleep(600)
    if data == b"ends":
        os._exit(0)
    if data == b"all memory":
        bytearray(64 << 30)
    return data == b"used"


def test_every_kind_of_defect_is_found_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(driver, "MOST_S", 0.05)
    monkeypatch.setattr(driver, "MOST_WAITED_S", 0.1)
    bad = [b"raises", b"silent", b"spins", b"waits", b"ends", b"all memory"]
    found = drive(Kind("toy", turns, lambda rng, seeds: b""), [b"used", *bad, b"no", b"used"])
    assert [data for data, _ in found.defects] == bad
    assert (found.inputs, found.used, found.refused) == (9, 2, 1)
    words = ("KeyError", "AssertionError", "TooLong", "TooLong", "ended", "MemoryError")
    assert [word for word, (_, told) in zip(words, found.defects, strict=True) if word not in told] == []
    kept = keep(found, tmp_path)
    assert [path.read_bytes() for path in kept] == bad
    assert [json.dumps(found.inputs) in line for line in table([found]).splitlines()] == [False, True]


def breaks(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[], None]]:
    """Kind -> a change that breaks the code under it."""

    def change(place: str, new: Any) -> Callable[[], None]:
        return lambda: monkeypatch.setattr(place, new)

    return {
        "rows": change("trainer.life.rows.parsed", json.loads),  # text that is no JSON then raises
        "yaml": lambda: monkeypatch.setitem(_Dumper.yaml_representers, str, SafeRepresenter.represent_str),
        "overrides": change("configs.load.in_shell", lambda text, *rest: in_shell(text.split(" #")[0], *rest)),
        "signed": change("trainer.checkpoint.format.manifest.contradiction", lambda *facts: None),
        "environment": change("trainer.host.environment.check", lambda environ: None),
        "entries": change(
            "launch.checkpoint.list.entries", lambda path: [e for e in entries(path) if e.kind is not Entry.UNUSABLE]
        ),
    }


@pytest.mark.parametrize("kind", SIX)
def test_the_corpus_finds_what_is_broken(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    breaks(monkeypatch)[kind]()
    found = drive(KINDS[kind], (path.read_bytes() for path in KINDS[kind].corpus))
    assert found.defects, "the code is broken, and no input shows it"
