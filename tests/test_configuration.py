"""What operators are told of settings: --print-config, names that set nothing, and docs/configuration.md."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from scripts.settings import PAGE, with_table
from service.client.cli import main
from service.config import PREFIX, Settings, load_settings, sources_of, unknown_variables, write_toml
from service.errors import ConfigError

BIN = Path(sys.executable).parent


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Nothing of the machine's own environment, and a way to set more."""
    for name in os.environ:
        if name.upper().startswith(PREFIX):
            monkeypatch.delenv(name)
    return monkeypatch.setenv


def test_what_is_printed_is_a_file_that_says_the_same(tmp_path, environment):
    environment("RNNSERVE_DRAIN_S", "1.5")
    environment("rnnserve_host", "")
    first = tmp_path / "first.toml"
    first.write_text("repository = '/models \"of\" \\ mine/é'\nmax_sessions = 7\ndrain_s = 9\n")
    flags = {"compress_responses": "yes", "tls_cert": "/c.pem"}
    settings, sources = load_settings(flags, first), sources_of(flags, first)
    assert {name: source for name, source in sources.items() if source != "default"} == {
        "repository": str(first),
        "max_sessions": str(first),
        "drain_s": "RNNSERVE_DRAIN_S",
        "compress_responses": "--compress-responses",
        "tls_cert": "--tls-cert",
    }
    second = tmp_path / "second.toml"
    second.write_text(write_toml(settings, sources))
    assert set(tomllib.loads(second.read_text())) == {n for n, v in settings.model_dump().items() if v is not None}
    environment("RNNSERVE_DRAIN_S", "")
    assert load_settings({}, second) == settings


def test_the_command_prints_and_ends(environment):
    environment("RNNSERVE_PORT", "7002")
    result = CliRunner().invoke(main, ["serve", "--repository", "/nowhere", "--print-config"])
    assert result.exit_code == 0, result.output
    lines = dict(line.split(" = ", 1) for line in result.stdout.splitlines() if " = " in line)
    assert lines["port"].split() == ["7002", "#", "RNNSERVE_PORT"]
    assert lines["repository"].split() == ['"/nowhere"', "#", "--repository"]
    refused = CliRunner().invoke(main, ["serve", "--print-config"])
    assert refused.exit_code == 2
    assert "repository is not set" in refused.output


def test_variables_that_set_nothing_are_told_with_what_was_meant(environment):
    for name in ("RNNSERVE_PROT", "rnnserve_max_sesions", "RNNSERVE_ZZZZ", "RNNSERVE_HOST", "RNNSERVE_SERVER"):
        environment(name, "1")
    environment("RNNSERVE_WORKRES", "")
    for name in ("RNNSERVE_SERVICE_HOST", "RNNSERVE_PORT_8001_TCP_ADDR"):  # of Kubernetes
        environment(name, "1")
    assert unknown_variables() == {
        "RNNSERVE_MAX_SESIONS": "RNNSERVE_MAX_SESSIONS",
        "RNNSERVE_PROT": "RNNSERVE_PORT",
        "RNNSERVE_ZZZZ": "",
    }


def test_a_name_in_the_file_that_sets_nothing_is_told_with_what_was_meant(tmp_path):
    path = tmp_path / "s.toml"
    path.write_text("repository = '/models'\nmax-sesions = 1\n")
    with pytest.raises(ConfigError, match=r"s\.toml: max-sesions is no setting; .*; did you mean max_sessions\?$"):
        load_settings({}, path)


def test_a_value_that_cannot_work_is_told_with_where_it_is_from(tmp_path, environment):
    path = tmp_path / "s.toml"
    path.write_text("repository = '/models'\nport = 'http'\n")
    for flags, source in (({}, str(path)), ({"port": "x"}, "--port")):
        with pytest.raises(ConfigError, match=f"^port: .*, got '.*' from {re.escape(source)}$"):
            load_settings(flags, path)
    environment("RNNSERVE_PORT", "tcp://10.0.0.1:8001")
    with pytest.raises(ConfigError, match=r"^port: .*, got 'tcp://.*' from RNNSERVE_PORT$"):
        load_settings({}, path)


# The page


def test_the_table_has_every_setting_as_it_is():
    page = PAGE.read_text(encoding="utf-8")
    assert with_table(page) == page, "run `make settings`"
    assert set(re.findall(r"^\| `([a-z_]+)` \|", page, re.MULTILINE)) == set(Settings.model_fields)


def test_the_example_prints_what_the_page_says(tmp_path):
    block = re.search(r"<!-- example -->\n```console\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]
    commands, expected, is_inside = [], [], False
    for line in block.splitlines():
        if is_inside or line.startswith("$ "):
            commands.append(line.removeprefix("$ "))
            is_inside = line != "END" and (is_inside or "<<" in line)
        else:
            expected.append(line)
    done = subprocess.run(
        ["bash", "-euc", "\n".join(commands)],
        cwd=tmp_path,
        env=os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == expected
    assert len(expected) == 5
