"""`rnnserve export --int8`: what is written, what is refused, and what a server makes of the file."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from onnx import numpy_helper

import models.int8
import models.quantize
from models import cli, tasks
from models.checks import without_padding
from models.errors import DataError, DropError, ExportError, ParityError
from models.export import export_net, export_run
from models.int8 import check_drop, score
from models.losses import evaluate
from models.modelfile import ModelFile
from models.recipe import Recipe
from models.reference import MatMulIntegerToFloat
from models.spec import LENGTHS, MODEL_FILE, Layout
from models.train import train
from service.backend import Backend
from service.client import Client
from service.probe import probe
from tests.models.conftest import make_task
from tests.models.exports import TRAINING, make_net
from tests.models.longform import own_task, shop_settings, shops
from tests.rpc import run_alone
from tests.serving import serving

VERDICTS = {"weights": "exact", "static": "exact", "dynamic": "coupled"}


@pytest.fixture(scope="module")
def lstm_run(tmp_path_factory):
    task = tasks.load("vowels")
    out = tmp_path_factory.mktemp("runs") / "lstm"
    return train(task, task.recipe.changed(cell="lstm", hidden=24, epochs=6), out, show_progress=False).run


@pytest.fixture(scope="module")
def repository(lstm_run, tmp_path_factory):
    """The same LSTM in float32 and in every form, each a model of its own."""
    root = tmp_path_factory.mktemp("int8")
    export_run(lstm_run, root, name="float32")
    for form in VERDICTS:
        export_run(lstm_run, root, name=form, int8=form, max_drop=0.05)
    return root


def file_of(repository, name):
    return repository / name / "1" / "model.onnx"


def invoke(*arguments):
    return CliRunner().invoke(cli.export, [str(argument) for argument in arguments])


@pytest.mark.parametrize("form", VERDICTS)
def test_file_says_what_was_done_to_it(lstm_run, repository, form):
    before, model = ModelFile(file_of(repository, "float32")), ModelFile(file_of(repository, form))
    quantization = model.spec.quantization
    metrics = json.loads((lstm_run.path / "metrics.json").read_text())
    assert (quantization.form, quantization.is_exact) == (form, VERDICTS[form] == "exact")
    assert quantization.before == {"accuracy": metrics["test"]["accuracy"]}
    assert abs(quantization.before["accuracy"] - quantization.after["accuracy"]) <= quantization.max_drop == 0.05
    assert quantization.size_before == before.size > 1.25 * model.size
    assert 1e-4 < quantization.max_abs_error < 1
    assert "layer.0" in " ".join(quantization.quantized)
    assert before.spec.quantization is None
    assert [layer.form for layer in model.spec.layers] == ["decomposed" if form == "static" else "operator"]
    assert [check.name for check in model.verify()] == ["golden input 1", "golden input 2"] + [
        "4 chunks against whole"
    ] * (form != "dynamic")
    assert all(check.is_passed for check in model.verify())


@pytest.mark.parametrize("form", VERDICTS)
def test_golden_answers_are_of_the_rounded_weights(repository, form):
    before, after = (ModelFile(file_of(repository, name)).spec for name in ("float32", form))
    for old, new in zip(before.golden, after.golden, strict=True):
        assert old.inputs == new.inputs
        lengths = old.inputs[LENGTHS].array()
        answers = [
            without_padding(before.graph, {"y": golden.outputs["y"].array()}, lengths)["y"] for golden in (old, new)
        ]
        gap = np.abs(answers[0] - answers[1])
        assert 1e-5 < gap.max() <= after.quantization.max_abs_error * 1.0001


@pytest.mark.parametrize("form", VERDICTS)
def test_server_finds_out_what_a_batch_does(repository, form):
    exactness = probe(Backend(file_of(repository, form)), 64)
    assert exactness.verdict == VERDICTS[form]
    assert exactness.is_chunkable is (form != "dynamic")


@pytest.mark.parametrize("form", VERDICTS)
def test_served_answers_are_those_of_a_sequence_alone(repository, form):
    """Batched where that is exact; one at a time where it is not."""
    xs = list(tasks.load("vowels").test.inputs[:24])
    xs[3] = 100 * xs[3]
    with serving(repository) as served, Client(served.address) as client:
        together = client.predict(form, xs)
        sizes = served.on_loop(lambda: dict(served.lane(form).tally.run_rows))
        assert client.model(form).exactness == VERDICTS[form]
        told = json.loads(client.model(form).spec_json)["quantization"]
    assert told["form"] == form
    assert (max(sizes) > 1) is (form != "dynamic")
    for x, y in zip(xs, together, strict=True):
        if form != "dynamic":
            np.testing.assert_array_equal(y, run_alone(repository, form, x))
        else:  # served step by step, since a run's scales are of all its steps
            np.testing.assert_allclose(y, run_alone(repository, form, x), atol=0.1)


def test_errors_are_compared_as_well_as_accuracies(tmp_path):
    task = tasks.load("waterflow")
    recipe = task.recipe.changed(cell="gru", hidden=16, layers=2, epochs=3)
    run = train(task, recipe, tmp_path / "run", show_progress=False).run
    done = invoke(run.path, "--repository", tmp_path, "--int8", "static", "--max-drop", 0.02)
    assert (done.exit_code, done.stderr) == (0, "")
    quantization = ModelFile(file_of(tmp_path, "waterflow")).spec.quantization
    metrics = json.loads((run.path / "metrics.json").read_text())["test"]
    for name in ("mae", "rmse"):
        assert quantization.before[name] == pytest.approx(metrics[name], rel=1e-4)
        assert (
            f"test {name} {quantization.after[name]:.4f}, {metrics[name]:.4f} before (0.02 may be lost)" in done.stdout
        )
    assert "int8 products with fixed scales: exact in a batch" in done.stdout
    assert "layer.1: GRU, both products in int8" in done.stdout
    assert done.stdout.count("steps/s, ") == 4
    described = CliRunner().invoke(cli.describe, [str(file_of(tmp_path, "waterflow"))]).stdout
    assert "int8 products with fixed scales: exact in a batch" in described
    assert "the reference of the rounded weights and onnxruntime differ by" in described


@pytest.mark.parametrize(
    ("before", "after", "refused"),
    [
        ({"accuracy": 0.9}, {"accuracy": 0.8951}, None),
        ({"accuracy": 0.9}, {"accuracy": 0.8949}, "accuracy"),
        ({"accuracy": 0.9}, {"accuracy": 0.95}, None),
        ({"mae": 4.0, "rmse": 4.0}, {"mae": 4.0, "rmse": 4.019}, None),
        ({"mae": 4.0, "rmse": 4.0}, {"mae": 3.0, "rmse": 4.021}, "rmse"),
        ({"mae": 4.0}, {"mae": float("nan")}, "mae"),
    ],
)
def test_drop_is_absolute_of_accuracies_and_relative_of_errors(before, after, refused):
    if refused is None:
        check_drop(before, after, 0.005, "static")
        return
    with pytest.raises(DropError, match="allows; try --int8 weights") as caught:
        check_drop(before, after, 0.005, "static")
    assert caught.value.metric == refused


def test_file_that_loses_too_much_is_not_written(vowels_run, tmp_path, monkeypatch):
    def spoiled(weights, axis, bits):
        integers, scales = quantized(weights, axis, bits)
        return integers, scales * np.float32(-1)

    quantized = models.quantize.quantized
    monkeypatch.setattr(models.quantize, "quantized", spoiled)
    done = invoke(vowels_run.path, "--repository", tmp_path / "repository", "--int8")
    assert done.exit_code == 1
    assert done.stderr.startswith("error: not written: over the test split, --int8 weights takes accuracy from 0.")
    assert "more than --max-drop 0.005 allows; export without --int8, or allow more" in done.stderr
    assert not (tmp_path / "repository").exists()


def test_weights_that_do_not_widen_to_their_rounding_are_not_written(vowels_run, tmp_path, monkeypatch):
    def spoiled(model, form):
        result = quantize(model, form)
        [scale] = [tensor for tensor in result.model.graph.initializer if tensor.name == "layer.0.R.scale"]
        scale.CopyFrom(numpy_helper.from_array(1.01 * numpy_helper.to_array(scale), scale.name))
        return result

    quantize = models.int8.quantize
    monkeypatch.setattr(models.int8, "quantize", spoiled)
    with pytest.raises(ParityError):
        export_run(vowels_run, tmp_path / "repository", int8="weights", max_drop=1.0)
    assert not (tmp_path / "repository").exists()


def test_products_that_differ_from_numpys_are_not_written(vowels_run, tmp_path, monkeypatch):
    """As where a kernel saturates: onnxruntime is compared with onnx's evaluator."""
    product = MatMulIntegerToFloat._run

    def saturating(self, a, b, *others):
        return product(self, a, np.clip(b, -40, 40), *others)

    monkeypatch.setattr(MatMulIntegerToFloat, "_run", saturating)
    with pytest.raises(ParityError):
        export_run(vowels_run, tmp_path / "repository", int8="static", max_drop=1.0)
    assert not (tmp_path / "repository").exists()


