"""Plain torch modules become graphs that answer as they do, each sequence alone."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from models.export import export, write_version
from models.modelfile import ModelFile
from models.spec import LENGTHS, Layout, StepMode
from tests.models import torch_modules as made

B, T = 4, 6


def made_up(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def ids():
    return torch.randint(9, (B, T), generator=torch.Generator().manual_seed(3))


def lengths():
    return torch.tensor([T, 2, 4, 1])


def exported(module, example, folder, **settings):
    torch.manual_seed(0)
    files, _ = export(module, example, **settings)
    model = ModelFile(write_version(files, folder, "m"))
    assert all(check.is_passed for check in model.verify())
    return model


def run(model, x, lengths):
    """Answers of onnxruntime to a ragged batch, from zero states."""
    graph = model.spec.graph
    rows = {graph.inputs[0].name: x.numpy(), LENGTHS: lengths.int().numpy()}
    zeros = {state.name: np.zeros((len(x), *state.row_shape), np.float32) for state in graph.states}
    return model.runtime(rows | zeros)


def test_every_step_is_answered_by_a_stack_of_layers(tmp_path):
    torch.manual_seed(0)
    module = made.Tagger()
    model = exported(module, made_up(B, T, 3), tmp_path, units={"x": "mV"})
    graph = model.spec.graph
    assert model.spec.step_mode[0] is StepMode.STEPPING
    assert (graph.operators["GRU"], graph.inputs[0].unit, graph.outputs[0].row_shape) == (2, "mV", (2,))
    assert [state.name for state in graph.states] == ["state.0.h", "state.1.h"]
    x, ends = made_up(3, 11, 3), torch.tensor([11, 1, 5])
    found = run(model, x, ends)
    module.eval()
    for row, end in enumerate(ends):
        y, h = module.rnn(module.encoder(x[row : row + 1, :end]))
        np.testing.assert_allclose(found["y"][row, :end], module.head(y)[0].detach(), atol=1e-6)
        np.testing.assert_allclose(found["state.1.h.next"][row], h[1].detach(), atol=1e-6)


def test_bidirectional_layers_are_buffered(tmp_path):
    model = exported(made.Tagger(bidirectional=True), made_up(B, T, 3), tmp_path)
    assert model.spec.step_mode[0] is StepMode.BUFFERED
    assert [layer.directions for layer in model.spec.layers] == [2, 2]


def test_last_step_becomes_a_running_answer(tmp_path):
    torch.manual_seed(0)
    module = made.LastStep()
    model = exported(module, made_up(T, B, 3), tmp_path, labels=["a", "b", "c"], name="last")
    output = model.spec.graph.outputs[0]
    assert (output.layout, output.element_names, model.spec.topology) == (
        Layout.PER_STEP,
        ("a", "b", "c"),
        "many-to-one",
    )
    assert model.spec.training.task == "last"
    x, ends = made_up(2, 5, 3), torch.tensor([5, 2])
    found = run(model, x, ends)["y"]
    for row, end in enumerate(ends):
        for step in range(end):
            expected = module(x[row : row + 1, : step + 1].transpose(0, 1))[0].detach()
            np.testing.assert_allclose(found[row, step], expected, atol=1e-6)


def test_last_step_of_a_batch_is_each_rows_last(tmp_path):
    torch.manual_seed(0)
    module = made.LastStep(bidirectional=True)
    model = exported(module, made_up(T, B, 3), tmp_path)
    assert model.spec.graph.outputs[0].layout is Layout.PER_SEQUENCE
    x, ends = made_up(3, 5, 3), torch.tensor([5, 2, 1])
    found = run(model, x, ends)["y"]
    for row, end in enumerate(ends):
        np.testing.assert_allclose(found[row], module(x[row : row + 1, :end].transpose(0, 1))[0].detach(), atol=1e-6)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_packed_ids_and_last_states(bidirectional, tmp_path):
    torch.manual_seed(0)
    module = made.LastState(bidirectional=bidirectional)
    model = exported(module, (ids(), lengths()), tmp_path)
    graph = model.spec.graph
    assert (graph.inputs[0].num_ids, graph.inputs[0].dtype) == (9, "int64")
    assert graph.outputs[0].layout is (Layout.PER_SEQUENCE if bidirectional else Layout.PER_STEP)
    x = torch.randint(9, (3, 8))
    ends = torch.tensor([8, 1, 5])
    expected = module(x, ends).detach().numpy()
    found = run(model, x, ends)["y"]
    found = found if bidirectional else found[np.arange(3), ends - 1]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert "Sort" not in graph.operators
    assert "TopK" not in graph.operators


def test_states_of_forward_travel_by_name(tmp_path):
    torch.manual_seed(0)
    module = made.Stateful()
    model = exported(module, {"x": made_up(T, B, 3), "seq_lens": lengths()}, tmp_path, lengths="seq_lens")
    graph = model.spec.graph
    assert [output.name for output in graph.outputs] == ["steps", "mean"]
    assert [layer.cell for layer in graph.layers] == ["rnn", "gru"]
    assert model.spec.step_mode[0] is StepMode.BUFFERED
    x, ends = made_up(3, 7, 3), torch.tensor([7, 2, 5])
    expected = module(x.transpose(0, 1), ends)
    found = run(model, x, ends)
    np.testing.assert_allclose(found["mean"], expected["mean"].detach(), atol=1e-6)
    np.testing.assert_allclose(found["state.0.h.next"][:, 0], expected["state"][0].detach(), atol=1e-6)
    for row, end in enumerate(ends):
        np.testing.assert_allclose(found["steps"][row, :end], expected["steps"][:end, row].detach(), atol=1e-6)


def test_what_reads_ahead_is_buffered(tmp_path):
    model = exported(made.Pooled(), (made_up(B, T, 3), lengths()), tmp_path)
    assert model.spec.graph.looks_ahead
    assert model.spec.step_mode[0] is StepMode.BUFFERED


def test_module_is_left_as_it_was(tmp_path):
    module = made.Tagger().train()
    before = copy.deepcopy(module.state_dict())
    export(module, made_up(B, T, 3))
    assert module.training
    assert isinstance(module.rnn, nn.GRU)
    assert not module.rnn._forward_hooks
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
