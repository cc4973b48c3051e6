"""Models from elsewhere, served: whatever their axes, a sequence gets what the file gives it, alone."""

from __future__ import annotations

from pathlib import Path

import grpc
import numpy as np
import onnx
import pytest

from service.client import Client
from service.config import load_settings
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb
from service.repository import load_repository
from tests import foreign
from tests.foreign import FEATURES, HIDDEN, Rows, zeros
from tests.lanes import equal
from tests.oip.calls import array, request, stub_of
from tests.rpc import sequences
from tests.serving import Served, serving

LSTM_STATES = """
[states.h0]
next = "hn"
batch_axis = 1
[states.c0]
next = "cn"
batch_axis = 1
"""
TIMED = "[inputs.input]\ntime_axis = 1\n[outputs.logits]\ntime_axis = 1\n" + LSTM_STATES
MAJOR = "[inputs.input]\nbatch_axis = 1\ntime_axis = 0\n[outputs.logits]\nbatch_axis = 1\ntime_axis = 0\n" + LSTM_STATES
CELL = '[inputs.frame]\n[outputs.score]\nname = "y"\n[states.memory]\nnext = "memory_out"\n'
FRAMED = '[inputs.audio]\ntime_axis = 1\nchunk = 4\ncontext = 2\n[outputs.speech]\n[states.state]\nnext = "stateN"\n'


def describe(root: Path, name: str, text: str) -> Path:
    """Put a model.toml where the model is to lie. Returns the model's path."""
    folder = root / name / "1"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.toml").write_text(text)
    return folder / "model.onnx"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("foreign")
    foreign.lstm(describe(root, "torch", TIMED))
    foreign.lstm(describe(root, "major", MAJOR), batch_first=False)
    foreign.lstm(describe(root, "one-step", TIMED), time=1)
    foreign.lstm(describe(root, "ragged", 'lengths = "lens"\n' + TIMED), lengths=True)
    foreign.lstm(describe(root, "ragged-major", 'lengths = "lens"\n' + MAJOR), batch_first=False, lengths=True)
    foreign.lstm(describe(root, "alone", "max_batch = 1\n" + TIMED), batch=1)
    for axis in range(3):
        text = f"{CELL}batch_axis = {axis}\n[constants]\nrate = 0.5\n"
        foreign.cell(describe(root, f"cell{axis}", text), state_axis=axis, rate=True)
    foreign.cell(describe(root, "begun", CELL + 'initial = "begin.npy"\n'))
    np.save(root / "begun" / "1" / "begin.npy", np.linspace(-1, 1, HIDDEN, dtype=np.float32)[None])
    foreign.framed(describe(root, "framed", FRAMED))
    foreign.framed(describe(root, "fixed", "max_batch = 1\n" + FRAMED), size="fixed", batch=1)
    last = FRAMED.replace("[outputs.speech]", '[outputs.speech]\nper = "sequence"')
    foreign.framed(describe(root, "last", last))
    return root


@pytest.fixture(scope="module")
def served(root: Path):
    with serving(root, max_chunk_steps=7) as running:
        yield running


@pytest.fixture(scope="module")
def client(served: Served):
    with Client(served.address) as client:
        yield client


def alone(root: Path, model: str, x: Rows) -> Rows:
    """What the file gives one sequence."""
    path = root / model / "1" / "model.onnx"
    if model == "one-step":
        session_of = path.parent.parent.parent / "torch" / "1" / "model.onnx"  # the same weights
        return foreign.lstm_alone(session_of, x)
    if model.startswith("cell"):
        axis = int(model[-1])
        shape = [1, HIDDEN]
        shape.insert(axis, 1)
        return foreign.cell_alone(path, x, state=zeros(*shape), rate=0.5)
    if model == "begun":
        return foreign.cell_alone(path, x, state=np.load(path.parent / "begin.npy")[None])
    if model in ("framed", "fixed", "last"):
        return foreign.framed_alone(path, x)
    return foreign.lstm_alone(path, x, batch_first="major" not in model, lengths="ragged" in model)


MODELS = [
    *("torch", "major", "one-step", "ragged", "ragged-major", "alone"),
    *("cell0", "cell1", "cell2", "begun", "framed", "fixed"),
]


def xs_of(model: str, seed: int, count: int = 12) -> list[Rows]:
    width = 4 if model in ("framed", "fixed", "last") else FEATURES
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((n, width)).astype(np.float32) for n in rng.integers(1, 40, count)]


