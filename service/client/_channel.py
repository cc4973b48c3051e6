"""How both shells reach a server: target, limits, keepalive, TLS, retries."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from service.client.errors import InvalidArgument

DEFAULT_TARGET = "localhost:8001"
DEFAULT_PORT = 8001
KEEPALIVE_S = 310.0
"""A gRPC server hangs up on clients that ask more often than every 5 minutes, unless it was told otherwise. A
connection that leaves what was sent unacknowledged for 10 s is given up all the same."""
SERVICE = "rnnserve.v1.SequenceService"
HEALTH_CHECK = "/grpc.health.v1.Health/Check"

_RETRY = {
    "maxAttempts": 4,
    "initialBackoff": "0.1s",
    "maxBackoff": "2s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelSettings:
    """What a channel is made of."""

    target: str = DEFAULT_TARGET
    """host:port, or any other name that gRPC knows, such as unix:/run/rnnserve.sock. Default port: 8001."""
    tls: bool = False
    """Encrypt, and check the server's certificate. Given certificates turn it on too."""
    root_certificates: bytes | None = None
    """PEM of the authorities to trust; None trusts those of gRPC."""
    client_certificate: bytes | None = None
    """PEM of the certificate chain to show to the server."""
    client_key: bytes | None = None
    """PEM of its private key."""
    server_name: str | None = None
    """Name to expect in the server's certificate, if it is not the target's."""
    max_message_bytes: int = 64 * 1024 * 1024
    """Largest message to send or take."""
    keepalive_s: float = KEEPALIVE_S
    """Idle time after which a call's connection is checked; 0 never checks."""
    options: Sequence[tuple[str, str | int]] = ()
    """Further channel options of gRPC; they win over the ones made here."""

    def __post_init__(self) -> None:
        if (self.client_certificate is None) != (self.client_key is None):
            raise InvalidArgument("client_certificate and client_key go together: give both or none")

    @property
    def address(self) -> str:
        """The target with its port."""
        host = self.target
        has_port = ":" in host.rpartition("]")[2] if host.startswith("[") else ":" in host
        return host if has_port else f"{host}:{DEFAULT_PORT}"

    @property
    def is_secure(self) -> bool:
        """Whether to speak TLS."""
        return self.tls or self.root_certificates is not None or self.client_certificate is not None

    def credentials(self) -> grpc.ChannelCredentials:
        """What to show, and whom to trust."""
        return grpc.ssl_channel_credentials(self.root_certificates, self.client_key, self.client_certificate)

    def channel_options(self) -> list[tuple[str, str | int]]:
        """Options for either kind of channel."""
        retried = [{"service": SERVICE, "method": method} for method in ("ListModels", "GetModel", "Predict")]
        options: dict[str, str | int] = {
            "grpc.max_send_message_length": self.max_message_bytes,
            "grpc.max_receive_message_length": self.max_message_bytes,
            "grpc.initial_reconnect_backoff_ms": 100,
            "grpc.max_reconnect_backoff_ms": 2_000,
            "grpc.enable_retries": 1,
            "grpc.service_config": json.dumps({"methodConfig": [{"name": retried, "retryPolicy": _RETRY}]}),
        }
        if self.keepalive_s:
            options["grpc.keepalive_time_ms"] = int(self.keepalive_s * 1000)
            options["grpc.keepalive_timeout_ms"] = 10_000
            options["grpc.http2.max_pings_without_data"] = 0
        if self.server_name is not None:
            options["grpc.ssl_target_name_override"] = self.server_name
        return [*(options | dict(self.options)).items()]
