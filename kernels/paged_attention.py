"""Call the attention kernels that `deploy/build_attention.py` compiled ahead of time from FlashInfer's templates.

Why not through FlashInfer's Python: its `plan` costs more host time than a small step has, chooses tiles by itself and
ties a graph to a schedule. Its kernels are called at the level of their headers instead, with index arrays that
`cluster/attention/schedule.py` makes; a call is one C function, a struct of pointers and sizes, no Python object.
Nothing of FlashInfer is imported, and nothing is compiled, where this runs. The libraries lie in a package
`expertmesh_attention` (a folder on the path), named by kernel, head size and architecture; its key names the sources
they were built from, so that a library of other sources is refused. Kernels: FlashInfer (Ye et al.), FlashAttention."""

import ctypes
import functools
import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import KernelError
from .flashinfer_fixes import FIXES
from .widen_kv import widen_kv

PACKAGE = "expertmesh_attention"  # holds the libraries and KEY_FILE
KEY_FILE = "key.txt"
FLASHINFER = "0.6.8.post1"  # the headers' version
SOURCES = ("paged_attention.cu", "paged_attention_e4m3.cuh", "paged_prefill.cu", "paged_attention_call.cuh")
HEAD_SIZES = (64, 128)
PREFILL_HEAD_SIZES = (128,)  # paged_prefill.cu
KV_FP8 = "_fp8"  # ending of the kernel's name where pages hold e4m3
_BUILD = "build it with `python -m expertmesh.deploy.build_attention` (docs/deploy.md), or choose attention='torch'"


class _Call(ctypes.Structure):
    """Fields by name; tensors are kept alive by whoever fills it in."""

    def fill(self, **values: Any) -> None:
        for name, value in values.items():
            setattr(self, name, value.data_ptr() if isinstance(value, torch.Tensor) else value)


class AttentionCall(_Call):
    """Fa2Call of paged_attention_call.cuh."""

    _fields_ = [
        *[(n, ctypes.c_void_p) for n in ("q", "o", "k", "v", "stream", "partial_o", "partial_lse")],
        *[(n, ctypes.c_void_p) for n in ("q_starts", "q_lens", "kv_lens", "page_starts", "pages")],
        *[(n, ctypes.c_void_p) for n in ("item_request", "item_q_tile", "item_chunk")],
        *[(n, ctypes.c_void_p) for n in ("o_starts", "merge_starts", "chunk_size")],
        *[(n, ctypes.c_int64) for n in ("page_stride", "kv_stride_n", "kv_stride_h")],
        *[(n, ctypes.c_int32) for n in ("q_stride_n", "q_stride_h", "num_heads", "num_kv_heads", "page_size")],
        *[(n, ctypes.c_int32) for n in ("num_requests", "num_items", "num_rows", "tile_q", "num_sms", "device")],
        ("overlap", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("mma_kv", ctypes.c_int32),
    ]


class PrefillCall(_Call):
    """Fa3Call of paged_attention_call.cuh."""

    _fields_ = [
        *[(n, ctypes.c_void_p) for n in ("q", "o", "k", "v", "stream", "pages", "work_starts")],
        *[(n, ctypes.c_void_p) for n in ("work_head", "work_q_tile", "work_q_start")],
        *[(n, ctypes.c_void_p) for n in ("work_page_start", "work_q_len", "work_kv_len")],
        *[(n, ctypes.c_int64) for n in ("page_stride", "kv_stride_n", "kv_stride_h")],
        *[(n, ctypes.c_int64) for n in ("q_stride_n", "q_stride_h", "o_stride_n", "o_stride_h")],
        *[(n, ctypes.c_int32) for n in ("num_heads", "num_kv_heads", "page_size", "num_tokens", "device")],
        ("scale", ctypes.c_float),
    ]


assert (ctypes.sizeof(AttentionCall), ctypes.sizeof(PrefillCall)) == (8 * 21 + 4 * 14, 8 * 20 + 4 * 6)


@dataclass(frozen=True, slots=True)
class AttentionLibrary:
    """The two kernels for one head size and device, and what turns pages of e4m3 into bf16 for the second."""

    attention: Any
    prefill: Any | None  # None: not for this head size or architecture

    @property
    def has_prefill(self) -> bool:
        return self.prefill is not None

    def attend(self, call: AttentionCall) -> None:
        _run(self.attention, call)

    def attend_long(self, call: PrefillCall) -> None:
        assert self.prefill is not None
        _run(self.prefill, call)

    widen = staticmethod(widen_kv)


def load_library(head_dim: int, device: torch.device, kv_dtype: torch.dtype = torch.bfloat16) -> AttentionLibrary:
    """Raises KernelError, with what to do, where there is none for this head size, KV and GPU."""
    if device.type != "cuda":
        raise KernelError(f"the attention kernels run on a GPU, not on {device}; choose attention='torch'")
    return _load(head_dim, architecture(*torch.cuda.get_device_capability(device)), kv_dtype == torch.float8_e4m3fn)


def architecture(major: int, minor: int) -> str:
    """The architecture whose libraries a GPU of this compute capability loads."""
    if major < 8:
        raise KernelError(
            f"compute capability {major}.{minor} is too old for the attention kernels (8.0); choose attention='torch'"
        )
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


def source_key() -> str:
    """Names what the libraries are built from."""
    folder = Path(__file__).parent
    texts = [(folder / name).read_text() for name in SOURCES]
    return hashlib.sha256("\n".join([FLASHINFER, repr(FIXES), *texts]).encode()).hexdigest()[:16]


def library_name(kernel: str, head_dim: int, arch: str) -> str:
    return f"{kernel}_{head_dim}_{arch}.so"


@functools.cache
def _load(head_dim: int, arch: str, kv_fp8: bool = False) -> AttentionLibrary:
    folder = _folder()
    path = folder / library_name("paged_attention" + (KV_FP8 if kv_fp8 else ""), head_dim, arch)
    if not path.is_file():
        raise KernelError(
            f"{folder} has no attention kernel for head size {head_dim} and {'fp8' if kv_fp8 else 'bf16'} KV on {arch} "
            f"({path.name}); {_BUILD}"
        )
    found, expected = (folder / KEY_FILE).read_text().strip(), source_key()
    if found != expected:
        raise KernelError(f"the attention kernels in {folder} are of sources {found}, this is {expected}; {_BUILD}")
    long = folder / library_name("paged_prefill", head_dim, arch)
    return AttentionLibrary(
        _function(path, "expertmesh_paged_attention"),
        _function(long, "expertmesh_paged_prefill") if long.is_file() else None,
    )


def _folder() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise KernelError(f"the attention kernels are not built (no package {PACKAGE}); {_BUILD}")
    return Path(next(iter(spec.submodule_search_locations)))


def _function(path: Path, name: str) -> Any:
    try:
        function = getattr(ctypes.CDLL(str(path)), name)
    except (OSError, AttributeError) as error:
        raise KernelError(f"{path} cannot be loaded: {error}; {_BUILD}") from error
    function.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int)
    function.restype = ctypes.c_int
    return function


_message = ctypes.create_string_buffer(512)


def _run(function: Any, call: _Call) -> None:
    if function(ctypes.byref(call), _message, len(_message)):
        raise KernelError(f"attention kernel: {_message.value.decode(errors='replace')}")
