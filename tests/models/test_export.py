"""Export: parity for every kind of net, the gate's refusals, and what is in the file."""

import dataclasses
import json
import os
import stat
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import models.export
import models.layers
from models import tasks
from models.errors import ExportError, ParityError, RunError
from models.export import export_net, export_run, next_version, write_version
from models.graphs import to_onnx
from models.modelfile import ModelFile
from models.nets import FOLD_LIMIT
from models.runs import Run
from models.runtime import Runtime
from models.spec import LENGTHS, METADATA_KEY, MODEL_FILE, LayerSpec, Layout, StepMode, parse_spec
from models.train import load_net
from tests.models.conftest import make_task
from tests.models.exports import TRAINING, exported_net, make_net, node
from tests.models.test_layers import CELLS, torch_weights
from tests.oracles import run_layers, softmax

# Parity


@pytest.mark.parametrize("kind", ["classification", "regression"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "bidirectional"])
@pytest.mark.parametrize(("cell", "activation"), CELLS)
def test_every_net_passes_the_gate_with_native_operators(cell, activation, bidirectional, layers, kind):
    _, model, spec = exported_net(
        kind=kind, cell=cell, activation=activation, bidirectional=bidirectional, layers=layers
    )
    assert spec.graph.operators[cell.upper()] == layers
    assert spec.parity.num_cases == (16 if bidirectional else 19)
    assert spec.parity.max_abs_error < 1e-5 * 100  # relative to values of up to about 100 mV
    allowed = {cell.upper(), "Transpose", "Squeeze", "Reshape", "MatMul", "Gemm", "Add", "Softmax", "Gather"}
    assert spec.graph.operators.keys() <= allowed
    constants = {each.name for each in model.graph.initializer}
    for number in range(layers):
        each = node(model, cell.upper(), number)
        assert each.input[4] == LENGTHS
        assert set(each.input[1:4]) == {f"layer.{number}.{name}" for name in "WRB"} <= constants
    expected_mode = StepMode.BUFFERED if bidirectional else StepMode.STEPPING
    assert spec.step_mode[0] is expected_mode
    is_per_sequence = bidirectional and kind == "classification"
    assert spec.graph.outputs[0].layout is (Layout.PER_SEQUENCE if is_per_sequence else Layout.PER_STEP)


@pytest.mark.parametrize(("cell", "activation"), CELLS)
def test_file_is_the_formula_without_torch_in_between(cell, activation):
    net, model, _ = exported_net(kind="classification", cell=cell, activation=activation, bidirectional=True, layers=2)
    runtime = Runtime(model.SerializeToString())
    rng = np.random.default_rng(2)
    mean, scale = net.input_mean.numpy(), net.input_scale.numpy()
    x = (mean + scale * rng.standard_normal((4, 9, 2))).astype(np.float32)
    lengths = np.array([9, 1, 4, 6], np.int32)
    states = [rng.uniform(0, 1, (4, 2, 6)).astype(np.float32) for _ in net.state_names]
    found = runtime({"x": x, LENGTHS: lengths, **dict(zip(net.state_names, states, strict=True))})

    layers = [torch_weights(layer) for layer in net.recurrent]
    _, last = run_layers(cell, (x - mean) / scale, lengths, layers, states, activation)
    final = (last[-2] if cell == "lstm" else last[-1]).reshape(4, -1)
    head = net.head.weight.detach().numpy(), net.head.bias.detach().numpy()
    np.testing.assert_allclose(found["y"], softmax(final @ head[0].T + head[1]), atol=2e-6)
    for name, state in zip(net.state_names, last, strict=True):
        np.testing.assert_allclose(found[f"{name}.next"], state, atol=5e-6)


def test_scaling_that_would_cancel_stays_in_the_graph():
    task = make_task()
    far = dataclasses.replace(
        task, train=dataclasses.replace(task.train, inputs=tuple(x + 50 * FOLD_LIMIT for x in task.train.inputs))
    )
    _, spec = export_net(make_net(far), far, TRAINING)
    assert spec.graph.operators["Sub"] == spec.graph.operators["Mul"] == 1
    _, _, near = exported_net()
    assert not {"Sub", "Mul", "Div"} & near.graph.operators.keys()


