"""What both clients share: their settings, what they know of models, and the translation of failed calls."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from service.client import _codec
from service.client._channel import DEFAULT_TARGET, KEEPALIVE_S, ChannelSettings, Compression
from service.client._status import from_rpc
from service.client.errors import InvalidArgument, RnnserveError, Unavailable
from service.client.info import ModelInfo
from service.tensors import Array

FIRST_DELAY_S = 0.05
LAST_DELAY_S = 2.0
READY_INTERVAL_S = 0.5
"""Longest time between two questions whether a server is ready."""


class ClientBase:
    """One server, reached over one connection that every call and stream shares."""

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        tls: bool = False,
        root_certificates: bytes | None = None,
        client_certificate: bytes | None = None,
        client_key: bytes | None = None,
        server_name: str | None = None,
        metadata: Sequence[tuple[str, str]] = (),
        max_message_bytes: int = 64 * 1024 * 1024,
        keepalive_s: float = KEEPALIVE_S,
        resume_timeout_s: float = 30.0,
        compression: Compression | None = None,
        options: Sequence[tuple[str, str | int]] = (),
    ) -> None:
        """Prepare; the connection is made by the first call.

        target              host:port; the port is 8001 where none is given
        tls                 encrypt, and check the server's certificate; given certificates turn it on too
        root_certificates   PEM of the authorities to trust; None trusts those of gRPC
        client_certificate  PEM of the certificate chain to show, with client_key
        server_name         name to expect in the server's certificate, if it is not the target's
        metadata            sent with every call, such as [("authorization", "Bearer ...")]
        max_message_bytes   largest message to send or take
        keepalive_s         idle time after which a call's connection is checked, which a server may resent if it is
                            less than 5 minutes; 0 never checks
        resume_timeout_s    longest that a stream tries to take up a session that lingers after a lost connection
        compression         "gzip" or "deflate": of requests, and of answers where it makes them smaller
        options             further channel options of gRPC
        """
        self._settings = ChannelSettings(
            target=target,
            tls=tls,
            root_certificates=root_certificates,
            client_certificate=client_certificate,
            client_key=client_key,
            server_name=server_name,
            max_message_bytes=max_message_bytes,
            keepalive_s=keepalive_s,
            compression=compression,
            options=options,
        )
        self._given_metadata = (*metadata, *self._settings.metadata())
        self._resume_timeout_s = resume_timeout_s
        self._infos: dict[tuple[str, int], ModelInfo] = {}
        self._prepare()

    def _prepare(self) -> None:
        """Make what the kind of client needs."""

    @property
    def _metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes with a call: what was given, and the caller's place in its trace, if it uses OpenTelemetry."""
        if "opentelemetry.trace" not in sys.modules:
            return self._given_metadata
        from opentelemetry import propagate

        carrier: dict[str, str] = {}
        propagate.inject(carrier)
        return (*self._given_metadata, *((name.lower(), value) for name, value in carrier.items()))

    @property
    def target(self) -> str:
        """Address of the server."""
        return self._settings.address

    def _remember(self, model: str, version: int, info: ModelInfo) -> ModelInfo:
        """Keep what a server said of a model: what it declares decides how arrays are sent and read."""
        self._infos[model, version] = self._infos[model, info.version] = info
        return info

    def _forget(self, model: str, version: int) -> None:
        """Ask again next time: what is known of a model may be what made a request wrong."""
        self._infos.pop((model, version), None)


def translate(error: Any) -> RnnserveError:
    """Turn a failed call, of either kind of channel, into an error of the client's tree."""
    return from_rpc(error.code().name, error.details() or "", error.trailing_metadata())


def delays() -> Iterator[float]:
    """Seconds to wait before each attempt to connect again: exponential, with jitter so that clients spread out."""
    delay = FIRST_DELAY_S
    while True:
        yield delay * random.uniform(0.5, 1.0)  # noqa: S311 - nothing secret
        delay = min(2 * delay, LAST_DELAY_S)


def not_resumed(error: RnnserveError | None, limit_s: float) -> Unavailable:
    """Say that the time to resume ran out."""
    why = f": {error.message}" if error is not None else ""
    return Unavailable(
        f"the connection was lost, and the session could not be resumed within {limit_s:g} s{why}", reason="NOT_RESUMED"
    )


def whole_input(info: ModelInfo, steps: Any) -> dict[str, Array] | None:
    """Read steps that are all at hand, as arrays; None for an iterable that is to be read step by step."""
    if isinstance(steps, dict) or (isinstance(steps, list | tuple) and steps and not isinstance(steps[0], dict)):
        return _codec.chunk_of(info, steps)
    if isinstance(steps, np.ndarray) and len(steps):
        return _codec.chunk_of(info, steps)
    return None


def check_timeout(timeout: float | None) -> None:
    """Refuse a time that gRPC would take for another one."""
    if timeout is not None and timeout <= 0:
        raise InvalidArgument(f"timeout: expected more than 0 seconds, got {timeout}")
