"""Read tensors, or slices of them, from a folder in Hugging Face layout straight into memory that the caller owns.

Why not the safetensors library: it maps files, so pages that were only passed by count as this process's memory,
and a truncated file is a bus error. Here the header is validated against the file's true size first, then bytes are
read through one small buffer (or directly, where no conversion is needed) into the final tensor: a role's memory
grows by what it keeps. Every value is checked to be finite on the way. All failures are CheckpointError naming
file, tensor, remedy.

File format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data."""

import json
import math
import os
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Protocol

import torch

from .errors import CheckpointError
from .model_config import GenerationDefaults, ModelConfig
from .quantized import dequantize, quantized_form, read_quantized

INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,  # these two are never converted: packed nibbles, and values that need their scales
    "I32": torch.int32,
}
_CONVERTIBLE = ("F64", "F32", "F16", "BF16")
_FLOATS = tuple(DTYPES[name] for name in _CONVERTIBLE)
_BUFFER_BYTES = 8 << 20
_AGAIN = "download the file again"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor is: `offset` is from the start of the file."""

    file: Path
    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadProgress:
    what: str
    bytes_read: int
    bytes_total: int
    elapsed_s: float

    @property
    def bytes_per_s(self) -> float:
        return self.bytes_read / self.elapsed_s if self.elapsed_s > 0 else 0.0

    @property
    def summary(self) -> str:
        """ "58.0 GB, 9.6 GB/s"."""
        return f"{self.bytes_read / 1e9:.1f} GB, {self.bytes_per_s / 1e9:.1f} GB/s"

    def __str__(self) -> str:
        percent = 100 * self.bytes_read / self.bytes_total if self.bytes_total else 100.0
        unit, name, digits = (1e9, "GB", 2) if self.bytes_total >= 1e10 else (1e6, "MB", 0)
        amount = f"{self.bytes_read / unit:,.1f} of {self.bytes_total / unit:,.1f} {name}"
        return f"{self.what}: {amount} ({percent:.0f} %), {self.bytes_per_s / unit:,.{digits}f} {name}/s"


ProgressCallback = Callable[[LoadProgress], None]


class ProgressMeter:
    """Counts bytes and reports at most every `interval_s`, and once at the end. `add` from any thread."""

    def __init__(
        self,
        what: str,
        bytes_total: int,
        report: ProgressCallback | None,
        *,
        interval_s: float = 0.5,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.what, self.bytes_total, self.report, self.interval_s, self.clock = (
            what,
            bytes_total,
            report,
            interval_s,
            clock,
        )
        self.bytes_read = 0
        self.started = self.last = clock()
        self._lock = threading.Lock()

    def add(self, num_bytes: int) -> None:
        with self._lock:
            self.bytes_read += num_bytes
            if self.report is not None and self.clock() - self.last >= self.interval_s:
                self._emit()

    def finish(self) -> LoadProgress:
        return self._emit()

    def _emit(self) -> LoadProgress:
        self.last = self.clock()
        progress = LoadProgress(
            what=self.what, bytes_read=self.bytes_read, bytes_total=self.bytes_total, elapsed_s=self.last - self.started
        )
        if self.report is not None:
            self.report(progress)
        return progress


class Files(Protocol):
    """The files of one model, by name: here, or fetched when they are read (`model_source.py`)."""

    def open(self, name: str, begin: int, end: int | None) -> int:
        """A descriptor through which bytes [begin, end) can be read; None = to the end. The caller closes it."""

    def size(self, name: str) -> int: ...


class LocalFiles:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def open(self, name: str, begin: int, end: int | None) -> int:
        return os.open(self._folder / name, os.O_RDONLY)

    def size(self, name: str) -> int:
        return (self._folder / name).stat().st_size


class Checkpoint:
    """One folder. Opens a file's header only when a tensor in it is first asked for. Reads from any thread."""

    reads_files = True  # reading costs a thread's time, so several threads are faster than one

    def __init__(self, folder: str | Path, *, files: Files | None = None) -> None:
        """`files` brings the weights where they are not in the folder yet; all else is there."""
        self.folder = Path(folder)
        self._files = files or LocalFiles(self.folder)
        if not self.folder.is_dir():
            raise CheckpointError(
                "the folder does not exist; point --model at a downloaded model", file=str(self.folder)
            )
        self.config = ModelConfig.from_folder(self.folder)
        self.generation = GenerationDefaults.from_folder(self.folder, self.config)
        self._weight_map = self._read_weight_map(all_here=files is None)
        self._headers: dict[Path, dict[str, TensorEntry]] = {}
        self._staging = threading.local()

    def __contains__(self, name: str) -> bool:
        return name in self._weight_map

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._weight_map)

    def entry(self, name: str) -> TensorEntry:
        path = self._weight_map.get(name)
        if path is None:
            raise CheckpointError(
                "the tensor is missing from the checkpoint; download it again, or correct config.json",
                file=str(self.folder),
                tensor=name,
            )
        if path not in self._headers:
            self._headers[path] = self._read_header(path)
        found = self._headers[path].get(name)
        if found is None:
            raise CheckpointError(
                f"the index names this file, but the tensor is not in it; {_AGAIN}", file=str(path), tensor=name
            )
        return found

    def read_into(
        self, name: str, dest: torch.Tensor, *, index: int | None = None, meter: ProgressMeter | None = None
    ) -> None:
        """Fill `dest` (contiguous, any float dtype, CPU or GPU) with the tensor, or with `tensor[index]`.
        `dest`'s shape is the shape that the config demands; another one on disk is an error. A linear layer that is
        stored quantised is dequantised: exactly, then rounded once to `dest`'s dtype."""
        base = name.removesuffix(".weight")
        if index is None and dest.dtype in _FLOATS and base != name and quantized_form(self, base):
            dest.copy_(dequantize(read_quantized(self, base, *dest.shape, device=dest.device, meter=meter)))
            return
        entry = self.entry(name)
        expected = tuple(dest.shape) if index is None else (entry.shape[0] if entry.shape else 0, *dest.shape)
        if entry.shape != expected or (index is not None and not 0 <= index < entry.shape[0]):
            raise CheckpointError(
                f"shape {list(entry.shape)} where config.json demands {list(expected)}"
                + ("" if index is None else f" with index {index}")
                + "; config.json and weights are of different models: take both from one download",
                file=str(entry.file),
                tensor=name,
            )
        if entry.dtype not in DTYPES or (entry.dtype not in _CONVERTIBLE and DTYPES[entry.dtype] != dest.dtype):
            raise CheckpointError(
                f"dtype {entry.dtype} is not supported here ({', '.join(_CONVERTIBLE)} are); take the bfloat16 release",
                file=str(entry.file),
                tensor=name,
            )
        element_bytes = DTYPES[entry.dtype].itemsize
        offset = entry.offset + (0 if index is None else index * dest.numel() * element_bytes)
        self._read_range(entry, name, offset, dest, meter)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entry(name).shape

    def linear_bytes(self, name: str) -> int:
        """Bytes of a linear layer's `weight`, with its scales and zero points where it is quantised."""
        base = name.removesuffix(".weight")
        if quantized_form(self, base) is None:
            return self.entry(name).num_bytes
        parts = ("weight", "weight_scale_inv", "qweight", "qzeros", "scales", "g_idx")
        return sum(self.entry(f"{base}.{part}").num_bytes for part in parts if f"{base}.{part}" in self)

    def as_stored(
        self,
        name: str,
        shape: tuple[int, ...],
        *,
        device: torch.device | str = "cpu",
        meter: ProgressMeter | None = None,
    ) -> torch.Tensor:
        """The tensor in its own dtype."""
        entry = self.entry(name)
        if entry.dtype not in DTYPES:
            raise CheckpointError(
                f"dtype {entry.dtype} is not supported ({', '.join(DTYPES)} are)", file=str(entry.file), tensor=name
            )
        dest = torch.empty(shape, dtype=DTYPES[entry.dtype], device=device)
        self.read_into(name, dest, meter=meter)
        return dest

    def read(self, name: str, shape: tuple[int, ...], *, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
        dest = torch.empty(shape, dtype=dtype, device=device)
        self.read_into(name, dest)
        return dest

    def _read_weight_map(self, *, all_here: bool) -> dict[str, Path]:
        """Tensor name -> file, from the index, else from the one file's own header, else from all files' headers."""
        folder = self.folder
        index = folder / INDEX_NAME
        if index.exists():
            try:
                weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                named = {str(name): folder / str(file) for name, file in weight_map.items()}
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"the index cannot be read ({error}); {_AGAIN}", file=str(index)) from None
            outside = next((str(p) for p in named.values() if p.parent != folder), None)
            if outside is not None:
                raise CheckpointError(
                    f"the index names {outside}, which is not in the folder; {_AGAIN}", file=str(index)
                )
            missing = sorted({str(p) for p in named.values() if all_here and not p.exists()})
            if missing:
                raise CheckpointError(
                    f"{len(missing)} file(s) named by the index are missing; {_AGAIN}", file=missing[0]
                )
            return named
        single = not all_here or (folder / SINGLE_NAME).exists()
        files = [folder / SINGLE_NAME] if single else sorted(folder.glob("*.safetensors"))
        if not files:
            raise CheckpointError("no *.safetensors file in the folder; download the weights too", file=str(folder))
        return {name: path for path in files for name in self._read_header(path)}

    def _read_header(self, path: Path) -> dict[str, TensorEntry]:
        def broken(problem: str, tensor: str = "") -> CheckpointError:
            return CheckpointError(f"{problem}; {_AGAIN}", file=str(path), tensor=tensor)

        try:
            size = self._files.size(path.name)
            with self._open(path, 0, min(8, size)) as file:
                start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
            if not 2 <= length <= size - 8:
                raise broken(f"truncated or not a safetensors file ({size} bytes, header of {length})")
            with self._open(path, 8, 8 + length) as file:
                header = json.loads(file.read(length))
        except OSError as error:
            raise broken(f"the file cannot be read ({error})") from None
        except ValueError as error:
            raise broken(f"the header is not JSON ({error})") from None
        entries = {}
        for name, info in header.items():
            if name == "__metadata__":
                continue
            try:
                dtype, shape = str(info["dtype"]), tuple(int(n) for n in info["shape"])
                begin, end = (int(n) for n in info["data_offsets"])
            except (KeyError, TypeError, ValueError) as error:
                raise broken(f"the header's entry cannot be read ({error})", name) from None
            expected = math.prod(shape) * DTYPES[dtype].itemsize if dtype in DTYPES else end - begin
            if not 0 <= begin <= end or end - begin != expected:
                raise broken(f"the header gives {end - begin} bytes to {dtype} {list(shape)} = {expected} bytes", name)
            if 8 + length + end > size:
                raise broken(f"truncated: the tensor ends at byte {8 + length + end} of a file of {size}", name)
            entries[name] = TensorEntry(path, dtype, shape, 8 + length + begin, end - begin)
        return entries

    def _read_range(
        self, entry: TensorEntry, name: str, offset: int, dest: torch.Tensor, meter: ProgressMeter | None
    ) -> None:
        """Bytes of the file at `offset` -> dest, piece by piece, checking every value. Copies to a GPU are enqueued on
        the current stream."""
        flat = dest.view(-1)  # raises for a non-contiguous destination: our own mistake
        dtype = DTYPES[entry.dtype]
        direct = dest.dtype == dtype and dest.device.type == "cpu"
        piece = _BUFFER_BYTES // dtype.itemsize
        staging = None if direct else self._new_staging(dest.device, min(_BUFFER_BYTES, flat.numel() * dtype.itemsize))
        with self._open(entry.file, offset, offset + flat.numel() * dtype.itemsize) as file:
            for start in range(0, flat.numel(), piece):
                target = flat[start : start + piece]
                source = target if staging is None else staging.take(target.numel() * dtype.itemsize).view(dtype)
                _read_exactly(file, source.view(torch.uint8).numpy().data, entry, name)
                if staging is not None:
                    staging.copy(source, target)
                if not _all_finite(source):
                    raise CheckpointError(
                        f"NaN or infinity among elements {start}..{start + target.numel() - 1} of the slice read; "
                        "the weights are damaged: download the file again",
                        file=str(entry.file),
                        tensor=name,
                    )
                if meter is not None:
                    meter.add(target.numel() * dtype.itemsize)

    def _new_staging(self, device: torch.device, num_bytes: int) -> "_Staging":
        """A GPU's is pinned, which takes a while, so a thread keeps it; another one is gone with the tensor."""
        if device.type != "cuda":
            return _Staging(num_bytes, pinned=False)
        if not hasattr(self._staging, "pinned"):
            self._staging.pinned = _Staging(_BUFFER_BYTES, pinned=True)
        kept: _Staging = self._staging.pinned
        return kept

    def _open(self, path: Path, begin: int, end: int) -> FileIO:
        """Unbuffered, at `begin`."""
        file = FileIO(self._files.open(path.name, begin, end), "rb")
        file.seek(begin)
        return file


