"""The name of this node."""

from __future__ import annotations

import os
import socket

from trainer.host.environment import SLURMD_NODENAME


def node_name() -> str:
    """This node's name in events and files."""
    return SLURMD_NODENAME.read(os.environ) or socket.gethostname()
