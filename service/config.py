"""Settings of the server: frozen, validated, each explained by the text under it.

One precedence: a flag beats an environment variable (RNNSERVE_ and the name in capitals; an empty one counts as
absent), which beats the TOML file given by --config, which beats the default. The command line, the environment and
the file share the names below.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from service.errors import ConfigError
from service.versions import VersionPolicies

PREFIX = "RNNSERVE_"
"""Of every environment variable."""
OTHER_VARIABLES = frozenset({"RNNSERVE_SERVER"})
"""Those that begin alike and are the client's."""
_SERVICE_LINK = re.compile(rf"{PREFIX}(SERVICE_|PORT_\d)")
"""Variables that Kubernetes makes for a Service called rnnserve."""

Port = Annotated[int, Field(ge=0, le=65535)]
Positive = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Repository = Annotated[Path | str, BeforeValidator(lambda given: _repository_of(given))]
"""A path, or the text of a URL."""
Policies = Annotated[
    VersionPolicies,
    NoDecode,  # the environment holds the text of a flag, not JSON
    BeforeValidator(VersionPolicies.parse),
    PlainSerializer(str),
    Field(json_schema_extra={"repeats": True}),
]
"""On the command line it may be given in parts."""


class Settings(BaseSettings):
    """Everything that can be set."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_ignore_empty=True,
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
    )

    repository: Repository
    """Directory of models: <repository>/<model>/<version>/model.onnx; or a URL, s3://, gs://, abfs:// and others of
    fsspec."""
    repository_cache: Path | None = None
    """Directory for what is fetched from a URL, kept for the next start; without it one that is removed at the end."""
    version_policy: Policies = VersionPolicies()
    """Versions that are served: all, latest:N (the highest that load), or numbers such as 1,3; MODEL=POLICY is for one
    model."""
    watch: Seconds = 0.0
    """Seconds between looks at the repository for what is new, changed or gone; 0 looks only at start."""
    retire_s: Seconds = 0.0
    """Longest that live sessions go on with a version that newer ones have replaced; 0 for as long as they last."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for every IPv4 address, [::] for every one."""
    port: Port = 8001
    """Port of the gRPC server; 0 takes a free one."""
    http_port: Port = 8002
    """Port of the page, /metrics, /livez and /readyz; 0 takes a free one."""
    page: bool = True
    """Whether the HTTP port has the page, which shows the models and tries them, and its API."""
    page_hosts: str = ""
    """Host names, with commas between them, that browsers may ask for the page by, beside addresses and names without
    a dot; so that no stranger's page can use it through a name of theirs."""
    tls_cert: Path | None = None
    """PEM file with the server's certificate chain; with tls_key it turns TLS on."""
    tls_key: Path | None = None
    """PEM file with the private key of tls_cert."""
    tls_client_ca: Path | None = None
    """PEM file of authorities; clients must show a certificate that one of them signed."""

    workers: Positive = 1
    """Processes that share the port, each with all models and its own sessions; more than 1 needs Linux."""
    provider: Literal["cpu", "cuda", "cuda,cpu"] = "cpu"
    """onnxruntime's execution provider; "cuda" fails where CUDA is absent, "cuda,cpu" falls back to the CPU."""
    device_id: Annotated[int, Field(ge=0)] = 0
    """Number of the GPU, as CUDA counts those that it sees."""
    compute_threads: Positive = 1
    """Threads that a batch may be split over; it is where that is measured to be faster."""
    max_batch_rows: Positive = 256
    """Most sequences advanced in one run."""
    max_chunk_steps: Positive = 16
    """Most steps that a sequence advances in one run; longer input is cut, so that others get their turn."""
    inline_run_ms: Seconds = 2.0
    """Runs measured to take less than this happen on the event loop, longer ones on a thread."""
    batch_coupled_models: bool = False
    """Batch also models whose neighbours in a batch change each other's numbers (the probe at load tells)."""

    max_sessions: Positive = 16_384
    """Most live sessions of one model version."""
    max_resident_sessions: Annotated[int, Field(ge=0)] = 0
    """Most of them whose state is in memory, for a model that steps; the others' is in spill_store; 0 keeps all."""
    spill_store: Path | None = None
    """File for the state of idle sessions past max_resident_sessions, made if absent and emptied at start and stop;
    each of several workers adds its number to the name."""
    max_predict_sequences: Positive = 1_024
    """Most sequences of Predict calls in progress at once, for one model version; more wait their turn. No call takes
    more than half of those that are free, so that there is room for the next one."""
    max_message_bytes: Positive = 16 * 1024 * 1024
    """Largest request message, as it is after decompression."""
    max_response_bytes: Annotated[int, Field(ge=2 * 1024 * 1024)] = 64 * 1024 * 1024
    """Largest answer of a call with one answer; those of streams are cut into messages of about 1 MiB."""
    max_metadata_bytes: Annotated[int, Field(ge=4096)] = 16 * 1024
    """Largest metadata of a request, as HTTP/2 counts it: names, values, and 32 bytes for each pair."""
    max_concurrent_streams: Annotated[int, Field(ge=0)] = 0
    """Most calls in progress on one connection; a client lets more wait; 0 sets no limit."""
    compress_responses: bool = False
    """Compress answers for clients that accept gzip or deflate; a call can ask for its own with the metadata
    rnnserve-compression: gzip or deflate."""
    max_steps_per_message: Positive = 65_536
    """Most steps in one message, over all of its sequences; and most opens and closes."""
    max_inflight_steps: Positive = 16_384
    """Most steps of one session that are queued, or kept for a model that needs the whole sequence."""
    max_queued_steps: Positive = 1_048_576
    """Most steps queued for one model version; more are refused at once with a time to retry after."""
    max_unsent_bytes: Positive = 4 * 1024 * 1024
    """Answers, those of queued steps included, that wait for one stream; past it the server stops reading from it."""
    max_replay_window: Annotated[int, Field(ge=0)] = 1_024
    """Most answers that a session may ask to be kept for a resend."""
    max_linger_s: Seconds = 300.0
    """Longest that a session may ask to outlive its connection."""
    session_idle_s: Seconds = 0.0
    """Time after which a session without steps is ended, though its client is connected; 0 never ends it."""
    sequence_idle_s: Seconds = 60.0
    """Time after which a sequence of the Open Inference Protocol without requests is ended; 0 never ends it."""
    non_finite: Literal["reject", "pass"] = "reject"
    """What to do with NaN and infinity in inputs: refuse the step, or let the model have them."""

    keepalive_s: Seconds = 40.0
    """Time without a sign of a client after which its connection is checked by a ping; 0 never checks."""
    keepalive_timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 20.0
    """Time without an answer to it after which the connection is given up, and its sessions with it."""
    min_ping_interval_s: Seconds = 10.0
    """Least time between a client's own pings; one that asks more often is told too_many_pings and hung up on."""
    idle_pings: bool = True
    """Let clients ping, and check connections, while no call is in progress."""
    max_connection_age_s: Seconds = 0.0
    """Time, give or take a tenth, after which a connection takes no new calls, so that clients connect anew and spread
    over the servers that there are; its native streams are told in-band; 0 lets it live."""
    max_connection_age_grace_s: Seconds = 30.0
    """Time that calls on a connection past max_connection_age_s get to finish."""
    max_connection_idle_s: Seconds = 0.0
    """Time without a call after which a connection is closed; 0 lets it live."""
    reflection: bool = True
    """Tell clients such as grpcurl what services and messages there are."""
    channelz: bool = False
    """Offer grpc.channelz, which tells whoever asks of every connection and its counts: for trusted networks."""

    drain_s: Seconds = 30.0
    """Time that streams get to finish after SIGTERM, or once their model was unloaded by a call."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severity that is logged."""
    log_format: Literal["text", "json"] = "text"
    """How log lines are written: as text, or each as one object of JSON."""
    access_log: Literal["off", "calls", "sessions"] = "off"
    """Log a line for each call that has ended, of gRPC and of HTTP; or for each live session that has ended too."""
    otlp_endpoint: str = ""
    """URL of an OpenTelemetry collector that traces are sent to, such as http://localhost:4317; empty leaves it to
    OpenTelemetry's own variables, and without them there are no traces. Needs rnnserve[otel]."""


