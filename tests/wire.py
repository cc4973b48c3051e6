"""One HTTP/2 connection to a server, frame by frame: what no channel of gRPC shows."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager

from h2 import events
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes

HEADER = 9
"""Bytes of a frame's header, whose first three are the length of the rest."""


class Wire:
    """Everything that the server has sent."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._h2 = H2Connection(H2Configuration(client_side=True, header_encoding="utf-8"))
        self.answers_pings = True
        self.settings: dict[SettingCodes, int] = {}
        self.pings = 0
        """Pings of the server's own."""
        self.ping_acks = 0
        self.goaway: tuple[int, bytes] | None = None
        """Error code, and why."""
        self.headers: dict[str, str] = {}
        self.trailers: dict[str, str] = {}
        self.data = b""
        self.is_closed = False
        self._buffer = b""
        self._h2.initiate_connection()
        self._flush()

    def call(self, method: str, message: bytes, *, ends: bool = True, **headers: str) -> None:
        """Begin a call of gRPC with its first message."""
        stream = self._h2.get_next_available_stream_id()
        fields = {":method": "POST", ":scheme": "http", ":path": method, ":authority": "test", "te": "trailers"}
        fields["content-type"] = "application/grpc"
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self._h2.send_headers(stream, [*(fields | named).items()])
        self._h2.send_data(stream, b"\0" + struct.pack(">I", len(message)) + message, end_stream=ends)
        self._flush()

    def ping(self) -> None:
        """Ask whether the server is there."""
        self._h2.ping(b"whatever")
        self._flush()

    def read(self, timeout_s: float) -> None:
        """Take what comes in that time, at least one piece of it if any does."""
        self._socket.settimeout(timeout_s)
        try:
            data = self._socket.recv(65536)
        except TimeoutError:
            return
        except OSError:
            data = b""
        if not data:
            self.is_closed = True
            return
        self._buffer += data
        while len(self._buffer) >= HEADER and len(self._buffer) >= (size := HEADER + int.from_bytes(self._buffer[:3])):
            one, self._buffer = self._buffer[:size], self._buffer[size:]
            try:  # one by one: what h2 says of a frame is lost if it minds the next, as all that comes after a GOAWAY
                for event in self._h2.receive_data(one):
                    self._take(event)
            except ProtocolError:
                continue
        if self.answers_pings:
            self._flush()

    def read_until(self, holds: str, timeout_s: float = 5.0) -> float:
        """Read until an attribute is true. Returns how long that took, in seconds."""
        began = time.monotonic()
        while not getattr(self, holds):
            left_s = began + timeout_s - time.monotonic()
            assert left_s > 0, f"no {holds} within {timeout_s} s"
            self.read(left_s)
        return time.monotonic() - began

    def _take(self, event: events.Event) -> None:
        if isinstance(event, events.RemoteSettingsChanged):
            self.settings.update({code: change.new_value for code, change in event.changed_settings.items()})
        elif isinstance(event, events.PingReceived):
            self.pings += event.ping_data != b"whatever"
        elif isinstance(event, events.PingAckReceived):
            self.ping_acks += 1
        elif isinstance(event, events.ConnectionTerminated):
            self.goaway = (int(event.error_code), event.additional_data or b"")
        elif isinstance(event, events.ResponseReceived):
            self.headers = dict(event.headers)
        elif isinstance(event, events.TrailersReceived):
            self.trailers = dict(event.headers)
        elif isinstance(event, events.DataReceived):
            self.data += event.data
            self._h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)

    def _flush(self) -> None:
        try:
            self._socket.sendall(self._h2.data_to_send())
        except OSError:
            self.is_closed = True


@contextmanager
def wire(address: str) -> Iterator[Wire]:
    """Connect, until the block ends."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        yield Wire(connection)
