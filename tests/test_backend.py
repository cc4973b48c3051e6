"""service.backend: what a file must be to be served, and what the probe finds batching to do to its numbers."""

import logging

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto
from onnx.helper import set_model_props

from models.spec import METADATA_KEY, Golden, GoldenArray, Layout
from service.backend import Backend, check_provider
from service.config import load_settings
from service.errors import ConfigError, ModelBroken, RunFailed
from service.probe import LOUDNESS, PROBE_STEPS, probe
from service.repository import load_version
from tests.onnx_models import build


@pytest.fixture
def load(tmp_path):
    """Load a built model after a change to its file or its spec."""

    def load(model, *, change=None, **spec):
        file = onnx.load_from_string(model.content)
        if change is not None:
            change(file)
        if spec:
            set_model_props(file, {METADATA_KEY: model.spec.model_copy(update=spec).to_json()})
        path = tmp_path / "model.onnx"
        path.write_bytes(file.SerializeToString())
        return Backend(path)

    return load


def graph_with(model, **changes):
    """The graphs of a spec with something changed."""
    return {"graphs": (model.spec.graph.model_copy(update=changes),)}


def golden(x):
    return {"golden": (Golden(inputs={"x": x}, outputs={}),)}


def batch_of(backend, size, *, steps=4, seed=0):
    """(inputs, lengths, states) of a random batch."""
    x = np.random.default_rng(seed).standard_normal((size, steps, 3)).astype(np.float32)
    states = [np.zeros((size, *s.row_shape), np.float32) for s in backend.graph.states]
    return {"x": x}, np.full(size, steps, np.int32), states


# ---- runs -----------------------------------------------------------------------------------------------------------


def test_a_run_gives_outputs_and_states_in_the_order_of_the_spec(load):
    backend = load(build("lstm", layers=2))
    inputs, lengths, states = batch_of(backend, 3)
    [y], after = backend.run(inputs, lengths, states)
    session = ort.InferenceSession(build("lstm", layers=2).content, providers=["CPUExecutionProvider"])
    names = ["state.0.h", "state.0.c", "state.1.h", "state.1.c"]
    feeds = {**inputs, "lengths": lengths, **dict(zip(names, states, strict=True))}
    expected = session.run(["y", *(f"{name}.next" for name in names)], feeds)
    for mine, theirs in zip([y, *after], expected, strict=True):
        np.testing.assert_array_equal(mine, theirs, strict=True)
    assert (backend.provider, len(backend.digest), backend.num_bytes) == (
        "CPUExecutionProvider",
        64,
        len(build("lstm", layers=2).content),
    )


def test_a_run_that_onnxruntime_refuses_is_run_failed(load):
    backend = load(build("lstm"))
    inputs, lengths, states = batch_of(backend, 2)
    with pytest.raises(RunFailed, match=r"invalid dimensions for input: x .* index: 2 Got: 2 Expected: 3") as caught:
        backend.run({"x": inputs["x"][..., :2]}, lengths, states)
    assert "\n" not in str(caught.value)
    [y], _ = backend.run(inputs, lengths, states)
    assert y.shape == (2, 4, 2)


# ---- the probe ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "verdict", "is_chunkable"),
    [
        (build("lstm", layers=2), "exact", True),
        (build("gru", hidden=33), "exact", True),
        (build("gru", num_ids=11), "exact", True),
        (build("lstm", bidirectional=True), "exact", True),
        (build("gru", bidirectional=True, many_to_one=True), "exact", True),
        (build("rnn"), "rounding", True),
        (build("lstm", coupled=True), "coupled", True),
    ],
)
def test_verdicts(load, model, verdict, is_chunkable):
    exactness = probe(load(model), 64)
    assert (exactness.verdict, exactness.is_chunkable) == (verdict, is_chunkable), exactness.detail
    assert ("cut into chunks" in exactness.detail) == model.spec.graph.is_causal


def test_an_int8_model_is_coupled(tmp_path, caplog):
    from onnxruntime.quantization import quantize_dynamic

    path = build("lstm", hidden=32).save(tmp_path, "m")
    with caplog.at_level(logging.ERROR):  # it advises on quality
        quantize_dynamic(path, path.with_name("int8.onnx"))
    exactness = probe(Backend(path.with_name("int8.onnx")), 64)
    assert (exactness.verdict, exactness.is_chunkable) == ("coupled", False)


