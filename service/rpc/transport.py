"""What the settings ask of connections and messages, as gRPC's options; and the services that tell of the server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import grpc.aio
from grpc_reflection.v1alpha import reflection

from service.config import Settings

NEVER_MS = 2**31 - 1
"""gRPC's word for a time that does not come."""
LOWEST_LEVEL = 1
"""Of compression: gRPC then takes gzip or else deflate, if the client accepts one; an algorithm that is named to it is
used whatever the client accepts."""
JITTER = 0.1
"""By which gRPC shortens or lengthens the age of a connection at random, so that they don't all end at once."""


def server_options(settings: Settings, *, shares_port: bool) -> list[tuple[str, int]]:
    """Make gRPC's options.

    shares_port  whether other processes listen on the port; else a second server would start without an error
    """
    options = {
        "grpc.so_reuseport": int(shares_port),
        "grpc.max_receive_message_length": settings.max_message_bytes,
        "grpc.max_send_message_length": settings.max_response_bytes,
        # Between the first and the second, gRPC refuses more and more of what comes, at random.
        "grpc.max_metadata_size": settings.max_metadata_bytes,
        "grpc.absolute_max_metadata_size": settings.max_metadata_bytes,
        "grpc.keepalive_time_ms": _ms(settings.keepalive_s),
        "grpc.keepalive_timeout_ms": _ms(settings.keepalive_timeout_s),
        # What counts where the peer says nothing at all.
        "grpc.http2.ping_timeout_ms": _ms(settings.keepalive_timeout_s),
        "grpc.keepalive_permit_without_calls": int(settings.idle_pings),
        "grpc.http2.min_ping_interval_without_data_ms": int(settings.min_ping_interval_s * 1000),
        "grpc.max_connection_age_ms": _ms(settings.max_connection_age_s),
        "grpc.max_connection_age_grace_ms": int(settings.max_connection_age_grace_s * 1000),
        "grpc.max_connection_idle_ms": _ms(settings.max_connection_idle_s),
        "grpc.enable_channelz": int(settings.channelz),
    }
    if settings.max_concurrent_streams:
        options["grpc.max_concurrent_streams"] = settings.max_concurrent_streams
    if settings.compress_responses:
        options["grpc.default_compression_level"] = LOWEST_LEVEL
    return list(options.items())


def add_diagnostics(server: grpc.aio.Server, settings: Settings, services: Sequence[str]) -> None:
    """Add what is on of reflection, which tells of `services` and itself, and channelz."""
    if settings.channelz:
        from grpc_channelz.v1 import channelz, channelz_pb2  # not asked for, mostly

        channelz.add_channelz_servicer(server)
        services = (*services, channelz_pb2.DESCRIPTOR.services_by_name["Channelz"].full_name)
    if settings.reflection:
        reflection.enable_server_reflection((*services, reflection.SERVICE_NAME), server)


class ConnectionAges:
    """When connections that have a longest age were first seen, so that their streams can be told in time.

    gRPC itself has clients connect anew, and closes the connection when the grace is over; handlers hear of neither. A
    connection is known by its peer's address.
    """

    def __init__(self, max_age_s: float, grace_s: float) -> None:
        self.grace_s = grace_s
        """Time between the announcement and the end."""
        self._told_after_s = max_age_s * (1 - JITTER)
        self._forgotten_after_s = max_age_s * (1 + JITTER) + grace_s
        self._seen: dict[str, float] = {}  # in the order of time

    @classmethod
    def of(cls, settings: Settings) -> ConnectionAges | None:
        """Make them if the settings set an age."""
        age_s = settings.max_connection_age_s
        return cls(age_s, settings.max_connection_age_grace_s) if age_s else None

    def see(self, peer: str) -> float:
        """Note that a connection is used. Returns when it was first, by the loop's clock."""
        now = asyncio.get_running_loop().time()
        if (first := self._seen.get(peer)) is not None and now - first < self._forgotten_after_s:
            return first
        self._seen.pop(peer, None)
        while self._seen and now - next(iter(self._seen.values())) >= self._forgotten_after_s:
            del self._seen[next(iter(self._seen))]
        self._seen[peer] = now
        return now

    def call_when_old(self, peer: str, act: Callable[[float], Any]) -> asyncio.TimerHandle:
        """Call `act` with the grace when a connection reaches its age, unless the handle is cancelled."""
        return asyncio.get_running_loop().call_at(self.see(peer) + self._told_after_s, act, self.grace_s)


def _ms(seconds: float) -> int:
    """Milliseconds for gRPC; 0 stands for never."""
    return min(max(1, int(seconds * 1000)), NEVER_MS) if seconds else NEVER_MS
