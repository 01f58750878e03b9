"""One row for a minute of rows: the mean, lowest and highest value of each number."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]
_NAMES = {"uuid", "index", "rank", "pid", "step"}  # numbers that are names


class _Numbers:
    """Sums over the numbers of one GPU, of one rank or of the host."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}  # sum, count, lowest, highest
        self._shares: dict[str, int] = {}
        self._rows = 0

    def add(self, values: Row) -> None:
        self._rows += 1
        for name, value in values.items():
            if isinstance(value, list):
                for word in value:
                    if isinstance(word, str):
                        self._shares[word] = self._shares.get(word, 0) + 1
            elif isinstance(value, int | float) and not isinstance(value, bool) and name not in _NAMES:
                sums = self._sums.setdefault(name, [0.0, 0, value, value])
                sums[0] += value
                sums[1] += 1
                sums[2], sums[3] = min(sums[2], value), max(sums[3], value)

    def row(self) -> Row:
        """`name: [mean, lowest, highest]`. For words (`throttled`), the share of rows that held each word."""
        row: Row = {name: [round(s / n, 3), low, high] for name, (s, n, low, high) in self._sums.items()}
        if self._shares:
            row["throttled"] = {word: round(count / self._rows, 3) for word, count in self._shares.items()}
        return row


class Minute:
    """The rows between two rollups."""

    def __init__(self) -> None:
        self.rows = 0
        self._host = _Numbers()
        self._gpus: dict[str, tuple[Row, _Numbers]] = {}
        self._ranks: dict[int, tuple[Row, Row, _Numbers]] = {}

    def add(self, row: Row) -> None:
        self.rows += 1
        self._host.add(row["host"])
        for gpu in row["gpus"]:
            self._gpus.setdefault(gpu["uuid"], (gpu, _Numbers()))[1].add(gpu)
        for rank in row["ranks"]:
            first = self._ranks[rank["rank"]][0] if rank["rank"] in self._ranks else rank
            numbers = self._ranks[rank["rank"]][2] if rank["rank"] in self._ranks else _Numbers()
            numbers.add(rank)
            self._ranks[rank["rank"]] = (first, rank, numbers)

    def row(self) -> Row:
        """The rollup. `steps` of a rank are its first and last step in the minute."""
        return {
            "rows": self.rows,
            "host": self._host.row(),
            "gpus": [
                {"uuid": gpu["uuid"], "index": gpu["index"], **numbers.row()} for gpu, numbers in self._gpus.values()
            ],
            "ranks": [
                {"rank": rank, "steps": [first.get("step"), last.get("step")], **numbers.row()}
                for rank, (first, last, numbers) in sorted(self._ranks.items())
            ],
        }
