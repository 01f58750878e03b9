"""A rehearsal cluster with a changed setting for a while."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from slurm.rehearsal.cluster import Cluster
from tests.slurm.jobs import call


@contextmanager
def preempting_by_user_signal(cluster: Cluster, told: bool) -> Iterator[None]:
    conf, line = cluster.home.conf, "SlurmctldParameters=preempt_send_user_signal\n"
    before = conf.read_text()
    assert line in before
    conf.write_text(before if told else before.replace(line, ""))
    call(cluster, "scontrol", "reconfigure")
    try:
        yield
    finally:
        conf.write_text(before)
        call(cluster, "scontrol", "reconfigure")


@contextmanager
def requeueing_on_exit_75(cluster: Cluster) -> Iterator[None]:
    before = cluster.home.conf.read_text()
    cluster.home.conf.write_text(before + "RequeueExit=75\n")
    call(cluster, "scontrol", "reconfigure")
    try:
        yield
    finally:
        cluster.home.conf.write_text(before)
        call(cluster, "scontrol", "reconfigure")


@contextmanager
def read_only(cluster: Cluster, folder: Path) -> Iterator[None]:
    """Make a folder read-only for the cluster's nodes."""
    shells = []
    for name in cluster.settings.names:
        node = cluster.alive(name)
        assert node is not None
        shells.append(str(node.children()[0].pid))
    inside: Callable[[str], list[str]] = lambda pid: ["nsenter", "--mount", "--pid", f"--target={pid}"]  # noqa: E731
    for pid in shells:
        subprocess.run([*inside(pid), "mount", "--bind", str(folder), str(folder)], check=True)
        subprocess.run([*inside(pid), "mount", "-o", "remount,bind,ro", str(folder)], check=True)
    try:
        yield
    finally:
        for pid in shells:
            subprocess.run([*inside(pid), "umount", "--lazy", str(folder)], check=True)