@pytest.mark.parametrize(
    ("batch_error", "chunk_error", "verdict", "is_chunkable"),
    [
        (0.0, 0.0, "exact", True),
        (1e-6, 0.0, "rounding", True),
        (0.0, 1e-6, "rounding", True),
        (1e-3, 0.0, "coupled", True),
        (0.0, 1e-3, "coupled", False),
        (np.nan, 0.0, "coupled", True),
        (0.0, np.nan, "coupled", False),
    ],
)
def test_an_error_of_batching_or_chunking_is_found_and_weighed(
    load, monkeypatch, batch_error, chunk_error, verdict, is_chunkable
):
    backend = load(build("lstm"))
    run = backend.run

    def inexact(inputs, lengths, states):
        outputs, after = run(inputs, lengths, states)
        is_cut = len(lengths) == 1 and lengths[0] < PROBE_STEPS
        error = batch_error if len(lengths) > 1 else chunk_error if is_cut else 0.0
        if error:  # relative to the largest value of each row
            after = [s + np.float32(error) * np.abs(s).max(axis=(1, 2), keepdims=True) for s in after]
        return outputs, after

    monkeypatch.setattr(backend, "run", inexact)
    exactness = probe(backend, 64)
    assert (exactness.verdict, exactness.is_chunkable) == (verdict, is_chunkable), exactness.detail


def probed_inputs(backend, monkeypatch):
    """Every x that the probe runs."""
    run = backend.run
    seen = []

    def note(inputs, lengths, states):
        seen.append(inputs["x"].copy())
        return run(inputs, lengths, states)

    monkeypatch.setattr(backend, "run", note)
    probe(backend, 64)
    return seen


def test_the_probe_puts_loud_and_broken_neighbours_beside_a_sequence(load, monkeypatch):
    seen = probed_inputs(load(build("lstm")), monkeypatch)
    quiet = seen[0][0]
    assert quiet.shape == (PROBE_STEPS, 3)
    assert any(len(x) == 2 and np.array_equal(x[0], quiet * np.float32(LOUDNESS)) for x in seen)
    assert any(len(x) == 2 and np.isnan(x[0]).all() for x in seen)
    crowds = [x for x in seen if len(x) == 64]
    assert [np.array_equal(x, np.stack([quiet[:2]] * 64)) for x in crowds] == [True]
    assert all(np.array_equal(x[-1][: len(quiet)], quiet) for x in seen if 1 < len(x) < 64)


def test_the_probe_stays_within_the_vocabulary(load, monkeypatch):
    seen = np.concatenate([x.ravel() for x in probed_inputs(load(build("gru", num_ids=11)), monkeypatch)])
    assert (seen.min(), seen.max()) == (0, 10)


def test_the_probe_takes_its_inputs_from_the_golden_ones(load, monkeypatch):
    rows = np.array([[[1, 2, 3], [np.nan, 5, 6], [7, 8, 9]]], np.float32)
    quiet = probed_inputs(load(build("lstm"), **golden(GoldenArray.of(rows))), monkeypatch)[0]
    assert {tuple(row) for row in quiet[0].tolist()} == {(1, 2, 3), (7, 8, 9)}


def test_golden_inputs_without_a_finite_row_do_not_blind_the_probe(load):
    rows = GoldenArray.of(np.full((1, 2, 3), np.nan, np.float32))
    assert probe(load(build("lstm", coupled=True), **golden(rows)), 64).verdict == "coupled"


# ---- files that can't be served -------------------------------------------------------------------------------------


def fixed(index, axis):
    def change(file):
        file.graph.input[index].type.tensor_type.shape.dim[axis].dim_value = 5

    return change


def without_spec(file):
    del file.metadata_props[:]


def with_spec(text):
    return lambda file: set_model_props(file, {METADATA_KEY: text})


def without_next_state(file):
    del file.graph.output[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_spec, "no 'rnnserve.spec' in the file's metadata: export it with `rnnserve export`"),
        (with_spec("{}"), r"the spec in the file's metadata is not valid: topology: Field required"),
        (with_spec("hm"), r"the spec in the file's metadata is not valid: spec: Invalid JSON"),
        (without_next_state, r"not what its spec says: outputs \['state.0.h.next'\] are missing"),
        (fixed(0, 0), r"x is tensor\(float\) \[5, 'time', 3\], spec float32 \['batch', 'time', 3\]"),
        (fixed(0, 1), r"x is tensor\(float\) \['batch', 5, 3\], spec float32 \['batch', 'time', 3\]"),
        (fixed(1, 0), r"lengths is tensor\(int32\) \[5\], spec int32 \['batch'\]"),
    ],
)
def test_a_file_at_fault_is_broken_and_the_message_says_how(load, change, message):
    with pytest.raises(ModelBroken, match=message):
        load(build("lstm"), change=change)


