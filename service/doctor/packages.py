"""What is installed: by its metadata, so that nothing heavy is imported, and the stubs by importing them."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Collection, Iterator
from importlib.metadata import PackageNotFoundError, distributions, requires, version

from service.config import Settings
from service.doctor.findings import Finding, Level, fault

AREA = "installed"
TOLD = ("grpcio", "protobuf", "numpy", "onnxruntime", "onnxruntime-gpu", "onnx", "torch", "uvloop")
"""Packages whose versions a report of a fault should have."""
RUNTIME = re.compile(r"onnxruntime(-[a-z0-9]+)*")
"""Distributions that bring the module onnxruntime, each in a build of its own."""
NOT_RUNTIME = {"onnxruntime-extensions", "onnxruntime-genai", "onnxruntime-tools", "onnxruntime-training-api"}
WHAT_FOR = {
    "train": "to train, export and import models",
    "otel": "for traces, --otlp-endpoint",
    "s3": "for a repository at s3://",
    "gcs": "for a repository at gs://",
    "azure": "for a repository at abfs://",
}
"""What extras are for; cpu and gpu are told of by the module that they share."""
OFFERED = {"train"}
"""Extras that are told of though no setting needs them."""
STORES = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "abfs": "azure", "abfss": "azure", "az": "azure"}
"""Extras by the protocol of a repository's URL."""


def asked_extras(settings: Settings) -> set[str]:
    """Name the extras that settings need."""
    protocol = str(settings.repository).partition("://")[0]
    return ({"otel"} if settings.otlp_endpoint else set()) | ({STORES[protocol]} if protocol in STORES else set())


def check_packages(*, is_serving: bool, asked: Collection[str] = ()) -> Iterator[Finding]:
    """Look at what is installed.

    is_serving  whether onnxruntime is needed
    asked       extras that are
    """
    python = f"{platform.python_implementation()} {platform.python_version()}"
    where = f"{python} at {sys.executable}, {platform.system()} {platform.machine()}"
    yield Finding(AREA, "rnnserve", Level.OK, f"rnnserve {version('rnnserve')}, {where}")
    found = {name: installed for name in TOLD if (installed := _version(name))}
    yield Finding(AREA, "packages", Level.OK, ", ".join(f"{name} {installed}" for name, installed in found.items()))
    yield from _check_runtimes(is_serving)
    yield _check_stubs()
    for extra, purpose in WHAT_FOR.items():
        missing = [name for name in _required(extra) if _version(name) is None]
        if missing and (extra in asked or extra in OFFERED):
            text = f"of the extra [{extra}], not installed: {', '.join(missing)}"
            advice = f"{purpose}: pip install 'rnnserve[{extra}]'"
            yield Finding(AREA, extra, fault(extra in asked), text, advice)


def _check_runtimes(is_serving: bool) -> Iterator[Finding]:
    names = sorted({str(each.metadata["Name"]).lower().replace("_", "-") for each in distributions()})
    runtimes = [name for name in names if RUNTIME.fullmatch(name) and name not in NOT_RUNTIME]
    if not runtimes:
        yield Finding(
            AREA,
            "onnxruntime",
            fault(is_serving),
            "onnxruntime is not installed: this is enough for a client, and not to serve",
            "to serve: pip install 'rnnserve[cpu]', or 'rnnserve[gpu]' on a machine with an NVIDIA GPU",
        )
    elif _version("onnx") is None:
        text, advice = "onnx is not installed, which models with a model.toml need", "to serve such: pip install onnx"
        yield Finding(AREA, "onnx", Level.NOTE, text, advice)
    if len(runtimes) > 1:
        yield Finding(
            AREA,
            "onnxruntime",
            Level.PROBLEM if is_serving else Level.WARNING,
            f"{' and '.join(runtimes)} are both installed, and overwrite each other's files: which one runs is chance",
            f"pip uninstall -y {' '.join(runtimes)}, then pip install 'rnnserve[cpu]' or 'rnnserve[gpu]'",
        )


def _check_stubs() -> Finding:
    """Generated code refuses a protobuf that is too old for it, and grpcio's modules a grpcio that is."""
    try:
        import grpc  # noqa: F401 - that it can be imported is what is looked at

        from service.pb.rnnserve.v1 import rnnserve_pb2, rnnserve_pb2_grpc  # noqa: F401
    except Exception as error:  # noqa: BLE001 - whatever is wrong with them
        text = f"gRPC and the messages can't be loaded: {error}"
        return Finding(AREA, "grpc", Level.PROBLEM, text, "pip install --force-reinstall rnnserve brings what fits")
    return Finding(AREA, "grpc", Level.OK, "gRPC and the messages load")


def _required(extra: str) -> list[str]:
    """Names of what an extra needs."""
    lines = [line for line in requires("rnnserve") or () if f'extra == "{extra}"' in line.replace("'", '"')]
    return [name[0] for line in lines if (name := re.match(r"[A-Za-z0-9._-]+", line))]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
