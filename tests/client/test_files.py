"""Input files of the command line."""

from dataclasses import replace

import numpy as np
import pytest

from service.client import _codec
from service.client._files import InputError, read_sequences, read_steps, read_text
from service.client.errors import InvalidArgument
from service.client.info import TensorInfo
from tests.client.toy import SUM

PAIR = replace(SUM, inputs=(TensorInfo("x", "float32", (2,), "per_step", element_names=("left", "right")),))
TOKENS = replace(SUM, inputs=(TensorInfo("t", "int64", (), "per_step"),))
TWO = replace(SUM, inputs=(TensorInfo("a", "float32", (1,), "per_step"), TensorInfo("b", "int64", (), "per_step")))
MIXED = replace(
    SUM,
    inputs=(
        TensorInfo("x", "float32", (2,), "per_step", element_names=("warmth", "price")),
        TensorInfo("weather", "int64", (), "per_step", categories=("", "rain", "sun")),
    ),
)
LETTERS = replace(SUM, inputs=(TensorInfo("letter", "int64", (), "per_step", categories=("", "A", "B", "é", "É")),))
STEPS = [[1.0, 2.0], [-3.5, 4e-3]]


def text(tmp_path, content, name="steps.csv"):
    path = tmp_path / name
    path.write_text(content)
    return str(path)


@pytest.mark.parametrize(
    "content",
    [
        "1,2\n-3.5,4e-3\n",
        "1;2\n-3.5;4e-3",
        "1\t2\n-3.5\t4e-3\n",
        "  1   2\n\n-3.5 .004\n",
        '"1", "2"\r\n"-3.5", "0.004"\r\n',
        "first,second\n1,2\n-3.5,4e-3\n",
        "\ufeffright,time,left\n2,noon,1\n4e-3,later,-3.5\n",
        "[1, 2]\n[-3.5, 0.004]\n",
        '{"x": [1, 2]}\n{"x": [-3.5, 0.004]}\n',
        '{"right": 2, "left": 1, "time": 0}\n{"left": -3.5, "right": 0.004}\n',
    ],
)
def test_text_is_read_in_many_shapes(tmp_path, content):
    [(name, sequence)] = read_sequences(text(tmp_path, content), PAIR)
    assert name.endswith("steps.csv")
    np.testing.assert_array_equal(np.float32(sequence), np.float32(STEPS))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1,2\n3,x\n", r"line 2, column 2: expected a number, got 'x'"),
        ("1,2\n3,\n", r"line 2, column 2: expected a number, got ''"),
        ("1,2\n\n3\n", r"line 3, column 2: expected 2 values, got 1"),
        ("1,2,3\n", r"line 1, column 3: expected 2 values, got 3"),
        ("left,right\n1,2\n3\n", r"line 3, column 2: expected a number, got nothing"),
        ("[1, 2]\n[3, oops]\n", r"line 2, column 5: not JSON: Expecting value"),
        ("[1, 2]\n[3]\n", r"line 2, column 1: x: expected one step of shape \[2\], got \[1\]"),
        ('{"left": 1}\n', r"line 1, column 1: right is missing"),
        ("", "no timesteps"),
        ("a,b\n", "no timesteps"),
    ],
)
def test_faults_in_text_name_their_place(tmp_path, content, message):
    path = text(tmp_path, content)
    with pytest.raises(InputError, match=message) as caught:
        read_sequences(path, PAIR)
    assert path in caught.value.message
    assert caught.value.exit_code == 2


def test_token_ids_are_integers(tmp_path):
    assert [int(step) for step in read_steps(text(tmp_path, "1 2\n3\n"), TOKENS)] == [1, 2, 3]
    with pytest.raises(InputError, match=r"line 1, column 2: expected an integer, got '2\.5'"):
        list(read_steps(text(tmp_path, "1,2.5\n"), TOKENS))


def test_several_inputs_come_by_name(tmp_path):
    path = text(tmp_path, '{"a": [1.5], "b": 3}\n{"a": [2.5], "b": 4}\n')
    [(_, sequence)] = read_sequences(path, TWO)
    assert (sequence["a"].tolist(), sequence["b"].tolist()) == ([[1.5], [2.5]], [3, 4])
    np.savez(tmp_path / "two.npz", a=[[1.5], [2.5]], b=[3, 4])
    steps = list(read_steps(str(tmp_path / "two.npz"), TWO))
    assert [(step["a"].tolist(), int(step["b"])) for step in steps] == [([1.5], 3), ([2.5], 4)]
    with pytest.raises(InputError, match=r"takes several inputs \(a, b\)"):
        list(read_steps(text(tmp_path, "1,2\n"), TWO))


def test_numpy_files_hold_one_sequence_or_several(tmp_path):
    one, many = np.ones((3, 2)), np.arange(12).reshape(2, 3, 2)
    np.save(tmp_path / "one.npy", one)
    np.save(tmp_path / "many.npy", many)
    np.savez(tmp_path / "named.npz", a=one, b=many)
    names = [name.rpartition("/")[2] for name, _ in read_sequences(str(tmp_path / "named.npz"), PAIR)]
    assert names == ["named.npz:a", "named.npz:b[0]", "named.npz:b[1]"]
    assert [x.shape for _, x in read_sequences(str(tmp_path / "many.npy"), PAIR)] == [(3, 2), (3, 2)]
    np.testing.assert_array_equal(list(read_steps(str(tmp_path / "one.npy"), PAIR)), one)
    with pytest.raises(InputError, match="expected one sequence, got 2"):
        list(read_steps(str(tmp_path / "many.npy"), PAIR))


