"""The Serve deployment of a gateway: our own grpc.aio server inside a Serve replica.

Serve places it, checks its health and tells it to drain; requests come over the server's own port. It follows the
Conductor's topology to know which attention replicas to dial, keeps nothing that matters (sessions are in Redis), and
announces its address when it has reached an attention replica: that is what READY waits for."""

import asyncio
import contextlib
import os
from dataclasses import replace

import ray
from ray import serve

from ...config import ClusterConfig
from ...errors import NoReplica, Unavailable
from ...model_config import ModelConfig
from ...model_source import model_folder
from ...telemetry import configure
from ..heap import freeze_heap
from ..status import ConductorLink, ProcessStatus, report_failure, report_forever
from .api_keys import ApiKeys
from .balancer import BalancerConfig
from .generation import CLOSING_TEXT, GenerationConfig
from .journal import Journal
from .server import GatewayServer
from .session import SessionStore
from .tier import AttentionTier
from .tls import server_credentials
from .tokenizer import Tokenizer
from .waiting_room import WaitingRoomConfig

WATCH_S = 20.0  # length of a long poll for the topology
JOIN_S = 10.0  # a gateway that joins waits so long for an attention replica before it opens its port
RETRY_S = 1.0  # pause while the Conductor restarts
DRAIN_S = 20.0  # below Serve's graceful_shutdown_timeout_s


class Gateway:
    """One gateway. `__init__` returns when its port is open."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config_text: str, conductor: ConductorLink
    ) -> None:
        config = ClusterConfig.from_json(config_text).on_node(ray.util.get_node_ip_address())
        context = serve.get_replica_context()
        self.gateway_id, self._conductor = f"gateway-{context.replica_tag}", conductor
        self._server: GatewayServer | None = None
        self._marked: set[tuple[float, float]] = set()  # times of damage that are in the store
        self._status = ProcessStatus(
            name=self.gateway_id, role="gateway", state="joining", pid=os.getpid(), node=os.uname().nodename
        )
        try:
            self._server = await self._build(config, context.rank.local_rank)
            await self._dial_who_serves()
            address = await self._server.start()
        except Exception as error:
            await report_failure(conductor, self.gateway_id, error)
            raise
        self._status = replace(self._status, address=address)
        freeze_heap()
        self._tasks = [
            asyncio.create_task(self._follow_topology(), name="topology"),
            asyncio.create_task(report_forever(conductor, lambda: self._status), name="reports"),
        ]

    async def _build(self, config: ClusterConfig, local_rank: int) -> GatewayServer:
        network, scheduler = config.network, config.scheduler
        api_keys = ApiKeys.from_file(network.api_keys_file)
        folder = await asyncio.to_thread(model_folder, config.model, config.weights)
        model = ModelConfig.from_folder(folder)
        tokenizer = await asyncio.to_thread(Tokenizer.for_checkpoint, folder)
        telemetry = configure(
            config.telemetry,
            role="gateway",
            instance=self.gateway_id,
            metrics_host=network.gateway_host,
            metrics_port=network.metrics_port + (local_rank if network.metrics_port > 0 else 0),
        )
        self._store = SessionStore(config.redis_url, ttl_s=config.session_ttl_s)
        self._journal = Journal(config.redis_url)
        await self._store.check()
        self._tier = AttentionTier(
            gateway_id=self.gateway_id,
            cluster_token=network.cluster_token,
            config=BalancerConfig(
                max_num_waiting=scheduler.max_num_waiting,
                max_num_seqs=scheduler.max_num_seqs,
                max_unreported_tokens=2 * scheduler.max_num_batched_tokens,
            ),
            waiting=WaitingRoomConfig(
                max_waiting=scheduler.max_num_queued, max_waiting_per_key=scheduler.max_num_queued_per_key
            ),
            weights=api_keys.weights,
            max_message_bytes=network.max_message_bytes,
        )
        return GatewayServer(
            GenerationConfig(
                model=config.served_model_name,
                max_model_len=config.max_model_len or model.max_position_embeddings,
                vocab_size=model.vocab_size,
                closing_text=config.thinking_closing_text or CLOSING_TEXT,
            ),
            tokenizer=tokenizer,
            tier=self._tier,
            sessions=self._store,
            journal=self._journal,
            api_keys=api_keys,
            topology=self._conductor,
            host=network.gateway_host,
            port=network.gateway_port + (0 if config.gateway_per_node or not network.gateway_port else local_rank),
            cluster_token=network.cluster_token,
            max_message_bytes=network.max_message_bytes,
            max_request_bytes=network.max_request_bytes,
            credentials=server_credentials(network.tls_cert_file, network.tls_key_file, network.tls_client_ca_file),
            layout=config.layout,
            num_logical_experts=model.num_experts,
            num_moe_layers=len(model.moe_layer_ids),
            telemetry=telemetry,
        )

    def check_health(self) -> None:
        if self._server is None or not self._server.address:
            raise Unavailable("the gateway's gRPC server is not up")

    async def __del__(self) -> None:
        """Drain: health says NOT_SERVING, running streams end, then the port closes."""
        if self._server is None or not self._server.address:
            return
        for task in self._tasks:
            task.cancel()
        with contextlib.suppress(Unavailable):  # it may end together with us
            await self._conductor.report(replace(self._status, state="draining"))
        await self._server.drain(DRAIN_S)
        await self._tier.close()
        await self._journal.close()
        await self._store.close()
        self._server.telemetry.shutdown()
        with contextlib.suppress(Unavailable):
            await self._conductor.forget(self.gateway_id)

    async def _dial_who_serves(self) -> None:
        """A gateway that joins a running cluster opens its port when it can serve; in a new one nobody serves yet."""
        with contextlib.suppress(Unavailable):  # NoReplica is one: the port opens all the same
            if links := (await self._conductor.watch(0, 0.0)).links:
                self._tier.set_replicas(links)
                await self._tier.wait_connected(JOIN_S)

    async def _follow_topology(self) -> None:
        """Dial who serves. While the Conductor restarts, the present links go on."""
        version = 0
        while True:
            try:
                state = await self._conductor.watch(version, WATCH_S)
            except Unavailable:
                await asyncio.sleep(RETRY_S)
                continue
            version = state.version
            if all(p.name != self.gateway_id for p in state.processes):  # a Conductor that has started again
                with contextlib.suppress(Unavailable):
                    await self._conductor.report(self._status)
            await self._mark_suspect(state.suspect_spans)
            if not state.links:
                continue
            self._tier.set_replicas(state.links)
            if self._status.state != "ready" and not await self._announce():
                version = 0  # look again at once

    async def _mark_suspect(self, spans: tuple[tuple[float, float], ...]) -> None:
        """Every gateway writes them, and again where Redis was away: the same times are there once."""
        if new := [span for span in spans if span not in self._marked]:
            with contextlib.suppress(Unavailable):  # SessionStoreUnavailable is one: with the next look
                await self._store.mark_suspect(new)
                self._marked.update(new)

    async def _announce(self) -> bool:
        """READY once an attention replica is connected; it stays so, since replicas come and go."""
        try:
            await self._tier.wait_connected(RETRY_S)
        except NoReplica:
            return False
        self._status = replace(self._status, state="ready")
        await self._conductor.report(self._status)
        return True
