"""What a path in a config may be: one rule for every key that names a path.

`~` is the home of the person who loads the config. A run writes down the expanded path. A job, a container or `sudo`
may have another home, and one run must not get two folders. A file that you wrote keeps its `~`.
"""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import AfterValidator, Field, WithJsonSchema

MOST_NAME_BYTES = 255  # Linux's limit for one name in a path
MOST_PATH_BYTES = 4095 - 200  # Linux's limit, less what is made below a run folder or a cache, rounded up


def fitting(path: str) -> str:
    """Return the path. Raises ValueError for a path that no filesystem takes."""
    if "\0" in path:
        raise ValueError("it holds a NUL character")
    try:
        encoded = path.encode()
    except UnicodeEncodeError:
        raise ValueError("it holds a byte that is no UTF-8") from None
    longest = max(map(len, encoded.split(b"/")))
    if longest > MOST_NAME_BYTES:
        raise ValueError(f"a name in it has {longest} bytes, {MOST_NAME_BYTES} are the most: shorten it")
    if len(encoded) > MOST_PATH_BYTES:
        raise ValueError(f"it has {len(encoded)} bytes, {MOST_PATH_BYTES} are the most: shorten it")
    return path


def expanded(path: str) -> str:
    """The path with `~` or `~user` at its beginning replaced. Raises ValueError where that user has no home."""
    if not fitting(path).startswith("~"):
        return path
    found = os.path.expanduser(path)
    if found.startswith("~"):
        user = path.partition("/")[0][1:]
        if user:
            raise ValueError(f"there is no user {user!r}; write ./{path} for a folder of that name")
        raise ValueError("HOME is not set, and this user id has no name: write the whole path instead of ~")
    if not os.path.isabs(found):
        raise ValueError("HOME is no absolute path: write the whole path instead of ~")
    return fitting(found)


PathText = Annotated[
    str,
    Field(min_length=1),
    AfterValidator(expanded),
    WithJsonSchema({"type": "string", "format": "path", "minLength": 1}),
]
"""A key that names a file or folder, or a word that stands for one (`bytes`, `python:stdlib`)."""