def test_a_column_is_a_sequence_of_one_feature(tmp_path):
    np.save(tmp_path / "column.npy", np.arange(3.0))
    [(_, sequence)] = read_sequences(str(tmp_path / "column.npy"), SUM)
    assert sequence.shape == (3, 1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.npy", b"not numpy", "not a NumPy file"),
        ("x.npz", b"PK\x03\x04 broken", "not a NumPy file"),
        ("x.npy", b"", "not a NumPy file"),
        ("x.csv", b"\xff\xfe\x00", "not text: byte 0 is not UTF-8"),
    ],
)
def test_files_that_are_something_else(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_sequences(str(tmp_path / name), PAIR)


def test_files_that_are_not_there_or_of_another_shape(tmp_path):
    for name in ("nope.npy", "nope.csv"):
        with pytest.raises(InputError, match=r"nope\.\w+: No such file"):
            read_sequences(str(tmp_path / name), PAIR)
    np.save(tmp_path / "flat.npy", np.zeros(4))
    with pytest.raises(InputError, match=r"expected shape \[time, 2\], got \[4\]"):
        read_sequences(str(tmp_path / "flat.npy"), PAIR)
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(InputError, match="not a NumPy file that can be read"):
        read_sequences(str(tmp_path / "objects.npy"), PAIR)


# Categories


@pytest.mark.parametrize(
    "content",
    [
        "warmth,price,weather\n1,2,sun\n3,4,hail\n5,6,rain\n",
        "day;weather;price;warmth\n1;sun;2;1\n2;;4;3\n3;rain;6;5\n",
        '{"warmth": 1, "price": 2, "weather": "sun"}\n{"x": [3, 4], "weather": 0}\n{"x": [5, 6], "weather": "rain"}\n',
    ],
)
def test_categories_come_by_name_beside_numbers(tmp_path, content):
    [(_, sequence)] = read_sequences(text(tmp_path, content), MIXED)
    assert (sequence["x"].dtype, sequence["weather"].dtype) == (np.float32, np.int64)
    assert sequence["x"].tolist() == [[1, 2], [3, 4], [5, 6]]
    assert sequence["weather"].tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1,2,sun\n", "line 1: the first row names the columns, and warmth, price, weather is not among them"),
        ("warmth,weather\n1,sun\n", "line 1: the first row names the columns, and price is not among them"),
        ("warmth,price,weather\n1,much,sun\n", r"line 2, column 2 \(price\): expected a number, got 'much'"),
        ("warmth,price,weather\n1,2\n", r"line 2, column 3 \(weather\): expected a category, got nothing"),
        ('{"warmth": 1, "weather": "sun"}\n', "line 1, column 1: price is missing"),
        ('{"x": [1, "sun"], "weather": "sun"}\n', "line 1, column 1: x: expected float32, got <U"),
    ],
)
def test_faults_in_columns_name_their_place(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        read_sequences(text(tmp_path, content), MIXED)


def test_one_input_of_categories(tmp_path):
    info = replace(SUM, inputs=MIXED.inputs[1:])
    assert [int(step) for step in read_steps(text(tmp_path, "weather\nsun\nrain\n"), info)] == [2, 1]
    chunk = _codec.chunk_of(info, ["rain", "sun", "fog"])
    assert (chunk["weather"].tolist(), chunk["weather"].dtype) == ([1, 2, 0], np.int64)
    assert _codec.chunk_of(info, [2, 0])["weather"].tolist() == [2, 0]


# Text


def test_a_text_is_a_sequence_of_its_characters():
    request, lengths = _codec.predict_request(LETTERS, ["AB", "bé-É", ["A", "other"]])
    assert lengths == [2, 4, 2]
    # Letters that the model knows in one case alone are known in both; what is known as it is stays so.
    assert np.frombuffer(request.inputs[0].data, "<i8").tolist() == [1, 2, 2, 3, 0, 4, 1, 0]
    assert _codec.chunk_of(LETTERS, "Ba")["letter"].tolist() == [2, 1]
    assert read_text("ab", LETTERS).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (SUM, "model sum takes no text: x is not of characters; leave --text out"),
        (TOKENS, "takes no text"),
        (replace(SUM, inputs=MIXED.inputs[1:]), "takes no text"),
        (TWO, r"takes several inputs \(a, b\)"),
    ],
)
def test_text_is_for_models_of_characters(info, message):
    with pytest.raises(InputError, match=message):
        read_text("rain", info)


def test_texts_that_are_no_sequences():
    with pytest.raises(InputError, match="an empty text has no timesteps"):
        read_text("", LETTERS)
    with pytest.raises(InvalidArgument, match="letter: expected a list of sequences, got str"):
        _codec.predict_request(LETTERS, "AB")
    weather = replace(SUM, inputs=MIXED.inputs[1:])
    with pytest.raises(InvalidArgument, match=r"weather: expected shape \[time\], got \[\]"):
        _codec.chunk_of(weather, "rain")
