"""Products of fp8 dense layers on a GPU: exact weights, any number of rows, rows that do not see each other, graphs."""

import json

import pytest
import torch

from expertmesh.cluster.attention.products import InvariantProducts, PlainProducts
from expertmesh.cluster.attention.weights import load_attention_weights
from expertmesh.dummy_checkpoint import DummyCheckpoint
from expertmesh.errors import KernelError
from expertmesh.kernels import reference
from expertmesh.kernels.dense_fp8 import Fp8Weight, dense_fp8, pack_fp8, unpack_fp8
from expertmesh.kernels.dense_w8a8 import TILES, dense_w8a8, has_kernel, quantize_rows
from expertmesh.kernels.dense_w8a8_few import dense_w8a8_few
from expertmesh.kernels.dequantize_fp8 import dequantize_fp8
from expertmesh.kernels.pack import swizzle
from expertmesh.make_checkpoint import complete_config

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
DEVICE = "cuda"
BF16 = torch.bfloat16
SHAPES = ((128, 128), (384, 256), (1024, 2048), (4096, 8192), (9216, 4096))  # N, K
ROWS = (1, 2, 7, 8, 9, 16, 17, 32, 33, 63, 64, 65, 200)


def weight_of(num_outputs, k, seed=0):
    """Every byte but NaN, scales of several sizes."""
    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    raw = torch.randint(0, 254, (num_outputs, k), dtype=torch.uint8, device=DEVICE, generator=generator)
    raw += raw >= 0x7F
    scales = torch.rand(num_outputs // 128, k // 128, device=DEVICE, generator=generator) * 1e-3 + 1e-6
    return pack_fp8(raw.view(torch.float8_e4m3fn), scales)


def exact(w):
    return reference.dequantize_blocks(*unpack_fp8(w), dtype=torch.float64)


def rows_of(num_rows, k, seed=1):
    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    return torch.randn(num_rows, k, device=DEVICE, generator=generator).to(BF16)


def assert_is_the_product(got, x, w):
    """float32 sums, rounded once to bf16."""
    expected = x.double() @ exact(w).T
    difference = (got.double() - expected).abs()
    assert got.shape == expected.shape
    assert bool((difference <= 2**-8 * expected.abs() + 2e-5 * expected.square().mean().sqrt()).all())


@pytest.mark.parametrize(("num_outputs", "k"), SHAPES)
@pytest.mark.parametrize("num_rows", ROWS)
def test_the_product_is_that_of_the_exact_weights(num_rows, num_outputs, k):
    x, w = rows_of(num_rows, k), weight_of(num_outputs, k)
    assert_is_the_product(dense_fp8(x, w), x, w)


def test_nothing_comes_of_no_rows():
    w = weight_of(256, 256)
    assert dense_fp8(rows_of(0, 256), w).shape == (0, 256)
    with pytest.raises(KernelError, match="x must be"):
        dense_fp8(rows_of(1, 128), w)


@pytest.mark.parametrize("rows", [8, 16])
def test_every_number_is_widened_exactly(rows):
    """A row of one 1.0 takes a column of w as it is, subnormals included."""
    w = weight_of(256, 256)
    x = torch.eye(256, device=DEVICE).to(BF16)
    got = torch.cat([dense_fp8(few.contiguous(), w) for few in x.split(rows)])
    assert torch.equal(got, exact(w).float().T.to(BF16))


@pytest.mark.parametrize(("num_outputs", "k"), [(9216, 4096), (4096, 8192), (384, 256)])
def test_a_rows_bits_depend_on_that_row_alone(num_outputs, k):
    x, w = rows_of(64, k), weight_of(num_outputs, k)
    for product in (dense_fp8, dense_w8a8_few) if has_kernel(x.device) else (dense_fp8,):
        whole = product(x, w)
        assert torch.equal(product(x, w), whole)
        for first, last in ((0, 1), (5, 6), (63, 64), (3, 11), (10, 26), (20, 52), (0, 33)):
            assert torch.equal(product(x[first:last].contiguous(), w), whole[first:last])
        spoilt = x.clone()
        spoilt[17] = float("nan")
        got = product(spoilt, w)
        assert bool(got[17].isnan().all())
        others = [row for row in range(64) if row != 17]
        assert torch.equal(got[others], whole[others])


def test_a_graph_of_products_gives_the_same_bits_again_and_again():
    weights = [weight_of(9216, 4096), weight_of(4096, 8192, seed=2)]
    inputs = [rows_of(5, 4096), rows_of(5, 8192)]
    expected = [dense_fp8(x, w) for x, w in zip(inputs, weights, strict=True)]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = [dense_fp8(x, w) for x, w in zip(inputs, weights, strict=True) for _ in range(4)]
    for _ in range(5):
        graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected[i // 4]) for i, y in enumerate(got))


@pytest.mark.parametrize(("num_outputs", "k"), SHAPES)
def test_dequantised_weights_are_rounded_once(num_outputs, k):
    w = weight_of(num_outputs, k)
    assert torch.equal(dequantize_fp8(w), exact(w).float().to(BF16))


# ------------------------------------------------------------------------------------------------ many rows, in fp8
hopper = pytest.mark.skipif(not has_kernel(torch.device(DEVICE)), reason="wgmma is of capability 9.0")


@pytest.mark.parametrize("k", [128, 384, 4096])
@pytest.mark.parametrize("num_rows", [1, 9, 130])
def test_rows_are_quantised_as_in_plain_torch(num_rows, k):
    x = rows_of(num_rows, k)
    x[0, :128] = 0
    x[-1, -1] = 3e4
    packed, scales = quantize_rows(x, 192)
    values, expected_scales = reference.quantize_fp8(x)
    assert torch.equal(scales[:, :num_rows].T, expected_scales)
    got = swizzle(packed.view(k // 128, 192, 8, 16)).view(k // 128, 192, 128)[:, :num_rows]
    assert torch.equal(got.transpose(0, 1).reshape(num_rows, k), values.view(torch.uint8))


def assert_is_nearly(got, x, w):
    """On the same quantised rows; the tensor cores add fp8 products of a block in fewer bits than float32's."""
    expected = reference.dequantize_fp8(*reference.quantize_fp8(x), dtype=torch.float64) @ exact(w).T
    difference = (got.double() - expected).abs()
    assert float(difference.norm() / expected.norm()) <= 1e-2
    assert bool((difference <= 1e-2 * expected.abs() + 5e-2 * expected.square().mean().sqrt()).all())


@hopper
@pytest.mark.parametrize(("num_outputs", "k"), SHAPES)
@pytest.mark.parametrize("num_rows", [1, 8, 17, 32, 63, 64, 65, 96, 128, 200])
def test_some_rows_give_the_product_of_quantised_rows(num_rows, num_outputs, k):
    x, w = rows_of(num_rows, k), weight_of(num_outputs, k)
    assert_is_nearly(dense_w8a8_few(x, w), x, w)


@hopper
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("num_outputs", "k"), SHAPES)
@pytest.mark.parametrize("num_rows", [1, 64, 127, 129, 600, 2048])
def test_many_rows_give_the_product_of_quantised_rows(num_rows, num_outputs, k, tile):
    x, w = rows_of(num_rows, k), weight_of(num_outputs, k)
    got = dense_w8a8(x, w, tile=tile)
    assert_is_nearly(got, x, w)
    assert torch.equal(dense_w8a8(x, w, tile=tile), got)
    assert not w.counters.any()


@hopper
def test_nan_stays_in_its_row_among_many():
    x, w = rows_of(300, 4096), weight_of(1024, 4096)
    whole = dense_w8a8(x, w)
    x[131, 7] = float("nan")
    got = dense_w8a8(x, w)
    assert bool(got[131].isnan().all())
    others = [row for row in range(300) if row != 131]
    assert torch.equal(got[others], whole[others])


# ---------------------------------------------------------------------------------------------------- the tier's choice
@pytest.mark.parametrize("num_rows", [1, 16, 17, 128, 129, 600, 2048])
def test_plain_products_are_within_the_tolerance_of_logits(num_rows):
    x, w = rows_of(num_rows, 4096), weight_of(1024, 4096)
    got, expected = PlainProducts()(x, w), (x.double() @ exact(w).T)
    assert float((got.double() - expected).norm() / expected.norm()) <= 5e-2


def test_invariant_products_give_a_row_its_bits_in_any_batch():
    w = weight_of(1024, 4096)
    products, x = InvariantProducts([w]), rows_of(256, 4096)
    whole = products(x, w)
    moved = torch.cat([x[100:101], rows_of(127, 4096, seed=9)])
    assert torch.equal(products(moved, w)[0], whole[100])


def test_an_fp8_checkpoints_projections_stay_fp8_on_a_gpu(tmp_path):
    raw = {
        "vocab_size": 512,
        "hidden_size": 512,
        "moe_intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    }
    (tmp_path / "config.json").write_text(json.dumps(complete_config(raw)))
    checkpoint = DummyCheckpoint(tmp_path)
    kept = load_attention_weights(checkpoint, dtype=BF16, device=DEVICE, keep_fp8=True)
    widened = load_attention_weights(checkpoint, dtype=BF16, device=DEVICE)
    for mine, plain in zip(kept.layers, widened.layers, strict=True):
        assert isinstance(mine.qkv, Fp8Weight)
        assert torch.equal(dequantize_fp8(mine.qkv), plain.qkv)
        assert torch.equal(dequantize_fp8(mine.o), plain.o)
