"""Only regular files are read, and the report of a mistake sends no control characters to the terminal."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest

from configs.errors import UserError, printable, tell
from configs.files import NotAFile, open_regular, read_regular


def test_a_regular_file_is_read_also_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b").symlink_to("a")
    assert read_regular(tmp_path / "b", 3) == b"abc"
    with pytest.raises(NotAFile, match="larger than 2 bytes"):
        read_regular(tmp_path / "b", 2)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "c")


def test_nothing_else_is_opened_and_nothing_waits(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket"))
    (tmp_path / "circle").symlink_to("circle")
    before = len(os.listdir("/proc/self/fd"))
    kinds = (("pipe", "a pipe"), ("socket", "a socket"), (".", "a folder"), ("/dev/zero", "a device"))
    for path, words in (*kinds, ("circle", "it is a link that cannot be followed: Too many levels")):
        with pytest.raises(NotAFile) as caught:
            open_regular(tmp_path / path)
        assert words in str(caught.value.strerror)
    assert len(os.listdir("/proc/self/fd")) == before
    listener.close()


def test_control_characters_are_shown() -> None:
    assert printable("a\tb\x1b[2J\r\nä\x9b\x00") == "a\\tb\\x1b[2J\\r\nä\\x9b\\x00"
    assert printable(os.fsdecode(b"x\xff")) == "x\\xff"
    assert printable("\u202e\ud800") == "\\u202e\\ud800"  # an override of the text direction; half a surrogate pair


def test_telling_never_raises(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tell(UserError("a\x07b"))
    assert capsys.readouterr().err == "error: a\\x07b\n"
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        tell(UserError("x"))
        monkeypatch.undo()
        full_closed = full
        with pytest.raises(OSError):
            full.close()  # its buffer still holds the text that could not be written
    monkeypatch.setattr(sys, "stderr", full_closed)
    tell(UserError("x"))