@pytest.mark.parametrize("model", MODELS)
def test_sequences_of_any_lengths_get_what_they_get_alone(client: Client, root: Path, model: str) -> None:
    xs = xs_of(model, 1)
    for y, x in zip(client.predict(model, xs), xs, strict=True):
        near(client, model, y, alone(root, model, x))


@pytest.mark.parametrize("model", MODELS)
def test_live_sequences_get_what_they_get_alone(client: Client, root: Path, model: str) -> None:
    xs = dict(enumerate(xs_of(model, 2)))
    rows: dict[int, list[Rows]] = {each: [] for each in xs}
    with client.gateway(model) as gateway:
        for each in xs:
            assert gateway.open() == each
        for t in range(max(map(len, xs.values()))):
            gateway.send({each: x[t] for each, x in xs.items() if t < len(x)})
        gateway.end()
        for events in gateway.receive():
            assert not events.errors
            for handle, y in events:
                rows[handle].extend(y)
    for each, x in xs.items():
        near(client, model, np.array(rows[each]), alone(root, model, x))


def near(client: Client, model: str, y: Rows, wanted: Rows) -> None:
    """As equal as the verdict says; a matrix product may round otherwise in a batch."""
    assert y.shape == wanted.shape
    if client.model(model).exactness == "exact":
        np.testing.assert_array_equal(y, wanted)
    else:
        np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-6)


def test_verdicts_are_measured(client: Client) -> None:
    verdicts = {model: client.model(model).exactness for model in MODELS}
    assert {verdicts[model] for model in ("torch", "major", "ragged", "ragged-major")} == {"exact"}
    assert {verdicts["alone"], verdicts["fixed"]} == {"coupled"}
    assert set(verdicts.values()) <= {"exact", "rounding", "coupled"}


def test_one_at_a_time_is_one_at_a_time(served: Served) -> None:
    for model in ("alone", "fixed"):
        assert served.lane(model).scheduler.config.max_rows == 1
    assert served.lane("framed").scheduler.config.max_rows == 256


def test_steps_are_chunks_where_the_description_says_so(client: Client) -> None:
    info = client.model("framed")
    assert info.step_mode == "chunked"
    assert "a step is a chunk of 4 entries" in info.step_mode_reason
    assert [(t.name, t.row_shape) for t in info.inputs] == [("audio", (4,))]
    assert [state.name for state in info.states] == ["state", "context.audio"]
    assert client.model("torch").step_mode == "stepping"
    assert [t.name for t in client.model("cell0").outputs] == ["y"]


def test_an_output_of_the_sequence_is_the_last_steps(client: Client, root: Path) -> None:
    xs = xs_of("last", 5)
    for y, x in zip(client.predict("last", xs), xs, strict=True):
        np.testing.assert_allclose(y, alone(root, "last", x)[-1], rtol=1e-5, atol=1e-6)


def test_states_travel(client: Client, root: Path) -> None:
    """Cut anywhere, with the states in a client's hands, contexts among them."""
    for model in ("framed", "torch"):
        [x] = xs_of(model, 6, 1)
        x = np.concatenate([x, x])
        first = client.predict(model, [x[:3]], return_state=True)
        second = client.predict(model, [x[3:]], states=first.states)
        near(client, model, np.concatenate([first[0], second[0]]), alone(root, model, x))


def test_every_session_begins_with_the_initial_state(client: Client, served: Served, root: Path) -> None:
    """A slot that another sequence has used too, over both protocols; a client's own state takes its place."""
    [x] = xs_of("begun", 7, 1)
    wanted = alone(root, "begun", x)
    for _ in range(3):
        with client.stream("begun") as stream:
            np.testing.assert_allclose(list(stream.run(x)), wanted, rtol=1e-5, atol=1e-6)
    with stub_of(served) as stub:
        for number in (1, 2):
            flags = {"sequence_id": number, "sequence_start": True, "sequence_end": True}
            got = array(stub.ModelInfer(request("begun", {"frame": x[None]}, **flags)))
            np.testing.assert_allclose(got[0], wanted, rtol=1e-5, atol=1e-6)
    path = root / "begun" / "1" / "model.onnx"
    given = {"memory": zeros(1, 1, HIDDEN)}
    from_zeros = foreign.cell_alone(path, x, state=zeros(1, 1, HIDDEN))
    np.testing.assert_allclose(client.predict("begun", [x], states=given)[0], from_zeros, rtol=1e-5, atol=1e-6)
    assert not np.allclose(from_zeros[0], wanted[0])


