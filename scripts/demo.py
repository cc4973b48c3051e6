"""Serve the model that `make demo` trained, stream real utterances frame by frame, and print every running prediction.

demo.py REPOSITORY
"""

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from models import tasks
from models.tasks.base import Task
from service.client import Client, RnnserveError, Unavailable

MODEL = "vowels"
NUM_UTTERANCES = 3
BAR_WIDTH = 30
LABEL_WIDTH = 9
READY_LIMIT_S = 60
STOP_LIMIT_S = 60


@contextlib.contextmanager
def served(repository: Path) -> Iterator[str]:
    """Run a server on free ports, yield its address, and stop it as an orchestrator would."""
    with socket.socket() as grpc, socket.socket() as http:
        for each in (grpc, http):
            each.bind(("127.0.0.1", 0))
        port, http_port = grpc.getsockname()[1], http.getsockname()[1]
    command = [sys.executable, "-m", "service.client.cli", "serve", "--repository", str(repository)]
    server = subprocess.Popen([*command, "--port", str(port), "--http-port", str(http_port)])
    try:
        wait_until_ready(server, f"127.0.0.1:{port}")
        yield f"127.0.0.1:{port}"
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            status = server.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            server.kill()
            sys.exit(f"the server did not end within {STOP_LIMIT_S} s of SIGTERM")
    if status:
        sys.exit(f"the server ended with status {status}")


def wait_until_ready(server: subprocess.Popen[bytes], address: str) -> None:
    """Return when the server answers; exit with its status if it ended instead."""
    deadline = time.monotonic() + READY_LIMIT_S
    with Client(address) as client:
        while True:
            if (status := server.poll()) is not None:
                sys.exit(f"the server ended with status {status}; what it printed says why")
            try:
                return client.wait_ready(timeout=1)
            except Unavailable:
                if time.monotonic() > deadline:
                    sys.exit(f"the server was not ready within {READY_LIMIT_S} s")


def choose(task: Task) -> list[int]:
    """Pick test utterances of different speakers, spread over the data."""
    speakers = np.linspace(0, len(task.labels) - 1, NUM_UTTERANCES).astype(int)
    spoken = [int(target) for target in task.test.targets]
    return [spoken.index(speaker) for speaker in speakers]


def show(client: Client, task: Task, utterance: int) -> bool:
    """Stream one utterance, print a line per frame as its answer arrives, and tell whether the last is right."""
    frames, truth = task.test.inputs[utterance], task.labels[int(task.test.targets[utterance])]
    print(f"\nTest utterance {utterance}: {len(frames)} frames, spoken by {truth}")
    print(f"  frame  {'says':<{LABEL_WIDTH}}  {'probability':<{BAR_WIDTH + 5}}  right?")
    said = ""
    with client.stream(MODEL) as stream:
        for number, frame in enumerate(frames, start=1):
            scores = stream.step(frame)
            said, chance = task.labels[int(np.argmax(scores))], float(np.max(scores))
            bar = f"{'#' * round(chance * BAR_WIDTH):<{BAR_WIDTH}}"
            is_right = "yes" if said == truth else "no"
            print(f"  {number:>5}  {said:<{LABEL_WIDTH}}  {chance:>4.0%} {bar}  {is_right}", flush=True)
    print(f"  {'right' if said == truth else 'wrong'} at the end")
    return said == truth


def suggest(repository: Path, sample: Path) -> None:
    """Say what to try next, in commands that work as they stand."""
    rnnserve = Path(sys.executable).with_name("rnnserve")
    if rnnserve.is_relative_to(Path.cwd()):
        rnnserve = rnnserve.relative_to(Path.cwd())
    commands = {
        f"serve --repository {repository}": "start the server again; from another terminal:",
        "models": "what it serves",
        f"stream {MODEL} {sample}": "an answer per frame",
        f"describe {repository}/{MODEL}/1/model.onnx": "what the file says of itself",
        "train --help": "train another",
    }
    width = max(map(len, commands))
    for command, meaning in commands.items():
        print(f"  {rnnserve} {command:<{width}}  # {meaning}")


def main(repository: Path) -> None:
    """Serve, stream, stop, and say what to try next."""
    task = tasks.load(MODEL)
    with served(repository) as address, Client(address) as client:
        print(f"\nServing on {address}. Each frame is sent alone, and answered before the next one is sent.")
        chosen = choose(task)
        num_right = sum([show(client, task, utterance) for utterance in chosen])
    sample = repository.parent / "utterance.npy"
    np.save(sample, task.test.inputs[chosen[0]])
    print(f"\n{num_right} of {len(chosen)} utterances ended right, and the server stopped cleanly. Try next:\n")
    suggest(repository, sample)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except RnnserveError as error:
        sys.exit(f"the demo failed: {error}")