def test_scores_are_those_of_training(vowels_run, vowels_file):
    metrics = json.loads((vowels_run.path / "metrics.json").read_text())
    task = tasks.load("vowels")
    spec = ModelFile(vowels_file).spec
    for split in ("validation", "test"):
        for alone in (False, True):
            found = score(vowels_file.read_bytes(), spec, task, getattr(task, split), alone=alone)
            assert found == {"accuracy": metrics[split]["accuracy"]}


def test_answers_once_a_sequence_are_scored():
    task = make_task()
    net = make_net(task, cell="lstm", bidirectional=True)
    files, spec = export_net(net, task, TRAINING)
    assert spec.graph.outputs[0].layout is Layout.PER_SEQUENCE
    assert score(files[MODEL_FILE], spec, task, task.train)["accuracy"] == evaluate(net, task, task.train)["accuracy"]


def test_unrolled_graphs_are_scored():
    task = make_task()
    net = make_net(task, unroll=8)
    files, spec = export_net(net, task, TRAINING)
    assert spec.graph.fixed_steps == 8
    _, told = models.int8.quantize_files(files, spec, net.graphs(task), task, "weights", 1.0)
    assert told.quantization.before["accuracy"] == evaluate(net, task, task.test)["accuracy"]
    assert told.graph.operators["Cast"] >= 1
    with pytest.raises(ExportError, match=r"it has no recurrent operator\. Use --int8 weights"):
        models.int8.quantize_files(files, spec, net.graphs(task), task, "static", 1.0)


