"""How both shells reach a server: target, limits, keepalive, TLS, compression, retries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from service.client.errors import InvalidArgument

if TYPE_CHECKING:
    import grpc

DEFAULT_TARGET = "localhost:8001"
DEFAULT_PORT = 8001
KEEPALIVE_S = 310.0
"""A gRPC server hangs up on clients that ask more often than every 5 minutes, unless it was told otherwise. A
connection that leaves what was sent unacknowledged for 10 s is given up all the same."""
HEALTH_CHECK = "/grpc.health.v1.Health/Check"
SERVICE_CONFIG = Path(__file__).parent.parent / "pb" / "rnnserve" / "v1" / "service_config.json"
"""What is tried again, and when, in gRPC's own words; a copy of the one beside the proto. Streams are not: they are
resumed instead."""
RETRY_BYTES = 16 * 1024 * 1024
"""A request is kept for its next attempt up to this size. Larger ones than a server takes are then not sent in vain."""

Compression = Literal["gzip", "deflate"]
COMPRESSION_KEY = "rnnserve-compression"
"""Metadata that asks for compressed answers."""
_ALGORITHMS: dict[Compression, int] = {"deflate": 1, "gzip": 2}


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
    compression: Compression | None = None
    """Of requests; metadata() asks for answers of the same."""
    options: Sequence[tuple[str, str | int]] = ()
    """Further channel options of gRPC; they win over the ones made here."""

    def __post_init__(self) -> None:
        if (self.client_certificate is None) != (self.client_key is None):
            raise InvalidArgument("client_certificate and client_key go together: give both or none")
        if self.compression is not None and self.compression not in _ALGORITHMS:
            raise InvalidArgument(f"compression: expected gzip or deflate, got {self.compression!r}")

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
        import grpc  # not needed to complete a command line, which can't wait for it

        return grpc.ssl_channel_credentials(self.root_certificates, self.client_key, self.client_certificate)

    def channel_options(self) -> list[tuple[str, str | int]]:
        """Options for either kind of channel."""
        options: dict[str, str | int] = {
            "grpc.max_send_message_length": self.max_message_bytes,
            "grpc.max_receive_message_length": self.max_message_bytes,
            "grpc.initial_reconnect_backoff_ms": 100,
            "grpc.max_reconnect_backoff_ms": 2_000,
            "grpc.enable_retries": 1,
            "grpc.per_rpc_retry_buffer_size": RETRY_BYTES,
            "grpc.service_config": _service_config(),
        }
        if self.compression is not None:
            options["grpc.default_compression_algorithm"] = _ALGORITHMS[self.compression]
        if self.keepalive_s:
            options["grpc.keepalive_time_ms"] = int(self.keepalive_s * 1000)
            options["grpc.keepalive_timeout_ms"] = options["grpc.http2.ping_timeout_ms"] = 10_000
            options["grpc.http2.max_pings_without_data"] = 0
        if self.server_name is not None:
            options["grpc.ssl_target_name_override"] = self.server_name
        return [*(options | dict(self.options)).items()]

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What every call carries for the sake of these settings."""
        return () if self.compression is None else ((COMPRESSION_KEY, self.compression),)


@cache
def _service_config() -> str:
    return SERVICE_CONFIG.read_text(encoding="utf-8")
