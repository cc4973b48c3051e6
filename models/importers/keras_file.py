"""A `.keras` archive as Keras 3 saves it, read with h5py alone: no keras, no torch, and no code of the file's is run.

The archive is a zip of metadata.json (Keras' version), config.json (the layers and their options) and model.weights.h5
(their variables). Source of the format: keras/src/saving/saving_lib.py.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from models.errors import ForeignFileError

MAX_BYTES = 2**31 - 1
"""Most bytes of weights: one ONNX file cannot hold more."""
MAX_CONFIG_BYTES = 2**26

_METADATA, _CONFIG, _WEIGHTS = "metadata.json", "config.json", "model.weights.h5"

Array = np.ndarray[Any, Any]


class KerasFile:
    """A saved model, opened: its configuration, and its variables when they are asked for.

    Raises ForeignFileError for a file that cannot be read, is damaged, or is not what Keras 3 saves.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ForeignFileError(f"{path}: {error.strerror}") from error
        self.sha256 = hashlib.sha256(content).hexdigest()
        try:
            archive = zipfile.ZipFile(io.BytesIO(content))
        except zipfile.BadZipFile as error:
            hint = "save it with model.save('NAME.keras')"
            raise ForeignFileError(f"{path} is not a .keras archive, which is a zip file: {hint}") from error
        with archive:
            metadata = self._json(archive, _METADATA)
            self.keras_version = str(metadata.get("keras_version", ""))
            self.saved = str(metadata.get("date_saved", ""))
            if self.keras_version.partition(".")[0] != "3":
                raise ForeignFileError(
                    f"{path} was saved by Keras {self.keras_version or '(unknown)'}, and is read as Keras 3 saves it: "
                    "load it with Keras 3 and save it again"
                )
            self.config = self._json(archive, _CONFIG)
            weights = self._member(archive, _WEIGHTS, MAX_BYTES)
        try:
            self._root = h5py.File(io.BytesIO(weights), "r")
        except (OSError, RuntimeError, ValueError) as error:
            raise ForeignFileError(f"{path}: {_WEIGHTS} is damaged: {_line(error)}; save the model again") from error
        self._bytes_left = MAX_BYTES

    def variables(self, place: str, *, layer: str) -> list[Array]:
        """Read the variables of a layer in the order that Keras made them.

        place  the layer's group in the file, such as "layers/lstm_1/cell"
        layer  its name, for errors
        Returns nothing for a layer that has none. Raises ForeignFileError.
        """
        try:
            group = self._follow(f"{place}/vars")
            if group is None:
                return []
            return [self._read(group, str(number), f"{place}/vars") for number in range(len(group))]
        except ForeignFileError as error:
            raise ForeignFileError(f"{self.path}: weights of layer {layer!r}: {error}") from error
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, MemoryError) as error:
            what = f"weights of layer {layer!r} are damaged: {_line(error)}; save the model again"
            raise ForeignFileError(f"{self.path}: {what}") from error

    def _follow(self, place: str) -> h5py.Group | None:
        group: h5py.Group = self._root
        for name in place.split("/"):
            found = self._get(group, name)
            if found is None:
                return None
            if not isinstance(found, h5py.Group):
                raise ForeignFileError(f"{place!r} is no group")
            group = found
        return group

    def _read(self, group: h5py.Group, name: str, place: str) -> Array:
        found = self._get(group, name)
        if not isinstance(found, h5py.Dataset):
            raise ForeignFileError(f"{place}/{name} is missing")
        if found.is_virtual or found.external:
            raise ForeignFileError(f"{place}/{name} lies in another file")
        if found.dtype.kind not in "fiu":
            raise ForeignFileError(
                f"{place}/{name} holds {found.dtype}, not numbers: save it with dtype policy float32"
            )
        self._bytes_left -= found.size * found.dtype.itemsize
        if self._bytes_left < 0:
            raise ForeignFileError(f"more than {MAX_BYTES:,} bytes, which one ONNX file cannot hold")
        return np.asarray(found[()])

    @staticmethod
    def _get(group: h5py.Group, name: str) -> object | None:
        """Look up a member that lies in this very file; a link to another would read whatever file it names."""
        link = group.get(name, getlink=True)
        if link is None:
            return None
        if not isinstance(link, h5py.HardLink):
            raise ForeignFileError(f"{name!r} is a link to elsewhere")
        found: object = group[name]
        return found

    def _json(self, archive: zipfile.ZipFile, name: str) -> Mapping[str, Any]:
        content = self._member(archive, name, MAX_CONFIG_BYTES)
        try:
            value = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ForeignFileError(f"{self.path}: {name} is not JSON: {_line(error)}") from error
        if not isinstance(value, dict):
            raise ForeignFileError(f"{self.path}: {name} is not a JSON object")
        return value

    def _member(self, archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
        try:
            size = archive.getinfo(name).file_size
            if size > limit:
                raise ForeignFileError(f"{self.path}: {name} has {size:,} bytes; at most {limit:,} are read")
            return archive.read(name)
        except KeyError as error:
            hint = "it is not what model.save('NAME.keras') of Keras 3 writes"
            raise ForeignFileError(f"{self.path} has no {name}: {hint}") from error
        except (zipfile.BadZipFile, OSError, RuntimeError, NotImplementedError, EOFError, zlib.error) as error:
            raise ForeignFileError(f"{self.path}: {name} is damaged: {_line(error)}; save the model again") from error


def _line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
