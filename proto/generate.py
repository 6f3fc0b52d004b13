"""The one protoc call: `python -P -m expertmesh.proto.generate` writes *_pb2.py, *_pb2.pyi and *_pb2_grpc.py beside the .proto.

The virtual path `-Iexpertmesh/proto=...` makes the stubs import each other as `expertmesh.proto`, whatever the checkout's name."""

import sys
from pathlib import Path


def main() -> int:
    from grpc_tools import protoc

    here = Path(__file__).resolve().parent
    link_root = here.parent / ".link"  # .link/expertmesh -> .., made by the Makefile
    return int(
        protoc.main(
            [
                "protoc",
                f"-Iexpertmesh/proto={here}",
                f"--python_out={link_root}",
                f"--pyi_out={link_root}",
                f"--grpc_python_out={link_root}",
                "expertmesh/proto/expertmesh.proto",
            ]
        )
    )


if __name__ == "__main__":
    sys.exit(main())