class _Staging:
    """Room for a piece on its way from a file to where it is converted or sent; pinned, two, so that one is filled
    while the other is on its way."""

    def __init__(self, num_bytes: int, *, pinned: bool) -> None:
        self._buffers = [torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned) for _ in range(1 + pinned)]
        self._sent = [torch.cuda.Event() for _ in self._buffers] if pinned else []
        self._next = 0

    def take(self, num_bytes: int) -> torch.Tensor:
        if self._sent:
            self._sent[self._next].synchronize()  # at once if it was never recorded
        return self._buffers[self._next][:num_bytes]

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """`source` is what `take` gave."""
        target.copy_(source, non_blocking=bool(self._sent))
        if self._sent:
            self._sent[self._next].record()
            self._next = 1 - self._next


def _read_exactly(file: FileIO, view: memoryview, entry: TensorEntry, name: str) -> None:
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise CheckpointError(f"the file ended early; {_AGAIN}", file=str(entry.file), tensor=name)
        done += count


def _all_finite(values: torch.Tensor) -> bool:
    """min and max carry NaN, and show infinities, without a mask of the tensor's size."""
    if values.dtype == torch.float8_e4m3fn:  # no infinity, and NaN is one magnitude
        return not bool((values.view(torch.uint8) & 0x7F == 0x7F).any())
    low, high = torch.aminmax(values)
    return math.isfinite(float(low)) and math.isfinite(float(high))
