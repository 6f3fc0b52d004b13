"""A checkpoint of which only config.json exists: its tensors are seeded noise, made where they are asked for.

For benchmarks and sizing (`load_format: dummy`): nothing is read from disk, so a model of 235B parameters starts as
fast as a GPU writes, and every other line of code is the one that serves. The noise is chosen so that a step costs
what it costs with real weights: embeddings and norms of unit size and a random router keep the tokens of a batch apart,
so that their top-k is even over the experts; what each layer adds is scaled by 1 / sqrt(2 * layers), so activations
stay of order one at any depth. Forms follow config.json: 16-bit numbers; fp8 with scales of 128x128 blocks (all
bytes but NaN are as likely); GPTQ and AWQ nibbles in groups of 128.

A tensor depends on its name alone (a generator on the target device, seeded by the name's hash), so an expert has the
same bytes in every slot, rank and process on GPUs of one kind; a CPU draws others than a GPU.
Idea: vLLM's dummy load format, with weights that route as trained ones do."""

import functools
import hashlib
import json
import math
import threading
from pathlib import Path

import torch

from .checkpoint import DTYPES, Checkpoint, ProgressMeter, TensorEntry
from .errors import CheckpointError
from .make_checkpoint import tensor_shapes
from .model_config import ModelConfig
from .quantized import GROUP

Shape = tuple[int, ...]
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANDOM_NIBBLE_RMS = math.sqrt(sum((q - 8) ** 2 for q in (8, *range(1, 16))) / 16)


class DummyCheckpoint(Checkpoint):
    """A folder with a config.json; weights in it are not looked at."""

    reads_files = False

    def _read_weight_map(self, *, all_here: bool) -> dict[str, Path]:
        path = self.folder / "config.json"
        raw = json.loads(path.read_text(encoding="utf-8"))
        quantization = raw.get("quantization_config") or raw.get("compression_config") or {}
        method = str(quantization.get("quant_method", ""))
        self._entries = {
            name: TensorEntry(path, dtype, shape, 0, math.prod(shape) * DTYPES[dtype].itemsize)
            for name, (dtype, shape) in stored_tensors(self.config, method).items()
        }
        self._generators = threading.local()
        return dict.fromkeys(self._entries, path)

    def _read_header(self, path: Path) -> dict[str, TensorEntry]:
        return self._entries

    def _read_range(
        self, entry: TensorEntry, name: str, offset: int, dest: torch.Tensor, meter: ProgressMeter | None
    ) -> None:
        stored, start = DTYPES[entry.dtype], offset // DTYPES[entry.dtype].itemsize
        if dest.numel() == math.prod(entry.shape) and dest.dtype == stored:
            self._fill(name, entry.shape, dest.view(-1))
        else:  # a slice, or converted: the values stay those of the whole tensor as stored
            whole = torch.empty(math.prod(entry.shape), dtype=stored, device=dest.device)
            self._fill(name, entry.shape, whole)
            dest.view(-1).copy_(whole[start : start + dest.numel()])
        if meter is not None:
            meter.add(dest.numel() * stored.itemsize)

    def _fill(self, name: str, shape: Shape, flat: torch.Tensor) -> None:
        """One whole tensor [n] in its stored dtype."""
        part = name.rpartition(".")[2]
        if part == "g_idx":
            torch.arange(flat.numel(), dtype=flat.dtype, device=flat.device, out=flat)
            flat.div_(GROUP, rounding_mode="floor")
        elif part == "qzeros":  # 8 everywhere; GPTQ stores it minus one
            flat.fill_(0x77777777 if f"{name.removesuffix('qzeros')}g_idx" in self else -0x77777778)
        elif part in ("scales", "weight_scale_inv"):
            base = name.removesuffix(part)
            fp8 = part == "weight_scale_inv"
            fan_in = self.entry(base + "weight").shape[1] if fp8 else shape[0] * GROUP
            rms = _random_e4m3_rms() if fp8 else _RANDOM_NIBBLE_RMS
            flat.fill_(_deviation(base + "weight", fan_in, self.config) / rms)
        elif part == "qweight":
            _draw_nibbles(flat.view(torch.uint8), self._generator(name, flat.device))
        elif flat.dtype == torch.float8_e4m3fn:
            drawn = flat.view(torch.uint8).random_(0, 254, generator=self._generator(name, flat.device))
            drawn.add_(drawn >= 0x7F)  # 0x7F and 0xFF are NaN
        elif name.endswith("norm.weight"):
            flat.fill_(1.0)
        else:
            deviation = _deviation(name, shape[-1], self.config)
            flat.normal_(0.0, deviation, generator=self._generator(name, flat.device))

    def _generator(self, name: str, device: torch.device) -> torch.Generator:
        """Of this thread, at the place where the tensor's numbers begin."""
        of_device = self._generators.__dict__
        key = str(device)
        if key not in of_device:
            of_device[key] = torch.Generator(device=device)
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1
        return of_device[key].manual_seed(seed)


