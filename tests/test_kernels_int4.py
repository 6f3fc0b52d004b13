"""int4 and W8A16 weights without a GPU: checkpoint layouts, packed layouts and their inverses, references, plans, and
that every form compiles cleanly for every architecture."""

import pytest
import torch
from compiling import compile_each

from expertmesh.errors import KernelError
from expertmesh.kernels import jit, pack_int4, reference
from expertmesh.kernels.expert_layer import ExpertLayer
from expertmesh.kernels.grouped_gemm_mma import SHARED_BYTES, choose_mma_plan
from expertmesh.kernels.pack_int4 import random_int4
from expertmesh.kernels.pack_mma import pack_mma, unpack_mma
from expertmesh.quantized import AWQ_ORDER, Int4Matrix, dequantize_int4, from_awq, from_gptq, unpack_nibbles


def words(values: torch.Tensor) -> torch.Tensor:
    """[..., 8] integers 0..15 -> int32, the first in the lowest nibble; written as the checkpoints' writers do."""
    word = sum(values[..., i].to(torch.int64) << (4 * i) for i in range(8))
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)


def gptq_tensors(q, zeros, scales):
    """q [in, out], zeros and scales [in / 128, out] -> qweight, qzeros, scales, g_idx."""
    qweight = words(q.view(-1, 8, q.shape[1]).transpose(1, 2))
    qzeros = words(((zeros.int() - 1) % 16).view(zeros.shape[0], -1, 8))
    return qweight, qzeros, scales, torch.arange(q.shape[0], dtype=torch.int32) // 128


