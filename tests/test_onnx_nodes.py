"""onnx's own cases for the operators RNN, GRU and LSTM, through the runtime that checks our exports."""

import warnings

import numpy as np
import pytest
from onnx.backend.test.loader import load_model_tests
from onnx.helper import get_node_attr_value

from models.errors import ModelFileError
from models.runtime import Runtime

OPERATORS = ("RNN", "GRU", "LSTM")


def cases():
    """Every case whose only node is one of the operators, by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other operators' cases, which overflow on purpose
        everything = load_model_tests(kind="node")
    return {
        case.name: case
        for case in everything
        if len(case.model.graph.node) == 1 and case.model.graph.node[0].op_type in OPERATORS
    }


CASES = cases()


def is_batch_first(case):
    """Whether it has layout=1, which onnxruntime has no kernel for; what we export has layout 0."""
    [node] = case.model.graph.node
    return any(a.name == "layout" for a in node.attribute) and get_node_attr_value(node, "layout") == 1


def named(values, arrays):
    return dict(zip((value.name for value in values), arrays, strict=True))


def test_there_are_cases_of_every_operator():
    counted = {op: sum(case.model.graph.node[0].op_type == op for case in CASES.values()) for op in OPERATORS}
    assert all(count >= 4 for count in counted.values()), counted
    assert {name for name, case in CASES.items() if is_batch_first(case)} == {
        "test_gru_batchwise",
        "test_lstm_batchwise",
        "test_simple_rnn_batchwise",
    }


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not is_batch_first(case)])
def test_case_is_answered_as_onnx_says(name):
    case = CASES[name]
    runtime = Runtime(case.model.SerializeToString())
    for inputs, outputs in case.data_sets:
        answers = runtime(named(case.model.graph.input, inputs))
        for output, wanted in named(case.model.graph.output, outputs).items():
            np.testing.assert_allclose(answers[output], wanted, rtol=case.rtol, atol=1e-6)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if is_batch_first(case)])
def test_batch_first_layout_is_refused_and_never_wrong(name):
    with pytest.raises(ModelFileError, match="layout_ == 0"):
        Runtime(CASES[name].model.SerializeToString())
