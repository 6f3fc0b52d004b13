"""Compile the `.cu` files beside this one and launch them: source -> NVRTC -> cubin -> module -> torch's current
stream.

Why NVRTC by its low-level binding: it compiles for any architecture without a GPU, so `compile_only` is both the CPU
test of every kernel (errors, spills, stack use) and the first half of a launch. No CUDA header is included anywhere,
so neither nvcc nor a toolkit is needed. Cubins are kept in memory and on disk under a key of everything that shapes
them. Launches go through cuLaunchKernelEx, so that a kernel may start its prologue while the one before it still runs
(programmatic dependent launch), inside CUDA graphs too (`launch.py`)."""

import ctypes
import functools
import hashlib
import os
import re
import tempfile
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import KernelError
from . import wgmma
from .launch import check, driver, launch

SUPPORTED_ARCHS = ("sm_80", "sm_89", "sm_90a", "sm_100a")  # what the CPU checks compile for
_DIRECTORY = Path(__file__).parent
_INCLUDE = re.compile(r'^\s*#include\s+"([^"]+)"', re.MULTILINE)
_COMMON_FLAGS = ("--std=c++17", "--ptxas-options=-v", "--generate-line-info")


@dataclass(frozen=True, slots=True)
class KernelUse:
    """What ptxas said of one kernel."""

    name: str
    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int

    @property
    def clean(self) -> bool:
        return not (self.stack_bytes or self.spill_store_bytes or self.spill_load_bytes)


@dataclass(frozen=True, slots=True)
class Compiled:
    """One translation unit for one architecture."""

    key: str
    cubin: bytes
    log: str

    def use(self) -> list[KernelUse]:
        return parse_ptxas_log(self.log)


def compile_only(file: str, arch: str, defines: Mapping[str, int] | None = None) -> Compiled:
    """Compile `file` for `arch` ("sm_90a"). Needs NVRTC, neither GPU nor driver. Raises KernelError with the log."""
    return _compile(file, arch, tuple(sorted((defines or {}).items())))


def parse_ptxas_log(log: str) -> list[KernelUse]:
    """Registers, stack and spills of each kernel in a `-v` log of ptxas."""
    found: list[KernelUse] = []
    name, frame = "", (0, 0, 0)
    for line in log.splitlines():
        if m := re.search(r"Compiling entry function '(\w+)'", line):
            name, frame = m[1], (0, 0, 0)
        elif m := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            frame = max(frame, (int(m[1]), int(m[2]), int(m[3])))
        elif (m := re.search(r"Used (\d+) registers", line)) and name:
            found.append(KernelUse(name, int(m[1]), *frame))
    return found


def set_cache_directory(directory: Path | None) -> None:
    """Where cubins are kept between processes; None keeps them in memory only."""
    global _cache_directory
    _cache_directory = directory


_cache_directory: Path | None = Path.home() / ".cache" / "expertmesh" / "kernels"
_lock = threading.Lock()


@functools.cache
def architecture(device_index: int) -> str:
    """Architecture to compile for on this device: with the `a` suffix where wgmma or tcgen05 exist."""
    require_gpu()
    major, minor = torch.cuda.get_device_capability(device_index)
    if major < 8:
        raise KernelError(
            f"GPU {device_index} ({torch.cuda.get_device_name(device_index)}) has compute capability {major}.{minor}; "
            "the kernels need 8.0 or newer: use the torch path (kernels='torch')"
        )
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


@functools.cache
def since_hopper(device_index: int) -> bool:
    """Whether there are clusters of CTAs, and launches that begin before the one before them has ended."""
    return torch.cuda.get_device_capability(device_index)[0] >= 9


