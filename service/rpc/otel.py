"""Whether traces are asked for, and can be had: nothing of OpenTelemetry is imported unless they are."""

from __future__ import annotations

import logging
import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

from service.config import Settings
from service.errors import ConfigError

if TYPE_CHECKING:
    from service.rpc.tracing import Tracing

log = logging.getLogger(__name__)
VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
"""Either turns traces on, as the setting otlp_endpoint does."""
PACKAGES = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.grpc", "opentelemetry.exporter.otlp.proto.http")


def tracing_of(settings: Settings, index: int | None) -> Tracing | None:
    """Begin to trace, if that is asked for by the setting or by OpenTelemetry's variables.

    index  which of several workers this is; None where it is alone

    Raises ConfigError where the setting asks for it and it can't be had. Where it is only the environment that asks,
    which others may have filled, it is warned of.
    """
    variable = next((name for name in VARIABLES if os.environ.get(name)), None)
    if not (settings.otlp_endpoint or variable) or _is_turned_off():
        return None
    if not all(map(_is_there, PACKAGES)):
        advice = "traces need OpenTelemetry's SDK and its OTLP exporter: pip install 'rnnserve[otel]'"
        if settings.otlp_endpoint:
            raise ConfigError(f"otlp_endpoint: {advice}", field="otlp_endpoint")
        log.warning("%s is set, but there will be no traces: %s", variable, advice)
        return None
    from service.rpc.tracing import Tracing

    return Tracing(settings.otlp_endpoint, index, settings.host)


def _is_turned_off() -> bool:
    """Whether OpenTelemetry's variables say that there are to be no traces."""
    is_disabled = os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    return is_disabled or os.environ.get("OTEL_TRACES_EXPORTER", "").strip().lower() == "none"


def _is_there(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # nor is the package around it
        return False
