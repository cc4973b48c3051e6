"""Servers as processes of their own, and what the operating system says of them."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

CLI = ("-m", "service.client.cli")


@dataclass(frozen=True)
class Process:
    """A running server: the process that was started, and those that it started."""

    target: str
    pid: int
    ready_s: float
    """Seconds from its start until it was ready."""
    http_port: int = 0
    """Where its metrics are; 0 for a server that has none."""

    def cpu_s(self) -> float:
        """CPU seconds that it has used: all processes and threads, user and system, those that ended included."""
        total = 0.0
        for process in self._tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system + times.children_user + times.children_system
        return total

    def memory_bytes(self) -> int:
        """Memory that it has taken for itself: heaps and stacks of all its processes.

        Mapped files don't count, libraries above all: whose own they are changes with what else runs on the machine.
        """
        return sum(memory.rss - memory.shared for memory in self._memory())

    def resident_bytes(self) -> int:
        """Memory that it has in use, mapped files included."""
        return sum(memory.rss for memory in self._memory())

    def _memory(self) -> list[psutil._pslinux.pmem]:
        found = []
        for process in self._tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(process.memory_info())
        return found

    def _tree(self) -> list[psutil.Process]:
        first = psutil.Process(self.pid)
        return [first, *first.children(recursive=True)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def running(*command: str, port: int, http_port: int = 0) -> Iterator[Process]:
    """Run a server until the block ends; it says `ready` on a line of its own."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    try:
        while (line := process.stdout.readline()) != "ready\n":
            if not line:
                raise RuntimeError(f"{' '.join(command)} ended before it was ready")
        yield Process(f"127.0.0.1:{port}", process.pid, time.perf_counter() - began, http_port)
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def rnnserve(repository: Path, *flags: str) -> contextlib.AbstractContextManager[Process]:
    port, http_port = free_port(), free_port()
    address = ("--port", str(port), "--http-port", str(http_port), "--drain-s", "0")
    command = (*CLI, "serve", "--repository", str(repository), *address, *flags)
    return running(*command, port=port, http_port=http_port)


def echo(outputs: int) -> contextlib.AbstractContextManager[Process]:
    port = free_port()
    return running("-m", "benchmarks.echo", str(port), str(outputs), port=port)


@functools.cache
def flags_of_serve() -> frozenset[str]:
    """Every flag that `rnnserve serve --help` names."""
    text = subprocess.run([sys.executable, *CLI, "serve", "--help"], check=True, capture_output=True, text=True).stdout
    return frozenset(word for word in text.split() if word.startswith("--"))