def awq_tensors(q, zeros, scales):
    order = list(AWQ_ORDER)
    return words(q.view(q.shape[0], -1, 8)[..., order]), words(zeros.view(zeros.shape[0], -1, 8)[..., order]), scales


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_checkpoint_tensors_come_back_as_the_weights_they_stand_for(kind, symmetric):
    generator = torch.Generator().manual_seed(0)
    inputs, outputs = 256, 24
    q = torch.randint(0, 16, (inputs, outputs), generator=generator)
    zeros = torch.full((2, outputs), 8) if symmetric else torch.randint(0, 16, (2, outputs), generator=generator)
    scales = (torch.rand(2, outputs, generator=generator) * 0.01).half()
    made = from_gptq(*gptq_tensors(q, zeros, scales)) if kind == "gptq" else from_awq(*awq_tensors(q, zeros, scales))
    assert (made.zeros is None) == (symmetric and kind == "gptq")
    expected = torch.empty(outputs, inputs, dtype=torch.float64)
    for i in range(inputs):
        for o in range(outputs):
            expected[o, i] = (int(q[i, o]) - int(zeros[i // 128, o])) * float(scales[i // 128, o])
    assert torch.equal(dequantize_int4(made, torch.float64), expected)


def test_symmetric_gptq_zero_points_are_stored_as_sevens():
    qweight, qzeros, scales, g_idx = gptq_tensors(
        torch.zeros(128, 8).int(), torch.full((1, 8), 8), torch.ones(1, 8).half()
    )
    assert qzeros.tolist() == [[0x77777777]]
    assert dequantize_int4(from_gptq(qweight, qzeros, scales, g_idx)).unique().tolist() == [-8.0]


def test_what_int4_cannot_take_is_refused_with_the_reason():
    q, zeros, scales = torch.zeros(256, 8).int(), torch.full((2, 8), 8), torch.ones(2, 8).half()
    qweight, qzeros, scales, g_idx = gptq_tensors(q, zeros, scales)
    with pytest.raises(KernelError, match="desc_act"):
        from_gptq(qweight, qzeros, scales, g_idx.flip(0))
    with pytest.raises(KernelError, match="groups of 128"):
        from_gptq(qweight, qzeros, scales[:1], g_idx)
    with pytest.raises(KernelError, match="float32"):
        from_awq(*awq_tensors(q, zeros, scales.float()))
    with pytest.raises(KernelError, match="multiple of 128"):
        pack_mma(*random_int4(1, 192, 128))
    w13, w2 = random_int4(2, 128, 128)
    with pytest.raises(KernelError, match="one for the layer"):
        pack_mma(w13, Int4Matrix(w2.nibbles, w2.scales.bfloat16(), None))
    with pytest.raises(KernelError, match="int4"):
        pack_mma(w13, torch.zeros(2, 128, 128).bfloat16())


def layer(form, hidden, intermediate, zeros=False):
    if form == "int4":
        return random_int4(3, hidden, intermediate, zeros=zeros)
    generator = torch.Generator().manual_seed(1)
    w13, w2 = (
        torch.randint(0, 256, (3, *shape), dtype=torch.uint8, generator=generator)
        for shape in ((2 * intermediate, hidden), (hidden, intermediate))
    )
    if form == "bf16":
        return tuple(torch.stack((w, w.flip(-1)), -1).flatten(-2).view(torch.bfloat16) for w in (w13, w2))
    scales = [torch.rand(3, w.shape[1] // 128, w.shape[2] // 128, generator=generator) for w in (w13, w2)]
    return w13.view(torch.float8_e4m3fn), w2.view(torch.float8_e4m3fn), *scales


def same(a, b):
    if isinstance(a, Int4Matrix):
        return all(same(getattr(a, n), getattr(b, n)) for n in ("nibbles", "scales", "zeros"))
    return a is b if a is None or b is None else torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize(("form", "zeros"), [("bf16", False), ("w8a16", False), ("int4", False), ("int4", True)])
@pytest.mark.parametrize(("hidden", "intermediate"), [(128, 128), (384, 256), (256, 640)])
def test_packing_has_an_exact_inverse(form, zeros, hidden, intermediate):
    weights = layer(form, hidden, intermediate, zeros)
    packed = pack_mma(*weights)
    back = unpack_mma(packed)
    assert all(same(a, b) for a, b in zip(weights, back))
    bits = 8 * (packed.w13.numel() + packed.w2.numel()) / (9 * hidden * intermediate)
    assert bits == {"bf16": 16, "w8a16": 8 + 8 * 32 / 8192, "int4": 4.25 if zeros else 4.125}[form]


def test_a_lane_finds_its_fragment_in_sixteen_bytes():
    """w2, output row 16 + g (+ 8), columns 2 t, 2 t + 1 (+ 8) of each step of 16: int4 steps 4..7 of lane (g, t)."""
    w13, w2 = random_int4(1, 128, 128)
    block = pack_mma(w13, w2).w2[0, 0, 0]
    q = unpack_nibbles(w2.nibbles)[0]
    g, t = 5, 3
    vector = block.view(-1)[: 4 * 2 * 512].view(4, 2, 32, 4, 4)[1, 1, 4 * g + t]  # 16 outputs, vector, lane, word, byte
    for step in range(4):
        word = int.from_bytes(bytes(vector[step].tolist()), "little")
        for register in range(4):
            row, column = 16 + g + 8 * (register & 1), 16 * (4 + step) + 8 * (register >> 1) + 2 * t
            assert word >> (4 * register) & 0x000F000F == int(q[row, column]) | int(q[row, column + 1]) << 16


def test_an_e4m3_lane_finds_the_bytes_of_a_register_sixteen_bits_apart():
    """w2, output row 16 + g (+ 8): register 0 and 2 widen bytes 0 and 2 of a word, 1 and 3 its bytes 1 and 3."""
    w13, w2, *scales = layer("w8a16", 128, 128)
    block = pack_mma(w13, w2, *scales).w2[0, 0, 0]
    raw = w2.view(torch.uint8)[0]
    g, t = 2, 1
    vector = block[: 4 * 4 * 512].view(4, 4, 32, 2, 8)[1, 3, 4 * g + t]  # 16 outputs, vector, lane, step, byte
    for step in range(2):
        for register in range(4):
            row, column = 16 + g + 8 * (register & 1), 16 * (6 + step) + 8 * (register >> 1) + 2 * t
            first = 4 * (register >> 1) + (register & 1)
            assert vector[step, [first, first + 2]].tolist() == raw[row, [column, column + 1]].tolist()


def test_int4_reference_is_the_product_of_the_dequantised_weights():
    w13, w2 = random_int4(3, 128, 128, zeros=True)
    x, ids = torch.randn(6, 128), torch.tensor([[0, -1], [2, 1], [1, 0], [-1, -1], [2, 0], [1, 2]], dtype=torch.int32)
    plain = [dequantize_int4(w, torch.float64) for w in (w13, w2)]
    expected = reference.expert_rows(x, ids, *plain, dtype=torch.float64)
    assert torch.equal(pack_int4.expert_rows_int4(x, ids, w13, w2, dtype=torch.float64), expected)


# ------------------------------------------------------------------------------------------------- plans, compilation
CAPABILITIES = {"sm_80": (8, 0), "sm_89": (8, 9), "sm_90a": (9, 0), "sm_100a": (10, 0)}


def test_the_torch_path_takes_every_form():
    x, ids = (
        torch.randn(5, 256).bfloat16(),
        torch.tensor([[0, 2], [1, -1], [2, 2], [-1, -1], [0, 1]], dtype=torch.int32),
    )
    w13, w2 = random_int4(3, 256, 128)
    expected = pack_int4.expert_rows_int4(x, ids, w13, w2, dtype=torch.float64)
    got = ExpertLayer(w13, w2, kernels="torch").rows(x, ids).double()
    assert (got - expected).norm() < 4e-3 * expected.norm()
    (q13, s13), (q2, s2) = (reference.quantize_blocks(dequantize_int4(w)) for w in (w13, w2))
    plain = [reference.dequantize_blocks(q, s, dtype=torch.float64) for q, s in ((q13, s13), (q2, s2))]
    expected = reference.expert_rows(x, ids, *plain, dtype=torch.float64)
    got = ExpertLayer(q13, q2, s13, s2, kernels="torch", form="w8a16").rows(x, ids).double()
    assert (got - expected).norm() < 4e-3 * expected.norm()
    with pytest.raises(KernelError, match="int4, not as w8a16"):
        ExpertLayer(w13, w2, form="w8a16")


@pytest.mark.parametrize("arch", jit.SUPPORTED_ARCHS)
def test_plans_fit_the_shared_memory_of_every_architecture(arch):
    limit = SHARED_BYTES.get(CAPABILITIES[arch], 227 << 10)
    for form in ("bf16", "w8a16", "int4"):
        for pairs in (1, 64, 512, 65536):
            plan = choose_mma_plan(form, pairs, 16, 2048, 768, has_zeros=form == "int4", capability=CAPABILITIES[arch])
            assert plan.stages >= 2
            assert plan.ctas * (plan.shared_bytes + 2048) <= limit + 1024
            assert (2 * 768) % plan.m_rows == 0


@pytest.mark.parametrize("form", ["bf16", "w8a16", "int4"])
def test_mma_kernels_compile_for_every_architecture_without_spills(form):
    plans = {
        (arch, choose_mma_plan(form, rows * 16, 16, 2048, 768, has_zeros=zeros, capability=CAPABILITIES[arch]))
        for arch in jit.SUPPORTED_ARCHS
        for rows in (0.1, 3, 8, 100)
        for zeros in ((False, True) if form == "int4" and rows == 3 else (False,))
    }
    each = compile_each(("grouped_gemm_mma.cu", arch, plan.defines(2048, 768, 8)) for arch, plan in plans)
    for (arch, plan), compiled in zip(plans, each, strict=True):
        use = compiled.use()
        assert [u.name for u in use] == ["grouped_gemm_mma"]
        assert all(u.clean for u in use), (plan, use)
        registers = -(-use[0].registers // 8) * 8 * plan.num_threads
        assert plan.ctas * registers <= 65536, (plan, use)  # the whole grid must be resident
        assert plan.ctas == 1 or arch == "sm_90a"
