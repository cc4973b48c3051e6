"""Encrypted connections, with a certificate made for the test."""

import shutil
import subprocess

import numpy as np
import pytest
from click.testing import CliRunner

from service.client import AsyncClient, Client, InvalidArgument, Unavailable
from service.client.cli import main
from tests.serving import serving

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """Files of a certificate for localhost that signs itself, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(cert)]
    subprocess.run([*command.split(), *names], check=True, capture_output=True)
    return cert, key


@pytest.fixture(scope="module")
def target(repository, certificate):
    cert, key = certificate
    with serving(repository, tls_cert=cert, tls_key=key, tls_client_ca=cert) as running:
        yield f"localhost:{running.server.port}"


async def test_both_sides_show_certificates(target, certificate, sequences):
    cert, key = (path.read_bytes() for path in certificate)
    options = {"root_certificates": cert, "client_certificate": cert, "client_key": key}
    with Client(target, **options) as client:
        blocking = client.predict("lstm", sequences)
    async with AsyncClient(target, **options) as client:
        for y, z in zip(await client.predict("lstm", sequences), blocking, strict=True):
            np.testing.assert_array_equal(y, z)


def test_a_client_that_shows_nothing_or_speaks_plainly_is_refused(target, certificate):
    for options in ({"root_certificates": certificate[0].read_bytes()}, {}):
        with Client(target, **options) as client, pytest.raises(Unavailable):
            client.models(timeout=10)
    with pytest.raises(InvalidArgument, match="go together"):
        Client(target, client_key=b"")


def test_the_command_takes_certificates(target, certificate):
    cert, key = map(str, certificate)
    options = ["--server", target, "--ca", cert, "--cert", cert, "--key", key]
    for command in ("health", "models"):
        result = CliRunner().invoke(main, [command, *options])
        assert result.exit_code == 0, result.output
    assert CliRunner().invoke(main, ["health", "--server", target, "--tls"]).exit_code == 1
