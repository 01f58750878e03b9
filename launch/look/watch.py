"""`python -m launch watch`: a run while it runs, in 80 columns: every GPU, loss and speed, the last events."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

from rich.console import Group
from rich.table import Table
from rich.text import Text

from configs.errors import UserError, printable
from launch.look.run_folder import holder_of, readable, running
from launch.look.screen import Picture, show, show_once
from launch.monitor.rows import OLD_S, OtherVersion, age_s, changed_s, newest_rows, phase_now
from trainer.host.arguments import Parser, typed
from trainer.host.console import duration, si
from trainer.life import attempts as life
from trainer.life.attempts import Attempt
from trainer.life.folder import RunFolder
from trainer.life.rows import PassedOver, Row, amount, last_row, rows_backwards, speed_of, text, whole

_BLOCKS = " ▁▂▃▄▅▆▇█"
_HISTORY = 12
_ONE_LINE_PER_GPU = 16  # the most GPUs with a line each; with more, each node has one line
_EVENTS = 4
_NUMBERS = {"GiB", "W", "°C", "MHz", "step", "CPU"}
_BAD = {"hang", "slow_rank", "idle", "gpu_lost", "driver_gone", "monitor_lost", "rank_failed", "rank_died", "nonfinite"}
_GPU_COLUMNS = ["device", "active", "tensor", "GiB", "W", "°C", "MHz", "step", "at"]
_NODE_COLUMNS = ["node", "each", "mean", "lately", "GiB", "W", "°C", "CPU", "step", "at"]
Line = tuple[float, list[str]]  # how busy (-1: unknown, which comes first when the lines do not all fit), cells
_SILENT = {"saved", "reading_left_out"}  # events that tell a watcher nothing


@dataclass
class NodeView:
    """One node's newest row. `activity`: its mean activity of the last rows, oldest first."""

    name: str
    row: Row
    age_s: float
    activity: deque[float] = field(default_factory=lambda: deque(maxlen=_HISTORY))


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    parser = Parser(prog=typed("launch watch"), description=__doc__)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--once", action="store_true", help="print how it is now, and end")
    parser.add_argument("--every", type=float, default=1.0, metavar="S", help="seconds between two looks")
    options = parser.parse_args(arguments)
    folder = RunFolder(options.run)
    with readable(folder.root):
        if not folder.attempts.is_dir():
            raise UserError(f"{options.run} is no run folder: it has no attempts")
    watcher = Watcher(folder)
    if options.once:
        show_once(watcher.look(None))
    else:
        show(lambda height: Picture(watcher.look(height), last=False), options.every)
    return 0


