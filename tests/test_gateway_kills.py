"""Promise: a gateway that is killed under running streams costs its clients a pause. A cut of `make gateway-kills`:
the demo model, gateways in processes of their own, our client."""

from expertmesh.bench.gateway_kills import run


async def test_streams_of_killed_gateways_say_what_an_undisturbed_one_says(demo_engine: str):
    figures = await run(demo_engine, num_runs=3, seed=7, progress=False)
    assert figures.wrong == []
    assert (figures.runs, figures.streams >= 3) == (3, True)
