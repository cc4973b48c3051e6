"""docs/training.md: what it says, done."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from models import cli
from models.config import RunConfig
from models.runs import Run
from service.client.cli import main
from tests.models.test_train import assert_same_run
from tests.serving import serving

DOCS = (Path(__file__).resolve().parents[2] / "docs" / "training.md").read_text()
COMMANDS = {"train": cli.train, "export": cli.export, "verify": cli.verify}


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCS, re.DOTALL | re.MULTILINE)


def commands():
    """Lines that are indented, and begin with the command; a backslash joins the next one."""
    joined = DOCS.replace("\\\n", " ")
    return [shlex.split(line)[1:] for line in re.findall(r"^ {4,}(rnnserve .*)$", joined, re.MULTILINE)]


def test_every_command_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [script] = blocks("python")
    exec(compile(script, "docs/training.md", "exec"), {})
    client = []
    for name, *arguments in commands():
        if name == "predict":
            client.append(arguments)
            continue
        done = CliRunner().invoke(COMMANDS[name], arguments)
        assert (done.exit_code, done.stderr) == (0, ""), (name, arguments)
    assert (tmp_path / "flow.csv").read_text().splitlines()[1] == "0,2022-03-20T10:00:00+00:00,100.59,11,Sunday"
    assert_same_run(Path("runs/again"), Path("runs/flow"))
    assert {entry.name for entry in Path("runs").iterdir()} == {"again", "bf16", "flow", "lstm", "weekday"}
    assert list(Path("logs/bf16").iterdir())
    metrics = Run(Path("runs/flow")).read_json("metrics.json")
    assert metrics["test"]["mae"] < metrics["baseline"]["test"]["mae"]

    with serving(tmp_path / "repository") as running:
        [arguments] = client
        told = CliRunner().invoke(main, ["predict", *arguments, "--server", running.address])
    assert told.exit_code == 0, told.stderr
    assert len(told.stdout.splitlines()) == len((tmp_path / "flow.csv").read_text().splitlines()) - 1


def test_config_by_hand_is_one(tmp_path):
    [text] = blocks("toml")
    (tmp_path / "mine.toml").write_text(text)
    config = RunConfig.read(tmp_path / "mine.toml")
    assert config.data.target == ("flow",)
    assert config.recipe == tomllib.loads(text)["recipe"]


@pytest.mark.parametrize("flag", sorted(set(re.findall(r"`(--[a-z-]+)", DOCS))))
def test_every_flag_there_is(flag):
    flags = {flag for command in COMMANDS.values() for option in command.params for flag in option.opts}
    assert flag in flags


def test_it_is_short():
    assert len(DOCS.splitlines()) <= 120
