"""What a benchmark says of single steps: all of them, with what was in them, the longest first."""

import gc

from expertmesh.bench.local_engine import LocalEngine
from expertmesh.bench.step_watch import StepWatch
from expertmesh.config import CacheConfig, SchedulerConfig
from expertmesh.request import EngineRequest, SamplingParams


def test_every_step_is_told_with_what_was_in_it(tiny_checkpoint):
    now = [1.0]
    watch = StepWatch(lambda: now[0])
    cache = CacheConfig(kv_memory_bytes=4 << 20, enable_prefix_cache=False)
    scheduler = SchedulerConfig(max_prefill_tokens_per_step=16)
    local = LocalEngine(tiny_checkpoint, cache=cache, scheduler=scheduler, observer=watch)
    launch = local.runner.launch
    takes = iter([0.005, 0.03, 0.01, 0.002, 0.002])

    def slow(*arguments):
        now[0] += next(takes)
        return launch(*arguments)

    local.runner.launch = slow
    watch.watch(local.runner)
    with local:
        prompt = tuple(range(40))
        local.run([EngineRequest(request_id="long", prompt_ids=prompt, sampling=SamplingParams(max_tokens=3))])
        assert local.books_balance
    steps = watch.steps
    assert [one.chunks for one in steps] == [((16, 16),), ((16, 32),), ((8, 40),), (), ()]
    assert [one.num_decodes for one in steps] == [0, 0, 0, 1, 1]
    assert [round(one.host_ms) for one in steps] == [5, 30, 10, 2, 2]
    assert [round(one.ms) for one in steps] == [0, 30, 10, 2, 2], "the first has none before it"
    assert all(one.how == "eager" and one.num_mallocs == 0 for one in steps)
    assert watch.longest(2, 1.0, now[0]) == [steps[1], steps[2]]
    assert watch.longest(9, 1.04, now[0]) == [steps[3], steps[4]], "those that were launched in this time"
    assert str(steps[1]).startswith("30.0 ms (host 30.0, device 0.0): 0 decodes, prompts 16 to 32, bucket ")
    watch.close()
    assert watch._collected not in gc.callbacks