def test_initial_states_spill_and_come_back(root: Path, tmp_path: Path) -> None:
    settings = {"max_resident_sessions": 2, "spill_store": tmp_path / "spill"}
    [x] = xs_of("begun", 8, 1)
    with serving(root, **settings) as served, Client(served.address) as client, client.gateway("begun") as gateway:
        handles = [gateway.open() for _ in range(6)]
        rows: dict[int, list[Rows]] = {handle: [] for handle in handles}
        for t in range(len(x)):
            for handle in handles:
                gateway.send({handle: x[t]})
        gateway.end()
        for events in gateway.receive():
            assert not events.errors
            for handle, y in events:
                rows[handle].extend(y)
        assert served.lane("begun").tally.spills
    for handle in handles:
        np.testing.assert_allclose(rows[handle], alone(root, "begun", x), rtol=1e-5, atol=1e-6)


def test_whole_requests_of_the_inference_protocol(served: Served, root: Path) -> None:
    xs = xs_of("framed", 9, 3)
    padded = np.zeros((3, max(map(len, xs)), 4), np.float32)
    for row, x in zip(padded, xs, strict=True):
        row[: len(x)] = x
    lengths = np.array([len(x) for x in xs], np.int32)
    with stub_of(served) as stub:
        got = array(stub.ModelInfer(request("framed", {"audio": padded, "lengths": lengths})), "speech")
    for y, x in zip(got, xs, strict=True):
        np.testing.assert_allclose(y[: len(x)], alone(root, "framed", x), rtol=1e-5, atol=1e-6)


def test_weights_beside_the_file(tmp_path: Path) -> None:
    whole, apart = (describe(tmp_path, name, TIMED) for name in ("whole", "apart"))
    model = onnx.load(foreign.lstm(whole))
    onnx.save(model, apart, save_as_external_data=True, location="weights.bin", size_threshold=64)
    assert (apart.parent / "weights.bin").stat().st_size > 100
    [x] = sequences(3, 1, 9, 9)
    with serving(tmp_path) as served, Client(served.address) as client:
        equal(client.predict("apart", [x])[0], foreign.lstm_alone(whole, x))
        assert client.model("apart").digest != client.model("whole").digest


def test_digest_is_of_the_description_too(tmp_path: Path) -> None:
    digests = set()
    for text in (TIMED, TIMED + "# and a word\n"):
        foreign.lstm(describe(tmp_path, "it", text))
        [lane] = load_repository(load_settings({"repository": tmp_path})).lanes
        digests.add(lane.backend.digest)
    assert len(digests) == 2


def fault_of(folder: Path) -> str:
    """Why the only model can't be served."""
    loaded = load_repository(load_settings({"repository": folder}))
    assert not loaded.lanes
    [broken] = loaded.broken
    return str(broken.error)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[inputs.input", "is not TOML"),
        ("[outputs.logits]\n", "inputs: Field required"),
        ("inputs = {}\n[outputs.logits]\n", "inputs: none is given with every step"),
        (TIMED + "[inputs.x]\n", "inputs.x: the graph has no such input; it has input, h0, c0"),
        (TIMED.replace("[outputs.logits]", "[outputs.y]"), "y: the graph has no such output; it has logits, hn, cn"),
        (TIMED.replace('"cn"', '"c"'), "c: the graph has no such output"),
        (TIMED.replace('"cn"', '"hn"'), "two states have the same next value"),
        (TIMED + "[constants]\nh0 = 1\n", "h0 is in states and in constants: leave it in one"),
        (TIMED.partition("[states.c0]")[0], "'c0' is in none of inputs, states and constants: put it into one"),
        (TIMED.replace("time_axis = 1", "time_axis = 0", 1), "batch_axis and time_axis are both 0"),
        (TIMED.replace("time_axis = 1", "time_axis = 3", 1), "inputs.input: axis 3 of a tensor of 3 axes"),
        (TIMED.replace("time_axis = 1", "time_axes = 1", 1), "inputs.input.time_axes: is no key here"),
        (TIMED.replace("batch_axis = 1", "batch_axis = -1", 1), "states.h0.batch_axis: Input should be greater"),
        (TIMED.replace("time_axis = 1", "context = 2", 1), "chunk and context are entries of a time axis"),
        (
            TIMED.replace("time_axis = 1\n", "", 1),
            "the graph has [?, ?, 3], which leaves sizes open: give",
        ),
        (
            TIMED.replace("time_axis = 1", "time_axis = 1\nshape = [4]", 1),
            "shape [4] does not fit the graph's",
        ),
        (TIMED.replace("batch_axis = 1", 'batch_axis = 1\ninitial = "no.npy"', 1), "no.npy can't be read"),
        (TIMED.replace("batch_axis = 1", 'batch_axis = 1\ninitial = "../x.npy"', 1), "the name of a .npy file beside"),
        (
            TIMED.replace("batch_axis = 1", 'batch_axis = 1\ninitial = "bad.npy"', 1),
            "bad.npy is float32 [2], the",
        ),
        ('lengths = "lens"\n' + TIMED, "lengths.lens: the graph has no such input"),
    ],
)
def test_descriptions_that_do_not_fit_say_what_to_change(tmp_path: Path, text: str, words: str) -> None:
    path = describe(tmp_path, "it", text)
    np.save(path.parent / "bad.npy", np.zeros(2, np.float32))
    foreign.lstm(path)
    assert words in fault_of(tmp_path)


