"""The port that several workers share: what may lie on it, and what may not."""

from __future__ import annotations

import socket
import sys
from contextlib import ExitStack

import pytest

from service.config import load_settings
from service.errors import ConfigError
from service.rpc.ports import hold_port

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="several workers need Linux")


def listener(port: int = 0, *options: int) -> socket.socket:
    made = socket.socket()
    for option in options:
        made.setsockopt(socket.SOL_SOCKET, option, 1)
    try:
        made.bind(("127.0.0.1", port))
    except OSError:
        made.close()
        raise
    made.listen()
    return made


def test_port_of_a_server_that_has_just_ended_is_free() -> None:
    alone = listener(0, socket.SO_REUSEADDR)
    port = alone.getsockname()[1]
    with socket.create_connection(("127.0.0.1", port)) as client:
        alone.accept()[0].close()  # the side that closes first keeps the connection, in TIME_WAIT
        assert client.recv(1) == b""
    alone.close()
    with pytest.raises(OSError, match="in use"):
        listener(port, socket.SO_REUSEPORT)
    with ExitStack() as held:
        assert hold_port(load_settings({"repository": "/r", "port": port}), held) == port
        worker = listener(port, socket.SO_REUSEADDR, socket.SO_REUSEPORT)  # as gRPC does it
        with worker, pytest.raises(ConfigError, match="the port is in use"), ExitStack() as more:
            hold_port(load_settings({"repository": "/r", "port": port}), more)


def test_port_that_is_held_is_not_held_twice() -> None:
    with ExitStack() as held:
        port = hold_port(load_settings({"repository": "/r", "port": 0}), held)
        with pytest.raises(ConfigError, match="the port is in use"), ExitStack() as more:
            hold_port(load_settings({"repository": "/r", "port": port}), more)


def test_port_of_a_stranger_who_would_share_it_is_in_use() -> None:
    with listener(0, socket.SO_REUSEPORT) as stranger, pytest.raises(ConfigError, match="in use"), ExitStack() as held:
        hold_port(load_settings({"repository": "/r", "port": stranger.getsockname()[1]}), held)
