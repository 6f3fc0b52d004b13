"""Read a shard's experts from GPTQ, AWQ and fp8 checkpoints in the forms that `kernels/expert_layer.py` multiplies by,
where `weights.py` would give them as 16-bit numbers. Zero points and scales stay as stored."""

from collections.abc import Sequence

import torch

from ..checkpoint import Checkpoint, ProgressMeter
from ..errors import CheckpointError
from ..quantized import Fp8Matrix, Int4Matrix, quantized_form, read_quantized, stack_experts

Arguments = tuple[torch.Tensor | Int4Matrix | None, ...]  # of ExpertLayer: w13, w2, w13_scales, w2_scales


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
    config = checkpoint.config
    hidden, width = config.hidden_size, config.moe_intermediate_size
    sizes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}

    def read(expert: int, part: str) -> Int4Matrix | Fp8Matrix:
        return read_quantized(checkpoint, _base(layer_id, expert, part), *sizes[part], device=device, meter=meter)

    int4: list[tuple[Int4Matrix, Int4Matrix, Int4Matrix]] = []
    fp8: list[tuple[torch.Tensor, ...]] = []
    for expert in logical_ids:
        gate, up, down = (read(expert, part) for part in sizes)
        if isinstance(gate, Int4Matrix) and isinstance(up, Int4Matrix) and isinstance(down, Int4Matrix):
            int4.append((gate, up, down))
        elif isinstance(gate, Fp8Matrix) and isinstance(up, Fp8Matrix) and isinstance(down, Fp8Matrix):
            w13, w13_scales = torch.cat((gate.values, up.values)), torch.cat((gate.scales, up.scales))
            fp8.append((w13, down.values, w13_scales, down.scales))
    if len(logical_ids) not in (len(int4), len(fp8)):
        raise CheckpointError("a layer's experts must all be int4, or all fp8", file=str(checkpoint.folder))
    return (*stack_experts(int4), None, None) if int4 else tuple(torch.stack(tensors) for tensors in zip(*fp8))


def _base(layer_id: int, expert: int, part: str) -> str:
    return f"model.layers.{layer_id}.mlp.experts.{expert}.{part}_proj"
