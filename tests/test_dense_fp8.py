"""fp8 weights of dense layers, without a GPU: layout, loading as stored, and that the kernels compile cleanly."""

import json

import pytest
import torch
from compiling import compile_each, compile_for

from expertmesh.checkpoint import Checkpoint
from expertmesh.cluster.attention.products import PlainProducts
from expertmesh.cluster.attention.weights import fp8_parameters, load_attention_weights
from expertmesh.dummy_checkpoint import DummyCheckpoint
from expertmesh.errors import KernelError
from expertmesh.kernels import dense_w8a8, jit
from expertmesh.kernels.dense_fp8 import (
    FewRowsPlan,
    Fp8Weight,
    num_slices,
    outputs_of_slice,
    pack_fp8,
    unpack_fp8,
)
from expertmesh.kernels.dense_w8a8_few import SlicePlan
from expertmesh.make_checkpoint import complete_config
from expertmesh.quantized import Fp8Matrix, dequantize

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
CASE = {
    "vocab_size": 256,
    "num_hidden_layers": 2,
    "hidden_size": 256,
    "moe_intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "intermediate_size": 384,
    "mlp_only_layers": [1],
    "quantization_config": FP8,
}


pytestmark = pytest.mark.usefixtures("private_cubins")


@pytest.fixture
def checkpoint(tmp_path) -> Checkpoint:
    (tmp_path / "config.json").write_text(json.dumps(complete_config(CASE)))
    return DummyCheckpoint(tmp_path)


