from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.launch.monitor.node import Node
from tests.launch.monitor.standin import Reader, build


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-in for NVML, built once."""
    return build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def reader(library: Path, tmp_path: Path) -> Iterator[Callable[..., Reader]]:
    """A function that makes readers, which end with the test."""
    readers: list[Reader] = []

    def make(text: str, **env: str) -> Reader:
        readers.append(Reader(library, tmp_path, text, env))
        return readers[-1]

    yield make
    for one in readers:
        one.close()


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Node]]:
    nodes: list[Node] = []

    def make(**settings: Any) -> Node:
        nodes.append(Node(tmp_path, monkeypatch, **settings))
        return nodes[-1]

    yield make
    for one in nodes:
        if one.keeper.process is not None:
            one.keeper.process.kill()