class Watcher:
    """Looks again and again, and remembers the values for the sparklines."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self._nodes: dict[str, NodeView] = {}
        self._notes: list[str] = []
        self._over = PassedOver()

    def look(self, height: int | None, state: str | None = None) -> Group:
        """The whole picture. `height` None: all lines. `state`: the state of the run, from a caller that knows it
        better. Raises UserError when a file may not be read."""
        self._over = PassedOver()
        with readable(self.folder.root):
            self._read_nodes()
            head, events = self._head(state), self._events()
        notes = [*self._notes, *([self._over.told(self.folder.root)] if self._over else [])]
        head += [Text(note, style="red") for note in notes]
        room = None if height is None else max(height - len(head) - len(events) - 3, 3)
        return Group(*head, self._table(room), *events)

    def _read_nodes(self) -> None:
        self._notes = []
        for path in self.folder.gpu.glob("*.jsonl"):
            known = self._nodes.get(path.stem)
            try:
                rows = newest_rows(path, "second", 1 if known else _HISTORY, self._over)
            except OtherVersion as other:
                self._notes.append(str(other))
                continue
            if not rows:
                continue
            view = known or NodeView(path.stem, rows[-1], 0.0)
            if known is None or rows[-1]["time_s"] != known.row["time_s"]:
                view.activity.extend(value for row in rows if (value := _activity(row)) is not None)
            view.row, view.age_s = rows[-1], age_s(path)
            self._nodes[path.stem] = view

    def _head(self, state: str | None) -> list[Text]:
        number = max(life.numbers(self.folder), default=None)
        attempt = f"attempt {number}" if number is not None else "no attempt yet"
        head = [Text(f"{self.folder.root.name}  {attempt}  {state or self._state(number)}", style="bold", no_wrap=True)]
        if row := last_row(self.folder.metrics, "loss", number, self._over):
            step, loss, mfu = (amount(row, name) for name in ("step", "loss", "mfu"))
            speed = speed_of(row)
            told = [f"step {step:,.0f}"] if step is not None else []
            told += [f"loss {loss:.4f}" if loss is not None else "loss nan"]
            told += [f"{si(speed[0])} {speed[1]}/s, MFU {f'{mfu:.1%}' if mfu else 'n/a'}"] if speed is not None else []
            told.append(f"{duration(age_s(self.folder.metrics))} ago")
            head.append(Text("  ".join(told), no_wrap=True))
        return head

    def _state(self, number: int | None) -> str:
        if number is None:
            return "starting"
        end = Attempt(self.folder, number).end
        if end is not None:
            return f"{end.reason}{f' ({end.cause})' if end.cause else ''}"
        phase, holder = phase_now(self.folder.gpu, number), holder_of(self.folder, self._over)
        if phase is None and (holder is None or holder.alive is False):
            return "died"
        stepped = whole(last_row(self.folder.metrics, "loss", number), "attempt") == number
        return running(phase, stepped)

    def _table(self, room: int | None) -> Table:
        nodes = sorted(self._nodes.values(), key=lambda node: node.name)
        few = sum(len(_devices(node.row)) for node in nodes) <= _ONE_LINE_PER_GPU
        names, lines = (_GPU_COLUMNS, _gpu_lines(nodes)) if few else (_NODE_COLUMNS, _node_lines(nodes))
        table = Table(box=None, padding=(0, 1, 0, 0))
        shown = lines if room is None or len(lines) <= room else sorted(lines)[: room - 1]  # the least busy
        told = [place for place in range(len(names)) if any(cells[place] for _, cells in lines)]  # a CPU has no watts
        for name, place in ((names[place], place) for place in told):
            widest = max([len(name), *(len(cells[place]) for _, cells in shown)])
            side: Literal["left", "right"] = "right" if name in _NUMBERS else "left"
            least = None if name == names[-1] else widest  # only the last column may shrink
            table.add_column(name, no_wrap=True, overflow="ellipsis", justify=side, min_width=least)
        for _, cells in shown:
            table.add_row(*(cells[place] for place in told))
        if len(shown) < len(lines):
            table.add_row(f"{len(lines) - len(shown)} more", "are busier")
        return table

    def _events(self) -> list[Text]:
        files = sorted(self.folder.events.glob("*.jsonl"), key=changed_s)[-20:]
        rows = [row for path in files for row in islice(rows_backwards(path, self._over), 2 * _EVENTS)]
        rows = [row for row in rows if row.get("time_s") is not None and text(row, "event") not in (None, *_SILENT)]
        told = []
        for row in sorted(rows, key=lambda row: row["time_s"])[-_EVENTS:]:
            facts = {k: text(row, k) or v for k, v in row.items() if isinstance(v, str | int | float)}
            when = time.strftime("%H:%M:%S", time.localtime(row["time_s"]))
            line = f"{when} {facts['event']} " + " ".join(
                f"{name}={value}" for name, value in facts.items() if name not in ("time_s", "event")
            )
            told.append(
                Text(printable(line), no_wrap=True, overflow="ellipsis", style="yellow" if _is_bad(row) else "dim")
            )
        return told


def _is_bad(row: Row) -> bool:
    return row["event"] in _BAD


def _devices(row: Row) -> list[Row]:
    """The things that get a line: the GPUs, or the ranks of a node without GPUs."""
    return row["gpus"] or row["ranks"]


def _busy(device: Row) -> float | None:
    """Percent active: SM activity, else utilization, else that of a rank's main thread."""
    for name in ("sm_pct", "gpu_pct", "main_cpu_pct"):
        if (value := amount(device, name)) is not None:
            return min(max(value, 0.0), 100.0)
    return None