def _repository_of(given: Any) -> Any:
    """Tell a path from a URL."""
    if not isinstance(given, str):
        return given
    protocol, is_url, path = given.partition("://")
    return given if is_url and protocol != "file" else Path(path if is_url else given)


def load_settings(flags: dict[str, Any], config: Path | None = None) -> Settings:
    """Merge flags, environment and file. Raises ConfigError that names the setting at fault."""
    values = _read_toml(config) if config else {}
    variables = _variables()
    below = {name: value for name, value in values.items() if _variable(name) not in variables}
    try:
        settings = Settings(**(below | flags))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "settings"
        if first["type"] == "missing":
            message = f"{name} is not set: give --{name.replace('_', '-')} or {_variable(name)}"
        elif first["type"] == "extra_forbidden":
            close = difflib.get_close_matches(name, Settings.model_fields, n=1)
            meant = f"; did you mean {close[0]}?" if close else ""
            place = "" if name in flags else f"{config}: "
            message = f"{place}{name} is no setting; `rnnserve serve --help` lists them{meant}"
        else:
            source = sources_of(flags, config).get(str(first["loc"][0]), "") if first["loc"] else ""
            where = f" from {source}" if source else ""
            message = f"{name}: {first['msg'].removeprefix('Value error, ')}, got {first.get('input')!r}{where}"
        raise ConfigError(message, field=name) from error
    _check_spilling(settings)
    return settings


