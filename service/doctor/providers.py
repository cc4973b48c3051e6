"""Which of onnxruntime's execution providers work: each has to run an LSTM and to get the right number."""

from __future__ import annotations

import base64
import ctypes
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from service.doctor.findings import Finding, Level, fault

AREA = "providers"
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
MODEL = base64.b64decode(
    "CAgSADqdAQooCgF4CgF3CgFyEgASAXkiBExTVE0qEgoLaGlkZGVuX3NpemUYAaABAhIBZyodCAEIBAgBEAFCAXdKEAAAgD8AAIA/"
    "AACAPwAAgD8qHQgBCAQIARABQgFyShAAAIA/AACAPwAAgD8AAIA/WhcKAXgSEgoQCAESDAoCCAEKAggBCgIIAWIXCgF5EhIKEAgB"
    "EgwKAggBCgIIAQoCCAFCBAoAEA4="
)
"""One LSTM of one unit, weights of 1 and no bias, of opset 14: x [1, 1, 1] -> y [1, 1, 1], its last state."""
EXPECTED = 0.36960635
"""Its answer to 1: s tanh(s tanh(1)), s = 1 / (1 + exp(-1))."""
CPU_WHEEL = "pip uninstall -y onnxruntime, then pip install 'rnnserve[gpu]'"


def check_providers(provider: str, *, is_serving: bool, is_chosen: bool) -> Iterator[Finding]:
    """Run a model on every provider that onnxruntime has.

    provider    that the settings name: cpu, cuda, or cuda,cpu
    is_serving  whether onnxruntime is needed
    is_chosen   whether the provider was given, rather than being the default
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import onnxruntime as ort
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            yield _unloadable(error, is_serving)
        elif is_chosen:
            text, advice = f"provider {provider!r} was asked for, and onnxruntime is not installed", "as above"
            yield Finding(AREA, provider, Level.PROBLEM, text, advice)
        return
    except Exception as error:  # noqa: BLE001 - such as a shared library that is missing
        yield _unloadable(error, is_serving)
        return
    wants = provider.split(",")
    for name in ort.get_available_providers():
        kind = name.removesuffix("ExecutionProvider").lower()
        if name == CUDA:
            continue
        if not (why := run_on(ort, name)):
            yield Finding(AREA, kind, Level.OK, f"{name} works: it ran an LSTM (onnxruntime {ort.__version__})")
        elif name == CPU:
            advice = "pip install --force-reinstall onnxruntime"
            yield Finding(AREA, kind, fault(is_serving), f"{name} does not work: {why}", advice)
        else:
            advice = "nothing: the server takes the CPU or CUDA"
            yield Finding(AREA, kind, Level.NOTE, f"{name} is there, and runs no LSTM", advice)
    yield _check_cuda(ort, wants, is_asked="cuda" in wants and (is_serving or is_chosen))


def run_on(ort: Any, name: str) -> str:
    """Say why a provider does not run a model; empty where it does."""
    import numpy as np

    quiet = ort.SessionOptions()
    quiet.log_severity_level = 4  # what goes wrong is told here
    if name != CPU:  # or the LSTM would be the CPU's, and work
        quiet.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        session = ort.InferenceSession(MODEL, quiet, providers=[name])
        answer = float(session.run(None, {"x": np.ones((1, 1, 1), np.float32)})[0][0, 0, 0])
    except Exception as error:  # noqa: BLE001 - whatever it raises is the reason
        return " ".join(str(error).split())[:300]
    return "" if math.isclose(answer, EXPECTED, rel_tol=1e-3) else f"it computed {answer} in place of {EXPECTED}"


def _check_cuda(ort: Any, wants: list[str], *, is_asked: bool) -> Finding:
    falls_back = "cpu" in wants
    level = Level.WARNING if is_asked and falls_back else fault(is_asked)
    aside = "" if not is_asked else ", or serve with --provider cpu"
    driver = cuda_driver()
    if CUDA not in ort.get_available_providers():
        text = f"{CUDA} is absent: onnxruntime {ort.__version__} is a build without it"
        if driver:
            text += f"; {driver}"
        return Finding(AREA, "cuda", level, text, f"to serve on an NVIDIA GPU: {CPU_WHEEL}{aside}")
    if driver:
        advice = f"install NVIDIA's driver, and in a container give it the GPU (--gpus all){aside}"
        return Finding(AREA, "cuda", level, f"{CUDA} can't work: {driver}", advice)
    ort.preload_dlls()
    if missing := _missing_library(Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"):
        advice = f"pip install 'rnnserve[gpu]' brings the CUDA and cuDNN libraries that it was built for{aside}"
        return Finding(AREA, "cuda", level, f"{CUDA} can't be loaded: {missing}", advice)
    if why := run_on(ort, CUDA):
        advice = f"compare the driver's CUDA version (nvidia-smi) with that of the installed libraries{aside}"
        return Finding(AREA, "cuda", level, f"{CUDA} does not work: {why}", advice)
    return Finding(AREA, "cuda", Level.OK, f"{CUDA} works: it ran an LSTM")


def cuda_driver() -> str:
    """Say why there is no GPU to be used; empty where there is one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver (libcuda.so.1)"
    if code := driver.cuInit(0):
        return f"the NVIDIA driver finds no GPU that it can use (cuInit: error {code})"
    return ""


def _missing_library(path: Path) -> str:
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


def _unloadable(error: Exception, is_serving: bool) -> Finding:
    text = f"onnxruntime is installed and can't be imported: {' '.join(str(error).split())[:300]}"
    advice = "pip install --force-reinstall 'rnnserve[cpu]', or 'rnnserve[gpu]' on a machine with an NVIDIA GPU"
    return Finding(AREA, "onnxruntime", fault(is_serving), text, advice)
