"""Promise: over TLS the same service; a stranger is turned away by the handshake, a wrong file by name at the start."""

import subprocess
from pathlib import Path

import grpc
import pytest
from gateway_world import gateway, say

from expertmesh.client import AsyncClient
from expertmesh.errors import ConfigError, Unavailable
from expertmesh.router.gateway.tls import ClientTls, server_credentials


def openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=60)


def make_certificate(folder: Path, name: str, issuer: str = "") -> None:
    """NAME.pem and NAME.key for localhost, signed by `issuer`; a CA of its own without one."""
    signed = ["-CA", f"{folder}/{issuer}.pem", "-CAkey", f"{folder}/{issuer}.key"] if issuer else []
    extension = f"basicConstraints=critical,CA:{'FALSE' if issuer else 'TRUE'}"
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"] if issuer else []
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc", "-keyout", f"{folder}/{name}.key"]
    out = ["-x509", "-days", "2", "-subj", f"/CN={name}", "-out", f"{folder}/{name}.pem"]
    openssl("req", *key, *out, "-addext", extension, *names, *signed)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CA with certificates for a gateway and a client, and another CA with a client's."""
    folder = tmp_path_factory.mktemp("pki")
    for name, issuer in (("ca", ""), ("gateway", "ca"), ("alice", "ca"), ("other-ca", ""), ("mallory", "other-ca")):
        make_certificate(folder, name, issuer)
    return folder


def files(folder: Path, name: str) -> dict[str, str]:
    return {"cert_file": f"{folder}/{name}.pem", "key_file": f"{folder}/{name}.key"}


async def ask(address: str, tls: ClientTls | None) -> str:
    async with AsyncClient(address, tls=tls) as client:
        return await client.generate("hi", timeout_s=30).answer()


async def test_a_gateway_with_a_certificate_serves_those_who_trust_its_ca(pki: Path):
    async with gateway(say("x"), credentials=server_credentials(**files(pki, "gateway"))) as world:
        assert await ask(world.server.address, ClientTls(ca_file=f"{pki}/ca.pem")) == "x"
        port = world.server.address.rpartition(":")[2]
        assert await ask(f"localhost:{port}", ClientTls(ca_file=f"{pki}/ca.pem")) == "x"
        for tls in (ClientTls(ca_file=f"{pki}/other-ca.pem"), ClientTls(), None):
            with pytest.raises(Unavailable):
                await ask(world.server.address, tls)


async def test_with_a_client_ca_only_its_certificates_are_let_in(pki: Path):
    credentials = server_credentials(**files(pki, "gateway"), client_ca_file=f"{pki}/ca.pem")
    async with gateway(say("x"), credentials=credentials) as world:
        assert await ask(world.server.address, ClientTls(ca_file=f"{pki}/ca.pem", **files(pki, "alice"))) == "x"
        for own in (files(pki, "mallory"), {}):
            with pytest.raises(Unavailable):
                await ask(world.server.address, ClientTls(ca_file=f"{pki}/ca.pem", **own))
        assert len(world.engine.submitted) == 1


def test_a_wrong_file_is_named_at_the_start(pki: Path, tmp_path: Path):
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("not a certificate")
    own = files(pki, "gateway")
    locked = tmp_path / "locked.key"
    openssl("pkey", "-in", own["key_file"], "-aes256", "-passout", "pass:secret", "-out", str(locked))
    cases = [
        ({"cert_file": own["cert_file"], "key_file": ""}, "network.tls_key_file", "since tls_cert_file is set"),
        ({"cert_file": "", "key_file": own["key_file"]}, "network.tls_cert_file", "since tls_key_file is set"),
        ({**own, "cert_file": "/nowhere.pem"}, "network.tls_cert_file", "No such file"),
        ({**own, "key_file": str(tmp_path)}, "network.tls_key_file", "Is a directory"),
        ({**own, "key_file": f"{pki}/alice.key"}, "network.tls_key_file", "the key of the certificate in"),
        ({**own, "key_file": str(locked)}, "network.tls_key_file", "without a passphrase"),
        ({**own, "cert_file": str(garbage)}, "network.tls_cert_file, network.tls_key_file", "a PEM certificate chain"),
        ({**own, "client_ca_file": str(garbage)}, "network.tls_client_ca_file", "PEM certificates"),
        ({"cert_file": "", "key_file": "", "client_ca_file": "x"}, "network.tls_client_ca_file", "unset without"),
    ]
    for arguments, field, expected in cases:
        with pytest.raises(ConfigError) as caught:
            server_credentials(**arguments)
        assert caught.value.field == field
        assert expected in str(caught.value)
    assert server_credentials("", "") is None


def test_a_clients_wrong_file_is_named_before_a_call(pki: Path):
    own = files(pki, "alice")
    for tls, field in (
        (ClientTls(ca_file="/nowhere.pem"), "tls.ca_file"),
        (ClientTls(cert_file=own["cert_file"]), "tls.cert_file, tls.key_file"),
        (ClientTls(cert_file=own["cert_file"], key_file=f"{pki}/ca.key"), "tls.key_file"),
    ):
        with pytest.raises(ConfigError) as caught:
            AsyncClient("localhost:1", tls=tls)
        assert caught.value.field == field


async def test_plain_text_and_garbage_on_a_tls_port_hurt_nobody(pki: Path):
    async with gateway(say("x"), credentials=server_credentials(**files(pki, "gateway"))) as world:
        async with grpc.aio.insecure_channel(world.server.address) as channel:
            call = channel.unary_stream("/expertmesh.v1.Generation/Generate")(b"")
            error = await world.refused(call)
            assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert await ask(world.server.address, ClientTls(ca_file=f"{pki}/ca.pem")) == "x"
