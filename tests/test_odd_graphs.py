"""Graphs from elsewhere that are put together in odd ways: served as they are, or refused with what to change."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from service.client import Client
from service.config import load_settings
from service.repository import load_repository
from tests import foreign
from tests.foreign import FEATURES, HIDDEN, Foreign, Rows
from tests.lanes import equal
from tests.rpc import sequences
from tests.serving import serving
from tests.test_adapter import TIMED, describe, fault_of

ROW = ["b", 3]
SUM = '[inputs.x]\n[outputs.y]\n[states.s]\nnext = "s_out"\n'


def running_sum(path: Path, names: tuple[str, str, str, str] = ("x", "s", "y", "s_out"), **options: int) -> Path:
    """A state that every input is added to, and its value as the answer."""
    x, state, y, following = names
    it = Foreign()
    it.node("Add", [x, state], following)
    it.node("Identity", [following], y)
    return it.save(path, [(x, ROW), (state, ROW)], [(y, ROW), (following, ROW)], **options)


def xs_of(width: int = 3) -> list[Rows]:
    return sequences(7, 4, 1, 12, features=width)


NAMES = [
    ("lengths of it", "shape", "steps", "times"),
    ("t", "time", "batch", "goes on"),
    ("x", "x/next", "x/made", "x/before"),
    ("step/t", "steps/int32", "weight/time axis", "shape/y"),
]


def test_names_never_clash(tmp_path: Path) -> None:
    for number, names in enumerate(NAMES):
        x, state, y, following = names
        text = f'[inputs."{x}"]\n[outputs."{y}"]\n[states."{state}"]\nnext = "{following}"\n'
        running_sum(describe(tmp_path, f"it{number}", text), names)
    with serving(tmp_path) as served, Client(served.address) as client:
        for number, names in enumerate(NAMES):
            for y, x in zip(client.predict(f"it{number}", xs_of()), xs_of(), strict=True):
                np.testing.assert_allclose(y, np.cumsum(x, axis=0), rtol=1e-5, atol=1e-6)
            assert [t.name for t in client.model(f"it{number}").inputs] == [names[0]]


def test_an_output_that_is_a_state_or_an_input_too(tmp_path: Path) -> None:
    """Answered, and carried on; a state that is given on as it is; an input that is given back."""
    it = Foreign()
    it.node("Add", ["x", "s"], "s_out")
    it.node("Identity", ["kept"], "unused")
    text = '[inputs.x]\n[outputs.s_out]\n[outputs.x]\nname = "echo"\n[states.s]\nnext = "s_out"\n'
    text += '[states.kept]\nnext = "kept"\n'
    takes = [("x", ROW), ("s", ROW), ("kept", ROW)]
    it.save(describe(tmp_path, "it", text), takes, [("s_out", ROW), ("x", ROW), ("kept", ROW)])
    with serving(tmp_path) as served, Client(served.address) as client:
        answers = client.predict("it", xs_of(), outputs=["s_out", "echo"], return_state=True)
        for sums, echo, x in zip(answers.outputs["s_out"], answers.outputs["echo"], xs_of(), strict=True):
            np.testing.assert_allclose(sums, np.cumsum(x, axis=0), rtol=1e-5, atol=1e-6)
            equal(echo, x)
        np.testing.assert_allclose(answers.states["s"][1], np.sum(xs_of()[1], axis=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["BOOL", "INT32", "INT64", "DOUBLE"])
def test_states_of_every_type(tmp_path: Path, kind: str) -> None:
    """Kept as they were past a sequence's end, as an output of the sequence is."""
    it, number = Foreign(), TensorProto.DataType.Value(kind)
    it.node("Or" if kind == "BOOL" else "Add", ["x", "s"], "s_out")
    it.node("Identity", ["s_out"], "y")
    text = SUM.replace("[outputs.y]", '[outputs.y]\nper = "sequence"')
    values = [(name, number, ROW) for name in ("x", "s", "y", "s_out")]
    it.save(describe(tmp_path, "it", text), values[:2], values[2:])
    dtype = helper.tensor_dtype_to_np_dtype(number)
    xs = [np.random.default_rng(n).integers(2, size=(n, 3)).astype(dtype) for n in (1, 9, 4)]
    with serving(tmp_path) as served, Client(served.address) as client:
        for y, x in zip(client.predict("it", xs), xs, strict=True):
            equal(y, x.any(axis=0) if kind == "BOOL" else x.sum(axis=0, dtype=dtype))


