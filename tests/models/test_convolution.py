"""A causal convolution before the recurrent layers: the formula, its state, and how it streams."""

import numpy as np
import pytest
import torch

from models.convolution import STATE, ConvOptions, FrontEnd
from models.errors import RecipeError
from models.export import export_net, write_version
from models.objective import build
from models.recipe import Recipe
from models.spec import StepMode
from models.tasks import load
from service.client import Client
from tests.models.conftest import make_task
from tests.models.exports import TRAINING, make_net
from tests.serving import serving

LENGTHS = np.array([7, 1, 4], np.int32)
OPTIONS = ConvOptions(filters=5, kernel_size=3, dilation=2)


@pytest.fixture
def front_end():
    torch.manual_seed(2)
    front_end = FrontEnd(4, OPTIONS)
    torch.nn.init.normal_(front_end.conv.bias)
    return front_end


def run(front_end, x, lengths, past):
    with torch.no_grad():
        y, kept = front_end(
            torch.from_numpy(x).transpose(0, 1),
            torch.from_numpy(lengths),
            None if past is None else torch.from_numpy(past),
        )
    return y.transpose(0, 1).numpy(), kept.numpy()


def by_formula(front_end, x, past):
    """y[t] = relu(b + sum over k of W[:, :, k] @ x[t - 2 * (2 - k)]) of one row, and the last four steps."""
    weight, bias = front_end.conv.weight.detach().numpy(), front_end.conv.bias.detach().numpy()
    steps = np.concatenate([past, x])
    y = [
        np.maximum(bias + sum(weight[:, :, k] @ steps[t + 4 - 2 * (2 - k)] for k in range(3)), 0.0)
        for t in range(len(x))
    ]
    return np.array(y), steps[-4:]


@pytest.mark.parametrize("begins", ["zeros", "given"])
def test_rows_and_their_next_states_are_the_formula(front_end, begins):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((3, 8, 4)).astype(np.float32)
    past = rng.standard_normal((3, 4, 4)).astype(np.float32) if begins == "given" else np.zeros((3, 4, 4), np.float32)
    x[1, 1:], x[2, 4:] = np.nan, 1e6  # padding
    y, kept = run(front_end, x, LENGTHS, past if begins == "given" else None)
    for row, length in enumerate(LENGTHS.tolist()):
        expected, last = by_formula(front_end, x[row, :length], past[row])
        np.testing.assert_allclose(y[row, :length], expected, atol=1e-5)
        np.testing.assert_array_equal(kept[row], last)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    task = make_task(kind="regression")
    net = make_net(task, cell="gru", conv_filters=5, conv_kernel_size=3, conv_dilation=2)
    files, spec = export_net(net, task, TRAINING)
    repository = tmp_path_factory.mktemp("conv")
    write_version(files, repository, "conv")
    return net, spec, repository


def test_the_past_is_one_more_state_of_a_model_that_steps(exported):
    net, spec, _ = exported
    assert [state.name for state in spec.graph.states] == [STATE, "state.0.h"] == list(net.state_names)
    assert spec.graph.states[0].row_shape == (4, 2)
    assert spec.graph.operators["Conv"] == spec.graph.operators["GRU"] == 1
    assert spec.step_mode[0] is StepMode.STEPPING


def test_a_server_streams_it_step_by_step(exported):
    net, _, repository = exported
    rng = np.random.default_rng(4)
    x = (net.input_mean.numpy() + net.input_scale.numpy() * rng.standard_normal((9, 2))).astype(np.float32)
    with torch.no_grad():
        zeros = (torch.zeros(1, *state.row_shape) for state in net.state_specs)
        expected = net(torch.from_numpy(x)[None], torch.tensor([9], dtype=torch.int32), *zeros)[0][0].numpy()
    with serving(repository) as served, Client(served.address) as client:
        assert served.lane("conv").exactness.verdict in ("exact", "rounding")
        with client.stream("conv") as stream:
            steps = np.array([np.ravel(stream.step(row)) for row in x])
        np.testing.assert_allclose(steps, expected, rtol=1e-5, atol=1e-5)


def test_a_task_that_generates_has_no_steps_to_convolve():
    with pytest.raises(RecipeError, match="conv_filters does not go with power"):
        build(load("power"), Recipe(conv_filters=4))


def test_scores_in_training_are_those_of_forward():
    net = make_net(make_task(kind="regression"), cell="lstm", conv_filters=3, conv_kernel_size=2)
    x = torch.randn(3, 7, 2)
    lengths = torch.from_numpy(LENGTHS)
    states = (torch.zeros(3, *state.row_shape) for state in net.state_specs)
    torch.testing.assert_close(net.scores(x, lengths)[0], net(x, lengths, *states)[0][0])
