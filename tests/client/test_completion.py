"""Completion of the command line, in a real bash, and without waiting for what it does not need."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from service.client._cli_completion import VARIABLE

BIN = Path(sys.executable).parent
ENVIRONMENT = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
COMPLETED = """
import sys
from service.client.cli import main
try:
    main(prog_name="rnnserve")
except SystemExit:
    pass
print(*{"torch", "grpc", "onnx", "onnxruntime", "google.protobuf", "pydantic"} & set(sys.modules), file=sys.stderr)
"""
SETTINGS = {"serve", "train"}
"""Subcommands whose options are made from settings, which need pydantic."""


def by_click(shell, *words):
    """What the command answers to a shell: (its lines, heavy modules that it has imported)."""
    told = {VARIABLE: f"{shell}_complete", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    if shell == "fish":
        told["COMP_CWORD"] = words[-1]
    done = subprocess.run(
        [sys.executable, "-c", COMPLETED], env=ENVIRONMENT | told, check=True, capture_output=True, text=True
    )
    return done.stdout.splitlines(), set(done.stderr.split())


@pytest.fixture(scope="module")
def bash():
    """Complete words as bash does after the tab key."""
    if shutil.which("bash") is None:
        pytest.skip("there is no bash")
    script = subprocess.run([BIN / "rnnserve", "completion", "bash"], check=True, capture_output=True, text=True).stdout

    def complete(*words, **environment):
        quoted = " ".join(f"'{word}'" for word in words)
        act = f"""{script}
            [[ "$(complete -p rnnserve)" == *"-F _rnnserve_completion rnnserve" ]] || exit 9
            COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}
            _rnnserve_completion rnnserve 2>/dev/null
            printf '%s\\n' "${{COMPREPLY[@]}}"
        """
        done = subprocess.run(
            ["bash", "--norc", "-c", act], env=ENVIRONMENT | environment, check=True, capture_output=True, text=True
        )
        return done.stdout.split()

    return complete


def test_bash_completes_subcommands_options_and_values(bash):
    assert {"serve", "train", "predict", "completion"} <= set(bash("rnnserve", ""))
    assert bash("rnnserve", "se") == ["serve"]
    assert bash("rnnserve", "serve", "--max-conn") == [
        "--max-connection-age-s",
        "--max-connection-age-grace-s",
        "--max-connection-idle-s",
    ]
    assert bash("rnnserve", "serve", "--provider", "cu") == ["cuda", "cuda,cpu"]
    assert bash("rnnserve", "serve", "--channelz", "") == ["true", "false"]
    assert bash("rnnserve", "completion", "") == ["bash", "zsh", "fish"]
    assert bash("rnnserve", "train", "vow") == ["vowels"]


def test_bash_completes_the_models_of_the_server(bash, served):
    assert bash("rnnserve", "predict", "bi", RNNSERVE_SERVER=served.address) == ["bigru", "bilstm"]
    assert bash("rnnserve", "stream", "--server", served.address, "to") == ["tokens"]
    assert bash("rnnserve", "health", "--server", served.address, "--model", "ls") == ["lstm"]
    assert bash("rnnserve", "models", "", RNNSERVE_SERVER="localhost:1") == []


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (("predict", "lstm", ""), "file"),
        (("stream", "lstm", ""), "file"),
        (("serve", "--repository", ""), "dir"),
        (("serve", "--tls-cert", ""), "file"),
        (("describe", ""), "file"),
    ],
)
def test_files_and_directories_are_left_to_the_shell(words, kind):
    assert by_click("bash", "rnnserve", *words)[0] == [f"{kind},"]


@pytest.mark.parametrize(
    "words",
    [
        ("",),
        ("serve", "--"),
        ("predict", "--"),
        ("predict", "lstm", ""),
        ("health", "--"),
        ("train", "--"),
        ("bench", "-"),
    ],
)
def test_the_tab_key_waits_for_nothing_heavy(words):
    lines, imported = by_click("bash", "rnnserve", *words)
    assert lines
    assert imported == ({"pydantic"} if words[0] in SETTINGS else set())


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_their_script_and_their_answers(shell):
    script = subprocess.run([BIN / "rnnserve", "completion", shell], check=True, capture_output=True, text=True).stdout
    assert f"{VARIABLE}={shell}_complete" in script
    lines, _ = by_click(shell, "rnnserve", "se")
    assert "serve" in " ".join(lines)