def bidirectional(path: Path, *, lengths: bool) -> Path:
    it = Foreign()
    it.node("Transpose", ["input"], "x", perm=[1, 0, 2])
    widths = {"W": FEATURES, "R": HIDDEN}
    weights = [it.weight(name, 2, 4 * HIDDEN, width) for name, width in widths.items()]
    takes = ["x", *weights, it.weight("B", 2, 8 * HIDDEN), *(["lens"] if lengths else [])]
    it.node("LSTM", takes, "Y", hidden_size=HIDDEN, direction="bidirectional")
    it.node("ReduceSum", ["Y", it.constant("one", 1)], "both", keepdims=0)
    it.node("Transpose", ["both"], "y", perm=[1, 0, 2])
    given = [("lens", TensorProto.INT32, ["b"])] if lengths else []
    return it.save(path, [("input", ["b", "t", FEATURES]), *given], [("y", ["b", "t", HIDDEN])])


def test_sequences_are_given_whole_to_what_reads_from_their_end(tmp_path: Path) -> None:
    path = describe(tmp_path, "it", 'lengths = "lens"\n[inputs.input]\ntime_axis = 1\n[outputs.y]\ntime_axis = 1\n')
    bidirectional(path, lengths=True)
    with serving(tmp_path, max_chunk_steps=2) as served, Client(served.address) as client:
        for y, x in zip(client.predict("it", xs_of()), xs_of(), strict=True):
            wanted = foreign.run(path, {"input": x[None], "lens": np.array([len(x)], np.int32)})["y"][0]
            np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-6)
        assert client.model("it").step_mode == "buffered"


def test_one_that_reads_from_the_end_and_knows_no_lengths_is_refused(tmp_path: Path) -> None:
    bidirectional(
        describe(tmp_path, "it", "[inputs.input]\ntime_axis = 1\n[outputs.y]\ntime_axis = 1\n"), lengths=False
    )
    assert "it can't be stepped: 7 steps at once are answered otherwise" in fault_of(tmp_path)

    it = Foreign()  # the last answer alone
    it.node("Transpose", ["input"], "x", perm=[1, 0, 2])
    weights = [it.weight(name, 2, 4 * HIDDEN, width) for name, width in {"W": FEATURES, "R": HIDDEN}.items()]
    it.node("LSTM", ["x", *weights], ["Y", "last"], hidden_size=HIDDEN, direction="bidirectional")
    it.node("ReduceSum", ["last", it.constant("axis", 0)], "y", keepdims=0)
    path = describe(tmp_path, "it", "[inputs.input]\ntime_axis = 1\n[outputs.y]\nper = 'sequence'\n")
    it.save(path, [("input", ["b", "t", FEATURES])], [("y", ["b", HIDDEN])])
    assert "it can't be stepped: 7 steps at once are answered otherwise" in fault_of(tmp_path)


