"""Which of onnxruntime's execution providers work, and why the others do not."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

from service.doctor.findings import Finding, Level, fault
from service.doctor.trial import CPU, CUDA, Runtime, examine

AREA = "providers"
REPAIR = "pip install --force-reinstall 'rnnserve[cpu]', or 'rnnserve[gpu]' on a machine with an NVIDIA GPU"


def check_providers(provider: str, *, is_serving: bool, is_chosen: bool) -> Iterator[Finding]:
    """Run a model on every provider that onnxruntime has.

    provider    that the settings name: cpu, cuda, or cuda,cpu
    is_serving  whether onnxruntime is needed
    is_chosen   whether the provider was given, rather than being the default
    """
    runtime = examine()
    if not runtime.is_installed:
        if is_chosen:
            text = f"provider {provider!r} was asked for, and onnxruntime is not installed"
            yield Finding(AREA, "provider", Level.PROBLEM, text, REPAIR.replace(" --force-reinstall", ""))
        return
    if runtime.error:
        text = f"onnxruntime is installed and does not work: {runtime.error}"
        yield Finding(AREA, "onnxruntime", fault(is_serving or is_chosen), text, REPAIR)
        return
    for name, why in runtime.faults:
        kind = name.removesuffix("ExecutionProvider").lower()
        if name == CUDA:
            continue
        if not why:
            yield Finding(AREA, kind, Level.OK, f"{name} works: it ran an LSTM (onnxruntime {runtime.version})")
        elif name == CPU:
            yield Finding(AREA, kind, fault(is_serving), f"{name} does not work: {why}", REPAIR)
        else:
            advice = "nothing: the server takes the CPU or CUDA"
            yield Finding(AREA, kind, Level.NOTE, f"{name} is there, and runs no LSTM", advice)
    wants = provider.split(",")
    is_asked = "cuda" in wants and (is_serving or is_chosen)
    yield judge_cuda(runtime, cuda_driver(), is_asked=is_asked, falls_back="cpu" in wants)


def judge_cuda(runtime: Runtime, driver: str, *, is_asked: bool, falls_back: bool) -> Finding:
    """Say whether CUDA works, and why not.

    driver      what is wrong with NVIDIA's; empty where nothing is
    falls_back  whether the CPU would do
    """
    faults = dict(runtime.faults)
    level = Level.WARNING if is_asked and falls_back else fault(is_asked)
    aside = ", or serve with --provider cpu" if is_asked else ""
    if CUDA not in faults:
        text = f"{CUDA} is absent: onnxruntime {runtime.version} is a build without it"
        advice = f"to serve on an NVIDIA GPU: pip uninstall -y onnxruntime, then pip install 'rnnserve[gpu]'{aside}"
        return Finding(AREA, "cuda", level, f"{text}; {driver}" if driver else text, advice)
    reasons = [each for each in (driver, runtime.missing_library) if each]
    if reasons:
        steps = ["install NVIDIA's driver, and in a container give it the GPU (--gpus all)"] if driver else []
        steps += ["pip install 'rnnserve[gpu]' brings CUDA's libraries"] if runtime.missing_library else []
        return Finding(AREA, "cuda", level, f"{CUDA} can't work: {'; '.join(reasons)}", f"{'; '.join(steps)}{aside}")
    if why := faults[CUDA]:
        advice = f"compare the CUDA version of the driver (nvidia-smi) with that of the installed libraries{aside}"
        return Finding(AREA, "cuda", level, f"{CUDA} does not work: {why}", advice)
    return Finding(AREA, "cuda", Level.OK, f"{CUDA} works: it ran an LSTM (onnxruntime {runtime.version})")


def cuda_driver() -> str:
    """Say why there is no GPU to be used; empty where there is one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver (libcuda.so.1)"
    if code := driver.cuInit(0):
        return f"the NVIDIA driver finds no GPU that it can use (cuInit: error {code})"
    return ""
