"""Generate beside onnxruntime alone: what a chosen id costs, in the same batches."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from benchmarks.measure import HIDDEN, Result, Settings, in_turns, ratio
from benchmarks.processes import Process, rnnserve
from models.spec import METADATA_KEY, Generation
from service.client import Client
from tests.onnx_models import build

MODEL = "generator"
IDS, EMBEDDING, STEPS = 64, 32, 48
"""Of a GRU of HIDDEN units that feeds ids back; nothing ends a sequence before it has so many outputs."""


def make_generator(root: Path) -> Path:
    """Write the model that is measured."""
    model = build("gru", features=EMBEDDING, hidden=HIDDEN, outputs=IDS, num_ids=IDS)
    generation = Generation(max_steps=STEPS, token_input="x", scores_output="y", begin_id=0)
    spec = model.spec.model_copy(update={"topology": "one-to-many", "generation": generation})
    proto = onnx.load_from_string(model.content)
    onnx.helper.set_model_props(proto, {METADATA_KEY: spec.to_json()})
    path = root / MODEL / "1" / "model.onnx"
    path.parent.mkdir(parents=True)
    path.write_bytes(proto.SerializeToString())
    return path


def generate(_: Path, settings: Settings) -> Iterator[Result]:
    """Compare greedy decoding of many sequences in one call with a loop around onnxruntime in the same batch."""
    with tempfile.TemporaryDirectory() as folder:
        loop = _Loop(make_generator(Path(folder)))
        with rnnserve(Path(folder)) as ours, Client(ours.target) as client:
            for num in (1, 64, 256):
                pairs = in_turns(
                    settings,
                    partial(_served_us, ours, client, num, settings.seconds),
                    partial(loop.output_us, num, settings.seconds / 2),
                )
                yield ratio(f"Generate, {num} sequences: server CPU per output / a loop of onnxruntime", pairs, "us")


def _served_us(server: Process, client: Client, num: int, seconds: float) -> float:
    """CPU time that the server takes for one output."""
    outputs, began, end = 0, server.cpu_s(), time.perf_counter() + seconds
    while time.perf_counter() < end:
        outputs += sum(made.num_outputs for made in client.generate(MODEL, num_sequences=num))
    return (server.cpu_s() - began) / outputs * 1e6


class _Loop:
    """The same decoding with onnxruntime alone, on one thread."""

    def __init__(self, path: Path) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = ort.InferenceSession(path, options)

    def output_us(self, batch: int, seconds: float) -> float:
        """CPU time of one output, in a batch of so many sequences."""
        outputs, began, end = 0, time.process_time(), time.perf_counter() + seconds
        lengths = np.ones(batch, dtype=np.int32)
        while time.perf_counter() < end:
            token = np.zeros((batch, 1), dtype=np.int64)
            state = np.zeros((batch, 1, HIDDEN), dtype=np.float32)
            for _ in range(STEPS):
                feeds = {"x": token, "lengths": lengths, "state.0.h": state}
                scores, state = self._session.run(["y", "state.0.h.next"], feeds)
                token = scores.argmax(-1)
            outputs += batch * STEPS
        return (time.process_time() - began) / outputs * 1e6