def random_fp8(num_outputs, k):
    values = torch.randint(0, 127, (num_outputs, k), dtype=torch.uint8).view(torch.float8_e4m3fn)
    return values, torch.rand(num_outputs // 128, k // 128)


def test_packing_has_an_exact_inverse_in_the_same_memory():
    values, scales = random_fp8(384, 256)
    before, address = values.clone(), values.data_ptr()
    packed = pack_fp8(values, scales)
    assert packed.shape == (384, 256)
    assert packed.packed.data_ptr() == address
    unpacked, same_scales = unpack_fp8(packed)
    assert torch.equal(unpacked.view(torch.uint8), before.view(torch.uint8))
    assert torch.equal(same_scales, scales)


def test_a_block_is_contiguous_and_its_pieces_are_swizzled():
    values, scales = random_fp8(256, 256)
    expected = values.view(torch.uint8).clone()
    blocks = pack_fp8(values, scales).packed.view(2, 2, 128, 8, 16)
    for output, column in ((0, 0), (131, 70), (255, 255)):
        row, within = output % 128, column % 128
        piece = (within // 16) ^ (row % 8)
        assert blocks[output // 128, column // 128, row, piece, within % 16] == expected[output, column]


def test_shapes_and_scales_without_a_kernel_are_refused():
    values, scales = random_fp8(256, 256)
    with pytest.raises(KernelError, match="multiples of 128"):
        pack_fp8(values[:100], scales)
    with pytest.raises(KernelError, match="float32 scales"):
        pack_fp8(values, scales[:1])
    with pytest.raises(KernelError, match="float32 scales"):
        pack_fp8(values, scales.bfloat16())


def test_kept_weights_are_exactly_those_of_the_checkpoint(checkpoint):
    kept = load_attention_weights(checkpoint, dtype=torch.bfloat16, keep_fp8=True)
    exact = load_attention_weights(checkpoint, dtype=torch.float32)
    for mine, plain in zip(kept.layers, exact.layers, strict=True):
        for name in ("qkv", "o", "w13", "w2"):
            weight, expected = getattr(mine, name), getattr(plain, name)
            assert (weight is None) == (expected is None)
            if weight is not None:
                assert isinstance(weight, Fp8Weight)
                assert torch.equal(dequantize(Fp8Matrix(*unpack_fp8(weight))), expected)
                assert not weight.counters.any()
        if plain.gate is not None:
            assert torch.equal(mine.gate, plain.gate.bfloat16())


def test_the_bytes_that_stay_fp8_are_known_before_loading(checkpoint):
    kept = load_attention_weights(checkpoint, dtype=torch.bfloat16, keep_fp8=True)
    held = [getattr(layer, name) for layer in kept.layers for name in ("qkv", "o", "w13", "w2")]
    assert fp8_parameters(checkpoint) == sum(w.packed.nbytes for w in held if w is not None)


def test_a_matrix_in_parts_of_a_block_is_widened(checkpoint, tmp_path):
    """Two heads of 32 are half a block: k and v have no whole rows of blocks."""
    raw = complete_config({**CASE, "head_dim": 32, "num_attention_heads": 4})
    (tmp_path / "config.json").write_text(json.dumps(raw))
    odd = DummyCheckpoint(tmp_path)
    layer = load_attention_weights(odd, dtype=torch.bfloat16, keep_fp8=True).layers[0]
    assert isinstance(layer.qkv, torch.Tensor)
    assert layer.qkv.dtype == torch.bfloat16
    assert isinstance(layer.o, Fp8Weight)
    assert PlainProducts()(torch.ones(2, 256).bfloat16(), layer.qkv).shape == (2, layer.qkv.shape[0])


GPUS = {
    "sm_80": ((8, 0), 108, 163),
    "sm_89": ((8, 9), 128, 99),
    "sm_90a": ((9, 0), 132, 227),
    "sm_100a": ((10, 0), 148, 227),
}
SHAPES = [(9216, 4096), (4096, 8192), (5120, 2048), (2048, 4096), (51200, 5120), (5120, 25600), (128, 128)]  # N, K


@pytest.mark.parametrize("num_sms", [1, 78, 108, 132, 148])
@pytest.mark.parametrize("num_outputs", [128, 384, 4096, 9216, 51200])
def test_outputs_are_shared_evenly(num_outputs, num_sms):
    num_ctas = num_slices(num_outputs, num_sms)
    eights = num_outputs // 8
    counts = [(i + 1) * eights // num_ctas - i * eights // num_ctas for i in range(num_ctas)]
    assert sum(counts) == eights
    assert 0 < min(counts) <= max(counts) == outputs_of_slice(num_outputs, num_ctas) // 8 <= 16
    assert max(counts) - min(counts) <= 1
    assert num_ctas % num_sms == 0 or num_ctas == eights


@pytest.mark.parametrize("arch", GPUS)
@pytest.mark.parametrize(("num_outputs", "k"), SHAPES)
def test_a_launch_fits_each_gpu(num_outputs, k, arch):
    capability, num_sms, kib = GPUS[arch]
    outputs = outputs_of_slice(num_outputs, num_slices(num_outputs, num_sms))
    plans = [FewRowsPlan.choose(rows, outputs, k, capability) for rows in (1, 8, 9, 16)]
    assert [plan.tile for plan in plans] == [8, 8, 16, 16]
    assert len({plan.parts for plan in plans}) == 1
    for plan in plans:
        assert plan.stages >= 2
        assert plan.shared_bytes + 1024 <= kib << 10
        assert plan.num_threads <= 704


@pytest.mark.parametrize(("num_outputs", "k"), SHAPES)
def test_a_launch_of_some_rows_fits_hopper(num_outputs, k):
    outputs = outputs_of_slice(num_outputs, num_slices(num_outputs, 132))
    plans = [SlicePlan.choose(rows, outputs, k) for rows in (1, 17, 64, 128)]
    assert [plan.tile for plan in plans] == [8, 32, 64, 128]
    for plan in plans:
        assert plan.stages >= 3
        assert plan.shared_bytes + 1024 <= 227 << 10
        assert plan.num_threads == (384 if outputs > 64 or k % 256 == 0 else 256)


@pytest.mark.parametrize(("num_outputs", "k"), SHAPES[:4])
def test_kernels_compile_without_spills(num_outputs, k):
    plans = []
    for arch in jit.SUPPORTED_ARCHS:
        capability, num_sms, _ = GPUS[arch]
        outputs = outputs_of_slice(num_outputs, num_slices(num_outputs, num_sms))
        plans += [(arch, FewRowsPlan.choose(rows, outputs, k, capability)) for rows in (8, 16)]
    each = compile_each(("dense_fp8.cu", arch, {"K": k, **plan.defines}) for arch, plan in plans)
    for (arch, plan), compiled in zip(plans, each, strict=True):
        (use,) = compiled.use()
        assert use.clean, (arch, use)
        assert use.registers * plan.num_threads <= 65536
    for file in ("dequantize_fp8.cu", "quantize_rows.cu"):
        for compiled in compile_for(jit.SUPPORTED_ARCHS, file, {"K": k}):
            (use,) = compiled.use()
            assert use.clean, (compiled.key, use)


@pytest.mark.parametrize(("num_outputs", "k"), SHAPES[:4])
def test_products_of_some_rows_compile_without_spills_or_waits_in_between(num_outputs, k):
    outputs = outputs_of_slice(num_outputs, num_slices(num_outputs, 132))
    plans = [SlicePlan.choose(rows, outputs, k) for rows in (8, 16, 32, 64, 128)]
    for compiled in compile_each(("dense_w8a8_few.cu", "sm_90a", {"K": k, **plan.defines}) for plan in plans):
        (use,) = compiled.use()
        assert use.clean, use
        assert "wgmma" not in compiled.log  # ptxas tells of products that it serialises


@pytest.mark.parametrize("tile", dense_w8a8.TILES)
def test_the_product_of_many_rows_compiles_without_spills_or_waits_in_between(tile):
    assert dense_w8a8.shared_bytes(tile) + 1024 <= 227 << 10
    defines = {"TILE": tile, "STAGES": dense_w8a8.stages_for(tile)}
    for compiled in compile_each(("dense_w8a8.cu", "sm_90a", {"K": k, **defines}) for k in (2048, 4096, 8192)):
        (use,) = compiled.use()
        assert use.clean, (compiled.key, use)
        assert "wgmma" not in compiled.log


@pytest.mark.parametrize(("rows", "tile"), [(1, 128), (128, 128), (129, 192), (256, 128), (512, 192), (2048, 192)])
def test_tiles_are_chosen_as_they_were_measured(rows, tile):
    assert dense_w8a8.tile_for(rows) == tile
