"""What is tried with onnxruntime, in a process of its own: it may write what it likes, and crash.

Nothing of this is imported by a server.
"""

from __future__ import annotations

import base64
import ctypes
import math
import multiprocessing
import os
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
MODEL = base64.b64decode(
    "CAgSADqdAQooCgF4CgF3CgFyEgASAXkiBExTVE0qEgoLaGlkZGVuX3NpemUYAaABAhIBZyodCAEIBAgBEAFCAXdKEAAAgD8AAIA/"
    "AACAPwAAgD8qHQgBCAQIARABQgFyShAAAIA/AACAPwAAgD8AAIA/WhcKAXgSEgoQCAESDAoCCAEKAggBCgIIAWIXCgF5EhIKEAgB"
    "EgwKAggBCgIIAQoCCAFCBAoAEA4="
)
"""One LSTM of one unit, weights of 1 and no bias, of opset 14: x [1, 1, 1] -> y [1, 1, 1], its last state."""
EXPECTED = 0.36960635
"""Its answer to 1: s tanh(s tanh(1)), s = 1 / (1 + exp(-1))."""
LONGEST_S = 60.0
MAX_REASON = 300
"""Longest reason, in characters."""


@dataclass(frozen=True, slots=True)
class Runtime:
    """What was found of onnxruntime."""

    is_installed: bool
    version: str = ""
    faults: tuple[tuple[str, str], ...] = ()
    """For each provider that it has: why it does not run the model, or nothing."""
    missing_library: str = ""
    """What CUDA's provider can't be loaded for."""
    error: str = ""
    """Why it can't be imported, or how the process ended."""


def examine() -> Runtime:
    """Import onnxruntime and have each of its providers run the model, in another process."""
    spawning = multiprocessing.get_context("spawn")
    mine, other = spawning.Pipe(duplex=False)
    process = spawning.Process(target=_report, args=(other,), daemon=True)
    process.start()
    other.close()
    try:
        found: Runtime = mine.recv() if mine.poll(LONGEST_S) else Runtime(True, error=f"no answer in {LONGEST_S:g} s")
    except EOFError:
        process.join(LONGEST_S)
        found = Runtime(True, error=f"the process that tried it ended with status {process.exitcode}")
    process.kill()
    return found


def _report(to: Connection) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):  # onnxruntime and the libraries below it write to both
        os.dup2(nowhere, number)
    to.send(look())
    to.close()


def look() -> Runtime:
    """Do as `examine` says, in this process."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import onnxruntime as ort
    except Exception as error:  # noqa: BLE001 - such as a shared library that is missing
        is_installed = getattr(error, "name", None) != "onnxruntime" or not isinstance(error, ModuleNotFoundError)
        return Runtime(is_installed, error=_words(error))
    providers = ort.get_available_providers()
    missing = ""
    if CUDA in providers:
        ort.preload_dlls()
        missing = missing_library(Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so")
    return Runtime(True, ort.__version__, tuple((name, run_on(ort, name)) for name in providers), missing)


def run_on(ort: Any, name: str) -> str:
    """Say why a provider does not run the model; empty where it does."""
    import numpy as np

    options = ort.SessionOptions()
    if name != CPU:  # or the LSTM would be the CPU's, and work
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        session = ort.InferenceSession(MODEL, options, providers=[name])
        answer = float(session.run(None, {"x": np.ones((1, 1, 1), np.float32)})[0][0, 0, 0])
    except Exception as error:  # noqa: BLE001 - whatever it raises is the reason
        return _words(error)
    return "" if math.isclose(answer, EXPECTED, rel_tol=1e-3) else f"it computed {answer} in place of {EXPECTED}"


def missing_library(path: Path) -> str:
    """Name the library that one needs and the system has not; empty where it loads, or is not there to be loaded."""
    if not path.exists():
        return ""
    try:
        ctypes.CDLL(str(path))
    except OSError as error:
        reason = str(error)
        # That it wants onnxruntime's own entry point first is no fault.
        return "" if "undefined symbol: Provider_GetHost" in reason else reason
    return ""


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:MAX_REASON]
