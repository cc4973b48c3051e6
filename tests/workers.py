"""`rnnserve serve --workers N` as processes, and ways to find out which worker does what."""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError

import grpc
import numpy as np
import psutil
from prometheus_client.parser import text_string_to_metric_families

from service.pb.rnnserve.v1 import rnnserve_pb2_grpc as pb_grpc
from tests.rpc import predict

Page = dict[tuple[str, frozenset[tuple[str, str]]], float]
LSTM = {"model": "lstm", "version": "1"}


class Fleet:
    """A running server of several workers."""

    def __init__(self, process: subprocess.Popen[str], scratch: Path, errors: Path) -> None:
        self.process = process
        self.announced: list[str] = []
        self.scratch = scratch
        self._errors = errors
        while (line := process.stdout.readline()) != "ready\n":
            assert line, self.log
            self.announced.append(line)
        self.address = self.announced[0].split("gRPC on ")[1].split(",")[0]
        self.http = self.announced[0].split("HTTP on ")[1].split(",")[0].strip()

    @property
    def folder(self) -> Path:
        [folder] = self.scratch.glob("rnnserve-*")
        return folder

    @property
    def log(self) -> str:
        return self._errors.read_text()

    def worker(self, index: int) -> psutil.Process:
        """The process that serves as worker `index`: it says so in the log, the last one counts."""
        pid = [line for line in self.log.splitlines() if f"worker {index} is ready" in line][-1].split()[-1]
        return psutil.Process(int(pid))

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"{self.http}{path}", timeout=10) as response:
            return response.read().decode()

    def is_ready(self) -> bool:
        try:
            return self.get("/readyz") == "ok\n"
        except HTTPError:
            return False

    def page(self) -> Page:
        return page_of(self.get("/metrics"))

    def page_of(self, index: int) -> Page:
        """The metrics of one worker."""
        connection = http.client.HTTPConnection("worker", timeout=10)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(self.folder / f"{index}.sock"))
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        return page_of(text)

    def per_worker(self, name: str, model: str = "lstm") -> list[float]:
        """A metric of a model, of each of two workers."""
        return [value(self.page_of(index), name, model=model, version="1") for index in range(2)]

    def connect(self) -> grpc.Channel:
        """Make a connection of its own: the kernel chooses its worker."""
        return grpc.insecure_channel(self.address, options=[("grpc.use_local_subchannel_pool", 1)])

    def connect_to(self, index: int) -> grpc.Channel:
        """Make connections until one has the wanted worker."""
        for _ in range(100):
            channel = self.connect()
            before = self.per_worker("rnnserve_steps_total")
            predict(pb_grpc.SequenceServiceStub(channel), "lstm", [np.zeros((1, 3), np.float32)])
            after = self.per_worker("rnnserve_steps_total")
            if after[index] > before[index]:
                return channel
            channel.close()
        raise AssertionError(f"no connection came to worker {index}")


def page_of(text: str) -> Page:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(page: Page, name: str, **labels: str) -> float:
    """The one value of a metric with those labels, whatever others it has."""
    [found] = [each for (known, have), each in page.items() if known == name and labels.items() <= set(have)]
    return found


def wait_until(holds: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Wait until something holds, asked again and again."""
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end, "it did not come to hold in time"
        time.sleep(0.02)


@contextmanager
def command(repository: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], Path, Path]]:
    """Run `rnnserve serve --workers 2` on free ports. Gives (process, folder of its folders, file of its errors)."""
    scratch = Path(tempfile.mkdtemp(prefix="w-", dir="/tmp"))  # short, for paths of sockets
    errors = scratch / "errors"
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            [
                *(Path(sys.executable).with_name("rnnserve"), "serve", "--repository", str(repository)),
                *("--workers", "2", "--port", "0", "--http-port", "0", *arguments),
            ],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={**os.environ, "TMPDIR": str(scratch)},
        )
    try:
        yield process, scratch, errors
    finally:
        workers = psutil.Process(process.pid).children() if process.poll() is None else []
        process.kill()
        process.communicate()
        psutil.wait_procs(workers, timeout=10)  # they remove their folder
        shutil.rmtree(scratch)


@contextmanager
def fleet_of(repository: Path, *arguments: str) -> Iterator[Fleet]:
    """Serve with two workers until the block ends."""
    with command(repository, *arguments) as (process, scratch, errors):
        yield Fleet(process, scratch, errors)
