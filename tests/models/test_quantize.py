"""Graphs of 8-bit integers: against the formulas, in numpy, and what onnxruntime makes of them."""

import dataclasses

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from models.errors import ExportError
from models.quantize import quantize, with_rounded_weights
from models.quantsteps import quantized, why_unbounded
from models.reference import reference
from models.runtime import Runtime
from models.spec import LENGTHS
from tests import onnx_models
from tests.models.exports import exported_net, node
from tests.models.test_layers import torch_weights
from tests.oracles import run_layers, softmax

CELLS = ("rnn", "gru", "lstm")
LENGTHS_OF = np.array([9, 1, 4, 6], np.int32)


class Integers:
    """Weights [out, in] that multiply values from -1 to 1 as integers: 7 bits against steps of 1/127."""

    def __init__(self, weights):
        self.shape = weights.shape
        self.scale = np.abs(weights).max(axis=1) / 63
        self.integers = np.rint(weights / self.scale[:, None]).astype(int)

    def __matmul__(self, values):
        steps = np.clip(np.rint(values * 127), -128, 127).astype(int)
        return (self.integers @ steps) * self.scale / 127


def inputs_of(net, seed=2):
    rng = np.random.default_rng(seed)
    mean, scale = net.input_mean.numpy(), net.input_scale.numpy()
    x = (mean + scale * rng.standard_normal((4, 9, 2))).astype(np.float32)
    states = [rng.uniform(-1, 1, (4, *net.state_shape)).astype(np.float32) for _ in net.state_names]
    return {"x": x, LENGTHS: LENGTHS_OF, **dict(zip(net.state_names, states, strict=True))}


def steps_within(y, lengths=LENGTHS_OF):
    return np.concatenate([row[:length] for row, length in zip(y, lengths, strict=True)])


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_static_graph_is_the_formula_with_integers(cell, bidirectional):
    net, model, _ = exported_net(cell=cell, bidirectional=bidirectional, layers=2)
    result = quantize(model, "static")
    feeds = inputs_of(net)
    found = Runtime(result.model.SerializeToString())(feeds)

    layers = [torch_weights(layer) for layer in net.recurrent]
    # Two inputs are too few to be stored smaller: their weights stay as they are.
    first = [dataclasses.replace(w, w_hh=Integers(w.w_hh)) for w in layers[0]]
    second = [dataclasses.replace(w, w_ih=Integers(w.w_ih), w_hh=Integers(w.w_hh)) for w in layers[1]]
    states = [feeds[name] for name in net.state_names]
    x = (feeds["x"] - net.input_mean.numpy()) / net.input_scale.numpy()
    y, last = run_layers(cell, x, LENGTHS_OF, [first, second], states)
    for name, state in zip(net.state_names, last, strict=True):
        np.testing.assert_allclose(found[f"{name}.next"], state, atol=1e-5)

    head, bias = Integers(net.head.weight.detach().numpy()), net.head.bias.detach().numpy()
    if bidirectional:
        final = (last[-2] if cell == "lstm" else last[-1]).reshape(4, -1)
        np.testing.assert_allclose(found["y"], softmax(np.stack([head @ row for row in final]) + bias), atol=1e-5)
    else:
        scores = np.stack([head @ row for row in steps_within(y)]) + bias
        np.testing.assert_allclose(steps_within(found["y"]), softmax(scores), atol=1e-5)
    assert (len(result.done), result.kept, result.replaced, result.is_exact) == (3, [], [0, 1], True)


@pytest.mark.parametrize("cell", CELLS)
def test_reference_in_numpy_answers_as_onnxruntime(cell):
    net, model, spec = exported_net(cell=cell, bidirectional=True, layers=2)
    quantized_model = quantize(model, "static").model
    found, expected = (
        run(inputs_of(net)) for run in (Runtime(quantized_model.SerializeToString()), reference(quantized_model))
    )
    for name in spec.graph.output_names:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-6)


@pytest.mark.parametrize("cell", CELLS)
def test_row_of_a_static_graph_is_its_own(cell):
    """Bit for bit, whatever is beside it, and cut anywhere; an RNN operator of float32 is not."""
    model = onnx.load_from_string(onnx_models.build(cell, features=5, hidden=96, layers=2).content)
    runtime = Runtime(quantize(model, "static").model.SerializeToString())
    rng = np.random.default_rng(0)
    names = [name for name in runtime.inputs if name.startswith("state.")]

    def run(x, states):
        lengths = np.full(len(x), x.shape[1], np.int32)
        return runtime({"x": x, LENGTHS: lengths} | dict(zip(names, states, strict=True)))

    x = rng.standard_normal((67, 20, 5)).astype(np.float32)
    states = [rng.uniform(-1, 1, (67, 1, 96)).astype(np.float32) for _ in names]
    x[1], x[2, 3] = 1000 * x[1], np.nan
    whole = run(x, states)
    alone = run(x[:1], [state[:1] for state in states])
    for name, array in alone.items():
        np.testing.assert_array_equal(whole[name][:1], array)
    first = run(x[:, :7], states)
    second = run(x[:, 7:], [first[f"{name}.next"] for name in names])
    np.testing.assert_array_equal(np.concatenate([first["y"], second["y"]], axis=1), whole["y"])


@pytest.mark.parametrize("cell", CELLS)
def test_what_is_no_number_stays_none_to_the_end(cell):
    model = onnx.load_from_string(onnx_models.build(cell, features=3, hidden=8, layers=2).content)
    runtime = Runtime(quantize(model, "static").model.SerializeToString())
    x = np.random.default_rng(0).standard_normal((2, 6, 3)).astype(np.float32)
    x[0, 2, 1] = np.nan
    states = {name: np.zeros((2, 1, 8), np.float32) for name in runtime.inputs if name.startswith("state.")}
    y = runtime({"x": x, LENGTHS: np.array([6, 6], np.int32)} | states)["y"]
    assert [bool(np.isnan(step).all()) for step in y[0]] == [False, False, True, True, True, True]
    assert np.isfinite(y[1]).all()