def test_one_that_reads_another_axis_from_its_end_is_stepped(tmp_path: Path) -> None:
    """Bands of a frame [batch, time, bands], read in both directions, each band beside a sum over time."""
    it = Foreign()
    flat = it.node("Reshape", ["frames", it.constant("flat", -1, 4, 1)], "bands")  # [batch x time, bands, 1]
    first = it.node("Transpose", [flat], "bands.first", perm=[1, 0, 2])
    widths = {"W": 1, "R": 1}
    weights = [it.weight(name, 2, 4, width) for name, width in widths.items()]
    it.node("LSTM", [first, *weights], "Y", hidden_size=1, direction="bidirectional")
    it.node("ReduceSum", ["Y", it.constant("one", 1)], "both", keepdims=0)  # [bands, batch x time, 1]
    it.node("Transpose", ["both"], "both.first", perm=[1, 0, 2])
    it.node("Reshape", ["both.first", it.node("Shape", ["frames"], "shape")], "seen")
    it.node("Add", [it.node("CumSum", ["seen", "one"], "sums"), it.node("Unsqueeze", ["s", "one"], "s.wide")], "y")
    it.node("Slice", ["y", it.constant("last", -1), it.constant("end", 2**31), "one"], "y.last")
    it.node("Squeeze", ["y.last", "one"], "s_out")
    frames, row = ["b", "t", 4], ["b", 4]
    text = "[inputs.frames]\ntime_axis = 1\n[outputs.y]\ntime_axis = 1\n[states.s]\nnext = 's_out'\n"
    path = describe(tmp_path, "it", text)
    it.save(path, [("frames", frames), ("s", row)], [("y", frames), ("s_out", row)])
    [x] = sequences(3, 1, 9, 9, features=4)
    with serving(tmp_path) as served, Client(served.address) as client, client.stream("it") as stream:
        wanted = foreign.run(path, {"frames": x[None], "s": np.zeros((1, 4), np.float32)})["y"][0]
        np.testing.assert_allclose(list(stream.run(x)), wanted, rtol=1e-5, atol=1e-6)


def test_old_operators_and_weights_among_inputs(tmp_path: Path) -> None:
    """Squeeze with axes as an attribute; initializers that are listed as inputs, as IR 3 wants them."""
    it = Foreign()
    it.node("MatMul", ["frame", it.weight("U", FEATURES, HIDDEN)], "fed")
    it.node("Add", ["fed", it.node("Squeeze", ["memory"], "flat", axes=[1])], "total")
    it.node("Unsqueeze", [it.node("Tanh", ["total"], "score")], "memory_out", axes=[1])
    state = ["b", 1, HIDDEN]
    path = describe(tmp_path, "it", '[inputs.frame]\n[outputs.score]\n[states.memory]\nnext = "memory_out"\n')
    takes = [("frame", ["b", FEATURES]), ("memory", state), ("U", [FEATURES, HIDDEN])]
    it.save(path, takes, [("score", ["b", HIDDEN]), ("memory_out", state)], opset=11)
    model = onnx.load(path)
    model.ir_version = 3
    onnx.save(model, path)
    [x] = sequences(3, 1, 9, 9, features=FEATURES)
    with serving(tmp_path) as served, Client(served.address) as client:
        memory, wanted = np.zeros((1, 1, HIDDEN), np.float32), []
        for step in x:
            answer = foreign.run(path, {"frame": step[None], "memory": memory})
            memory = answer["memory_out"]
            wanted.append(answer["score"][0])
        np.testing.assert_allclose(client.predict("it", [x])[0], wanted, rtol=1e-5, atol=1e-6)


