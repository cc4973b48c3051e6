"""Servers as processes of their own, and what the operating system says of them."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Process:
    """A running server."""

    target: str
    pid: int
    ready_s: float
    """Seconds from its start until it was ready."""

    def cpu_s(self) -> float:
        """CPU seconds that it has used, all threads, user and system."""
        times = psutil.Process(self.pid).cpu_times()
        return times.user + times.system

    def memory_bytes(self) -> int:
        """Memory that is its own."""
        return psutil.Process(self.pid).memory_full_info().uss


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def running(*command: str, port: int) -> Iterator[Process]:
    """Run a server until the block ends; it says `ready` on a line of its own."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    try:
        while (line := process.stdout.readline()) != "ready\n":
            if not line:
                raise RuntimeError(f"{command[0]} ended before it was ready")
        yield Process(f"127.0.0.1:{port}", process.pid, time.perf_counter() - began)
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def rnnserve(repository: Path, *flags: str) -> contextlib.AbstractContextManager[Process]:
    port = free_port()
    address = ("--port", str(port), "--http-port", "0", "--drain-s", "0")
    return running("-m", "service.client.cli", "serve", "--repository", str(repository), *address, *flags, port=port)


def echo(outputs: int) -> contextlib.AbstractContextManager[Process]:
    port = free_port()
    return running("-m", "benchmarks.echo", str(port), str(outputs), port=port)
