"""Silero VAD, a model that nobody here made, streamed through the server: equal to its own package's code."""

from __future__ import annotations

import re
import shlex
import warnings
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from service.adoptcli import adopt
from service.client import Client
from tests.oip.calls import array, request, stub_of
from tests.serving import Served, serving

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of torch.jit, which the package touches when it is imported
    from silero_vad.utils_vad import OnnxWrapper

RATE, CHUNK, SESSIONS = 16_000, 512, 24
PAGE = Path(__file__).parent.parent / "docs" / "adopt.md"
Rows = np.ndarray


@pytest.fixture(scope="module")
def file():
    with as_file(files("silero_vad.data") / "silero_vad.onnx") as path:
        yield path


@pytest.fixture(scope="module")
def root(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adopted by the command in docs/adopt.md."""
    root = tmp_path_factory.mktemp("adopted")
    [line] = re.findall(r"^ +rnnserve adopt (.*)$", PAGE.read_text(), re.MULTILINE)
    words = shlex.split(line.replace("$FILE", str(file)).replace("--repository repository", f"--repository {root}"))
    done = CliRunner().invoke(adopt, words)
    assert done.exit_code == 0, done.output
    assert "exact" in done.output
    return root


@pytest.fixture(scope="module")
def served(root: Path):
    with serving(root) as running:
        yield running


@pytest.fixture(scope="module")
def voices() -> list[Rows]:
    """Many live microphones: the clip from different places on, louder and softer, in noise. Each [chunks, 512]."""
    with np.load(Path(__file__).parent / "data" / "speech.npz") as clip:
        assert clip["rate"] == RATE
        samples = clip["samples"].astype(np.float32) / 32768
    rng = np.random.default_rng(0)
    found = []
    for number in range(SESSIONS):
        start = int(rng.integers(0, len(samples) // 2))
        part = samples[start:] * rng.uniform(0.2, 1.5)
        part = part + rng.normal(0, 0.003 * (number % 4), len(part))
        found.append(part[: len(part) // CHUNK * CHUNK].reshape(-1, CHUNK).astype(np.float32))
    return found


@pytest.fixture(scope="module")
def wanted(file: Path, voices: list[Rows]) -> list[Rows]:
    """What the package's own code says, one after another: [chunks, 1] probabilities of speech."""
    model = OnnxWrapper(str(file))
    found = []
    for voice in voices:
        model.reset_states()
        found.append(np.concatenate([model(torch.from_numpy(chunk), RATE).numpy() for chunk in voice]))
    return found


def test_many_live_sessions(served: Served, voices: list[Rows], wanted: list[Rows]) -> None:
    """A chunk of each at a time, in one batch: bit for bit what each gets alone."""
    rows: dict[int, list[Rows]] = {number: [] for number in range(SESSIONS)}
    with Client(served.address) as client:
        assert client.model("vad").exactness == "exact"
        with client.gateway("vad") as gateway:
            for number in range(SESSIONS):
                assert gateway.open(f"microphone-{number}") == number
            for t in range(max(map(len, voices))):
                gateway.send({number: voice[t] for number, voice in enumerate(voices) if t < len(voice)})
            gateway.end()
            for events in gateway.receive():
                assert not events.errors
                for number, y in events:
                    rows[number].extend(y)
    for number, expected in enumerate(wanted):
        np.testing.assert_array_equal(np.array(rows[number]), expected)
    said = np.concatenate(wanted)
    assert said.max() > 0.9
    assert said.min() < 0.1  # it hears speech, and silence
    runs = served.lane("vad").tally
    assert runs.steps / runs.runs > 4  # and they ran together


def test_whole_recordings(served: Served, voices: list[Rows], wanted: list[Rows]) -> None:
    with Client(served.address) as client:
        for y, expected in zip(client.predict("vad", voices[:12]), wanted[:12], strict=True):
            np.testing.assert_array_equal(y, expected)


def test_sequences_of_the_inference_protocol(served: Served, voices: list[Rows], wanted: list[Rows]) -> None:
    chosen = list(range(0, SESSIONS, 8))
    longest = max(len(voices[number]) for number in chosen)

    def requests():
        for t in range(longest):
            for number in chosen:
                voice = voices[number]
                if t < len(voice):
                    flags = {"sequence_start": t == 0, "sequence_end": t == len(voice) - 1}
                    x = {"input": voice[t][None, None]}
                    yield request("vad", x, request_id=str(number), sequence_id=number + 1, **flags)

    rows: dict[str, list[Rows]] = {str(number): [] for number in chosen}
    with stub_of(served) as stub:
        for each in stub.ModelStreamInfer(requests()):
            assert not each.error_message
            rows[each.infer_response.id].append(array(each.infer_response, "output")[0, 0])
    for number in chosen:
        np.testing.assert_array_equal(np.array(rows[str(number)]), wanted[number])


def test_page_shows_what_adopt_writes(root: Path) -> None:
    [written] = re.findall(r"```toml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert written == (root / "vad" / "1" / "model.toml").read_text()


def test_weights_within_branches_are_counted(served: Served, file: Path) -> None:
    """All of them, of 4 bytes each, are most of the file; none is an initializer of the graph itself."""
    with Client(served.address) as client:
        assert 0.9 < client.model("vad").num_parameters * 4 / file.stat().st_size < 1
