"""What the saver threads of the ranks tell each other: JSON under keys of a store, and no collectives."""

from __future__ import annotations

import json
from contextlib import suppress
from datetime import timedelta
from typing import Any

from torch.distributed import HashStore, PrefixStore, Store  # type: ignore[attr-defined]

from trainer.checkpoint.format.collector import no_collection
from trainer.checkpoint.format.errors import SaveError


class Messages:
    """Named messages of one attempt. Holds a connection of its own, as a store's client serves one thread at a time."""

    def __init__(self, kv: Store | None, attempt: int, timeout_s: float) -> None:
        """`kv` None: this process is the only one."""
        self._kv_of_others = kv  # a clone does not keep the server alive that the original may hold
        own: Store = kv.clone() if kv is not None else HashStore()  # type: ignore[attr-defined]
        self._kv = PrefixStore(f"muster/saves/{attempt}", own)
        self._timeout = timedelta(seconds=timeout_s)

    def put(self, name: str, content: Any) -> None:
        self._kv.set(name, json.dumps(content))

    def tell(self, name: str, content: Any) -> None:
        """As `put`, where nothing can be done any more if the store is gone: whoever waits will time out."""
        with suppress(RuntimeError):
            self.put(name, content)

    def get(self, name: str, whose: str) -> Any:
        """Wait for a message. Raises SaveError, saying whose it would have been, when it does not come in time."""
        try:
            self._kv.wait([name], self._timeout)
            content = self._kv.get(name)
        except RuntimeError as error:  # torch.distributed's DistError: timed out, or the store is gone
            raise SaveError(f"no word from {whose} after {self._timeout.total_seconds():g} s ({error})") from error
        with no_collection():
            return json.loads(content)

    def drop(self, name: str) -> None:
        """Forget a message that everybody has read."""
        self._kv.delete_key(name)
