"""Whether what the settings name is there and fits: ports, certificates, models."""

from __future__ import annotations

import errno
import logging
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from service.config import PREFIX, Settings, unknown_variables
from service.doctor.findings import Finding, Level, fault

AREA = "settings"
SOON_S = 30 * 86_400
"""A certificate that ends sooner is warned about."""


def check_variables() -> Iterator[Finding]:
    """Look for variables that were meant to set something."""
    for name, meant in unknown_variables().items():
        advice = f"did you mean {meant}?" if meant else f"unset it; {PREFIX}... are settings of the server"
        yield Finding(AREA, name, Level.WARNING, f"the environment variable {name} sets nothing", advice)


def check_ports(settings: Settings, *, is_serving: bool) -> Iterator[Finding]:
    """Try to listen where the server would."""
    for name, port in (("port", settings.port), ("http_port", settings.http_port)):
        flag = "--" + name.replace("_", "-")
        address = f"{settings.host}:{port}"
        try:
            _bind(settings.host, port)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                text, advice = f"{address} is in use", f"stop what listens there, or choose another {flag}"
            elif error.errno == errno.EACCES:
                text, advice = f"{address} is not for users without rights", f"choose a {flag} from 1024 on"
            else:
                text, advice = f"can't listen on {address}: {error.strerror or error}", "choose another --host"
            yield Finding(AREA, name, fault(is_serving), text, advice)
        else:
            yield Finding(AREA, name, Level.OK, f"{address} is free" if port else f"{name}: a free one is taken")


def _bind(host: str, port: int) -> None:
    [*found] = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    for family, kind, protocol, _, name in found:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(
                socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
            )  # as the server: one that has just ended is gone
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind(name)


def check_tls(settings: Settings) -> Iterator[Finding]:
    """Shake hands with the certificate, in memory: a key that does not fit and a time that is over come out."""
    cert, key, authorities = settings.tls_cert, settings.tls_key, settings.tls_client_ca
    if not (cert or key or authorities):
        return
    if cert is None or key is None:
        yield Finding(
            AREA, "tls", Level.PROBLEM, "TLS needs both a certificate and its key", "give --tls-cert and --tls-key"
        )
        return
    yield _checked("tls_cert", cert, lambda: _check_certificate(cert, key))
    if authorities is not None:
        yield _checked("tls_client_ca", authorities, lambda: _check_authorities(authorities))


def _checked(name: str, path: Path, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            text, advice = f"the key is not that of {path}", "give the key that the certificate was made for"
        else:
            text, advice = (
                f"{path} can't be used: {error.reason or error}",
                "give PEM files; in a chain its own is first",
            )
    except OSError as error:
        text, advice = f"can't read {error.filename}: {error.strerror}", "give a file that the server may read"
    return Finding(AREA, name, Level.PROBLEM, text, advice)


def _check_authorities(path: Path) -> Finding:
    path.read_bytes()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_verify_locations(path)
    count = context.cert_store_stats()["x509"]
    return Finding(AREA, "tls_client_ca", Level.OK, f"{path}: {count} authorities that may sign clients' certificates")


def _check_certificate(cert: Path, key: Path) -> Finding:
    for path in (cert, key):  # or ssl would not say which
        path.read_bytes()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(cert, key)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.load_verify_locations(cert)
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # it vouches for itself
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    one = client.wrap_bio(to_client, to_server)
    other = server.wrap_bio(to_server, to_client, server_side=True)
    try:
        for _ in range(4):
            for side in (one, other):
                try:
                    side.do_handshake()
                except ssl.SSLWantReadError:
                    continue
    except ssl.SSLCertVerificationError as error:
        return Finding(AREA, "tls_cert", Level.PROBLEM, f"{cert}: {error.verify_message}", "get a new certificate")
    facts = one.getpeercert() or {}
    names = ", ".join(str(pair[1]) for pair in facts.get("subjectAltName", ()))
    ends = str(facts["notAfter"])
    text = f"{cert} fits its key, is for {names or 'no name (clients will refuse it)'}, and ends {ends}"
    left_s = ssl.cert_time_to_seconds(ends) - time.time()
    if left_s < SOON_S:
        return Finding(AREA, "tls_cert", Level.WARNING, f"{text}, in {left_s / 86_400:.0f} days", "renew it")
    if not names:
        return Finding(AREA, "tls_cert", Level.WARNING, text, "get one with subjectAltName, which clients look at")
    return Finding(AREA, "tls_cert", Level.OK, text)


def check_repository(settings: Settings) -> Iterator[Finding]:
    """Load every model as the server would, and probe it."""
    from service.errors import ServiceError
    from service.repository import load_repository

    area = "repository"
    # A running server may have its states in the file, which loading empties.
    alone = settings.model_copy(update={"spill_store": None, "max_resident_sessions": 0})
    try:
        with _quiet():
            loaded = load_repository(alone)
            loaded.storage.close()
    except ServiceError as error:
        yield Finding(area, "repository", Level.PROBLEM, str(error), "mend that, then ask again")
        return
    for lane in loaded.lanes:
        text = f"{lane.name}/{lane.version}: {lane.step_mode.value}, {lane.backend.provider}, {lane.exactness.verdict}"
        fallbacks = lane.backend.placement.recurrent_fallbacks
        if fallbacks:
            advice = "serve it on the CPU, or export it with attributes that the provider has a kernel for"
            text = f"{text}; {', '.join(map(str, fallbacks))} on {fallbacks[0].provider}"
            yield Finding(area, f"{lane.name}/{lane.version}", Level.WARNING, text, advice)
        else:
            yield Finding(area, f"{lane.name}/{lane.version}", Level.OK, text)
    for broken in loaded.broken:
        name = f"{broken.name}/{broken.version or '?'}"
        advice = f"`rnnserve verify` looks closer at a file; export it again, or move it out of {settings.repository}"
        yield Finding(area, name, Level.PROBLEM, f"{name}: {broken.error}", advice)
    if not loaded.lanes and not loaded.broken:
        text = f"{settings.repository} holds no model"
        yield Finding(
            area, "repository", Level.PROBLEM, text, f"rnnserve export RUN --repository {settings.repository}"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Log nothing meanwhile: it is told in findings."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