def stored_tensors(config: ModelConfig, method: str) -> dict[str, tuple[str, Shape]]:
    """Every tensor of a released checkpoint in this form: name -> dtype, shape. `method` as in quantization_config,
    "" for 16-bit weights."""
    number = _NAMES.get(getattr(torch, config.dtype, torch.bfloat16), "BF16")
    out: dict[str, tuple[str, Shape]] = {}
    for name, shape in tensor_shapes(config).items():
        base = name.removesuffix(".weight")
        if not method or not base.endswith("_proj"):
            out[name] = (number, shape)
        elif method == "fp8":
            out[name] = ("F8_E4M3", shape)
            out[base + ".weight_scale_inv"] = ("BF16", (-(-shape[0] // GROUP), -(-shape[1] // GROUP)))
        elif shape[1] % GROUP or shape[0] % 8:
            raise CheckpointError(
                f"{list(shape)} has no {method} form with groups of {GROUP}; take another config.json", tensor=name
            )
        else:
            outputs, inputs = shape
            qweight = (inputs // 8, outputs) if method == "gptq" else (inputs, outputs // 8)
            out[base + ".qweight"] = ("I32", qweight)
            out[base + ".qzeros"] = ("I32", (inputs // GROUP, outputs // 8))
            out[base + ".scales"] = ("F16", (inputs // GROUP, outputs))
            if method == "gptq":
                out[base + ".g_idx"] = ("I32", (inputs,))
    return out


def _deviation(name: str, fan_in: int, config: ModelConfig) -> float:
    """Standard deviation of a tensor's numbers, for inputs of unit size."""
    added = 1.0 / math.sqrt(2 * config.num_layers)  # of what a layer adds to its input, twice
    if name.endswith("embed_tokens.weight"):
        return 1.0
    if name.endswith("lm_head.weight"):
        return 3.0 / math.sqrt(fan_in)
    if name.endswith("o_proj.weight"):
        return added / math.sqrt(fan_in)
    if name.endswith("down_proj.weight"):
        return 2.0 * added / math.sqrt(fan_in)  # silu(gate) * up has a deviation near one half
    return 1.0 / math.sqrt(fan_in)


def _draw_nibbles(packed: torch.Tensor, generator: torch.Generator) -> None:
    """1 to 15, and 8 twice as often: on average 8, the zero point. Else all weights would share a little of one sign,
    which grows from layer to layer until every token looks, and is routed, like every other."""
    packed.random_(0, 256, generator=generator)
    packed.add_((packed & 0x0F == 0).mul(torch.tensor(0x08, dtype=torch.uint8)))
    packed.add_((packed < 0x10).mul(torch.tensor(0x80, dtype=torch.uint8)))


@functools.cache
def _random_e4m3_rms() -> float:
    """Of a number whose byte is any but NaN."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    return float(values[~values.isnan()].square().mean().sqrt())