X, Y = build().spec.graph.inputs[0], build().spec.graph.outputs[0]
H, C = build().spec.graph.states


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"inputs": (X.model_copy(update={"name": "z"}),)}, r"inputs \['lengths', .*'x'\], spec \['lengths', .*'z'\]"),
        ({"inputs": (X.model_copy(update={"row_shape": (4,)}),)}, r"\['batch', 'time', 3\], spec .*, 4\]"),
        ({"inputs": (X.model_copy(update={"row_shape": (7, 3)}),)}, r"\['batch', 'time', 3\], spec .*, 7, 3\]"),
        ({"inputs": (X.model_copy(update={"dtype": "float64"}),)}, r"x is tensor\(float\) .* spec float64"),
        ({"outputs": (Y.model_copy(update={"name": "z"}),)}, r"outputs \['z'\] are missing"),
        (
            {"outputs": (Y.model_copy(update={"row_shape": (3,)}),)},
            r"y is .* \['batch', 'time', 2\], spec .*, 3\]",
        ),
        ({"outputs": (Y.model_copy(update={"layout": Layout.PER_SEQUENCE}),)}, r"y is .* spec float32 \['batch', 2\]"),
        ({"states": (H, C.model_copy(update={"row_shape": (1, 9)}))}, r"state.0.c is .*1, 8\], spec .*1, 9\]"),
        ({"states": (H,)}, r"inputs \['lengths', 'state.0.c', .*spec \['lengths', 'state.0.h', 'x'\]"),
    ],
)
def test_a_graph_that_is_not_what_its_spec_says_is_broken(load, spec, message):
    model = build()
    with pytest.raises(ModelBroken, match="the graph is not what its spec says: .*" + message):
        load(model, **graph_with(model, **spec))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "onnxruntime can't load it"),
        (b"not a model", "onnxruntime can't load it: .*[Pp]rotobuf parsing failed"),
        (build().content[:-100], "onnxruntime can't load it"),
    ],
)
def test_a_corrupt_file_is_broken(tmp_path, content, message):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelBroken, match=message) as caught:
        Backend(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_file_that_cannot_be_read_is_broken(tmp_path):
    with pytest.raises(ModelBroken, match="can't be read: Is a directory"):
        Backend(tmp_path)


def test_inputs_of_a_type_that_the_spec_does_not_name_are_refused(load):
    def to_tokens(file):
        file.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64
        file.graph.input[0].type.tensor_type.shape.dim.pop()

    model = build("gru", num_ids=11)
    tokens = model.spec.graph.inputs[0].model_copy(update={"dtype": "float32", "num_ids": None})
    with pytest.raises(ModelBroken, match=r"x is tensor\(int64\) \['batch', 'time'\], spec float32"):
        load(model, **graph_with(model, inputs=(tokens,)))
    with pytest.raises(ModelBroken, match="onnxruntime can't load it"):
        load(build("lstm"), change=to_tokens)


# ---- providers ------------------------------------------------------------------------------------------------------


@pytest.fixture
def without_cuda(monkeypatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])


def test_cuda_that_is_absent_is_a_setting_at_fault_that_says_what_to_install(without_cuda, tmp_path):
    path = build().save(tmp_path, "m")
    for act in (lambda: check_provider("cuda"), lambda: Backend(path, provider="cuda")):
        with pytest.raises(ConfigError, match=r"needs CUDA.*pip install 'rnnserve\[gpu\]'.*NVIDIA") as caught:
            act()
        assert caught.value.field == "provider"


def test_cuda_with_a_fallback_is_the_cpu_where_it_is_absent(without_cuda, tmp_path):
    assert check_provider("cuda,cpu") == "CPUExecutionProvider"
    backend = Backend(build().save(tmp_path, "m"), provider="cuda,cpu")
    assert backend.provider == "CPUExecutionProvider"
    assert probe(backend, 64).verdict == "exact"


def test_cuda_that_does_not_start_is_no_silent_fallback(monkeypatch, tmp_path):
    path = build().save(tmp_path, "m")
    session = ort.InferenceSession
    asked = []

    def start(content, options, providers):
        asked.append(providers)
        return session(content, options, providers=["CPUExecutionProvider"])

    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: both)
    monkeypatch.setattr(ort, "InferenceSession", start)
    assert check_provider("cuda,cpu") == "CUDAExecutionProvider"
    with pytest.raises(ConfigError, match=r"CUDA was asked for but did not start.*NVIDIA driver.*--device-id"):
        Backend(path, provider="cuda")
    settings = load_settings({"repository": tmp_path, "provider": "cuda,cpu", "device_id": 3})
    backend = load_version(settings, "m", 1).backend
    assert (backend.provider, backend.device, backend.keeps_states) == ("CPUExecutionProvider", ("cpu", 0), False)
    cuda = [("CUDAExecutionProvider", {"device_id": number, "use_tf32": 0}) for number in (0, 3)]
    assert asked == [cuda[:1], [cuda[1], ("CPUExecutionProvider", {})]]
