"""What the machine, or the container, gives: cores, memory, files, directories, the event loop."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from service.config import Settings
from service.doctor.findings import Finding, Level, fault

AREA = "machine"
FAST = ("avx2", "avx512f", "avx512_vnni", "amx_int8")
"""Sets of instructions that onnxruntime's kernels use on x86-64, from the slowest."""
SPARE_FILES = 128
"""Files that a server has open beside its connections, roughly."""
EXPERIMENTS = "-event_engine_listener"
"""What `serve` sets where nothing is."""


class Machine:
    """Reads what Linux tells of itself; elsewhere there is less."""

    def __init__(self, root: Path = Path("/")) -> None:
        """root: of the file system; another one in tests."""
        self._root = root

    def cpu(self) -> tuple[str, list[str]]:
        """Name of the processor, and which of FAST it has."""
        text = self._read("proc/cpuinfo")
        name = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
        flags = re.search(r"^flags\s*:\s*(.*)$", text, re.MULTILINE)
        have = set(flags[1].split()) if flags else set()
        return (name[1] if name else "processor"), [each for each in FAST if each in have]

    def cores(self) -> tuple[int, float | None]:
        """Cores that this process may use, and the part of their time that its control group may, in cores."""
        allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        quotas = []
        for text in self._of_group("cpu", "cpu.max"):
            quota, _, period = text.partition(" ")
            if quota not in ("", "max"):
                quotas.append(int(quota) / int(period))
        times = zip(self._of_group("cpu", "cpu.cfs_quota_us"), self._of_group("cpu", "cpu.cfs_period_us"), strict=False)
        quotas += [int(quota) / int(period) for quota, period in times if int(quota) > 0]
        return allowed, min(quotas, default=None)

    def memory(self) -> int | None:
        """Bytes of memory that this process may use."""
        total = re.search(r"^MemTotal:\s+(\d+) kB", self._read("proc/meminfo"), re.MULTILINE)
        sizes = [int(total[1]) * 1024] if total else []
        limits = [*self._of_group("memory", "memory.max"), *self._of_group("memory", "memory.limit_in_bytes")]
        sizes += [int(text) for text in limits if text.isdigit()]  # or "max"
        return min(sizes, default=None)

    def _of_group(self, controller: str, name: str) -> list[str]:
        """Contents of a file in every control group that this process is in, of version 2 or 1."""
        folders = []
        for line in self._read("proc/self/cgroup").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            group = Path("sys/fs/cgroup") / controllers / path.lstrip("/")
            folders += [each for each in (group, *group.parents) if each.is_relative_to("sys/fs/cgroup")]
        return [text for folder in folders if (text := self._read(folder / name).strip())]

    def _read(self, path: str | Path) -> str:
        try:
            return (self._root / path).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""


def check_machine(settings: Settings, *, is_serving: bool, machine: Machine | None = None) -> Iterator[Finding]:
    """Look at what serving by these settings takes."""
    machine = machine or Machine()
    name, fast = machine.cpu()
    yield Finding(AREA, "cpu", Level.OK, name + (f" with {', '.join(fast)}" if fast else ""))
    yield _check_cores(machine, settings)
    if (size := machine.memory()) is not None:
        yield Finding(AREA, "memory", Level.OK, f"{size / 2**30:.1f} GiB of memory may be used")
    if finding := _check_files(settings):
        yield finding
    yield from _check_directories(settings, is_serving)
    yield _check_loop()
    experiments = os.environ.get("GRPC_EXPERIMENTS", EXPERIMENTS)
    if experiments != EXPERIMENTS:
        yield Finding(
            AREA,
            "grpc_experiments",
            Level.WARNING,
            f"GRPC_EXPERIMENTS is {experiments!r}, and so not what serve would set, {EXPERIMENTS!r}, which costs less",
            "unset it unless you know better",
        )


def _check_cores(machine: Machine, settings: Settings) -> Finding:
    cores, quota = machine.cores()
    usable = min(cores, quota or cores)
    text = f"{cores} cores" + ("" if quota is None else f", of which the control group gives the time of {quota:g}")
    wanted = settings.workers * settings.compute_threads
    if wanted > max(1, usable):
        return Finding(
            AREA,
            "cores",
            Level.WARNING,
            f"{text}; workers x compute_threads is {wanted}",
            f"set workers and compute_threads to {max(1, int(usable))} together at most, or give it more cores",
        )
    if quota is not None and quota < 1:
        advice = "give it a whole one: a server that is stopped within a period makes every session wait"
        return Finding(AREA, "cores", Level.WARNING, text, advice)
    return Finding(AREA, "cores", Level.OK, text)


def _check_files(settings: Settings) -> Finding | None:
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= settings.max_sessions + SPARE_FILES:
        return Finding(
            AREA, "files", Level.OK, f"{soft} open files, a connection each, and {settings.max_sessions} sessions"
        )
    above = "" if hard == resource.RLIM_INFINITY else f" (up to {hard})"
    return Finding(
        AREA,
        "files",
        Level.WARNING,
        f"{soft} open files, so at most about {max(0, soft - SPARE_FILES)} connections, for {settings.max_sessions} "
        "sessions: enough only where clients have several on a connection",
        f"raise `ulimit -n`{above}, systemd's LimitNOFILE or docker's --ulimit nofile",
    )


def _check_directories(settings: Settings, is_serving: bool) -> Iterator[Finding]:
    temporary = Path(tempfile.gettempdir())
    if settings.workers > 1:
        yield _check_writable("tmp", temporary, is_serving, "workers have their sockets there: set TMPDIR to another")
    if settings.spill_store is not None:
        advice = "make it, give the server the right to write there, or choose another --spill-store"
        yield _check_writable("spill_store", settings.spill_store.absolute().parent, is_serving, advice)


def _check_writable(name: str, folder: Path, is_asked: bool, advice: str) -> Finding:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return Finding(AREA, name, Level.OK, f"{folder} can be written to")
    except OSError as error:
        return Finding(AREA, name, fault(is_asked), f"{folder} can't be written to: {error.strerror}", advice)


def _check_loop() -> Finding:
    if sys.platform == "win32":
        return Finding(AREA, "uvloop", Level.OK, "asyncio's own event loop, for there is no uvloop for Windows")
    if importlib.util.find_spec("uvloop") is None:
        text, advice = "uvloop is not installed: the server takes asyncio's loop, which is slower", "pip install uvloop"
        return Finding(AREA, "uvloop", Level.WARNING, text, advice)
    return Finding(AREA, "uvloop", Level.OK, "uvloop is the server's event loop")
