"""Find Chromium for the tests of the page, or install Debian's, as root; where neither can be, say so.

A browser needs a hundred libraries, so that unpacking it beside them, as is done for smaller programs, does not work.
"""

import os
import shutil
import subprocess
import sys

PACKAGE = "chromium"
NAMES = ("chromium", "chromium-browser", "google-chrome")


def main() -> int:
    """Install it if need be."""
    if any(map(shutil.which, NAMES)):
        return 0
    how = f"the tests of the page are left out: they need Chromium. On Debian: apt-get install {PACKAGE}"
    if os.geteuid() or shutil.which("apt-get") is None:
        print(how)
        return 0
    install = ["apt-get", "install", "--yes", "--quiet", "--no-install-recommends", PACKAGE]
    quiet = {"check": False, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    print(f"Installing {PACKAGE}, for the tests of the page.")
    if subprocess.run(install, env=environment, **quiet).returncode:
        subprocess.run(["apt-get", "update", "--quiet"], **quiet)
        if subprocess.run(install, env=environment, **quiet).returncode:
            print(how)
    return 0


if __name__ == "__main__":
    sys.exit(main())