def test_branches_functions_and_sparse_weights(tmp_path: Path) -> None:
    """An If whose branches use values around them, under names that both have; a function of the file's own."""
    it = Foreign()
    it.node("MatMul", ["x", "eye"], "same")
    it.node("ReduceSum", ["same"], "total", keepdims=0)
    it.node("Cast", [it.constant("limit", 0)], "bound", to=TensorProto.FLOAT)
    it.node("Greater", ["total", it.node("Squeeze", ["bound"], "bound.scalar")], "is_more")
    made = helper.make_tensor_value_info("made", TensorProto.FLOAT, None)
    then, other = (
        helper.make_graph([helper.make_node(operator, ["same", "s"], ["made"])], operator, [], [made])
        for operator in ("Add", "Sub")
    )
    it.node("If", ["is_more"], "s_out", then_branch=then, else_branch=other)
    it.nodes.append(helper.make_node("Twice", ["s_out"], ["y"], domain="own"))
    path = describe(tmp_path, "it", "max_batch = 1\n" + SUM)
    twice = [helper.make_node("Add", ["s_out", "s_out"], ["y"])]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    function = helper.make_function("own", "Twice", ["s_out"], ["y"], twice, opsets[:1])
    rows = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ROW) for name in ("x", "s", "y", "s_out")]
    graph = helper.make_graph(
        it.nodes, "odd", rows[:2], rows[2:], [numpy_helper.from_array(it.weights["limit"], "limit")]
    )
    values = helper.make_tensor("eye", TensorProto.FLOAT, [3], [1.0, 1.0, 1.0])
    places = helper.make_tensor("places", TensorProto.INT64, [3], [0, 4, 8])
    graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [3, 3]))
    onnx.save(helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=8), path)
    [x] = sequences(3, 1, 9, 9)
    with serving(tmp_path) as served, Client(served.address) as client:
        state, wanted = np.zeros((1, 3), np.float32), []
        for step in x:
            answer = foreign.run(path, {"x": step[None], "s": state})
            state = answer["s_out"]
            wanted.append(answer["y"][0])
        equal(client.predict("it", [x])[0], np.array(wanted))
        with client.stream("it") as stream:
            equal(np.array(list(stream.run(x))), np.array(wanted))