def _activity(row: Row) -> float | None:
    values = [value for device in _devices(row) if (value := _busy(device)) is not None]
    return sum(values) / len(values) if values else None


def _bar(value: float | None, width: int = 10) -> str:
    if value is None:
        return "?"
    full, part = divmod(value / 100 * width, 1)
    return ("█" * int(full) + (_BLOCKS[round(part * 8)] if full < width else "")).ljust(width)


def _spark(values: list[float | None]) -> str:
    return "".join("?" if v is None else _BLOCKS[max(1, round(v / 100 * 8))] for v in values)


def _phase(row: Row) -> str:
    """What most ranks of a node are doing, and how many of them."""
    phases = [rank["phase"].replace("_", " ") for rank in row["ranks"]]
    if not phases:
        return "no ranks"
    most = max(set(phases), key=phases.count)
    return most if phases.count(most) == len(phases) else f"{most} {phases.count(most)}/{len(phases)}"


def _age(node: NodeView) -> str:
    return f"silent {duration(node.age_s)}" if node.age_s > OLD_S else ""


def _mean(row: Row, name: str) -> str:
    values = [value for gpu in row["gpus"] if (value := amount(gpu, name)) is not None]
    return f"{sum(values) / len(values):.0f}" if values else ""


def _number(device: Row, name: str, form: str = ".0f", unit: str = "") -> str:
    value = amount(device, name)
    return "" if value is None else f"{value:{form}}{unit}"


def _gpu_lines(nodes: list[NodeView]) -> list[Line]:
    lines: list[Line] = []
    for node in nodes:
        ranks = node.row["ranks"]
        for place, device in enumerate(_devices(node.row)):
            rank = ranks[place] if place < len(ranks) else {}
            kind = f"G{whole(device, 'index')}" if "uuid" in device else f"r{whole(device, 'rank')}"
            number = partial(_number, device)
            tensor = number("tensor_pct", ".0f", " %")
            at = "LOST" if device.get("lost") else _age(node) or rank.get("phase", "").replace("_", " ")
            if isinstance(throttled := device.get("throttled"), list) and throttled:
                at += printable(" throttled: " + ",".join(map(str, throttled)))
            cells = [f"{node.name} {kind}", _bar(_busy(device)), tensor, number("memory_gib", ".1f"), number("power_w")]
            cells += [number("temperature_c"), number("sm_clock_mhz"), str(rank.get("step", "")), at]
            busy = _busy(device)
            lines.append((-1.0 if busy is None else busy, cells))
    return lines


def _node_lines(nodes: list[NodeView]) -> list[Line]:
    lines: list[Line] = []
    for node in nodes:
        row = node.row
        each = _spark([None if device.get("lost") else _busy(device) for device in _devices(row)])
        steps = [rank["step"] for rank in row["ranks"]]
        mean, cpu_pct = _activity(row), amount(row["host"], "cpu_pct") or 0.0
        cells = [node.name, each, "?" if mean is None else f"{mean:3.0f} %", _spark(list(node.activity))]
        cells += [_mean(row, "memory_gib"), _mean(row, "power_w"), _mean(row, "temperature_c")]
        cells += [
            f"{cpu_pct:.0f} %",
            str(min(steps, default="")),
            _age(node) or _phase(row),
        ]
        lines.append((-1.0 if mean is None or node.age_s > OLD_S else mean, cells))
    return lines
