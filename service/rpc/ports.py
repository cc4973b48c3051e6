"""One TCP port for several processes: each listens on it with SO_REUSEPORT, and the kernel spreads connections."""

from __future__ import annotations

import errno
import socket
import sys
from contextlib import ExitStack

from service.config import Settings
from service.errors import ConfigError


def hold_port(settings: Settings, held: ExitStack) -> int:
    """Reserve the port that is set, or a free one, for processes of this user until `held` is closed.

    The sockets that hold it are bound and never listen, so that they get no connections. Returns the port. Raises
    ConfigError for a port in use, or an address that does not work.
    """
    if sys.platform != "linux":
        raise ConfigError(
            "several workers need Linux, whose SO_REUSEPORT spreads connections over them: serve with --workers 1, or "
            "start several servers behind a load balancer",
            field="workers",
        )
    port = settings.port
    address = f"{settings.host}:{port}"
    try:
        found = socket.getaddrinfo(settings.host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(f"can't listen on {address}: {error.strerror}; choose with --host", field="host") from error
    fault = None
    num_held = 0
    for family, kind, protocol, _, name in found:
        try:
            if port:
                with socket.socket(family, kind, protocol) as probe:  # a stranger that shares its port is found too
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind((name[0], port, *name[2:]))
            holder = held.enter_context(socket.socket(family, kind, protocol))
            _bind(holder, (name[0], port, *name[2:]))
        except OSError as error:
            fault = error
            if error.errno == errno.EADDRINUSE:
                break
        else:
            port = holder.getsockname()[1]
            num_held += 1
    if fault is not None and (not num_held or fault.errno == errno.EADDRINUSE):
        raise ConfigError(
            f"can't listen on {address}: the port is in use, or the address is not of this machine; stop the other "
            "server, or choose with --host and --port",
            field="port",
        ) from fault
    return port


def _bind(holder: socket.socket, name: tuple[str | int, ...]) -> None:
    """Bind a socket to a port that is to be shared. Raises OSError.

    Connections of a server that ran alone lie on its port for a minute after it has ended, and share it by SO_REUSEADDR
    only. That comes second: with it, the probe of a second server finds the port taken only once the workers listen.
    """
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        holder.bind(name)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(name)
