"""docs/import.md: what it says, done."""

import re
import shlex
from pathlib import Path

import numpy as np
from click.testing import CliRunner

from models import cli
from models.importers.cli import import_
from service.client import Client
from tests.models.keras_models import ask
from tests.serving import serving

DOCS = (Path(__file__).resolve().parents[2] / "docs" / "import.md").read_text()
COMMANDS = {"import": import_, "verify": cli.verify, "describe": cli.describe}


def test_every_command_works_and_what_is_imported_is_served(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = {}
    for script in re.findall(r"^```python\n(.*?)^```$", DOCS, re.DOTALL | re.MULTILINE):
        exec(compile(script, "docs/import.md", "exec"), named)
    told = []
    for line in re.findall(r"^ {4}rnnserve (.*)$", DOCS, re.MULTILINE):
        name, *arguments = shlex.split(line)
        done = CliRunner().invoke(COMMANDS[name], arguments)
        assert (done.exit_code, done.stderr) == (0, ""), line
        told.append(done.stdout)
    assert "0 = ann, 1 = bob, 2 = eve" in told[2]
    assert "in dB" in told[2]

    x = np.random.default_rng(0).normal(size=(6, 12)).astype(np.float32)
    with serving(tmp_path / "repository") as running, Client(running.address) as client:
        predicted = client.predict("speaker", [x, x[:2]])
        with client.stream("speaker") as stream:
            streamed = list(stream.run(x))
        ours = client.predict("torch-speaker", [x])
    running_answers = [ask(named["model"], x[: step + 1]) for step in range(len(x))]
    np.testing.assert_allclose(predicted[0], running_answers, atol=1e-5)
    np.testing.assert_allclose(predicted[1], running_answers[:2], atol=1e-5)
    np.testing.assert_allclose(streamed, running_answers, atol=1e-5)
    assert ours[0].shape == (6, 3)
