"""What is not converted is named, and a file that is damaged or evil does no more than that."""

import io
import json
import random
import subprocess
import sys
import zipfile

import h5py
import keras
import numpy as np
import pytest
from click.testing import CliRunner
from keras import layers

from models.errors import ConversionError, ForeignFileError
from models.importers.cli import import_
from models.importers.keras_file import KerasFile
from models.importers.keras_model import Names, convert, import_keras
from tests.models.keras_models import functional, saved, sequential


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A small model that is converted as it is."""
    return saved(sequential(layers.GRU(3), layers.Dense(2)), tmp_path_factory.mktemp("keras"))


def members(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def written(folder, contents):
    path = folder / "changed.keras"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return path


def with_config(path, folder, change):
    """The same file, its configuration changed."""
    contents = members(path)
    config = json.loads(contents["config.json"])
    change(config["config"]["layers"])
    return written(folder, contents | {"config.json": json.dumps(config)})


def with_weights(path, folder, change):
    """The same file, its weights changed."""
    contents = members(path)
    buffer = io.BytesIO(contents["model.weights.h5"])
    with h5py.File(buffer, "r+") as file:
        change(file)
    return written(folder, contents | {"model.weights.h5": buffer.getvalue()})


def refused(path, match, kind=ConversionError):
    with pytest.raises(kind, match=match) as caught:
        import_keras(path)
    assert "\n" not in str(caught.value)


X = (None, 3)
MODELS = {
    "merge_mode": (
        lambda: functional(keras.Input(X), layers.Bidirectional(layers.GRU(3), merge_mode="sum"), layers.Lambda(abs)),
        r"layer 'lambda\w*' \(Lambda\): its Python code is never run",
    ),
    "unknown": (
        lambda: sequential(layers.GRU(3, return_sequences=True), layers.GlobalAveragePooling1D()),
        r"\(GlobalAveragePooling1D\): layers of this class are not converted; take it out, or use one of Activation",
    ),
    "no recurrence": (lambda: sequential(layers.Dense(2)), "no SimpleRNN, LSTM or GRU"),
    "no time": (lambda: keras.Sequential([layers.Input((3,)), layers.Dense(2)]), "no SimpleRNN, LSTM or GRU"),
    "flat steps": (
        lambda: keras.Sequential([layers.Input((4, 3)), layers.GRU(3, return_sequences=True), layers.Flatten()]),
        r"\(Flatten\): it mixes steps, which ties the model to one length: use return_sequences=False",
    ),
    "padding": (
        lambda: sequential(layers.Conv1D(3, 2, padding="same"), layers.GRU(3)),
        r"\(Conv1D\): padding='same': train it with padding='causal'",
    ),
    "axis": (
        lambda: keras.Sequential([layers.Input((4, 3)), layers.GRU(3, return_sequences=True), layers.Softmax(axis=1)]),
        r"\(Softmax\): axis=1: it is converted along the last axis",
    ),
    "half": (
        lambda: sequential(layers.GRU(3, dtype="mixed_bfloat16")),
        r"\(GRU\): dtype policy 'mixed_bfloat16': set it to float32",
    ),
    "late ids": (
        lambda: functional(keras.Input((None, 3)), layers.GRU(3), layers.Embedding(4, 2)),
        r"\(Embedding\): it is converted as the first layer",
    ),
    "collapsed twice": (
        lambda: keras.Sequential(
            [layers.Input((2,)), layers.RepeatVector(3), layers.GRU(3, return_sequences=True), layers.LSTM(2)]
        ),
        r"\(LSTM\): after the input is repeated, a layer has to be causal, with return_sequences=True",
    ),
}


@pytest.mark.parametrize(("make", "match"), [pytest.param(*each, id=name) for name, each in MODELS.items()])
def test_what_cannot_be_converted_is_named(make, match, tmp_path):
    refused(saved(make(), tmp_path), match)


def test_models_that_fork_are_refused_with_the_layer(tmp_path):
    first = keras.Input(X, name="first")
    gru = layers.GRU(3, name="gru")(first)
    other = layers.LSTM(3, name="other")(first)
    many = "output_layers are .*: a model with one input and one output is converted"
    refused(saved(keras.Model(first, [gru, other]), tmp_path), many)
    added = layers.Add(name="added")([gru, other])
    refused(saved(keras.Model(first, added), tmp_path), r"layer 'added' \(Add\) takes 2 tensors: a chain")
    states = layers.GRU(3, return_state=True, name="stateful")(first)
    refused(saved(keras.Model(first, states[1]), tmp_path), many)
    refused(saved(keras.Model(first, layers.Dense(2)(states[1])), tmp_path), "takes output 1 of 'stateful'")
    second = keras.Input((3,), name="second")
    begun = layers.GRU(3, name="begun")(first, initial_state=second)
    refused(saved(keras.Model([first, second], begun), tmp_path), "input_layers are .*: a model with one input")


def test_custom_objects_are_refused_unread(path, tmp_path):
    def rename(layers):
        layers[1] |= {"module": "evil.module", "class_name": "GRU", "registered_name": "evil>GRU"}

    refused(with_config(path, tmp_path, rename), r"layer 'gru\w*' \(GRU\): a custom object of evil>GRU")

    def call(layers):
        layers[1]["config"]["activation"] = {"module": "os", "class_name": "function", "config": "system"}

    refused(with_config(path, tmp_path, call), r"activation=.*'system'.* is not converted; use one of tanh")


@pytest.mark.parametrize(
    ("option", "value", "match"),
    [
        ("units", 10**12, "units=1000000000000 is not a whole number from 1"),
        ("units", -1, "units=-1 is not a whole number from 1"),
        ("units", "many", "units='many' is not a whole number"),
        ("units", 4, r"its weights have the shapes .*\(3, 9\).*, where its options ask for \(3, 12\)"),
        ("return_sequences", "yes", "return_sequences='yes' is neither true nor false"),
    ],
)
def test_options_that_make_no_sense_are_named(option, value, match, path, tmp_path):
    refused(with_config(path, tmp_path, lambda layers: layers[1]["config"].update({option: value})), match)


def test_files_that_are_none(path, tmp_path):
    refused(tmp_path / "missing.keras", "missing.keras: No such file", ForeignFileError)
    text = tmp_path / "text.keras"
    text.write_text("not a zip")
    refused(text, r"text.keras is not a .keras archive, which is a zip file: save it with model.save", ForeignFileError)
    for name in ("metadata.json", "config.json", "model.weights.h5"):
        contents = members(path)
        del contents[name]
        refused(written(tmp_path, contents), f"has no {name}", ForeignFileError)
    old = json.dumps({"keras_version": "2.15.0"})
    refused(written(tmp_path, members(path) | {"metadata.json": old}), "saved by Keras 2.15.0.*: load it with Keras 3")
    refused(
        written(tmp_path, members(path) | {"config.json": "[" * 100_000}), "config.json is not JSON", ForeignFileError
    )
    refused(
        written(tmp_path, members(path) | {"config.json": "[]"}), "config.json is not a JSON object", ForeignFileError
    )
    refused(written(tmp_path, members(path) | {"config.json": "{}"}), "has no class_name and config")


def test_every_cut_of_a_file_is_refused(path, tmp_path):
    content = path.read_bytes()
    cut = tmp_path / "cut.keras"
    for size in range(0, len(content), len(content) // 40):
        cut.write_bytes(content[:size])
        with pytest.raises(ForeignFileError):
            import_keras(cut)


def test_damaged_weights_are_refused(path, tmp_path):
    weights = members(path)["model.weights.h5"]
    for size in (0, 7, 100, len(weights) // 2):
        changed = written(tmp_path, members(path) | {"model.weights.h5": weights[:size]})
        refused(changed, "damaged", ForeignFileError)
    place = "layers/gru/cell/vars"
    refused(with_weights(path, tmp_path, lambda f: f[place].pop("1")), f"{place}/1 is missing", ForeignFileError)

    def as_text(file):
        del file[f"{place}/0"]
        file[f"{place}/0"] = "text"

    refused(with_weights(path, tmp_path, as_text), f"{place}/0 holds object", ForeignFileError)


def test_weights_in_other_files_are_not_read(path, tmp_path):
    secret = tmp_path / "secret.h5"
    with h5py.File(secret, "w") as file:
        file["x"] = np.ones((3, 9), np.float32)
    place = "layers/gru/cell/vars"

    def link(file):
        del file[f"{place}/0"]
        file[f"{place}/0"] = h5py.ExternalLink(str(secret), "x")

    refused(with_weights(path, tmp_path, link), "'0' is a link to elsewhere", ForeignFileError)

    def outside(file):
        del file[f"{place}/0"]
        file.create_dataset(f"{place}/0", shape=(3, 9), dtype="f4", external=[(str(secret), 0, 108)])

    refused(with_weights(path, tmp_path, outside), "lies in another file", ForeignFileError)

    def virtual(file):
        del file[f"{place}/0"]
        layout = h5py.VirtualLayout(shape=(3, 9), dtype="f4")
        layout[:] = h5py.VirtualSource(str(secret), "x", shape=(3, 9))
        file.create_virtual_dataset(f"{place}/0", layout)

    refused(with_weights(path, tmp_path, virtual), "lies in another file", ForeignFileError)


def test_names_have_to_fit(path):
    with pytest.raises(ConversionError, match="3 labels for 2: give one for each"):
        import_keras(path, Names(labels=("a", "b", "c")))
    with pytest.raises(ConversionError, match="1 categories for 0"):
        import_keras(path, Names(categories=("",)))


def test_command_needs_no_keras(path, tmp_path):
    """In a process where neither can be imported."""
    program = (
        "import sys; sys.modules['keras'] = sys.modules['tensorflow'] = None; "
        "from models.importers.cli import import_; import_()"
    )
    arguments = [str(path), "--repository", str(tmp_path), "--name", "m", "--labels", "low, high", "--input-unit", "mV"]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path}/m/1/model.onnx: ")
    assert "1 GRU" in done.stdout
    assert "stepping: every layer is causal" in done.stdout


def test_command_is_torch_free_when_imported():
    program = "import models.importers.cli, sys; assert not {'torch', 'onnx', 'h5py', 'keras'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_command_names_what_is_wrong_in_one_line(tmp_path):
    path = saved(sequential(layers.GRU(3, return_sequences=True), layers.GlobalMaxPooling1D()), tmp_path)
    done = CliRunner().invoke(import_, [str(path), "--repository", str(tmp_path / "repository")])
    assert done.exit_code == 1
    assert done.stderr.startswith("error: layer 'global_max_pooling1d")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "repository").exists()


def test_command_reads_what_ids_stand_for(tmp_path):
    model = keras.Sequential([layers.Input((None,)), layers.Embedding(4, 2, mask_zero=True), layers.GRU(2)])
    words = tmp_path / "words.txt"
    words.write_text("one\ntwo\nthree\n")
    _, spec = import_keras(saved(model, tmp_path), Names(categories=("", "one", "two", "three")))
    assert spec.graph.inputs[0].categories == ("", "one", "two", "three")
    arguments = [str(tmp_path / "model.keras"), "--repository", str(tmp_path), "--categories"]
    assert CliRunner().invoke(import_, [*arguments, str(words)]).exit_code == 0
    done = CliRunner().invoke(import_, [*arguments, str(tmp_path / "absent.txt")])
    assert (done.exit_code, done.stderr.count("absent.txt")) == (1, 1)


def places(value, path=()):
    """Where everything is in JSON."""
    yield path
    for key, each in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(each, (*path, key))


def test_config_that_is_changed_anywhere_is_converted_or_refused(tmp_path):
    first = keras.Input((None, 4))
    side = layers.Bidirectional(layers.GRU(3, return_sequences=True))
    stack = [layers.Masking(), side, layers.LSTM(3), layers.RepeatVector(4), layers.SimpleRNN(3, return_sequences=True)]
    tail = [layers.TimeDistributed(layers.Dense(2)), layers.LeakyReLU(), layers.BatchNormalization()]
    junk = (None, True, -1, 0, 3, 1e300, "x", "", [], {}, [1, 2], ["a", 0, 0], {"class_name": "GRU"})
    file = KerasFile(saved(functional(first, *stack, *tail), tmp_path))
    text = json.dumps(file.config)
    at = [path for path in places(file.config) if path]
    refusals = 0
    for seed in range(200):
        rng = random.Random(seed)
        file.config = changed = json.loads(text)
        *way, last = rng.choice(at)
        for key in way:
            changed = changed[key]
        changed[last] = rng.choice(junk)
        try:
            convert(file, Names())
        except ConversionError:
            refusals += 1
    assert 50 < refusals < 150
