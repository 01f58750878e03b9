"""Nodes as Linux namespaces on their own bridge. Where that is not allowed, names in /etc/hosts."""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from configs.errors import UserError
from slurm.rehearsal.config import Home, Settings
from trainer.host.arguments import typed

_HOSTS = Path("/etc/hosts")
_NAMESPACES = ("--net", "--uts", "--pid", "--mount", "--fork")


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Hold a lock: two clusters that start at the same time would see the same ports free, and take them."""
    place = os.open(tempfile.gettempdir(), os.O_RDONLY)
    try:
        fcntl.flock(place, fcntl.LOCK_EX)
        yield
    finally:
        os.close(place)


def namespaces_allowed() -> bool:
    """Whether this machine allows all that an isolated node needs. Leaves nothing behind."""
    if not all(shutil.which(program) for program in ("ip", "unshare", "nsenter")):
        return False
    probe = f"mst-{os.getpid()}"  # several processes may ask at once
    if not _try("unshare", *_NAMESPACES, "--mount-proc", "true") or not _try(
        "ip", "link", "add", probe, "type", "bridge"
    ):
        return False
    return _try("ip", "link", "del", probe)


def add_bridge(settings: Settings) -> None:
    """Add the network of a cluster, with the controller's address on it, unless it exists."""
    if not Path(f"/sys/class/net/{settings.bridge}").exists():
        _ip("link", "add", settings.bridge, "type", "bridge")
        _ip("addr", "add", f"{settings.address(0)}/24", "dev", settings.bridge)
        _ip("link", "set", settings.bridge, "up")


def add_node(settings: Settings, number: int) -> None:
    """Add a network namespace with one cable to the bridge. Replaces that of a dead node."""
    space, link = settings.namespace(number), settings.link(number)
    _remove_node(settings, number)
    _ip("netns", "add", space)
    _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space)
    _ip("link", "set", link, "master", settings.bridge, "up")
    _ip("-n", space, "link", "set", "lo", "up")
    _ip("-n", space, "addr", "add", f"{settings.address(number)}/24", "dev", "eth0")
    _ip("-n", space, "link", "set", "eth0", "up")


def node_command(home: Home, settings: Settings, number: int) -> list[str]:
    """The command that a node runs: slurmd, as a plain daemon or inside namespaces."""
    name = f"node{number}"
    slurmd = ["slurmd", "-D", "-d", str(home.stepd), "-N", name]
    if not settings.isolated:
        return slurmd
    # The shell stays as process 1 of the node and reaps orphans. When it dies, the whole node dies.
    hosts = shlex.quote(str(home.root / "hosts"))
    script = f"hostname {name}; mount --bind {hosts} /etc/hosts; {shlex.join(slurmd)} & wait"
    enter = ["nsenter", f"--net=/run/netns/{settings.namespace(number)}"]
    return [*enter, "unshare", *_NAMESPACES[1:], "--kill-child", "--mount-proc", "bash", "-c", script]


def remove_all(settings: Settings) -> None:
    """Remove the network."""
    for number in range(1, settings.nodes + 1):
        _remove_node(settings, number)
    _try("ip", "link", "del", settings.bridge)


def _remove_node(settings: Settings, number: int) -> None:
    _try("ip", "netns", "del", settings.namespace(number))
    _try("ip", "link", "del", settings.link(number))


def hosts_add(settings: Settings) -> None:
    """Add the nodes' names: jobs look them up, and plain nodes have no /etc/hosts of their own."""
    mark = _mark(settings)
    if mark not in _HOSTS.read_text():
        with open(_HOSTS, "a") as file:
            file.write("".join(f"127.0.0.1 {name} {mark}\n" for name in settings.names))


def hosts_remove(settings: Settings) -> None:
    """Remove the names. The file is written in place, since /etc/hosts may be a mount point."""
    lines = _HOSTS.read_text().splitlines(keepends=True)
    kept = [line for line in lines if not line.rstrip("\n").endswith(_mark(settings))]
    if kept != lines:
        _HOSTS.write_text("".join(kept))


def _mark(settings: Settings) -> str:
    return f"# muster cluster {settings.slot}"


def _try(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(
            f"ip {' '.join(words)}: {done.stderr.strip()}; {typed('slurm cluster up --plain')} does without"
        )
