"""The kinds of inputs: what is called with each, how it is changed, and from which seeds."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tests.fuzz import folders, inputs, mutate, targets
from tests.fuzz.mutate import Mutator

CORPUS = Path(__file__).with_name("corpus")
PRESETS = Path(__file__).parents[2] / "configs"


@dataclass(frozen=True)
class Kind:
    """`target` returns whether an input was used, or None for texts of a checkpoint. `further`: seeds beyond the
    corpus."""

    name: str
    target: Callable[[bytes], bool | None]
    mutate: Mutator
    further: Callable[[], list[bytes]] = list

    @property
    def corpus(self) -> list[Path]:
        return sorted((CORPUS / self.name).glob("*"))

    @cached_property
    def seeds(self) -> list[bytes]:
        return [path.read_bytes() for path in self.corpus] + self.further()


def _files_of_a_run() -> list[bytes]:
    return [name.encode() + b"\n" + folders.STORED[Path(name)] for name in folders.FILES]


def _configs() -> list[bytes]:
    return [folders.STORED[Path("config.yaml")], *(path.read_bytes() for path in sorted(PRESETS.glob("*.yaml")))]


_MANIFEST = mutate.of_manifest(json.loads(folders.UNSIGNED))
KINDS = {
    kind.name: kind
    for kind in (
        Kind("manifest", targets.manifest, mutate.of_json),
        Kind("manifest-signed", targets.manifest_signed, mutate.of_manifest(json.loads(targets.SAVED))),
        Kind("checksums", targets.checksums, mutate.of_json),
        Kind("header", targets.header, mutate.of_header),
        Kind("rows", folders.rows, mutate.of_rows, _files_of_a_run),
        Kind("yaml", inputs.config, mutate.of_config, _configs),
        Kind("overrides", inputs.overrides, mutate.of_overrides),
        Kind("signed", folders.signed, _MANIFEST, lambda: KINDS["manifest-signed"].seeds),
        Kind("environment", inputs.environment, mutate.of_environment),
        Kind("entries", folders.entries, mutate.of_entries),
    )
}
SIX = ("rows", "yaml", "overrides", "signed", "environment", "entries")  # the commands' own inputs
