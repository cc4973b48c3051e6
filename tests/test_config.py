"""service.config: one precedence, and a message that names the setting whatever is wrong with it."""

import itertools
import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from service.config import PREFIX, Settings, load_settings
from service.errors import ConfigError

REQUIRED = {"repository": "/models"}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Nothing of the machine's own environment, and a way to set more."""
    for name in os.environ:
        if name.upper().startswith(PREFIX):
            monkeypatch.delenv(name)
    return monkeypatch.setenv


@pytest.fixture
def write(tmp_path):
    """Write a settings file."""

    def write(content):
        path = tmp_path / "rnnserve.toml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


SOURCES = list(itertools.product([False, True], repeat=3))


@pytest.mark.parametrize(
    ("name", "flag", "variable", "toml", "parsed", "default"),
    [
        ("max_sessions", "1", "2", "3", (1, 2, 3), 16_384),
        ("session_idle_s", "1.5", "2.5", "3.5", (1.5, 2.5, 3.5), 0.0),
        ("host", "a", "b", "'c'", ("a", "b", "c"), "127.0.0.1"),
        ("tls_cert", "a", "b", "'c'", (Path("a"), Path("b"), Path("c")), None),
        ("log_level", "debug", "error", "'warning'", ("debug", "error", "warning"), "info"),
    ],
)
@pytest.mark.parametrize(("has_flag", "has_variable", "is_in_file"), SOURCES)
def test_a_flag_beats_the_environment_which_beats_the_file_which_beats_the_default(
    environment, write, name, flag, variable, toml, parsed, default, has_flag, has_variable, is_in_file
):
    if has_variable:
        environment(f"{PREFIX}{name.upper()}", variable)
    config = write(f"{name} = {toml}\n" if is_in_file else "")
    settings = load_settings(REQUIRED | ({name: flag} if has_flag else {}), config)
    candidates = zip((has_flag, has_variable, is_in_file), parsed, strict=True)
    assert getattr(settings, name) == next((value for is_given, value in candidates if is_given), default)


@pytest.mark.parametrize(("text", "value"), [("true", True), ("0", False), ("off", False), ("1", True)])
def test_switches_are_read_from_the_environment(environment, text, value):
    environment("RNNSERVE_BATCH_COUPLED_MODELS", text)
    assert load_settings(REQUIRED).batch_coupled_models is value


def test_a_variable_in_small_letters_has_its_place_in_the_precedence_too(environment, write):
    environment("rnnserve_port", "7001")
    assert load_settings(REQUIRED, write("port = 7002")).port == 7001


def test_an_empty_variable_is_as_good_as_none(environment, write):
    environment("RNNSERVE_TLS_CERT", "")
    environment("RNNSERVE_PORT", "")
    settings = load_settings(REQUIRED, write("port = 7002"))
    assert (settings.tls_cert, settings.port) == (None, 7002)


def test_every_source_may_give_what_is_required(environment, write):
    assert load_settings({}, write("repository = '/in/file'")).repository == Path("/in/file")
    environment("RNNSERVE_REPOSITORY", "/in/environment")
    assert load_settings({}).repository == Path("/in/environment")
    assert load_settings({"repository": "/flag"}).repository == Path("/flag")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("port", "http", "port: Input should be a valid integer, .*, got 'http'"),
        ("port", "65536", "port: Input should be less than or equal to 65535, got '65536'"),
        ("http_port", "-1", "http_port: Input should be greater than or equal to 0, got '-1'"),
        ("max_sessions", "0", "max_sessions: Input should be greater than 0, got '0'"),
        ("workers", "0", "workers: Input should be greater than 0, got '0'"),
        ("max_chunk_steps", "1.5", "max_chunk_steps: Input should be a valid integer, .*, got '1.5'"),
        ("max_replay_window", "-1", "max_replay_window: Input should be greater than or equal to 0, got '-1'"),
        ("drain_s", "-0.1", "drain_s: Input should be greater than or equal to 0, got '-0.1'"),
        ("drain_s", "nan", "drain_s: Input should be a finite number, got 'nan'"),
        ("max_linger_s", "inf", "max_linger_s: Input should be a finite number, got 'inf'"),
        ("provider", "tpu", "provider: Input should be 'cpu', 'cuda' or 'cuda,cpu', got 'tpu'"),
        ("non_finite", "drop", "non_finite: Input should be 'reject' or 'pass', got 'drop'"),
        ("log_level", "INFO", "log_level: Input should be 'debug', 'info', 'warning' or 'error', got 'INFO'"),
        ("batch_coupled_models", "maybe", "batch_coupled_models: Input should be a valid boolean, .*, got 'maybe'"),
    ],
)
@pytest.mark.parametrize("source", ["flag", "environment", "file"])
def test_a_value_that_cannot_work_names_its_setting(environment, write, source, name, value, message):
    flags, config = dict(REQUIRED), None
    if source == "flag":
        flags[name] = value
    elif source == "environment":
        environment(f"{PREFIX}{name.upper()}", value)
    else:
        config = write(f"{name} = '{value}'")
    with pytest.raises(ConfigError, match=message) as caught:
        load_settings(flags, config)
    assert caught.value.field == name


