"""Ports on which the ranks of one machine meet."""

from __future__ import annotations

import random
import socket
from collections.abc import Sequence
from contextlib import suppress

from autodo_dist.errors import AutodoError

PORTS = range(10_000, 20_000)  # below those that Linux hands to outgoing connections


def free_port(ports: Sequence[int] = PORTS) -> int:
    """A port that can be bound now, drawn at random so that two runs seldom draw the same. AutodoError if none can."""
    for port in random.sample(ports, len(ports)):
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("", port))
            return port
    raise AutodoError(f"ports {ports[0]} to {ports[-1]}: none can be bound; see who holds them: ss -tlnp")