def test_a_graph_that_takes_one_sequence_says_so(tmp_path: Path) -> None:
    foreign.lstm(describe(tmp_path, "it", TIMED), batch=1)
    assert "the graph takes one sequence at a time: set max_batch = 1" in fault_of(tmp_path)


def test_a_fixed_time_without_states_is_refused_for_stepping(tmp_path: Path) -> None:
    it = foreign.Foreign()
    it.node("ReduceMean", ["x"], "y", axes=[1], keepdims=0)
    it.save(
        describe(tmp_path, "it", "[inputs.x]\ntime_axis = 1\n[outputs.y]\n"), [("x", ["b", 20, 3])], [("y", ["b", 3])]
    )
    assert "it can't be stepped: the time axis of x is fixed at 20 steps, and no state goes on" in fault_of(tmp_path)


def test_a_chunk_has_to_be_what_the_graph_takes(tmp_path: Path) -> None:
    foreign.framed(describe(tmp_path, "it", FRAMED.replace("chunk = 4", "chunk = 5")), size="fixed")
    assert "chunk 5 and context 2 are not the 6 that the graph takes" in fault_of(tmp_path)


def test_old_opsets_are_told_how_to_be_converted(tmp_path: Path) -> None:
    it = foreign.Foreign()
    it.node("Add", ["x", "s"], "s_out")
    it.node("Identity", ["s_out"], "y")
    path = describe(tmp_path, "it", '[inputs.x]\n[outputs.y]\n[states.s]\nnext = "s_out"\n')
    it.save(path, [("x", ["b", 3]), ("s", ["b", 3])], [("y", ["b", 3]), ("s_out", ["b", 3])], opset=9)
    assert "its opset is 9, and 11 is needed at least: convert it with onnx.version_converter" in fault_of(tmp_path)


def test_files_that_are_no_models(tmp_path: Path) -> None:
    describe(tmp_path, "it", TIMED).write_bytes(b"no model")
    assert "onnx can't read it" in fault_of(tmp_path)


def test_values_are_checked_against_num_ids(tmp_path: Path) -> None:
    it = foreign.Foreign()
    it.node("Gather", [it.weight("table", 6, HIDDEN), "ids"], "looked up")
    it.node("Add", ["looked up", "s"], "s_out")
    it.node("Identity", ["s_out"], "y")
    text = '[inputs.ids]\nnum_ids = 6\n[outputs.y]\n[states.s]\nnext = "s_out"\n'
    ids = ("ids", onnx.TensorProto.INT64, ["b"])
    it.save(
        describe(tmp_path, "it", text), [ids, ("s", ["b", HIDDEN])], [("y", ["b", HIDDEN]), ("s_out", ["b", HIDDEN])]
    )
    with serving(tmp_path) as served, served.stub() as stub:
        good = np.array([0, 5, 5])
        answer = stub.Predict(pb.PredictRequest(model="it", inputs=[pb.Tensor(data=good.tobytes())]))
        rows = np.frombuffer(answer.outputs[0].data, "<f4").reshape(3, HIDDEN)
        np.testing.assert_allclose(rows, np.cumsum(it.weights["table"][good], axis=0), rtol=1e-6)
        with pytest.raises(grpc.RpcError, match=r"token ids lie in 0\.\.5"):
            stub.Predict(pb.PredictRequest(model="it", inputs=[pb.Tensor(data=np.array([6]).tobytes())]))