def sources_of(flags: Mapping[str, Any], config: Path | None = None) -> dict[str, str]:
    """Tell where `load_settings` has each setting from. Raises ConfigError for a file that can't be read."""
    values = _read_toml(config) if config else {}
    variables = _variables()

    def source(name: str) -> str:
        if name in flags:
            return f"--{name.replace('_', '-')}"
        if _variable(name) in variables:
            return _variable(name)
        return str(config) if name in values else "default"

    return {name: source(name) for name in Settings.model_fields}


def write_toml(settings: Settings, sources: Mapping[str, str]) -> str:
    """Write settings as a file that --config reads, each with where it is from; None can't be written but is told."""
    lines = []
    for name, value in settings.model_dump(mode="json").items():
        # A string of JSON is one of TOML too, and so are numbers, switches and lists.
        text = f"# {name} is not set" if value is None else f"{name} = {json.dumps(value, ensure_ascii=False)}"
        lines.append(f"{text:<50}  # {sources[name]}")
    return f"# The settings of rnnserve {version('rnnserve')}, and where each is from.\n" + "\n".join(lines) + "\n"


def unknown_variables() -> dict[str, str]:
    """Find variables that set nothing, each with the name that was meant, perhaps, or an empty one."""
    strange = {
        name.removeprefix(PREFIX)
        for name in _variables() - OTHER_VARIABLES
        if name.startswith(PREFIX) and not _SERVICE_LINK.match(name)
    }
    known = {name.upper() for name in Settings.model_fields}
    meant = {name: difflib.get_close_matches(name, known, n=1) for name in sorted(strange - known)}
    return {f"{PREFIX}{name}": f"{PREFIX}{close[0]}" if close else "" for name, close in meant.items()}


def _variable(name: str) -> str:
    return f"{PREFIX}{name.upper()}"


def _variables() -> set[str]:
    """Names of variables that are not empty, which small letters count for too."""
    return {name.upper() for name, value in os.environ.items() if value}


def _check_spilling(settings: Settings) -> None:
    resident = settings.max_resident_sessions
    if resident and settings.spill_store is None:
        raise ConfigError(
            f"max_resident_sessions: {resident} leaves the others' state without a place: set spill_store too",
            field="spill_store",
        )
    if settings.spill_store is not None and not resident:
        raise ConfigError(
            f"spill_store: nothing is moved to {settings.spill_store} unless max_resident_sessions is set too",
            field="max_resident_sessions",
        )
    if resident > settings.max_sessions:
        raise ConfigError(
            f"max_resident_sessions: {resident} is more than max_sessions, {settings.max_sessions}; lower it, or leave "
            "both it and spill_store out",
            field="max_resident_sessions",
        )


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"can't read {path}: {error.strerror}", field="config") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}", field="config") from error
