"""Graphs that no net of a task has: contexts that are unrolled, decoders that read a memory, fixed time."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from models.errors import ExportError, ModelFileError, ParityError
from models.export import export_model, write_version
from models.graphs import GraphModule, draw_like, to_onnx
from models.layers import Recurrent
from models.modelfile import ModelFile
from models.spec import (
    LENGTHS,
    SOURCE_LENGTHS,
    Generation,
    GraphSpec,
    LayerSpec,
    Layout,
    StateSpec,
    StepMode,
    TensorSpec,
)
from tests.models.exports import TRAINING
from tests.models.test_layers import torch_weights
from tests.oracles import run_layers, softmax

IDS, WIDTH = 5, 4
GRU = LayerSpec(cell="gru", hidden=WIDTH)


def state(initial=""):
    return StateSpec(name="state.0.h", next_name="state.0.h.next", row_shape=(1, WIDTH), initial=initial)


def tensor(name, layout, *row_shape, dtype="float32", num_ids=None):
    return TensorSpec(name=name, dtype=dtype, row_shape=row_shape, layout=layout, num_ids=num_ids)


class Unroll(nn.Module):
    """Every step sees the same context [batch, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Recurrent("gru", 3, WIDTH)

    def forward(self, context, lengths, h):
        num_steps = lengths.max().item()
        x = context.unsqueeze(0).expand(num_steps, -1, -1)
        y, (last,) = self.layer(x, lengths, (h,))
        return y.transpose(0, 1), last


class Encoder(nn.Module):
    """Ids [batch, time] in; the memory of every step and the last state out."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(IDS, 3)
        self.layer = Recurrent("gru", 3, WIDTH)

    def forward(self, x, lengths, h):
        y, (last,) = self.layer(self.table(x).transpose(0, 1), lengths, (h,))
        return y.transpose(0, 1), last.tanh(), last


class Decoder(nn.Module):
    """Ids [batch, time] in, attention over the memory, log-probabilities out."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(IDS, 3)
        self.layer = Recurrent("gru", 3, WIDTH)
        self.head = nn.Linear(2 * WIDTH, IDS)

    def forward(self, token, memory, lengths, source_lengths, h):
        y, (last,) = self.layer(self.table(token).transpose(0, 1), lengths, (h,))
        y = y.transpose(0, 1)
        scores = y @ memory.transpose(1, 2)
        is_past = torch.arange(memory.shape[1]) >= source_lengths[:, None]
        weights = scores.masked_fill(is_past[:, None], float("-inf")).softmax(-1)
        return self.head(torch.cat([y, weights @ memory], -1)).log_softmax(-1), last


def part(module, spec):
    module = module.eval()
    ready = copy.deepcopy(module)
    ready.layer.freeze()
    return GraphModule(module=module, ready=ready, spec=spec, draw=draw_like(np.float64(0), np.float64(1)))


def unrolled():
    torch.manual_seed(0)
    spec = GraphSpec(
        layers=(GRU,),
        inputs=(tensor("context", Layout.PER_SEQUENCE, 3),),
        outputs=(tensor("y", Layout.PER_STEP, WIDTH),),
        states=(state(),),
    )
    return part(Unroll(), spec)


def pair():
    torch.manual_seed(0)
    decoder = GraphSpec(
        role="decoder",
        layers=(GRU,),
        inputs=(
            tensor("token", Layout.PER_STEP, dtype="int64", num_ids=IDS),
            tensor("memory", Layout.PER_SOURCE_STEP, WIDTH),
        ),
        outputs=(tensor("log_probs", Layout.PER_STEP, IDS),),
        states=(state("first"),),
    )
    encoder = GraphSpec(
        role="encoder",
        file="encoder.onnx",
        layers=(GRU,),
        inputs=(tensor("x", Layout.PER_STEP, dtype="int64", num_ids=IDS),),
        outputs=(tensor("memory", Layout.PER_STEP, WIDTH), tensor("first", Layout.PER_SEQUENCE, 1, WIDTH)),
        states=(state(),),
    )
    return [part(Decoder(), decoder), part(Encoder(), encoder)]


def exported(parts, topology="one-to-many", **settings):
    return export_model(parts, topology=topology, training=TRAINING, num_parameters=1, **settings)


def test_context_is_unrolled_for_as_many_steps_as_lengths_say(tmp_path):
    made = unrolled()
    files, spec = exported([made], generation=Generation(max_steps=7))
    assert spec.step_mode[0] is StepMode.GENERATIVE
    assert spec.graph.operators["GRU"] == 1
    model = ModelFile(write_version(files, tmp_path, "m"))
    assert [check.is_passed for check in model.verify()] == [True] * 3
    context = np.random.default_rng(1).standard_normal((3, 3)).astype(np.float32)
    lengths = np.array([2, 7, 4], np.int32)
    found = model.runtime({"context": context, LENGTHS: lengths, "state.0.h": np.zeros((3, 1, WIDTH), np.float32)})
    assert found["y"].shape == (3, 7, WIDTH)
    steps = np.repeat(context[:, None], 7, axis=1)
    expected, [last] = run_layers("gru", steps, lengths, [torch_weights(made.module.layer)], [np.zeros((3, 1, WIDTH))])
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(found["y"][row, :length], expected[row, :length], atol=2e-6)
    np.testing.assert_allclose(found["state.0.h.next"], last, atol=2e-6)


GENERATION = Generation(max_steps=9, token_input="token", scores_output="log_probs", begin_id=0, end_id=1)


@pytest.fixture(scope="module")
def translator():
    """An encoder and a decoder that reads its memory, exported."""
    return exported(pair(), "encoder-decoder", generation=GENERATION)


def test_decoder_reads_the_memory_of_its_encoder(translator, tmp_path):
    files, spec = translator
    assert [graph.role for graph in spec.graphs] == ["decoder", "encoder"]
    assert spec.graph.input_names == ("token", "memory", LENGTHS, SOURCE_LENGTHS, "state.0.h")
    path = write_version(files, tmp_path, "m")
    assert sorted(each.name for each in path.parent.iterdir()) == ["encoder.onnx", "model.onnx"]
    model = ModelFile(path)
    assert model.size == sum(map(len, files.values()))
    assert [check.is_passed for check in model.verify()] == [True] * 5
    # One sequence by hand: encode, attend, decode.
    decoder, encoder = (each.module for each in pair())
    x = np.array([[3, 1, 4, 2]])
    zeros = np.zeros((1, 1, WIDTH), np.float32)
    encoded = model.runtimes[1]({"x": x, LENGTHS: np.array([4], np.int32), "state.0.h": zeros})
    table = encoder.table.weight.detach().numpy()
    memory, [last] = run_layers("gru", table[x], [4], [torch_weights(encoder.layer)], [zeros])
    np.testing.assert_allclose(encoded["memory"], memory, atol=2e-6)
    np.testing.assert_allclose(encoded["first"], np.tanh(last), atol=2e-6)
    # Beside a longer source, whose padding it must not see.
    padded = np.concatenate([encoded["memory"], np.full((1, 2, WIDTH), 50, np.float32)], axis=1)
    token = np.array([[0, 3]])
    feeds = {
        "token": token.repeat(2, axis=0),
        "memory": padded.repeat(2, axis=0),
        LENGTHS: np.array([2, 2], np.int32),
        SOURCE_LENGTHS: np.array([4, 6], np.int32),
        "state.0.h": encoded["first"].repeat(2, axis=0),
    }
    found = model.runtime(feeds)["log_probs"][0]
    table = decoder.table.weight.detach().numpy()
    y, _ = run_layers("gru", table[token], [2], [torch_weights(decoder.layer)], [np.tanh(last)])
    weights = softmax(y[0] @ memory[0].T)
    joined = np.concatenate([y[0], weights @ memory[0]], axis=-1)
    scores = joined @ decoder.head.weight.detach().numpy().T + decoder.head.bias.detach().numpy()
    np.testing.assert_allclose(found, np.log(softmax(scores)), atol=5e-6)


def test_encoder_of_another_export_is_refused(translator, tmp_path):
    path = write_version(translator[0], tmp_path, "m")
    beside = path.parent / "encoder.onnx"
    beside.write_bytes(beside.read_bytes() + b"\x00")
    with pytest.raises(ModelFileError, match=r"encoder.onnx is not the encoder that .* was exported with"):
        ModelFile(path)
    beside.unlink()
    with pytest.raises(ModelFileError, match=r"encoder.onnx: No such file"):
        ModelFile(path)


def test_gate_sees_memory_that_is_not_masked():
    decoder, encoder = pair()
    spoiled = copy.deepcopy(decoder.ready)
    spoiled.forward = lambda token, memory, lengths, source_lengths, h: Decoder.forward(
        spoiled, token, memory, lengths, torch.full_like(source_lengths, 7), h
    )
    with pytest.raises(ParityError, match="log_probs"):
        exported([dataclasses.replace(decoder, ready=spoiled), encoder], "encoder-decoder", generation=GENERATION)


class Three(nn.Module):
    """Three steps of x [batch, 3, 2], summed."""

    def forward(self, x, lengths, total):
        is_real = torch.arange(3)[None, :, None] < lengths[:, None, None]
        y = total + torch.cumsum(torch.where(is_real, x, 0.0), 1)
        return y, y[:, -1:]


def test_graph_of_fixed_time_takes_shorter_rows(tmp_path):
    spec = GraphSpec(
        fixed_steps=3,
        inputs=(tensor("x", Layout.PER_STEP, 2),),
        outputs=(tensor("y", Layout.PER_STEP, 2),),
        states=(StateSpec(name="total", next_name="total.next", row_shape=(1, 2)),),
    )
    three = GraphModule(module=Three(), ready=Three(), spec=spec, draw=draw_like(np.float64(0), np.float64(1)))
    files, spec = exported([three], "many-to-many")
    assert spec.step_mode == (StepMode.BUFFERED, "it is unrolled: a run takes 3 steps, however few of them are real")
    model = ModelFile(write_version(files, tmp_path, "m"))
    shapes = {name: shape for name, (_, shape) in model.runtime.inputs.items()}
    assert shapes == {"x": ("batch", 3, 2), LENGTHS: ("batch",), "total": ("batch", 1, 2)}
    assert [check.is_passed for check in model.verify()] == [True] * 2


def test_time_that_was_baked_in_is_refused():
    made = unrolled()

    class Baked(Unroll):
        def forward(self, context, lengths, h):
            y, (last,) = self.layer(context.unsqueeze(0).expand(5, -1, -1), lengths, (h,))
            return y.transpose(0, 1), last

    ready = Baked()
    ready.layer = made.ready.layer
    with pytest.raises(ExportError, match="y: its time is fixed at 5 steps"):
        to_onnx(dataclasses.replace(made, ready=ready))
