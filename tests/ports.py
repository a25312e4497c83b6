"""Ports for jobs that tests start."""

from __future__ import annotations

import random
import socket

# Below what Linux hands out by itself (32768 on): nobody who asks for any free port can get it before the job listens.
_RANGE = range(20000, 32000)


def free_port() -> str:
    """A port that nobody listens on now."""
    for port in random.SystemRandom().sample(_RANGE, 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return str(port)
    raise RuntimeError(f"none of 100 ports tried in [{_RANGE.start}, {_RANGE.stop}) is free")
