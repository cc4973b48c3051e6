"""Programs and libraries of Debian, without root: unpacked from their packages, not installed."""

import os
import shutil
import subprocess
from pathlib import Path


def unpack(package: str, folder: Path) -> bool:
    """Unpack a package of the machine's own release into a folder; answer whether that worked.

    Nothing that the package needs comes with it. Where package lists are old, and this runs as root, they are renewed.
    """
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        return False
    download = ["apt-get", "download", "--quiet", package]
    if subprocess.run(download, cwd=folder, check=False, capture_output=True).returncode:
        if os.geteuid() or subprocess.run(["apt-get", "update", "--quiet"], check=False).returncode:
            return False
        if subprocess.run(download, cwd=folder, check=False).returncode:
            return False
    [archive] = folder.glob(f"{package}_*.deb")
    subprocess.run(["dpkg-deb", "--extract", archive, folder], check=True)
    return True
