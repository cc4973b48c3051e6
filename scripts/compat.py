"""Put NVIDIA's load tester perf_analyzer, of Triton, into the environment that runs this, as bin/perf_analyzer.

The program is inside of the wheel tritonclient 2.50.0 for x86-64 Linux, the newest that runs on glibc 2.36. Beside
libcudart, a package of its own, it needs Debian's libb64: taken from the system, or unpacked from Debian's package
beside it. Where there is no such program, or no libb64 to be had, it says so and leaves it out.
"""

import ctypes
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from debian import unpack

WHEEL = "tritonclient==2.50.0"
LIBRARY = "libb64.so.0d"
PREFIX = Path(sys.prefix)
FOLDER = PREFIX / "perf_analyzer"


def main() -> int:
    """Install it."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        print(f"perf_analyzer is for Linux on x86-64 alone, and left out on {platform.system()} {platform.machine()}")
        return 0
    FOLDER.mkdir(exist_ok=True)
    if not has_library() and not fetch_library():
        print(f"perf_analyzer is left out: it needs {LIBRARY}. On Debian or Ubuntu: apt-get install libb64-0d")
        return 0
    fetch_program()
    libraries = [FOLDER, *PREFIX.glob("lib/python3*/site-packages/nvidia/cuda_runtime/lib")]
    wrapper = PREFIX / "bin" / "perf_analyzer"
    wrapper.write_text(
        "#!/bin/sh\n"
        f'export LD_LIBRARY_PATH="{":".join(map(str, libraries))}:$LD_LIBRARY_PATH"\n'
        f'exec "{FOLDER}/perf_analyzer" "$@"\n'
    )
    wrapper.chmod(0o755)
    return subprocess.run([wrapper, "--version"], check=False, stdout=subprocess.DEVNULL).returncode


def has_library() -> bool:
    """Whether the system, or an earlier run of this, has libb64."""
    if (FOLDER / LIBRARY).exists():
        return True
    try:
        ctypes.CDLL(LIBRARY)
    except OSError:
        return False
    return True


def fetch_library() -> bool:
    """Unpack libb64 from Debian's package; answer whether that worked."""
    with tempfile.TemporaryDirectory() as folder:
        if not unpack("libb64-0d", Path(folder)):
            return False
        for library in Path(folder).rglob("libb64.so*"):
            shutil.copy(library, FOLDER)  # what a link names, too
    return (FOLDER / LIBRARY).exists()


def fetch_program() -> None:
    """Take the program out of the wheel."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--only-binary=:all:", "--dest", folder, WHEEL], check=True)
        [wheel] = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            [name] = [each for each in archive.namelist() if each.endswith("/bin/perf_analyzer")]
            program = FOLDER / "perf_analyzer"
            program.write_bytes(archive.read(name))
            program.chmod(program.stat().st_mode | stat.S_IXUSR)


if __name__ == "__main__":
    sys.exit(main())
