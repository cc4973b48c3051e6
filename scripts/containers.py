"""Build the serving image, run it beside Prometheus as docker-compose.yml says, and stream a sequence through it.

    containers.py REPOSITORY

Uses docker or podman, whichever is there and works. What a machine needs in addition to build is taken from the
environment: BUILD_FLAGS, such as "--network=host --build-arg PIP_INDEX_URL=...". Leaves nothing behind but the image.
"""

import contextlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from models import tasks
from service.client import Client

ROOT = Path(__file__).resolve().parent.parent
PROJECT = "rnnserve-check"
IMAGE = "rnnserve"
METRIC = "rnnserve_steps_total"


class Engine:
    """docker or podman, and the compose that goes with it."""

    def __init__(self, name: str, compose_command: list[str]) -> None:
        self.name = name
        self.compose_command = compose_command

    def run(self, *arguments: str) -> None:
        """Run a command of the engine and show what it says."""
        subprocess.run([self.name, *arguments], cwd=ROOT, check=True)

    def ask(self, *arguments: str) -> str:
        """Run a command of the engine and return what it prints."""
        return subprocess.run([self.name, *arguments], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout

    def compose(self, *arguments: str, variables: dict[str, str]) -> None:
        """Run a command of compose on a project of our own, so that a running one is left alone."""
        command = [*self.compose_command, "--project-name", PROJECT, *arguments]
        subprocess.run(command, cwd=ROOT, check=True, env=os.environ | variables)


def works(*command: str) -> bool:
    """Whether a command is there and succeeds."""
    if shutil.which(command[0]) is None:
        return False
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False).returncode == 0


def find_engine() -> Engine:
    """Find the first engine that works, with its compose."""
    composes = {
        "docker": [["docker", "compose"], ["docker-compose"]],
        "podman": [["podman-compose"], ["podman", "compose"]],
    }
    running = [name for name in composes if works(name, "info")]
    for name in running:
        for compose in composes[name]:
            if works(*compose, "version"):
                return Engine(name, compose)
    if running:
        sys.exit(f"{running[0]} works but has no compose: install docker's compose plugin or podman-compose")
    sys.exit("neither `docker info` nor `podman info` succeeds: install one of them and start it")


def free_ports(count: int) -> list[int]:
    """Find ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def composed(engine: Engine, variables: dict[str, str]) -> Iterator[None]:
    """Have the server and Prometheus up; show their logs if something fails."""
    try:
        engine.compose("up", "--detach", "--no-build", "server", "prometheus", variables=variables)
        yield
    except BaseException:
        engine.compose("logs", variables=variables)
        raise
    finally:
        engine.compose("down", "--volumes", variables=variables)


def container_of(engine: Engine, service: str) -> str:
    """Id of the container that runs a service."""
    labels = [
        f"--filter=label=com.docker.compose.{key}={value}"
        for key, value in (("project", PROJECT), ("service", service))
    ]
    return engine.ask("ps", "--quiet", *labels).strip()


def stream_through(address: str) -> str:
    """Stream a real utterance frame by frame, and compare with the same asked for at once."""
    utterance = tasks.load("vowels").test.inputs[0]
    with Client(address) as client:
        client.wait_ready(timeout=60)
        with client.stream("vowels") as stream:
            live = np.stack(list(stream.run(utterance)))
        whole = client.predict("vowels", [utterance])[0]
    np.testing.assert_array_equal(live, whole)
    return f"{len(live)} frames streamed; the same bits as in one call"


def look_inside(engine: Engine, server: str) -> str:
    """Have the health check pass from inside, and see that what should be impossible is."""
    engine.run("exec", server, "rnnserve", "health")
    look = (
        "import importlib.util, os\n"
        "print(os.getuid(), importlib.util.find_spec('torch') is None,"
        " *(bool(os.statvfs(path).f_flag & os.ST_RDONLY) for path in ('/', '/models')))"
    )
    user, *facts = engine.ask("exec", server, "python", "-c", look).split()
    if user == "0" or facts != ["True"] * 3:
        sys.exit(f"the server's container: user {user}; no PyTorch, read-only root, read-only models: {facts}")
    return f"healthy by its own check; user {user}; no PyTorch; root file system and models read-only"


def ask_prometheus(port: int, query: str) -> list[float]:
    """Values that a query has now; none while Prometheus starts."""
    url = f"http://127.0.0.1:{port}/api/v1/query?query={urllib.parse.quote(query)}"
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            result = json.load(response)["data"]["result"]
    except OSError:
        return []
    return [float(sample["value"][1]) for sample in result]


def wait_for_prometheus(port: int, limit_s: float = 60) -> str:
    """Wait until Prometheus has scraped the server since our steps; it can't be waited on but by asking."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        up, steps = ask_prometheus(port, 'up{job="rnnserve"}'), ask_prometheus(port, f"sum({METRIC})")
        if up == [1.0] and steps and steps[0] > 0:
            return f"its target is up; {METRIC} is {steps[0]:.0f}"
        time.sleep(0.5)
    sys.exit(f"Prometheus has no {METRIC} after {limit_s:.0f} s: up is {up}, {METRIC} is {steps}")


def measure(engine: Engine, server: str) -> str:
    """Size of the image, unpacked, and how much of it we added to Python's, in MB (10^6 bytes)."""
    image = int(engine.ask("image", "inspect", "--format", "{{.Size}}", IMAGE)) / 1e6
    ours, _ = engine.ask("exec", server, "du", "--summarize", "--block-size=1MB", "/opt/rnnserve").split()
    return f"{image:.0f} MB, {ours} of it rnnserve and what it needs"


def main(repository: Path) -> None:
    """Build, run, stream, look, take down."""
    engine = find_engine()
    print(f"engine      {engine.name}, {' '.join(engine.compose_command)}", flush=True)
    # podman leaves the health check out of an image in its own format.
    formats = ["--format=docker"] if engine.name == "podman" else []
    engine.run("build", *formats, *shlex.split(os.environ.get("BUILD_FLAGS", "")), "--tag", IMAGE, ".")
    grpc, http, prometheus = free_ports(3)
    variables = {
        "REPOSITORY": str(repository.resolve()),
        "GRPC_PORT": str(grpc),
        "HTTP_PORT": str(http),
        "PROMETHEUS_PORT": str(prometheus),
    }
    with composed(engine, variables):
        print(f"stream      {stream_through(f'127.0.0.1:{grpc}')}", flush=True)
        server = container_of(engine, "server")
        print(f"container   {look_inside(engine, server)}", flush=True)
        print(f"image       {measure(engine, server)}", flush=True)
        print(f"prometheus  {wait_for_prometheus(prometheus)}", flush=True)
        engine.run("stop", server)
        status = engine.ask("inspect", "--format", "{{.State.ExitCode}}", server).strip()
        if status != "0":
            sys.exit(f"the server ended with status {status} after SIGTERM")
        print("stop        drained and ended with status 0", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
