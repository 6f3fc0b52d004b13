"""The one protoc call: `python -P -m expertmesh.proto.generate` writes *_pb2.py, *.pyi and *_grpc.py beside the .proto.

`--check` writes elsewhere and fails when the committed files differ. The virtual path `-Iexpertmesh/proto=...` makes
the stubs import each other as `expertmesh.proto`, whatever the checkout's name."""

import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
GENERATED = ("expertmesh_pb2.py", "expertmesh_pb2.pyi", "expertmesh_pb2_grpc.py")


def generate(target: Path) -> None:
    """Write the three files under `target`."""
    from grpc_tools import protoc

    with tempfile.TemporaryDirectory() as out:
        arguments = [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
        if protoc.main(["protoc", f"-Iexpertmesh/proto={HERE}", *arguments, "expertmesh/proto/expertmesh.proto"]):
            raise SystemExit("protoc failed")
        for name in GENERATED:
            (target / name).write_text((Path(out) / "expertmesh" / "proto" / name).read_text())


def main() -> int:
    if "--check" not in sys.argv[1:]:
        generate(HERE)
        return 0
    with tempfile.TemporaryDirectory() as fresh:
        generate(Path(fresh))
        stale = [n for n in GENERATED if (Path(fresh) / n).read_text() != (HERE / n).read_text()]
    if stale:
        print(f"stale generated files: {', '.join(stale)}; run `make proto`", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
