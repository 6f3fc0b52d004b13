"""The chunk of a prompt beside decodes, learned from steps' times: a GPU of arithmetic stands in for the real one."""

import random
from dataclasses import dataclass

import pytest

from expertmesh.cluster.attention.pace import Allowance, Pace, Work

STRETCH = 2.5
CHUNK = 1024  # scheduler.max_prefill_tokens_per_step


@dataclass
class Gpu:
    """Milliseconds by what a step holds: about those of 30B on an H200."""

    least: float = 2.9
    all_experts: float = 14.0
    decode: float = 0.02
    token: float = 0.010
    context: float = 0.0030  # a token, after 1000 tokens of context
    noise: float = 0.0

    def __post_init__(self) -> None:
        self._random = random.Random(1)

    def ms(self, work: Work) -> float:
        tokens = work.num_decodes + work.num_prompt_tokens
        experts = 1 - (1 - 8 / 128) ** tokens
        read = self.least + (self.all_experts - self.least) * experts + self.decode * work.num_decodes
        found = read + self.token * (work.num_prompt_tokens + work.num_others) + self.context * work.reach / 1000
        return found * (1 + self.noise * self._random.uniform(-1, 1))


def warm(gpu: Gpu, *, most_decodes: int = 256, parity: int = 7000) -> Pace:
    """As a replica's warm-up leaves it."""
    pace = Pace(STRETCH, most_decodes=most_decodes, parity=parity)
    for size in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        if size <= most_decodes:
            for _ in range(3):
                run(pace, gpu, Work(size))
    for tokens in (128, 256, 512, 1024, 2048):
        run(pace, gpu, Work(0, tokens, tokens * tokens // 2))
    return pace


def run(pace: Pace, gpu: Gpu, work: Work) -> float:
    ms = gpu.ms(work)
    pace.observe(work, ms / 1e3)
    return ms


def prompt_beside(pace: Pace, gpu: Gpu, num_decodes: int, length: int, most: int = CHUNK) -> list[tuple[int, float]]:
    """A whole prompt as the scheduler cuts it -> tokens and milliseconds of each step."""
    done, found = 0, []
    while done < length:
        allowance = pace.allowance(num_decodes)
        assert allowance is not None
        count = min(max(1, allowance.num_tokens(done)), most, length - done)
        if not allowance.cost:
            run(pace, gpu, Work(num_decodes))
            continue
        found.append((count, run(pace, gpu, Work(num_decodes, count, count * done + count * count // 2))))
        done += count
    return found


@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize("num_decodes", [16, 32, 128])
def test_no_step_beside_decodes_takes_more_than_the_stretch_and_few_take_much_less(num_decodes: int, noise: float):
    gpu = Gpu(noise=noise)
    pace, bound = warm(gpu), max(STRETCH * Gpu().ms(Work(num_decodes)), 2 * Gpu().ms(Work(64)))
    steps = prompt_beside(pace, gpu, num_decodes, 65_536)
    times = [ms for _, ms in steps]
    assert max(times) <= bound * (1.1 + 2 * noise)
    capped = sum(1 for tokens, _ in steps if tokens == CHUNK)
    assert sorted(times[capped:-1])[len(times) // 8] >= bound * (0.92 - 2 * noise), "no time is left unused"
    assert steps[0][0] == CHUNK, "a short context has the whole budget"


def test_what_attention_really_costs_is_found_whatever_arithmetic_says():
    for parity in (0, 700, 7000, 70_000):
        gpu = Gpu()
        pace = warm(gpu, parity=parity)
        late = [ms for _, ms in prompt_beside(pace, gpu, 32, 32_768)[-30:-1]]
        bound = STRETCH * gpu.ms(Work(32))
        assert 0.9 * bound < min(late)
        assert max(late) <= 1.05 * bound


def test_beside_one_stream_prompts_get_half_of_the_gpu():
    """A step of one decode is so short that no step with a prompt could keep to a multiple of it."""
    gpu = Gpu()
    steps = prompt_beside(warm(gpu), gpu, 1, 16_384, most=16_384)
    base = gpu.ms(Work(64))
    assert all(ms <= 2.2 * base for _, ms in steps)
    assert all(ms >= 1.8 * base for _, ms in steps[:-1])


def test_where_more_wait_for_a_first_token_than_for_a_next_one_steps_may_take_longer():
    gpu = Gpu()
    pace = warm(gpu)

    def ms(num_decodes: int, num_prompts: int) -> float:
        allowance = pace.allowance(num_decodes, num_prompts)
        assert allowance is not None
        count = allowance.num_tokens(0)
        return gpu.ms(Work(num_decodes, count, count * count // 2))

    bound = STRETCH * gpu.ms(Work(32))
    assert ms(32, 1) == ms(32, 32) == pytest.approx(bound, rel=0.1)
    assert ms(32, 64) == pytest.approx(2 * bound, rel=0.15)
    assert ms(32, 400) == ms(32, 128) == pytest.approx(4 * bound, rel=0.2)


def test_nothing_is_said_before_steps_have_been_met():
    pace, gpu = Pace(STRETCH, most_decodes=256, parity=7000), Gpu()
    assert pace.allowance(8) is None
    for tokens in (512, 1024):
        run(pace, gpu, Work(0, tokens))
    run(pace, gpu, Work(8))
    assert pace.allowance(8) is None, "eight decodes do not meet all experts"
    run(pace, gpu, Work(64))
    assert pace.allowance(8) is None, "no prompt since"
    run(pace, gpu, Work(8, 512))
    assert pace.allowance(8) is not None
    assert pace.allowance(100) is None, "so many have not been met"


def test_a_step_that_was_held_up_changes_little():
    gpu = Gpu()
    pace = warm(gpu)
    prompt_beside(pace, gpu, 32, 16_384)
    before = pace.allowance(32)
    pace.observe(Work(32, 512, 512 * 8000), 1.0)
    pace.observe(Work(32), 1.0)
    after = pace.allowance(32)
    assert before is not None
    assert after is not None
    assert 0.6 * before.cost <= after.cost <= 2.7 * before.cost
    for _ in range(12):
        run(pace, gpu, Work(32))
    steps = prompt_beside(pace, gpu, 32, 32_768)
    assert max(ms for _, ms in steps[4:]) <= 1.1 * STRETCH * gpu.ms(Work(32))


def test_attention_that_grows_faster_than_its_context_is_followed():
    """As where another kernel takes over."""
    gpu = Gpu()
    pace, times, done = warm(gpu), [], 0
    while done < 65_536:
        gpu.context = 0.0025 if done < 12_000 else 0.0036 if done < 30_000 else 0.0028
        allowance = pace.allowance(32)
        assert allowance is not None
        count = max(1, min(allowance.num_tokens(done), CHUNK)) if allowance.cost else 0
        times.append(run(pace, gpu, Work(32, count, count * done + count * count // 2)))
        done += count
    bound = STRETCH * gpu.ms(Work(32))
    assert sorted(times)[int(0.98 * len(times))] <= 1.12 * bound


def test_another_gpu_is_learned_within_a_prompt():
    pace, slow = warm(Gpu()), Gpu(token=0.030, context=0.009)
    steps = prompt_beside(pace, slow, 32, 32_768)
    assert max(ms for _, ms in steps[len(steps) // 2 :]) <= 1.1 * STRETCH * slow.ms(Work(32))


def test_decodes_that_became_slow_behind_a_prompt_are_measured_again_and_starve_nobody():
    gpu = Gpu()
    pace = warm(gpu)
    prompt_beside(pace, gpu, 32, 8192)
    gpu.least += 40
    gpu.all_experts += 40
    steps = prompt_beside(pace, gpu, 32, 131_072)
    assert min(tokens for tokens, _ in steps[:-1]) >= 8
    assert len(steps) < 700
    bound = STRETCH * gpu.ms(Work(32))
    assert 0.8 * bound < max(ms for _, ms in steps[300:]) <= 1.1 * bound


def test_others_tokens_are_counted_since_the_step_is_theirs_too():
    gpu = Gpu()
    pace = warm(gpu)
    prompt_beside(pace, gpu, 32, 8192)
    alone = pace.allowance(32)
    for _ in range(20):
        run(pace, gpu, Work(32, num_others=600))
    shared = pace.allowance(32)
    assert alone is not None
    assert shared is not None
    assert shared.cost == pytest.approx(alone.cost - 600, rel=0.1)


def test_each_so_many_steps_some_are_without_prompts_even_where_its_time_is_not_told():
    gpu = Gpu()
    pace = warm(gpu)
    for _ in range(128):
        allowance = pace.allowance(32)
        assert allowance is not None
        assert allowance.cost > 0
        run(pace, gpu, Work(32, 100, 5000))
    for _ in range(3):
        allowance = pace.allowance(32)
        assert allowance is not None
        assert (allowance.cost, allowance.num_tokens(0)) == (0, 0)
        pace.observe(Work(32), 0.0)
    allowance = pace.allowance(32)
    assert allowance is not None
    assert allowance.cost > 0


@pytest.mark.parametrize("context", [0, 100, 50_000])
@pytest.mark.parametrize("parity", [0.0, 70.0, 7000.0])
def test_tokens_and_their_cost_are_inverse(context: int, parity: float):
    allowance = Allowance(1000.0, parity)
    count = allowance.num_tokens(context)
    assert allowance.cost_of(context, count) <= 1000 < allowance.cost_of(context, count + 1)
    assert Allowance.of(1024, parity).num_tokens(0) == 1024
