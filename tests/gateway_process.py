"""A gateway in a process of its own, to be killed: `python -P tests/gateway_process.py LINK_ADDRESS REDIS_URL`.

It prints its address and serves until it is killed."""

import asyncio
import sys

from gateway_world import MAX_MODEL_LEN, TOKEN, tokenizer

from expertmesh.router.gateway.generation import GenerationConfig
from expertmesh.router.gateway.journal import Journal
from expertmesh.router.gateway.server import GatewayServer
from expertmesh.router.gateway.session import SessionStore
from expertmesh.router.gateway.tier import AttentionTier


async def main(link_address: str, redis_url: str) -> None:
    tier = AttentionTier(gateway_id="gateway-child", cluster_token=TOKEN)
    tier.set_replicas({"attention-0": link_address})
    await tier.wait_connected(30)
    server = GatewayServer(
        GenerationConfig(model="tiny", max_model_len=MAX_MODEL_LEN, vocab_size=151_936),
        tokenizer=tokenizer(),
        tier=tier,
        sessions=SessionStore(redis_url),
        journal=Journal(redis_url),
    )
    print(await server.start(), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
