"""TLS of the client gRPC: files of the configuration to gRPC credentials, and every mistake in them named at the start.

gRPC reports a bad certificate or a key of another one as a failed handshake of every client, later and without a name.
So Python's `ssl` loads the same files first: what it refuses is a ConfigError that names field and file. Files are read
once; a new certificate needs a new gateway process (start one, drain the other)."""

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc

from ...errors import ConfigError


def server_credentials(
    cert_file: str, key_file: str, client_ca_file: str = "", *, prefix: str = "network."
) -> grpc.ServerCredentials | None:
    """None: no TLS. With `client_ca_file` clients must show a certificate that this CA has signed (mTLS).
    `prefix` stands before the field names in errors."""
    if not cert_file and not key_file:
        if client_ca_file:
            raise ConfigError(f"{prefix}tls_client_ca_file", client_ca_file, "unset without tls_cert_file")
        return None
    if not cert_file or not key_file:
        missing, given = ("tls_cert_file", "tls_key_file") if key_file else ("tls_key_file", "tls_cert_file")
        raise ConfigError(prefix + missing, "", f"a PEM file, since {given} is set")
    cert, key = _read(f"{prefix}tls_cert_file", cert_file), _read(f"{prefix}tls_key_file", key_file)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _load_pair(context, cert_file, key_file, prefix)
    client_ca = _load_ca(context, f"{prefix}tls_client_ca_file", client_ca_file)
    return grpc.ssl_server_credentials([(key, cert)], client_ca, require_client_auth=client_ca is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientTls:
    """How a client dials gateways over TLS. PEM files."""

    ca_file: str = ""  # who signed the gateways' certificates; empty = the roots that gRPC brings
    cert_file: str = ""  # own certificate and key, where the gateways ask for one
    key_file: str = ""
    server_name: str = ""  # the certificate's name where it is not the address's host

    def credentials(self) -> grpc.ChannelCredentials:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        ca = _load_ca(context, "tls.ca_file", self.ca_file)
        cert = key = None
        if bool(self.cert_file) != bool(self.key_file):
            raise ConfigError("tls.cert_file, tls.key_file", (self.cert_file, self.key_file), "both or neither")
        if self.cert_file:
            cert, key = _read("tls.cert_file", self.cert_file), _read("tls.key_file", self.key_file)
            _load_pair(context, self.cert_file, self.key_file, "tls.", "cert_file", "key_file")
        return grpc.ssl_channel_credentials(ca, key, cert)

    def connector(self, secure_channel: Callable[..., grpc.Channel]) -> Callable[..., grpc.Channel]:
        """`grpc.secure_channel` or `grpc.aio.secure_channel` with these credentials: called like `insecure_channel`."""
        credentials = self.credentials()
        named = (("grpc.ssl_target_name_override", self.server_name),) if self.server_name else ()

        def connect(address: str, options: tuple[tuple[str, object], ...] = ()) -> grpc.Channel:
            return secure_channel(address, credentials, options=(*options, *named))

        return connect


def _read(field: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(field, path, f"a readable PEM file: {error.strerror}") from None


def _load_pair(context: ssl.SSLContext, cert_file: str, key_file: str, prefix: str, *names: str) -> None:
    cert_name, key_name = names or ("tls_cert_file", "tls_key_file")

    def refuse_password() -> str:
        raise ConfigError(prefix + key_name, key_file, "a key without a passphrase: nobody is there to type it")

    try:
        context.load_cert_chain(cert_file, key_file, password=refuse_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(prefix + key_name, key_file, f"the key of the certificate in {cert_file}") from None
        fields = f"{prefix}{cert_name}, {prefix}{key_name}"
        raise ConfigError(fields, (cert_file, key_file), f"a PEM certificate chain and its key: {error}") from None


def _load_ca(context: ssl.SSLContext, field: str, path: str) -> bytes | None:
    if not path:
        return None
    data = _read(field, path)
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as error:
        raise ConfigError(field, path, f"PEM certificates: {error}") from None
    return data
