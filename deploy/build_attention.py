"""Compile the attention kernels of the GPU engine ahead of time, on a machine that need not have a GPU.

    python -m expertmesh.deploy.build_attention [--arch sm_90a] [--out FOLDER] [--flashinfer WHEEL_OR_FOLDER] [--jobs N]

Needs nvcc (CUDA 12.8 or newer) and a C++ compiler; of FlashInfer only the headers in its wheel, which pip fetches
without its dependencies unless they are installed or named. Makes the package `expertmesh_attention` in FOLDER
(site-packages by default): copy it into an image, or put its parent on PYTHONPATH. Takes about 3 minutes and 4 GB on
one idle core, most of it for paged_prefill.cu. Why ahead of time: FlashInfer compiles at first use, which would be a
replica's first request."""

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from ..errors import KernelError
from ..kernels.flashinfer_fixes import FIXES
from ..kernels.paged_attention import (
    FLASHINFER,
    HEAD_SIZES,
    KEY_FILE,
    KV_FP8,
    PACKAGE,
    PREFILL_HEAD_SIZES,
    library_name,
    source_key,
)

# Shared memory of an SM, from which the tile of KV follows (paged_attention.cu).
SHARED_KIB = {"sm_80": 164, "sm_86": 100, "sm_87": 164, "sm_89": 100, "sm_90a": 228, "sm_100a": 228, "sm_120a": 100}
PREFILL_ARCHS = ("sm_90a",)
_KERNELS = Path(__file__).resolve().parent.parent / "kernels"
# A header for filling tensors in CUTLASS's own tests; it alone would need cuRAND.
_NOT_NEEDED = "cutlass/util/reference/device/tensor_fill.h"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", action="append", choices=sorted(SHARED_KIB), help="default: sm_90a; may be repeated")
    parser.add_argument("--out", type=Path, default=Path(sysconfig.get_path("purelib")), help="folder for the package")
    parser.add_argument("--flashinfer", type=Path, help=f"wheel of flashinfer-python {FLASHINFER}, or a folder with it")
    parser.add_argument("--jobs", type=int, default=1, help="compilers at once")
    options = parser.parse_args(arguments)
    package = build(options.arch or ["sm_90a"], options.out, flashinfer=options.flashinfer, jobs=options.jobs)
    for path in sorted(package.glob("*.so")):
        print(f"{path}  {path.stat().st_size / 2**20:.1f} MiB")


def build(archs: list[str], out: Path, *, flashinfer: Path | None = None, jobs: int = 1) -> Path:
    """The package's folder, whole or not at all."""
    nvcc = _nvcc()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryDirectory(dir=out) as made:
        data = headers(flashinfer, Path(scratch))
        fixed = fix(data / "include", Path(scratch) / "fixed")
        shadow = Path(scratch) / "shadow"
        (shadow / _NOT_NEEDED).parent.mkdir(parents=True)
        (shadow / _NOT_NEEDED).touch()
        commands = [
            command(nvcc, kernel, head_dim, arch, includes=[shadow, fixed, *cutlass_folders(data)], out=Path(made))
            for arch in archs
            for kernel, head_dim in wanted(arch)
        ]
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(_run, commands))
        (Path(made) / "__init__.py").write_text('"""Attention kernels, made by expertmesh.deploy.build_attention."""\n')
        (Path(made) / KEY_FILE).write_text(source_key() + "\n")
        target = out / PACKAGE
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(made, target)
        target.chmod(0o755)  # a temporary folder is its owner's alone
    return target


def wanted(arch: str) -> list[tuple[str, int]]:
    """(kernel, head size) of the libraries of an architecture."""
    prefill = [("paged_prefill", d) for d in PREFILL_HEAD_SIZES if arch in PREFILL_ARCHS]
    return [*prefill, *(("paged_attention" + kv, d) for kv in ("", KV_FP8) for d in HEAD_SIZES)]


def command(nvcc: str, kernel: str, head_dim: int, arch: str, *, includes: list[Path], out: Path) -> list[str]:
    return [
        nvcc,
        *("-std=c++17", "-O3", "-use_fast_math", "-DNDEBUG", "--expt-relaxed-constexpr", "-diag-suppress=3357"),
        *("-DFLASHINFER_ENABLE_BF16", "-DFLASHINFER_ENABLE_F16", "-DCUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED"),
        f"-gencode=arch=compute_{arch.removeprefix('sm_')},code={arch}",
        f"-DHEAD_SIZE={head_dim}",
        f"-DSHARED_KIB_PER_SM={SHARED_KIB[arch]}",
        f"-DKV_FP8={int(kernel.endswith(KV_FP8))}",
        *(f"-I{folder}" for folder in includes),
        *("-Xcompiler", "-fPIC", "-shared", "-Xlinker", "-s"),
        str(_KERNELS / f"{kernel.removesuffix(KV_FP8)}.cu"),
        *("-o", str(out / library_name(kernel, head_dim, arch))),
    ]


def headers(flashinfer: Path | None, scratch: Path) -> Path:
    """FlashInfer's data folder: the one named, the installed one, or one that pip fetches."""
    if flashinfer is None and (spec := find_spec("flashinfer")) and spec.origin and _version(Path(spec.origin).parent):
        return Path(spec.origin).parent / "data"
    if flashinfer is None:
        wheel = f"flashinfer-python=={FLASHINFER}"
        _run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), wheel])
        flashinfer = next(scratch.glob("flashinfer_python-*.whl"))
    if flashinfer.suffix == ".whl":
        with zipfile.ZipFile(flashinfer) as archive:
            archive.extractall(scratch / "flashinfer_wheel")
        flashinfer = scratch / "flashinfer_wheel"
    folder = flashinfer / "flashinfer" if (flashinfer / "flashinfer").is_dir() else flashinfer
    if not _version(folder):
        raise KernelError(f"{flashinfer} is not flashinfer-python {FLASHINFER}, whose kernels these sources call")
    return folder / "data"


def fix(include: Path, out: Path) -> Path:
    """A copy of FlashInfer's own headers with `FIXES`."""
    shutil.copytree(include, out)
    for name, before, after in FIXES:
        text = (out / name).read_text()
        if text.count(before) != 1:
            raise KernelError(f"{include / name} is not the header that FIXES was written for")
        (out / name).write_text(text.replace(before, after))
    return out


def cutlass_folders(data: Path) -> list[Path]:
    return [data / "cutlass/include", data / "cutlass/tools/util/include"]


def _version(folder: Path) -> bool:
    """Whether this is the version that the sources are written for."""
    return any((folder.parent / f"flashinfer_python-{FLASHINFER}.dist-info").glob("METADATA"))


def _nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    found = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if found is None:
        raise KernelError("no nvcc: install a CUDA toolkit of 12.8 or newer, or set CUDA_HOME to where it is")
    return found


def _run(arguments: list[str]) -> None:
    done = subprocess.run(arguments, capture_output=True, text=True)
    if done.returncode:
        raise KernelError(f"{' '.join(arguments)} failed:\n{(done.stdout + done.stderr)[-4000:]}")


if __name__ == "__main__":
    main()
