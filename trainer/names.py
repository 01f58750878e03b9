"""What things are called."""

from __future__ import annotations

import os
import socket

PRETEND_VARIABLE = "MUSTER_PRETEND_GPUS"  # on a rehearsal cluster: how many GPUs a job got; its ranks use the CPU


def node_name() -> str:
    """This node's name in events and files."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()