def test_a_setting_that_is_missing_is_named_with_its_flag_and_variable():
    with pytest.raises(ConfigError) as caught:
        load_settings({})
    assert str(caught.value) == "repository is not set: give --repository or RNNSERVE_REPOSITORY"
    assert caught.value.field == "repository"


@pytest.mark.parametrize(
    ("flags", "text", "name"),
    [({"prot": 1}, "", "prot"), ({}, "max-sessions = 1", "max-sessions"), ({}, "[server]\nport = 1", "server")],
)
def test_a_setting_that_does_not_exist_is_named(write, flags, text, name):
    with pytest.raises(ConfigError, match=f"{name} is no setting; `rnnserve serve --help` lists them") as caught:
        load_settings(REQUIRED | flags, write(text))
    assert caught.value.field == name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("port 1", "is not TOML: Expected '='"),
        (b"host = '\xff'", "is not TOML: 'utf-8' codec"),
        ("a=1\na=2", "not TOML"),
    ],
)
def test_a_file_that_is_not_toml_is_named(write, content, message):
    path = write(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_settings(REQUIRED, path)
    assert str(caught.value).startswith(str(path))
    assert caught.value.field == "config"


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"can't read .*none.toml: No such file or directory"):
        load_settings(REQUIRED, tmp_path / "none.toml")
    with pytest.raises(ConfigError, match=r"can't read .*: Is a directory"):
        load_settings(REQUIRED, tmp_path)


@pytest.mark.parametrize(
    ("flags", "message", "field"),
    [
        ({"max_resident_sessions": 9}, "leaves the others' state without a place: set spill_store too", "spill_store"),
        (
            {"spill_store": "a.db"},
            "nothing is moved to a.db unless max_resident_sessions is set",
            "max_resident_sessions",
        ),
        (
            {"max_resident_sessions": 9, "spill_store": "a.db", "max_sessions": 8},
            "max_resident_sessions: 9 is more than max_sessions, 8; lower it",
            "max_resident_sessions",
        ),
    ],
)
def test_settings_of_spilling_go_together(flags, message, field):
    with pytest.raises(ConfigError, match=message) as caught:
        load_settings(REQUIRED | flags)
    assert caught.value.field == field
    both = load_settings(REQUIRED | {"max_resident_sessions": 9, "spill_store": "a.db", "max_sessions": 9})
    assert (both.max_resident_sessions, both.spill_store) == (9, Path("a.db"))


def test_settings_never_change():
    settings = load_settings(REQUIRED)
    with pytest.raises(ValidationError, match="frozen"):
        settings.port = 1


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_is_described(name):
    description = Settings.model_fields[name].description
    assert description
    assert description[0].isupper() or description[0] == "o"  # onnxruntime
    assert description.endswith(".")


def test_defaults_are_valid_and_open_to_this_machine_alone():
    settings = load_settings(REQUIRED)
    assert Settings(**settings.model_dump()) == settings
    assert settings.host == "127.0.0.1"
