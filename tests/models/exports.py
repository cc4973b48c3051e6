"""Exported nets that more than one test file uses."""

import functools

import onnx
import torch

from models.export import export_net
from models.nets import build
from models.recipe import Recipe
from models.spec import MODEL_FILE, Training
from tests.models.conftest import make_task

TRAINING = Training(task="sines", data_set="made up")


def make_net(task, **settings):
    torch.manual_seed(settings.pop("seed", 0))
    # An orthogonal matrix times 1.5 would make the states of a relu grow without end.
    initializers = {f"{name}_initializer": "torch" for name in ("kernel", "recurrent", "bias")}
    net = build(task, Recipe(hidden=6, **(initializers | settings))).eval()
    with torch.no_grad():
        for weights in net.parameters():
            weights.mul_(1.5)  # as far from linear as trained ones are
    return net


@functools.cache
def exported_net(*, kind="classification", cell="gru", activation="tanh", bidirectional=False, layers=1):
    """A net, its model and its spec. Exporting takes a second, so tests share them: alter copies only."""
    task = make_task(kind=kind)
    net = make_net(task, cell=cell, activation=activation, bidirectional=bidirectional, layers=layers)
    files, spec = export_net(net, task, TRAINING)
    return net, onnx.load_from_string(files[MODEL_FILE]), spec


def node(model, op_type, number=0):
    return [each for each in model.graph.node if each.op_type == op_type][number]


def renamed_inputs(model, swap):
    for each in model.graph.node:
        each.input[:] = [swap.get(name, name) for name in each.input]
