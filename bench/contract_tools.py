"""Clients that know nothing of expertmesh: grpcurl or buf where this machine has one, and generic reflection always."""

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import json_format, message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

BUF_FOLDER = Path(".cache/buf/node_modules/.bin")  # where `make contract` puts it
CALL_S = 60.0


@dataclass(frozen=True, slots=True)
class Answer:
    code: str  # of gRPC, lower case; "ok"
    messages: list[dict[str, Any]]
    text: str  # what the tool said of an error


class CommandLine:
    """grpcurl or buf curl, by reflection."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.name = "buf curl" if Path(path).name == "buf" else "grpcurl"

    def services(self, address: str) -> set[str]:
        if self.name == "grpcurl":
            return set(self._run(["-plaintext", address, "list"]).stdout.split())
        return set(self._run([*_BUF, "--list-services", f"http://{address}"]).stdout.split())

    def call(self, address: str, method: str, request: dict[str, Any], key: str = "") -> Answer:
        """`method`: package.Service/Method."""
        data, header = json.dumps(request), ["-H", f"authorization: Bearer {key}"] if key else []
        if self.name == "grpcurl":
            done = self._run(["-plaintext", *header, "-d", data, address, method])
        else:
            done = self._run([*_BUF, *header, "-d", data, f"http://{address}/{method}"])
        if done.returncode == 0:
            return Answer("ok", _objects(done.stdout), "")
        text = done.stderr + done.stdout
        found = [code for code in _CODES if code in text.replace(" ", "_").lower() or _CODES[code] in text]
        return Answer(found[0] if found else "unknown", [], text)

    def _run(self, arguments: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run([self._path, *arguments], capture_output=True, text=True, timeout=CALL_S)


class Reflection:
    """The same calls with messages made from what the server says of itself: no generated code takes part."""

    name = "reflection"

    def services(self, address: str) -> set[str]:
        with grpc.insecure_channel(address) as channel:
            return set(ProtoReflectionDescriptorDatabase(channel).get_services())

    def call(self, address: str, method: str, request: dict[str, Any], key: str = "") -> Answer:
        service, _, name = method.partition("/")
        metadata = (("authorization", f"Bearer {key}"),) if key else ()
        with grpc.insecure_channel(address) as channel:
            pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
            found = pool.FindServiceByName(service).FindMethodByName(name)
            asked = json_format.ParseDict(request, message_factory.GetMessageClass(found.input_type)())
            answer_class = message_factory.GetMessageClass(found.output_type)
            make = channel.unary_stream if found.server_streaming else channel.unary_unary
            call = make(
                f"/{method}",
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=answer_class.FromString,
            )
            try:
                answers = call(asked, metadata=metadata, timeout=CALL_S)
                messages = list(answers) if found.server_streaming else [answers]
            except grpc.RpcError as error:
                return Answer(error.code().name.lower(), [], error.details() or "")
            return Answer("ok", [json_format.MessageToDict(message) for message in messages], "")


def command_lines() -> list[CommandLine]:
    """grpcurl and buf, where they are here."""
    paths = (shutil.which("grpcurl"), shutil.which("buf") or shutil.which("buf", path=str(BUF_FOLDER)))
    return [CommandLine(path) for path in paths if path]


_BUF = ("curl", "--protocol", "grpc", "--http2-prior-knowledge")
_CODES = {
    "invalid_argument": "InvalidArgument",
    "unauthenticated": "Unauthenticated",
    "not_found": "NotFound",
    "unavailable": "Unavailable",
}


def _objects(text: str) -> list[dict[str, Any]]:
    """JSON objects, one behind the other."""
    decoder, found, at = json.JSONDecoder(), list[dict[str, Any]](), 0
    text = text.strip()
    while at < len(text):
        value, at = decoder.raw_decode(text, at)
        found.append(value)
        while at < len(text) and text[at].isspace():
            at += 1
    return found