def test_one_step_graph_has_nothing_to_spare():
    _, model, _ = exported_net()
    assert [each.op_type for each in model.graph.node] == [
        *("Transpose", "Transpose", "GRU", "Squeeze", "Transpose", "MatMul", "Add", "Transpose", "Softmax")
    ]
    assert [each.name for each in model.graph.input] == ["x", "lengths", "state.0.h"]
    assert [each.name for each in model.graph.output] == ["y", "state.0.h.next"]
    axes = [[axis.dim_param or axis.dim_value for axis in v.type.tensor_type.shape.dim] for v in model.graph.input]
    assert axes == [["batch", "time", 2], ["batch"], ["batch", 1, 6]]
    assert all(opset.version <= 21 for opset in model.opset_import)


def test_outputs_that_nobody_reads_are_not_computed():
    lstm = node(exported_net(cell="lstm", bidirectional=True)[1], "LSTM")
    assert lstm.output[0] == ""
    assert all(lstm.output[1:])


def test_refused_file_is_not_written(vowels_run, tmp_path, monkeypatch):
    def spoiled(part):
        model, graph = to_onnx(part)
        [bias] = [each for each in model.graph.initializer if each.name == "layer.0.B"]
        bias.CopyFrom(numpy_helper.from_array(np.zeros_like(numpy_helper.to_array(bias)), bias.name))
        return model, graph

    monkeypatch.setattr(models.export, "to_onnx", spoiled)
    with pytest.raises(ParityError):
        export_run(vowels_run, tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


def test_unwired_lengths_are_seen_before_any_number(monkeypatch):
    def unwired(kind, x, lengths, *rest, **settings):
        return native(kind, x, torch.ones_like(lengths), *rest, **settings)

    native = models.layers.native
    monkeypatch.setattr(models.layers, "native", unwired)
    with pytest.raises(ExportError, match="sequence_lens is not wired to 'lengths'"):
        to_onnx(*make_net(make_task()).graphs(make_task()))


# The file


def test_client_sends_raw_units_and_gets_probabilities(vowels_run, vowels_file):
    task, _, net, _ = load_net(vowels_run)
    runtime = Runtime(vowels_file.read_bytes())
    for utterance in (0, 100, 369):
        x = task.test.inputs[utterance]
        lengths = np.array([len(x)], np.int32)
        y = runtime({"x": x[None], LENGTHS: lengths, "state.0.h": np.zeros((1, 1, 16), np.float32)})["y"][0]
        np.testing.assert_allclose(y.sum(axis=1), np.ones(len(x)), rtol=1e-6)
        # By hand: normalise, run, apply the head and softmax.
        steps = (x - net.input_mean.numpy()) / net.input_scale.numpy()
        layers = [torch_weights(layer) for layer in net.recurrent]
        hidden, _ = run_layers("gru", steps[None], lengths, layers, [np.zeros((1, 1, 16))])
        scores = hidden[0] @ net.head.weight.detach().numpy().T + net.head.bias.detach().numpy()
        np.testing.assert_allclose(y, softmax(scores), atol=2e-6)


def test_client_sends_raw_units_and_gets_raw_units():
    task = tasks.load("waterflow")
    net = make_net(task)
    with torch.no_grad():
        net.head.weight.zero_()
        net.head.bias.fill_(2.0)
    files, spec = export_net(net, task, TRAINING)
    x = task.test.inputs[0][None, :50]
    lengths = np.array([50], np.int32)
    y = Runtime(files[MODEL_FILE])({"x": x, LENGTHS: lengths, "state.0.h": np.zeros((1, 1, 6), np.float32)})["y"]
    # The head says: up by two median hourly changes, everywhere.
    np.testing.assert_allclose(y, x[..., :1] + 2.0 * task.scaling().output_scale, rtol=1e-6)
    assert (spec.graph.inputs[0].unit, spec.graph.outputs[0].unit) == ("l/s, h", "l/s")


def test_spec_tells_where_the_model_came_from(vowels_run, vowels_file):
    spec = parse_spec(Runtime(vowels_file.read_bytes()).metadata[METADATA_KEY])
    metrics = json.loads((vowels_run.path / "metrics.json").read_text())
    assert spec.topology == "many-to-one"
    assert spec.labels == tuple(f"speaker {number}" for number in range(1, 10))
    assert spec.training.task == "vowels"
    assert spec.training.license == "CC BY 4.0"
    assert spec.training.metrics["test_accuracy"] == metrics["test"]["accuracy"]
    assert spec.training.metrics["baseline_test_accuracy"] == metrics["baseline"]["test"]["accuracy"]
    assert spec.training.recipe["hidden"] == 16
    assert spec.num_parameters == 3 * 16 * (12 + 16 + 2) + 9 * 17
    assert spec.versions["torch"] == torch.__version__
    assert spec.cell == "gru"
    assert spec.layers == (LayerSpec(cell="gru", hidden=16),)
    assert [(s.name, s.next_name, s.row_shape) for s in spec.graph.states] == [("state.0.h", "state.0.h.next", (1, 16))]


def test_file_says_nothing_of_the_machine_that_made_it(vowels_file):
    model = onnx.load(vowels_file)
    assert [prop.key for prop in model.metadata_props] == [METADATA_KEY]
    for each in (*model.graph.node, *model.graph.input, *model.graph.initializer, model.graph):
        assert not each.metadata_props
        assert not each.doc_string
    assert os.fsencode(Path.cwd()) not in vowels_file.read_bytes()


def test_versions_count_up(vowels_run, tmp_path):
    first = export_run(vowels_run, tmp_path)
    assert first.path == tmp_path / "vowels" / "1" / "model.onnx"
    assert write_version({MODEL_FILE: b""}, tmp_path, "vowels", 7).parent.name == "7"
    second = export_run(vowels_run, tmp_path)
    assert second.path.parent.name == "8"
    assert second.path.read_bytes() == first.path.read_bytes()
    assert write_version({MODEL_FILE: b""}, tmp_path, "other") == tmp_path / "other" / "1" / "model.onnx"
    assert sorted(entry.name for entry in (tmp_path / "vowels").iterdir()) == ["1", "7", "8"]
    assert stat.S_IMODE(first.path.stat().st_mode) == 0o644
    assert stat.S_IMODE(first.path.parent.stat().st_mode) == 0o755
    assert all(check.is_passed for check in ModelFile(first.path).verify())


def test_version_that_exists_is_never_changed(tmp_path):
    path = write_version({MODEL_FILE: b"old"}, tmp_path, "m", 3)
    with pytest.raises(ExportError, match="3 exists; versions are never changed"):
        write_version({MODEL_FILE: b"new"}, tmp_path, "m", 3)
    assert path.read_bytes() == b"old"
    assert next_version(tmp_path / "m") == 4
    assert [entry.name for entry in (tmp_path / "m").iterdir()] == ["3"]


@pytest.mark.parametrize(
    ("name", "version", "fault"),
    [("../m", None, "cannot be a model's name"), (".m", None, "cannot be a model's name"), ("m", 0, "begin at 1")],
)
def test_names_and_versions_that_cannot_be(tmp_path, name, version, fault):
    with pytest.raises(ExportError, match=fault):
        write_version({MODEL_FILE: b""}, tmp_path, name, version)
    assert not list(tmp_path.iterdir())


def test_repository_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot write to"):
        write_version({MODEL_FILE: b""}, tmp_path / "file", "m")


def test_what_is_no_run_is_said(tmp_path):
    with pytest.raises(RunError, match=r"has no best.pt: it is no run"):
        export_run(Run(tmp_path), tmp_path / "repository")
    (tmp_path / "best.pt").write_bytes(b"damaged")
    with pytest.raises(RunError, match=r"best.pt is damaged"):
        export_run(Run(tmp_path), tmp_path / "repository")


def test_run_that_was_killed_exports_its_best_epoch(vowels_run, tmp_path):
    for name in ("best.pt", "run.toml"):
        (tmp_path / name).write_bytes((vowels_run.path / name).read_bytes())
    spec = export_run(Run(tmp_path), tmp_path / "repository").spec
    assert set(spec.training.metrics) == {"validation_loss", "validation_accuracy"}


def test_exporting_leaves_warnings_as_they_were(recwarn):
    import warnings

    before = list(warnings.filters)
    to_onnx(*make_net(make_task()).graphs(make_task()))
    assert list(warnings.filters) == before
    assert not recwarn.list
