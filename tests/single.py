"""`rnnserve serve` as one process, with what it logs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

from service.pb.rnnserve.v1 import rnnserve_pb2_grpc as pb_grpc
from tests.workers import wait_until

Line = dict[str, Any]


class Single:
    """A running server."""

    def __init__(self, process: subprocess.Popen[str], errors: Path) -> None:
        self.process = process
        self._errors = errors
        first = process.stdout.readline()
        assert first, self.log
        self.address = first.split("gRPC on ")[1].split(",")[0]
        self.http = first.split("HTTP on ")[1].split(",")[0].strip()
        while process.stdout.readline() != "ready\n":
            assert process.poll() is None, self.log

    @property
    def log(self) -> str:
        return self._errors.read_text()

    def lines(self) -> list[Line]:
        """The log, each line of which must be an object."""
        return [json.loads(line) for line in self.log.splitlines()]

    def wait_for(self, fits: Callable[[Line], bool]) -> Line:
        """Wait for a line of the log, the first that fits."""
        wait_until(lambda: any(map(fits, self.lines())))
        return next(filter(fits, self.lines()))

    @contextmanager
    def stub(self) -> Iterator[pb_grpc.SequenceServiceStub]:
        with grpc.insecure_channel(self.address) as channel:
            yield pb_grpc.SequenceServiceStub(channel)

    def stop(self) -> int:
        """Drain it. Returns its status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=20)


@contextmanager
def single(repository: Path, *arguments: str, **variables: str) -> Iterator[Single]:
    """Serve until the block ends; variables of the environment beside those that are there."""
    with tempfile.NamedTemporaryFile("w+", prefix="rnnserve-") as errors:
        process = subprocess.Popen(
            [
                *(Path(sys.executable).with_name("rnnserve"), "serve", "--repository", str(repository)),
                *("--port", "0", "--http-port", "0", "--drain-s", "0.2", *arguments),
            ],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, **variables},
        )
        try:
            yield Single(process, Path(errors.name))
        finally:
            process.kill()
            process.communicate()
