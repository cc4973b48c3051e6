"""service.versions: how a version policy is written, and what it picks."""

import pytest
from click.testing import CliRunner

from service.config import Settings, load_settings
from service.errors import ConfigError
from service.rpc import cli
from service.versions import MAX_VERSION, VersionPolicies, VersionPolicy


@pytest.mark.parametrize(
    ("policy", "picked"),
    [
        ("all", [1, 3, 12]),
        ("latest:1", [12]),
        ("latest:2", [3, 12]),
        ("latest:7", [1, 3, 12]),
        ("3", [3]),
        ("12,1", [1, 12]),
        ("1,1,2", [1]),
        (str(MAX_VERSION), []),
    ],
)
def test_policy_picks(policy, picked):
    assert VersionPolicy.parse(policy).pick({12, 1, 3}) == picked
    assert VersionPolicy.parse(policy).pick([]) == []
    assert VersionPolicy.parse(str(VersionPolicy.parse(policy))) == VersionPolicy.parse(policy)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "latest",
        "latest:0",
        "latest:-1",
        "latest:1.5",
        "0",
        "01",
        "1,",
        "1, 3",
        "-1",
        "any",
        "1-3",
        "²",
        "²,1",
        "ALL",
        str(2**63),
    ],
)
def test_what_is_no_policy(text):
    with pytest.raises(ValueError, match=r"is no version policy: expected all, latest:N, or version numbers"):
        VersionPolicy.parse(text)


def test_every_model_may_have_its_own():
    policies = VersionPolicies.parse("latest:2 vowels=1,3  a=b=all")
    assert [str(policies.of(model)) for model in ("vowels", "a=b", "other")] == ["1,3", "all", "latest:2"]
    assert str(VersionPolicies.parse("vowels=all").of("other")) == "latest:1"
    assert VersionPolicies.parse(str(policies)) == VersionPolicies.parse(policies) == policies


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("all latest:1", "two policies for every model: 'all latest:1'"),
        ("m=all m=1", "two policies for m"),
        ("=all", "'=all' names no model before the ="),
        ("m=", "'' is no version policy"),
        (3, "expected a text such as 'latest:2 vowels=1,3', or a table; got 3"),
        ({"m n": 1}, "a model whose name has blanks can't have a policy of its own: 'm n'"),
        ({"m": {}}, "'{}' is no version policy"),
        ({"m": []}, "'' is no version policy"),
    ],
)
def test_what_are_no_policies(given, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_settings({"repository": "/m", "version_policy": given})
    assert caught.value.field == "version_policy"


def test_flag_variable_and_file_say_the_same(tmp_path, monkeypatch):
    config = tmp_path / "serve.toml"
    config.write_text('[version_policy]\n"*" = "latest:2"\nvowels = [1, 3]\nnames = 7\n')
    expected = VersionPolicies.parse("latest:2 vowels=1,3 names=7")
    assert load_settings({"repository": "/m"}, config).version_policy == expected
    monkeypatch.setenv("RNNSERVE_VERSION_POLICY", "latest:3 names=all")
    assert str(load_settings({"repository": "/m"}, config).version_policy) == "latest:3 names=all"
    settings = load_settings({"repository": "/m", "version_policy": "all"}, config)
    assert str(settings.version_policy) == "all"
    assert Settings(**settings.model_dump(mode="json")) == settings  # as workers get them


def test_flag_may_be_given_in_parts(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "_serve", seen.append)
    arguments = ["--repository", str(tmp_path), "--version-policy", "latest:2", "--version-policy", "vowels=1,3"]
    assert CliRunner().invoke(cli.serve, arguments).exit_code == 0
    assert CliRunner().invoke(cli.serve, arguments[:2]).exit_code == 0
    assert [str(each.version_policy) for each in seen] == ["latest:2 vowels=1,3", "latest:1"]
