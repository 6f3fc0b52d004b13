"""A row of a product does not depend on the other rows, on this machine, at the row count the self-test chose."""

import pytest
import torch
import torch.nn.functional as F

from expertmesh.errors import ConfigError
from expertmesh.numerics import MAX_ROWS, Numerics, rms_norm, select_numerics, silu_mul

SHAPES = [(64, 160), (96, 40), (256, 512), (40, 64)]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def numerics():
    return select_numerics(batch_invariant=True, linear_shapes=SHAPES, batched_shapes=SHAPES)


@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_row_of_a_linear_is_the_same_for_any_row_count(numerics, k, n):
    x, w = torch.randn(2 * MAX_ROWS + 37, k), torch.randn(n, k)
    whole = numerics.linear(x, w)
    assert torch.allclose(whole, F.linear(x, w), atol=1e-4)
    for count in (1, 2, 3, 5, 8, 15, 16, 17, 100, MAX_ROWS, MAX_ROWS + 1, 2 * MAX_ROWS + 3):
        start = len(x) - count
        assert torch.equal(numerics.linear(x[start:], w), whole[start:]), count


@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_row_of_a_batched_product_equals_the_plain_one(numerics, k, n):
    x, w = torch.randn(3, 20, k), torch.randn(3, n, k)
    plain = torch.stack([numerics.linear(a, b) for a, b in zip(x, w)])
    for capacity in (numerics.min_rows, 16, 20):
        assert torch.equal(numerics.batched_linear(x[:, :capacity].contiguous(), w), plain[:, :capacity])
        assert torch.equal(numerics.batched_linear(x[1:2, :capacity].contiguous(), w[1:2]), plain[1:2, :capacity])


def test_a_wide_product_is_the_same_with_and_without_threads(monkeypatch):
    from expertmesh import numerics as module

    numerics = select_numerics(batch_invariant=True, linear_shapes=[(32, 40_000)])
    x, w = torch.randn(20, 32), torch.randn(40_000, 32)
    threaded = numerics.linear(x, w)
    with torch.inference_mode():
        assert torch.equal(numerics.linear(x, w), threaded)
    assert torch.equal(numerics.linear(x[3:4], w), threaded[3:4])
    monkeypatch.setattr(module, "_column_pool", lambda: None)
    assert torch.equal(numerics.linear(x, w), threaded)


@pytest.mark.parametrize("width", [8, 40, 64, 100, 768])
def test_silu_mul_is_the_same_for_any_row_count(width):
    x = torch.randn(40, 2 * width)
    whole = silu_mul(x)
    assert torch.allclose(whole, F.silu(x[:, :width]) * x[:, width:], atol=1e-5)
    for count in (1, 2, 3, 7, 16, 33):
        assert torch.equal(silu_mul(x[40 - count :].clone()), whole[40 - count :])


def test_rms_norm_matches_its_definition_and_is_row_independent():
    x, weight = torch.randn(40, 72), torch.randn(72)
    whole = rms_norm(x, weight, 1e-6)
    assert torch.allclose(whole, x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight, atol=1e-5)
    for count in (1, 2, 5, 33):
        assert torch.equal(rms_norm(x[:count].clone(), weight, 1e-6), whole[:count])
    wide = rms_norm(x.bfloat16(), weight.bfloat16(), 1e-6)
    assert wide.dtype == torch.bfloat16


def test_plain_mode_is_plain():
    numerics = select_numerics(batch_invariant=False, linear_shapes=SHAPES)
    assert numerics == Numerics(batch_invariant=False, min_rows=1)
    x, w = torch.randn(3, 64), torch.randn(160, 64)
    assert torch.equal(numerics.linear(x, w), F.linear(x, w))


def test_mode_is_refused_with_several_threads():
    torch.set_num_threads(2)
    with pytest.raises(ConfigError, match="one torch thread"):
        select_numerics(batch_invariant=True, linear_shapes=SHAPES)


def test_mode_is_refused_where_the_self_test_fails(monkeypatch):
    from expertmesh import numerics as module

    monkeypatch.setattr(module, "_linear_holds", lambda k, n, min_rows: False)
    with pytest.raises(ConfigError, match=r"K=48, N=56.*batch_invariant=false"):
        select_numerics(batch_invariant=True, linear_shapes=[(48, 56)])


def test_mode_is_refused_on_other_devices():
    with pytest.raises(ConfigError, match="cuda"):
        select_numerics(batch_invariant=True, linear_shapes=SHAPES, device="cuda")
