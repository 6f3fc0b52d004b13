"""Read a shard's experts from GPTQ, AWQ and fp8 checkpoints in the forms that `kernels/expert_layer.py` multiplies by,
where `weights.py` would give them as 16-bit numbers. Zero points and scales stay as stored.

All experts that are asked for are read at once, each tensor into its place in a stack, and converted as a stack: a
layer of 128 experts is a few calls instead of thousands."""

from collections.abc import Sequence

import torch

from ..checkpoint import DTYPES, Checkpoint, ProgressMeter
from ..errors import CheckpointError
from ..parallel_reads import Read, read_all
from ..quantized import GROUP, Int4Matrix, from_awq, from_gptq, quantized_form, stack_gate_up

Arguments = tuple[torch.Tensor | Int4Matrix | None, ...]  # of ExpertLayer: w13, w2, w13_scales, w2_scales
_PARTS = ("gate", "up", "down")


def are_quantized(checkpoint: Checkpoint, layer_id: int) -> bool:
    return quantized_form(checkpoint, _base(layer_id, 0, "gate")) is not None


def load_quantized_layer(
    checkpoint: Checkpoint,
    layer_id: int,
    logical_ids: Sequence[int],
    *,
    device: torch.device | str = "cpu",
    meter: ProgressMeter | None = None,
) -> Arguments:
    """`ExpertLayer(*load_quantized_layer(...))`: the experts `logical_ids`, slot by slot. Raises CheckpointError for
    tensors that do not fit the config, KernelError for a quantisation that has no kernel."""
    forms = {quantized_form(checkpoint, _base(layer_id, e, part)) for e in logical_ids for part in _PARTS}
    if len(forms) != 1 or None in forms:
        found = ", ".join(sorted(str(form or "16 bits") for form in forms))
        raise CheckpointError(
            f"a layer's experts must all have one quantised form, layer {layer_id} has: {found}",
            file=str(checkpoint.folder),
        )
    stacks = _Stacks(checkpoint, layer_id, logical_ids, device)
    hidden, width = checkpoint.config.hidden_size, checkpoint.config.moe_intermediate_size
    form = forms.pop()
    if form == "fp8":
        return _load_fp8(stacks, hidden, width, meter)
    gate, up, down = (
        stacks.ask_int4(part, *sizes, gptq=form == "gptq")
        for part, sizes in zip(_PARTS, ((width, hidden), (width, hidden), (hidden, width)), strict=True)
    )
    stacks.read(meter)
    convert = from_gptq if form == "gptq" else from_awq
    return stack_gate_up(convert(*gate), convert(*up)), convert(*down), None, None


def _load_fp8(stacks: "_Stacks", hidden: int, width: int, meter: ProgressMeter | None) -> Arguments:
    blocks_in, blocks_out = -(-hidden // GROUP), -(-width // GROUP)
    w13 = stacks.ask(("gate", "up"), "weight", (width, hidden))
    w13_scales = stacks.ask(("gate", "up"), "weight_scale_inv", (blocks_out, blocks_in))
    w2 = stacks.ask(("down",), "weight", (hidden, width))
    w2_scales = stacks.ask(("down",), "weight_scale_inv", (blocks_in, blocks_out))
    stacks.read(meter)
    return w13, w2, w13_scales.float(), w2_scales.float()


class _Stacks:
    """Tensors of several experts, one after the other in memory; asked for first, then read together."""

    def __init__(
        self, checkpoint: Checkpoint, layer_id: int, logical_ids: Sequence[int], device: torch.device | str
    ) -> None:
        self._checkpoint, self._layer_id, self._logical_ids, self._device = checkpoint, layer_id, logical_ids, device
        self._reads: list[Read] = []

    def ask(self, parts: Sequence[str], kind: str, shape: tuple[int, int] | tuple[int]) -> torch.Tensor:
        """[num_experts, len(parts) * shape[0], ...] as stored: of each expert the parts' tensors `kind`, in order."""
        first = self._checkpoint.entry(f"{_base(self._layer_id, self._logical_ids[0], parts[0])}.{kind}")
        if first.dtype not in DTYPES:
            raise CheckpointError(f"dtype {first.dtype} is not supported", file=str(first.file))
        rows = shape[0]
        stack = torch.empty(
            len(self._logical_ids), len(parts) * rows, *shape[1:], dtype=DTYPES[first.dtype], device=self._device
        )
        for place, expert in enumerate(self._logical_ids):
            for i, part in enumerate(parts):
                dest = stack[place, i * rows : (i + 1) * rows]
                self._reads.append(Read(f"{_base(self._layer_id, expert, part)}.{kind}", dest))
        return stack

    def ask_int4(self, part: str, outputs: int, inputs: int, *, gptq: bool) -> tuple[torch.Tensor, ...]:
        """The arguments of `from_gptq` or `from_awq`."""
        shapes: dict[str, tuple[int, int] | tuple[int]] = {
            "qweight": (inputs // 8, outputs) if gptq else (inputs, outputs // 8),
            "qzeros": (inputs // GROUP, outputs // 8),
            "scales": (inputs // GROUP, outputs),
        }
        if gptq and f"{_base(self._layer_id, self._logical_ids[0], part)}.g_idx" in self._checkpoint:
            shapes["g_idx"] = (inputs,)
        return tuple(self.ask((part,), kind, shape) for kind, shape in shapes.items())

    def read(self, meter: ProgressMeter | None) -> None:
        read_all(self._checkpoint, self._reads, meter=meter)


def _base(layer_id: int, expert: int, part: str) -> str:
    return f"model.layers.{layer_id}.mlp.experts.{expert}.{part}_proj"
