"""Put Prometheus and promtool into the environment that runs this, as bin/prometheus and bin/promtool.

They are Debian's, programs without libraries of their own, unpacked from their package. Where there is no such package
it says so and leaves them out.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from debian import unpack

PACKAGE = "prometheus"
PROGRAMS = ("prometheus", "promtool")
BIN = Path(sys.prefix) / "bin"


def main() -> int:
    """Install them."""
    if all((BIN / name).exists() for name in PROGRAMS):
        return 0
    with tempfile.TemporaryDirectory() as folder:
        if not unpack(PACKAGE, Path(folder)):
            print(f"the tests with Prometheus are left out: they need Debian's package {PACKAGE}, or Ubuntu's")
            return 0
        for name in PROGRAMS:
            shutil.copy(Path(folder) / "usr" / "bin" / name, BIN / name)
    return max(
        subprocess.run([BIN / name, "--version"], check=False, capture_output=True).returncode for name in PROGRAMS
    )


if __name__ == "__main__":
    sys.exit(main())
