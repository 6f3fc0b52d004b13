"""One-file client: grpcio and the generated stubs, nothing else of the package. Copy it into your own service.

    expertmesh serve --model DIR &
    python -P -m expertmesh.deploy.quickstart "Why is the sky blue?" [--address 127.0.0.1:50051]

Thinking goes to stderr, the answer to stdout. `expertmesh.client.Client` adds typed events and sessions."""

import argparse
import sys

import grpc

from ..proto import expertmesh_pb2 as pb
from ..proto import expertmesh_pb2_grpc as rpc


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("prompt")
    parser.add_argument("--address", default="127.0.0.1:50051")
    parser.add_argument("--session", default="", help="continue this conversation")
    arguments = parser.parse_args()
    request = pb.GenerateRequest(
        chat=pb.Chat(messages=[pb.Message(role="user", content=arguments.prompt)]),
        session_id=arguments.session,
        sampling=pb.SamplingOptions(max_tokens=1024),
    )
    with grpc.insecure_channel(arguments.address) as channel:
        try:
            for event in rpc.GenerationStub(channel).Generate(request, timeout=600):
                show(event)
        except grpc.RpcError as error:
            print(f"{error.code().name}: {error.details()}", file=sys.stderr)
            return 1
    return 0


def show(event: pb.GenerateEvent) -> None:
    match event.WhichOneof("event"):
        case "reasoning":
            print(event.reasoning.text, end="", flush=True, file=sys.stderr)
        case "answer":
            print(event.answer.text, end="", flush=True)
        case "finished":
            usage = event.finished.usage
            print(f"\n[{usage.prompt_tokens} in, {usage.completion_tokens} out]", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