@functools.cache
def num_sms(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count


def require_gpu() -> None:
    """Raise a readable error where no kernel can run."""
    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = "this torch has no CUDA" if built is None else f"torch for CUDA {built} found no usable GPU or driver"
        raise KernelError(f"no GPU to run kernels on: {why}; use the torch path (kernels='torch') or check nvidia-smi")


_debug_defines: dict[str, int] = {}
_kernels: "weakref.WeakSet[Kernel]" = weakref.WeakSet()


def set_debug(**defines: int) -> None:
    """Compile every kernel with these besides its own from now on; for tests and the bench. WATCHDOG=1: a wait of some
    seconds inside a kernel is an error instead of a hang; CP_ASYNC=1: copy as sm_80 does; EVERY_LANE_ARRIVES=1: for
    racecheck, see common.cuh."""
    _debug_defines.clear()
    _debug_defines.update(defines)
    for kernel in _kernels:
        kernel.forget()


class Kernel:
    """One `extern "C"` kernel of one translation unit, loaded on each device at its first launch (before any
    capture)."""

    def __init__(self, file: str, name: str, defines: Mapping[str, int] | None = None) -> None:
        self.file, self.name = file, name
        self.defines = dict(defines or {})
        self._functions: dict[int, int] = {}
        self._modules: list[Any] = []
        _kernels.add(self)

    def forget(self) -> None:
        """Load again at the next launch."""
        self._functions.clear()

    def load(self, device: torch.device) -> None:
        """Compile and load now: a kernel without dynamic shared memory whose first launch must not take that long."""
        index = device.index if device.index is not None else torch.cuda.current_device()
        if index not in self._functions:
            self._load(index, 0)

    def launch(
        self,
        grid: tuple[int, ...],
        block: int,
        arguments: Sequence[Any],
        *,
        device: torch.device,
        shared_bytes: int = 0,
        overlap: bool = True,
    ) -> None:
        """Launch on torch's current stream of `device`. `overlap`: the kernel waits by itself (griddepcontrol.wait)
        for the kernel before it, so it may be resident early. Tensors are passed as pointers, numpy scalars by
        value."""
        index = device.index if device.index is not None else torch.cuda.current_device()
        function = self._functions.get(index) or self._load(index, shared_bytes)
        options: dict[str, Any] = {
            "stream": torch._C._cuda_getCurrentRawStream(index),
            "shared_bytes": shared_bytes,
            "overlap": overlap and since_hopper(index),
            "name": self.name,
        }
        if torch._C._cuda_getDevice() == index:
            launch(function, grid, block, arguments, **options)
            return
        with torch.cuda.device(index):
            launch(function, grid, block, arguments, **options)

    def _load(self, index: int, shared_bytes: int) -> int:
        compiled = compile_only(self.file, architecture(index), {**self.defines, **_debug_defines})
        from cupy.cuda.function import Module  # CuPy only where a kernel really runs

        with torch.cuda.device(index), _lock:
            module = Module()
            module.load(compiled.cubin)
            function = int(module.get_function(self.name).ptr)
            if shared_bytes:  # always: above 48 KiB in all, what the kernel declares itself counted, it is needed
                check(driver().cuFuncSetAttribute(ctypes.c_void_p(function), 8, ctypes.c_int(shared_bytes)), self.name)
            self._modules.append(module)
            self._functions[index] = function
        return function


def source_with_includes(file: str) -> str:
    """A `.cu` with its local headers written in, each once. `wgmma.cuh` is made by `wgmma.py`, not a file."""
    seen: set[str] = set()

    def expand(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        text = wgmma.header() if name == "wgmma.cuh" else (_DIRECTORY / name).read_text()
        text = text.replace("#pragma once\n", "")
        return _INCLUDE.sub(lambda m: f'#line 1 "{m[1]}"\n{expand(m[1])}#line 1 "{name} after {m[1]}"', text)

    return f'#line 1 "{file}"\n' + expand(file)


@functools.cache
def _compile(file: str, arch: str, defines: tuple[tuple[str, int], ...]) -> Compiled:
    source = source_with_includes(file)
    flags = (f"--gpu-architecture={arch}", *_COMMON_FLAGS, *(f"-D{k}={v}" for k, v in defines))
    nvrtc = _nvrtc()
    version = ".".join(map(str, nvrtc.getVersion()))
    digest = hashlib.sha256(repr((source, flags, version)).encode()).hexdigest()[:32]
    key = f"{Path(file).stem}-{arch}-{digest}"
    if stored := _read_cache(key):
        return stored
    program = nvrtc.createProgram(source, file, (), ())
    try:
        try:
            nvrtc.compileProgram(program, flags)
        except nvrtc.NVRTCError as error:
            log = nvrtc.getProgramLog(program) or str(error)
            raise KernelError(f"{file} does not compile for {arch} with {dict(defines)}:\n{log}") from error
        compiled = Compiled(key, bytes(nvrtc.getCUBIN(program)), nvrtc.getProgramLog(program) or "")
    finally:
        nvrtc.destroyProgram(program)
    _write_cache(compiled)
    return compiled


def _read_cache(key: str) -> Compiled | None:
    if _cache_directory is None:
        return None
    cubin, log = _cache_directory / f"{key}.cubin", _cache_directory / f"{key}.log"
    try:
        return Compiled(key, cubin.read_bytes(), log.read_text())
    except FileNotFoundError:
        return None


def _write_cache(compiled: Compiled) -> None:
    """Each file appears whole or not at all; the cubin last, since it is what a reader looks for first."""
    if _cache_directory is None:
        return
    try:
        _cache_directory.mkdir(parents=True, exist_ok=True)
        for suffix, content in ((".log", compiled.log.encode()), (".cubin", compiled.cubin)):
            handle, temporary = tempfile.mkstemp(dir=_cache_directory)
            with os.fdopen(handle, "wb") as f:
                f.write(content)
            os.replace(temporary, _cache_directory / f"{compiled.key}{suffix}")
    except OSError:
        return  # a read-only home costs a compilation per process, nothing else


def _nvrtc() -> Any:
    try:
        from cupy.cuda import nvrtc

        nvrtc.getVersion()
    except (ImportError, RuntimeError, OSError) as error:
        raise KernelError(
            f"NVRTC is not usable ({error}); install expertmesh[gpu] on a GPU host, expertmesh[kernel-checks] elsewhere"
        ) from error
    return nvrtc
