"""Generate the Python stubs from protos/, or check that those committed are what the protos say.

    protos.py           write service/pb; the service configs that lie beside the protos are copied as they are
    protos.py --check   lint the protos by buf.yaml and compare service/pb with what they generate

Run by an interpreter that has the packages of scripts/protos.txt; `make protos` and `make check` see to it.
"""

import argparse
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
PACKAGE = Path("service/pb")


def protoc(*arguments: str) -> None:
    """Run grpcio-tools' protoc on every proto of ours, in the root of the repository."""
    google_rpc = importlib.util.find_spec("google.rpc")
    if google_rpc is None or not google_rpc.submodule_search_locations:
        raise SystemExit("google/rpc/status.proto not found: install googleapis-common-protos")
    third_party = Path(next(iter(google_rpc.submodule_search_locations))).parent.parent
    files = [str(path.relative_to(ROOT)) for path in sorted(PROTOS.rglob("*.proto"))]
    command = [sys.executable, "-m", "grpc_tools.protoc", *arguments, f"-I{third_party}", *files]
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        raise SystemExit("protoc refused the protos")


def generate(out: Path) -> None:
    """Write the stubs below out, as out/service/pb/..."""
    # Mapping protos/ to service/pb gives the modules their package path; it works as long as no proto of ours imports
    # another one of ours.
    protoc(f"-I{PACKAGE}=protos", f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}")
    for path in PROTOS.rglob("*.json"):
        shutil.copyfile(path, out / PACKAGE / path.relative_to(PROTOS))


def stubs(root: Path) -> dict[str, str]:
    """Text of every stub and service config below root, by its path."""
    return {
        str(path.relative_to(root)): path.read_text()
        for pattern in ("*_pb2*.py", "*_pb2*.pyi", "*.json")
        for path in sorted((root / PACKAGE).rglob(pattern))
    }


def lint() -> bool:
    """Say what buf finds; answer whether it found nothing."""
    buf = Path(sys.executable).with_name("buf")
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "protos.binpb"
        protoc("-Iprotos", "--include_imports", "--include_source_info", f"--descriptor_set_out={image}")
        ours = [f"--path={path.relative_to(PROTOS)}" for path in sorted(PROTOS.rglob("*.proto"))]
        return not subprocess.run([buf, "lint", image, "--config=buf.yaml", *ours], cwd=ROOT, check=False).returncode


def check() -> bool:
    """Name the committed stubs that differ from generated ones; answer whether there are none."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        fresh = stubs(Path(folder))
    committed = stubs(ROOT)
    stale = [name for name in sorted(fresh.keys() | committed.keys()) if fresh.get(name) != committed.get(name)]
    for name in stale:
        print(f"{name}: not what protos/ generates; run `make protos` and commit the result")
    return not stale


def main() -> int:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description="Generate the Python stubs from protos/.")
    parser.add_argument("--check", action="store_true", help="lint and compare; write nothing")
    if parser.parse_args().check:
        return 0 if all([lint(), check()]) else 1
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        shutil.copytree(Path(folder) / PACKAGE, ROOT / PACKAGE, dirs_exist_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