@pytest.mark.parametrize(
    ("cell", "given"),
    [
        ("gru", {"linear_before_reset": 0}),
        ("gru", {"linear_before_reset": 0, "activations": ["HardSigmoid", "Softsign"]}),
        ("lstm", {"activations": ["HardSigmoid", "Tanh", "Sigmoid"], "activation_alpha": [1 / 6]}),
        ("rnn", {"activations": ["Softsign"]}),
    ],
)
def test_options_of_the_operator_hold_in_integers(cell, given):
    model = onnx.load_from_string(onnx_models.build(cell, features=3, hidden=32).content)
    plain = Runtime(model.SerializeToString())
    operator = node(model, cell.upper())
    for name, value in given.items():
        for old in [each for each in operator.attribute if each.name == name]:
            operator.attribute.remove(old)
        operator.attribute.append(onnx.helper.make_attribute(name, value))
    x = 2 * np.random.default_rng(0).standard_normal((4, 9, 3)).astype(np.float32)
    rng = np.random.default_rng(1)
    states = {n: rng.uniform(-1, 1, (4, 1, 32)).astype(np.float32) for n in plain.inputs if n.startswith("state.")}
    feeds = {"x": x, LENGTHS: LENGTHS_OF} | states
    other, wanted, found = (
        steps_within(run(feeds)["y"])
        for run in (
            plain,
            Runtime(model.SerializeToString()),
            Runtime(quantize(model, "static").model.SerializeToString()),
        )
    )
    off, apart = np.abs(found - wanted).max(), np.abs(other - wanted).max()
    assert off < 0.01
    assert apart > 4 * off


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"activations": ["Relu"]}, "its states have no bound: activation Relu"),
        ({"clip": 3.0}, "its operator has clip"),
    ],
)
def test_operator_without_a_bound_stays_and_says_why(given, why):
    model = onnx.load_from_string(onnx_models.build("rnn", hidden=32).content)
    operator = node(model, "RNN")
    operator.attribute.extend(onnx.helper.make_attribute(name, value) for name, value in given.items())
    assert why_unbounded(operator) == why
    with pytest.raises(ExportError, match=f"would change nothing here: .*{why}. Use --int8 weights"):
        quantize(model, "static")


def test_loaded_weights_are_float32_again(tmp_path):
    """onnxruntime folds them when it loads the file: kernels, memory and speed are those of float32."""
    _, model, _ = exported_net(cell="lstm", layers=2)
    smaller = quantize(model, "weights").model

    def loaded(content, path):
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(path)
        onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        return onnx.load(path).graph

    graphs = [loaded(each.SerializeToString(), tmp_path / f"{i}.onnx") for i, each in enumerate((model, smaller))]
    assert sorted(n.op_type for n in graphs[0].node) == sorted(n.op_type for n in graphs[1].node)
    folded = [{i.name: numpy_helper.to_array(i).dtype for i in graph.initializer} for graph in graphs]
    assert {np.dtype(np.int8)} & set(folded[1].values()) == set()


@pytest.mark.parametrize("cell", CELLS)
def test_stored_weights_are_a_rounding_off(cell):
    net, model, spec = exported_net(cell=cell, layers=2)
    smaller = quantize(model, "weights").model
    rounded = with_rounded_weights(model)
    for name in ("layer.1.W", "layer.1.R"):
        old, new = (
            next(numpy_helper.to_array(t) for t in each.graph.initializer if t.name == name)
            for each in (model, rounded)
        )
        assert 0 < np.abs(old - new).max() <= np.abs(old).max() / 127 / 2 * 1.0001
    found, expected = (Runtime(each.SerializeToString())(inputs_of(net)) for each in (smaller, rounded))
    for output in spec.graph.output_names:
        np.testing.assert_array_equal(found[output], expected[output])


def test_each_channel_has_its_own_scale():
    weights = np.array([[1.0, -0.5], [0.001, 0.0005], [0.0, 0.0]], np.float32)
    integers, scales = quantized(weights, -1, 8)
    assert integers.tolist() == [[127, -64], [127, 64], [0, 0]]
    np.testing.assert_allclose(scales[:, 0], [1 / 127, 0.001 / 127, 1.0])


@pytest.mark.parametrize("form", ["static", "dynamic"])
def test_no_two_products_overflow_16_bits(form):
    """CPUs without VNNI add them in pairs, saturating: 255 x 127 x 2 would answer otherwise there."""
    _, model, _ = exported_net(cell="lstm", layers=2)
    graph = quantize(model, form).model.graph
    stored = {name for each in graph.node if each.op_type == "Cast" for name in each.input}
    factors = [numpy_helper.to_array(t) for t in graph.initializer if t.data_type == 3 and t.name not in stored]
    assert len([each for each in factors if each.any()]) == (4 if form == "static" else 5)
    assert max(int(np.abs(each.astype(int)).max()) for each in factors) == 63
    assert 255 * 63 * 2 < 2**15


def test_what_has_no_dynamic_kernel_is_said():
    _, model, _ = exported_net(cell="gru")
    with pytest.raises(ExportError, match=r"layer\.0: onnxruntime has no dynamic int8 GRU; --int8 static has"):
        quantize(model, "dynamic")


def test_model_is_left_as_it_was():
    _, model, _ = exported_net(cell="lstm", layers=2)
    before = model.SerializeToString()
    for form in ("weights", "static", "dynamic"):
        quantize(model, form)
    assert model.SerializeToString() == before
