"""What holds for the project as a whole: the package, the command, the containers, the files."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from service.config import Settings

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
DOCKERFILE = (ROOT / "Dockerfile").read_text()

LONG_FILES: dict[str, str] = {}
"""Files that may have more than 400 lines, and why."""


def run_python(code: str) -> str:
    """Run code in a fresh interpreter and return what it prints."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


# The package


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> set[str]:
    """Names of the files in a freshly built wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    [path] = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


def test_wheel_holds_both_packages_with_their_data(wheel):
    on_disk = {
        path.relative_to(ROOT).as_posix()
        for package in ("models", "service")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    data = {Path(name).suffix for name in on_disk} - {".py", ".pyi", ".typed"}
    assert data, "the real data sets ship in the package"
    assert on_disk <= wheel


def test_wheel_holds_nothing_else(wheel):
    tops = {name.split("/")[0] for name in wheel}
    assert tops == {"models", "service", f"rnnserve-{PROJECT['version']}.dist-info"}
    assert f"rnnserve-{PROJECT['version']}.dist-info/licenses/LICENSE" in wheel


def test_torch_is_pinned_exactly():
    pins = [line for lines in PROJECT["optional-dependencies"].values() for line in lines if line.startswith("torch")]
    assert pins == ["torch==2.13.0"]


# The command


def test_every_subcommand_loads_without_torch():
    loaded = run_python(
        "import sys\n"
        "from importlib.metadata import entry_points\n"
        "import service.client.cli\n"
        "for point in entry_points(group='rnnserve.commands'):\n"
        "    point.load()\n"
        "    print(point.name)\n"
        "assert 'torch' not in sys.modules\n"
    )
    assert set(loaded.split()) == set(PROJECT["entry-points"]["rnnserve.commands"])


# The containers


def test_compose_locks_every_service_down():
    assert set(COMPOSE["services"]) == {"server", "prometheus", "grafana", "trainer"}
    for name, service in COMPOSE["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert {"mem_limit", "pids_limit"} <= service.keys(), name


def test_compose_serves_a_repository_that_it_cannot_write():
    server = COMPOSE["services"]["server"]
    [volume] = server["volumes"]
    assert volume.endswith(":/models:ro")
    assert server["healthcheck"]["test"] == ["CMD", "rnnserve", "health"]


def test_compose_publishes_the_default_ports_to_this_machine_only():
    published = [port for service in COMPOSE["services"].values() for port in service.get("ports", [])]
    assert all(port.startswith("${BIND:-127.0.0.1}:") for port in published)
    default = {name: Settings.model_fields[name].default for name in ("port", "http_port")}
    targets = [port.rpartition(":")[2] for port in COMPOSE["services"]["server"]["ports"]]
    assert targets == [str(default["port"]), str(default["http_port"])]


def test_compose_trains_only_when_asked():
    profiles = {name: service.get("profiles") for name, service in COMPOSE["services"].items()}
    assert profiles == {"server": None, "prometheus": None, "grafana": None, "trainer": ["train"]}


def test_compose_prometheus_scrapes_the_server():
    mounted = COMPOSE["services"]["prometheus"]["volumes"][0].split(":")[0]
    config = yaml.safe_load((ROOT / mounted).read_text())
    targets = [
        target for job in config["scrape_configs"] for each in job["static_configs"] for target in each["targets"]
    ]
    assert targets == [f"server:{Settings.model_fields['http_port'].default}"]


def test_image_has_the_version_and_a_numeric_user():
    assert f'org.opencontainers.image.version="{PROJECT["version"]}"' in DOCKERFILE
    assert re.findall(r"^USER (.*)$", DOCKERFILE, re.MULTILINE) == ["10001:10001"]


# The files


def test_no_file_is_too_long_to_read():
    folders = ("benchmarks", "deploy", "docs", "models", "protos", "scripts", "service", "tests")
    files = [path for folder in folders for kind in ("*.py", "*.sh") for path in (ROOT / folder).rglob(kind)]
    written = [path for path in files if not path.is_relative_to(ROOT / "service/pb")]
    long = {path.relative_to(ROOT).as_posix() for path in written if len(path.read_text().splitlines()) > 400}
    assert long == set(LONG_FILES)


def test_make_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text()
    [phony] = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    shown = subprocess.run(["make"], cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout
    assert re.findall(r"^  make ([a-z-]+)", shown, re.MULTILINE) == phony.split()