@pytest.mark.parametrize("lengths", [False, True])
def test_every_tensor_has_its_axes_where_it_wants(tmp_path: Path, lengths: bool) -> None:
    """Inputs [batch, time, 3] and [3, batch, time], a bias of the sequence [3, batch]; answers [time, 3, batch]."""
    it = Foreign()
    it.node("Transpose", ["b"], "b.first", perm=[1, 2, 0])
    it.node("Transpose", ["bias"], "bias.first", perm=[1, 0])
    wide = it.node("Unsqueeze", ["bias.first", it.constant("one", 1)], "bias.wide")
    it.node("Add", [it.node("Mul", ["a", "b.first"], "product"), wide], "biased")
    sums = it.node("CumSum", ["biased", it.constant("axis", 1)], "sums")
    it.node("Unsqueeze", ["s", "one"], "s.wide")
    it.node("Add", [sums, "s.wide"], "all")
    it.node("Transpose", ["all"], "y", perm=[1, 2, 0])
    takes = [("a", ["n", "t", 3]), ("b", [3, "n", "t"]), ("bias", [3, "n"]), ("s", ["n", 3])]
    if lengths:  # the last real one of each sequence
        takes.append(("lens", TensorProto.INT64, ["n"]))
        last = it.node("Sub", ["lens", it.node("Squeeze", ["one"], "one.scalar")], "last")
        places = it.node("Unsqueeze", [last, it.constant("both", 1, 2)], "places")
        it.node("Expand", [places, it.constant("wide", 1, 1, 3)], "places.wide")
        it.node("GatherElements", ["all", "places.wide"], "s_all", axis=1)
        it.node("Squeeze", ["s_all", "one"], "s_out")
    else:
        it.node("ReduceMean", ["all"], "s_out", axes=[1], keepdims=0)  # of one step
    text = ("lengths = 'lens'\n" if lengths else "") + (
        "[inputs.a]\ntime_axis = 1\n[inputs.b]\nbatch_axis = 1\ntime_axis = 2\n"
        "[inputs.bias]\nper = 'sequence'\nbatch_axis = 1\n"
        "[outputs.y]\nbatch_axis = 2\ntime_axis = 0\n[states.s]\nnext = 's_out'\n"
    )
    it.save(describe(tmp_path, "it", text), takes, [("y", ["t", 3, "n"]), ("s_out", ["n", 3])])
    left, right = (sequences(seed, 6, 2, 9) for seed in (1, 1))
    right = [x[::-1].copy() for x in right]
    bias = np.random.default_rng(4).standard_normal((6, 3)).astype(np.float32)
    wanted = [np.cumsum(a * b + c, axis=0) for a, b, c in zip(left, right, bias, strict=True)]
    with serving(tmp_path, max_chunk_steps=3) as served, Client(served.address) as client:
        answers = client.predict("it", {"a": left, "b": right, "bias": bias}, return_state=True)
        for y, last, each in zip(answers, answers.states["s"], wanted, strict=True):
            np.testing.assert_allclose(y, each, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(last, each[-1], rtol=1e-4, atol=1e-5)


CHANNELS, TAPS = 3, 4


def convolution(path: Path, chunk: object) -> Foreign:
    """A convolution over time, the last axis, without padding."""
    it = Foreign()
    it.node("Conv", ["x", it.weight("kernel", 2, CHANNELS, TAPS)], "y", kernel_shape=[TAPS])
    it.save(path, [("x", ["b", CHANNELS, "samples"])], [("y", ["b", 2, chunk])])
    return it


@pytest.mark.parametrize("chunk", [None, 2, 5])
def test_contexts_of_any_length_on_any_axis(tmp_path: Path, chunk: int | None) -> None:
    """A causal convolution is one that is given again what its taps reach back to: more than a chunk, or less."""
    size = f"chunk = {chunk}\n" if chunk else ""
    entry = f"shape = [2, {chunk}]\n" if chunk else "time_axis = 2\n"
    path = describe(tmp_path, "it", f"[inputs.x]\ntime_axis = 2\ncontext = {TAPS - 1}\n{size}[outputs.y]\n{entry}")
    convolution(path, "out")
    xs = sequences(5, 3, 1, 9, features=CHANNELS * (chunk or 1))
    with serving(tmp_path, max_chunk_steps=2) as served, Client(served.address) as client:
        rows = [x.reshape(len(x), chunk, CHANNELS) if chunk else x for x in xs]
        for y, x in zip(client.predict("it", rows), xs, strict=True):
            samples = np.concatenate([np.zeros((TAPS - 1, CHANNELS), np.float32), x.reshape(-1, CHANNELS)])
            whole = foreign.run(path, {"x": samples.T[None]})["y"][0]  # [2, time]
            steps = whole.reshape(2, len(x), -1).transpose(1, 0, 2)
            np.testing.assert_allclose(y, steps if chunk else steps[..., 0], rtol=1e-5, atol=1e-6)


def test_batching_is_measured_from_the_states_that_sequences_begin_with(tmp_path: Path) -> None:
    """A state of zeros would hide that neighbours change each other."""
    it = Foreign()
    it.node("Sub", ["x", it.node("ReduceMean", ["x"], "mean", axes=[0])], "centred")
    it.node("Where", [it.node("Cast", ["s"], "is_on", to=TensorProto.BOOL), "centred", "s"], "y")
    it.node("Identity", ["s"], "s_out")
    path = describe(tmp_path, "it", SUM + 'initial = "ones.npy"\n')
    np.save(path.with_name("ones.npy"), np.ones(3, np.float32))
    it.save(path, [("x", ROW), ("s", ROW)], [("y", ROW), ("s_out", ROW)])
    [lane] = load_repository(load_settings({"repository": tmp_path})).lanes
    assert lane.exactness.verdict == "coupled"


def test_digest_is_of_the_weights_too(tmp_path: Path) -> None:
    path = describe(tmp_path, "it", TIMED)
    model = onnx.load(foreign.lstm(path))
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=64)
    digests = set()
    for _ in range(2):
        [lane] = load_repository(load_settings({"repository": tmp_path})).lanes
        digests.add(lane.backend.digest)
        weights = path.with_name("weights.bin")
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x3e")
    assert len(digests) == 2
