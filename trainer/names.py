"""What things are called."""

from __future__ import annotations

import os
import socket


def node_name() -> str:
    """This node's name in events and files."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()
