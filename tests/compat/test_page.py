"""The page in a real browser: what it plots and saves is what the server answers a gRPC client; see browser.py."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from importlib.resources import as_file, files
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks.processes import rnnserve
from models import tasks
from models.export import export_run
from models.train import train
from service.adoptcli import adopt
from service.client import Client
from tests.compat.conftest import BIN, HERE
from tests.generating import WORDS, contextual, save, tokens
from tests.onnx_models import build

PARTS = ("example", "csv", "draw_by_pointer", "draw_by_keys", "keyboard_alone", "whole")
SPEECH = HERE.parent / "data" / "speech.npz"
CHROMIUM = any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
HALF_PIXEL = 0.5 / (260 - 34)
"""Of the chart's height, between its margins."""

pytestmark = [
    pytest.mark.skipif(not CHROMIUM, reason="`make test-compat` says why it could not install Chromium"),
    pytest.mark.timeout(300),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A net that was trained on real data, one that needs whole sequences, and one that generates."""
    root, runs = tmp_path_factory.mktemp("repository"), tmp_path_factory.mktemp("runs")
    task = tasks.load("vowels")
    for name, more in {"vowels": {}, "whole": {"bidirectional": True}}.items():
        run = train(task, task.recipe.changed(hidden=16, epochs=4, **more), runs / name, show_progress=False).run
        export_run(run, root, name=name)
    save(tokens(7), root, "names")
    save(contextual(), root, "contextual")
    build("gru", features=512, outputs=20).save(root, "wide")
    with as_file(files("silero_vad.data") / "silero_vad.onnx") as file:
        options = ("--constant", "sr=16000", "--chunk", "512", "--context", "64")
        done = CliRunner().invoke(adopt, [str(file), "--repository", str(root), "--name", "vad", *options])
    assert done.exit_code == 0, done.output
    with rnnserve(root) as process:
        yield process


@pytest.fixture(scope="module")
def client(server):
    with Client(server.target) as client:
        yield client


class Found(dict[str, dict[str, Any]]):
    """By part; one that failed fails the tests that look at it."""

    def __getitem__(self, part: str) -> dict[str, Any]:
        result = super().__getitem__(part)
        if "failed" in result:
            pytest.fail(f"{part}: {result['failed']}\n{result.get('said')}", pytrace=False)
        return result


@pytest.fixture(scope="module")
def found(server, tmp_path_factory):
    """What the browser saw, by part."""
    path = tmp_path_factory.mktemp("browser") / "found.json"
    command = [BIN / "python", HERE / "browser.py", f"http://127.0.0.1:{server.http_port}/", path]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=280)
    assert not done.returncode, done.stdout + done.stderr
    return Found(json.loads(path.read_text()))


def saved(text):
    """Outputs of a CSV that the page saved: [steps, outputs] float32."""
    header, *rows = csv.reader(text.splitlines())
    assert header[0] == "step"
    assert header[-1] == "latency_ms"
    assert all(float(row[-1]) >= 0 for row in rows)
    return header[1:-1], np.array([row[1:-1] for row in rows], dtype=np.float64).astype(np.float32)


def streamed(client, rows, model="vowels"):
    with client.stream(model) as stream:
        return np.array(list(stream.run(np.array(rows, np.float32))))


@pytest.mark.parametrize("part", PARTS[:-1])
def test_what_is_plotted_and_saved_is_what_the_server_answers(found, client, part):
    result = found[part]
    expected = streamed(client, result["sent"])
    names, values = saved(result["csv"])
    assert names == list(client.model("vowels").labels)
    np.testing.assert_array_equal(values, expected)
    for index, name in enumerate(names):
        np.testing.assert_allclose(result["plotted"][name], expected[:, index], rtol=0, atol=HALF_PIXEL)
    best = int(np.argmax(expected[-1]))
    assert result["leading"].split("  ")[0].strip().startswith(f"{names[best]} ")
    assert result["leading"].endswith(f"{100 * expected[-1, best]:.1f}%")
    assert result["steps"] == f"{len(expected)} of {len(expected)}"
    assert result["error"] == ""


def test_the_example_is_a_real_utterance(found):
    np.testing.assert_array_equal(np.array(found["example"]["sent"], np.float32), tasks.load("vowels").test.inputs[0])


def test_values_are_in_a_table_and_told_to_a_screen_reader(found):
    result = found["example"]
    _, values = saved(result["csv"])
    table = np.array([row[1:-1] for row in result["table"]], np.float64).astype(np.float32)
    np.testing.assert_array_equal(table, values)
    assert result["live"].startswith(f"Done after {len(values)} steps: speaker ")
    assert result["latency"].endswith(" ms")


def test_answers_arrive_while_steps_are_sent(found):
    counts = found["at_a_pace"]["counts"]
    assert counts == sorted(counts)
    assert len(set(counts)) > 8, counts


def test_a_run_can_be_paused_and_stopped(found, client):
    result = found["pause_and_stop"]
    assert result["paused"] == result["still"]
    assert result["name"] == "Resume"
    stopped, total = result["stopped"].split(" of ")
    assert int(result["paused"].split()[0]) < int(stopped) < int(total)
    assert result["error"] == ""


def test_csv_with_columns_in_another_order_is_the_same_sequence(found):
    assert found["csv"]["header"] == [f"lpc_{number}" for number in range(1, 13)]
    assert found["csv"]["sent"][:19] == found["example"]["sent"]


def test_bad_csv_is_told_clearly(found):
    names = "lpc_1, lpc_2, lpc_3, …, lpc_12"
    assert found["csv"]["faults"] == {
        "empty": "Paste rows first: a row a step.",
        "columns": f"Line 2 has 3 columns; the model takes 12: {names}.",
        "word": "Line 2, lpc_12: “abc” is not a number.",
        "gap": "Line 2, lpc_12: “” is not a number.",
        "header": "There is a header, and no rows below it.",
        "stranger": "Line 1, lpc_1: “lpc_1” is not a number.",
        "quote": "Line 1: text follows a closing quote.",
        "nan": "x: lpc_12 of step 1 is nan; send finite values, or start the server with --non-finite pass",
        "inf": "x: lpc_12 of step 0 is -inf; send finite values, or start the server with --non-finite pass",
    }


def test_a_drawn_curve_is_what_the_pointer_drew(found):
    sent = np.array(found["draw_by_pointer"]["sent"])
    assert sent.shape == (30, 12)
    np.testing.assert_allclose(sent[:, 2], np.linspace(-1, 1, 30), atol=0.05)
    assert not np.delete(sent, 2, axis=1).any()
    [line] = found["draw_by_pointer"]["input"].values()
    np.testing.assert_allclose(line, sent[:, 2], atol=0.02)


def test_a_curve_can_be_drawn_by_keys(found):
    sent = np.array(found["draw_by_keys"]["sent"])
    np.testing.assert_allclose(sent[:, 0], [0.61, 0.3, 0.5, 0.5, 1.0], atol=1e-6)
    assert found["draw_by_keys"]["told"] == "Step 5 of 5: 1"


def test_the_keyboard_alone_leads_to_a_result(found):
    result = found["keyboard_alone"]
    assert result["first"] == "skip"
    assert result["way"][0] == "try-model"
    assert result["way"][-1] == "start"
    assert result["outline"] != "none", "the focus is seen"
    assert result["after"] == "start", "the focus is not lost"


def test_a_model_that_needs_the_whole_sequence_answers_at_its_end(found, client):
    result = found["whole"]
    expected = client.predict("whole", [np.array(result["sent"], np.float32)])
    _, values = saved(result["csv"])
    np.testing.assert_array_equal(values, np.reshape(expected.outputs["y"], (1, -1)))
    assert "whole sequence" in result["mode"]


def test_what_is_generated_is_what_a_grpc_client_gets(found, client):
    made = client.generate("names", [[WORDS.index("b")]] * 3, seed=5, temperature=0.9)
    result = found["generate"]
    assert result["made"] == [each.text or "nothing" for each in made]
    _, *rows = csv.reader(result["csv"].splitlines())
    assert [int(row[3]) for row in rows] == [int(each) for one in made for each in one.ids]
    np.testing.assert_allclose(
        [float(row[5]) for row in rows], np.concatenate([one.log_probs for one in made]), rtol=1e-6
    )
    assert result["error"].startswith("“bxb” in the prompt is not in the model's vocabulary")


def test_a_sequence_is_given_its_context_once(found, client):
    result = found["contextual"]
    x = np.array([[1, 2, 3], [4, 5, 6], [-1, 0, 0.25]], np.float32)
    expected = client.predict("contextual", {"x": [x], "season": np.array([[0.5, -1, 2]], np.float32)})
    names, values = saved(result["csv"])
    assert names == ["y[0]", "y[1]"]
    np.testing.assert_array_equal(values, np.reshape(expected.outputs["y"], (3, 2)))
    assert result["sources"] == ["CSV", "Draw"], "there is no example, and no text"


def test_a_step_may_have_many_values(found, client):
    result = found["wide"]
    x = (np.arange(40)[:, None] + np.arange(512)) % 7
    names, values = saved(result["csv"])
    assert len(names) == 20
    np.testing.assert_array_equal(values, streamed(client, x, "wide"))
    assert len(result["plotted"]) == 12
    assert result["legend"][-1] == "and 500 more"


def test_a_signal_is_cut_into_chunks(found, client):
    """Real speech through a model that nobody here made."""
    result = found["signal"]
    with np.load(SPEECH) as clip:
        samples = clip["samples"].astype(np.float32) / 32768
    count = len(samples) // 512
    chunks = samples[: count * 512].reshape(count, 512)
    np.testing.assert_array_equal(np.array(result["sent"], np.float32), chunks)
    expected = streamed(client, chunks, "vad")
    _, values = saved(result["csv"])
    np.testing.assert_array_equal(values, expected)
    assert expected.max() > 0.9
    assert re.fullmatch(r"speech\.csv: [\d,]+ KiB, ready", result["note"])
    assert result["error"] == f"The last {len(samples) % 512} samples are no whole chunk, and are left out."
    drawn = np.array(result["drawn"], np.float32)
    np.testing.assert_allclose(drawn.ravel(), np.linspace(-0.9, 0.9, 3 * 512), atol=1e-6)
    np.testing.assert_array_equal(saved(result["drawn_csv"])[1], streamed(client, drawn, "vad"))


def test_a_model_says_all_of_itself(found, client):
    info = client.model("vowels")
    result = found["models"]
    assert result["list"] == [f"{name} version 1" for name in ("contextual", "names", "vad", "vowels", "whole", "wide")]
    for text in (
        info.digest,
        info.step_mode_reason,
        "many-to-one",
        "stepping",
        info.exactness,
        "lpc_12",
        "speaker 9",
        "state.0.h",
    ):
        assert text in result["text"]


@pytest.mark.parametrize(("part", "other"), [("theme_light", "dark"), ("theme_dark", "light")])
def test_the_theme_is_the_systems_until_one_is_chosen(found, part, other):
    colours = {"light": "rgb(246, 246, 244)", "dark": "rgb(16, 18, 21)"}
    mine = part.removeprefix("theme_")
    result = found[part]
    assert (result["system"], result["chosen"], result["reloaded"]) == (colours[mine], colours[other], colours[other])
    assert result["label"] == f"Switch to the {other} theme"


@pytest.mark.parametrize("part", ["accessible_light", "accessible_dark"])
def test_axe_finds_nothing(found, part):
    assert found[part]["violations"] == []


def test_a_phone_shows_all_of_it(found):
    result = found["narrow"]
    content, screen = result["width"]
    assert content <= screen == 360
    assert result["shift"] < 0.01
    assert result["reached"]


def test_nothing_is_fetched_from_elsewhere_and_nothing_goes_wrong(found, server):
    for part, result in dict(found).items():
        assert result["hosts"] == [f"127.0.0.1:{server.http_port}"], part
        assert result["said"] == [], part