def test_data_of_ones_own_are_read_again(tmp_path):
    task = own_task(tmp_path, shops(), shop_settings("sold"))
    run = train(task, Recipe(hidden=12, epochs=2), tmp_path / "run", show_progress=False).run
    exported = export_run(run, tmp_path / "repository", int8="static", max_drop=0.05)
    metrics = json.loads((run.path / "metrics.json").read_text())["test"]
    assert exported.spec.quantization.before["mae"] == pytest.approx(metrics["mae"], rel=1e-4)

    [file] = tmp_path.glob("*.csv")
    content = file.read_text()
    file.write_text(content + content.splitlines()[-1] + "\n")
    with pytest.raises(
        DataError, match=r"--int8 is judged by the test split, so it reads .*the file has changed since"
    ):
        export_run(run, tmp_path / "repository", int8="static")
    file.unlink()
    done = invoke(run.path, "--repository", tmp_path / "repository", "--int8")
    assert done.exit_code == 2
    assert "--int8 is judged by the test split, so it reads the run's data again: " in done.stderr
    assert str(file) in done.stderr
    assert len(list((tmp_path / "repository").glob("*/*"))) == 1


def test_dynamic_gru_is_refused_with_the_reason(vowels_run, tmp_path):
    with pytest.raises(ExportError, match="no dynamic int8 GRU; --int8 static has"):
        export_run(vowels_run, tmp_path, int8="dynamic")
    assert not list(tmp_path.iterdir())


def test_drop_without_int8_means_nothing(vowels_run, tmp_path):
    done = invoke(vowels_run.path, "--repository", tmp_path, "--max-drop", 0.1)
    assert done.exit_code == 2
    assert "--max-drop is for --int8" in done.stderr
