"""Streams that outlive their calls: made into a recording and a journal, read from there by Generate and Resume alike.

    begin:  journal.begin (the whole request) -> run: each output to the journal, then its events to the recording
    resume: still running here -> read it;  else journal.take -> the same events again from the journal's outputs,
            and where the stream had not ended the engine goes on after them (seed and position say the same tokens)

A resume elsewhere takes the stream over: the fence stops whoever wrote before, dead or not, so nobody waits to be sure
that a gateway is dead. When its last reader has left, a running stream is given a grace and then cancelled."""

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager

from ...errors import InvalidRequest, Unavailable
from ...proto import expertmesh_pb2 as pb
from ...request import RequestOutput
from .conversation import prompt_state
from .events import EventWriter
from .generation import Generation, GenerationPlan, Generations
from .journal import Journal, JournalWriter
from .link_messages import add_output, decode_output, decode_submit, encode_submit
from .recording import Recording
from .session import SessionRecord

GRACE_S = 30.0  # a running stream that nobody reads
Track = Callable[[Generation], AbstractContextManager[None]]


class Resumables:
    """All resumable streams in work at one gateway. `track` is entered around each one's work."""

    def __init__(self, generations: Generations, journal: Journal, track: Track, *, grace_s: float = GRACE_S) -> None:
        self._generations, self._journal, self._track, self._grace_s = generations, journal, track, grace_s
        self._running: dict[tuple[str, str], ResumableStream] = {}  # by owner and request id

    async def begin(self, generation: Generation, request: pb.GenerateRequest) -> "ResumableStream":
        """Start it. The same request again (a client that heard nothing) joins the stream that there is."""
        owner, request_id = generation.plan.owner, generation.request_id
        digest = hashlib.sha256(request.SerializeToString(deterministic=True)).digest()
        head = encode_head(generation.plan, digest)
        if not await self._journal.begin(owner, request_id, head.SerializeToString()):
            other = pb.JournalHead.FromString(await self._journal.head(owner, request_id))
            if other.digest != digest:
                raise InvalidRequest("request_id", request_id, "an id that no other request has used")
            return self.resume(owner, request_id)
        other = self._running.get((owner, request_id))
        if other is None or other.task is None:
            return self._start((owner, request_id), generation)
        await asyncio.wait([other.task])  # a Resume that came before its request, and has or has not seen the journal
        return self.resume(owner, request_id)

    def resume(self, owner: str, request_id: str) -> "ResumableStream":
        """The stream, from wherever it is; reading it says NotFound where there is none."""
        key = (owner, request_id)
        return self._running.get(key) or self._start(key, None)

    async def stop(self) -> None:
        """Cut what runs; another gateway goes on with it from the journal."""
        tasks = [stream.task for stream in self._running.values() if stream.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _start(self, key: tuple[str, str], generation: Generation | None) -> "ResumableStream":
        stream = self._running[key] = ResumableStream(generation, self._grace_s)
        stream.task = asyncio.create_task(self._run(key, stream), name=f"stream {key[1]}")
        return stream

    async def _run(self, key: tuple[str, str], stream: "ResumableStream") -> None:
        error: BaseException | None = None
        try:
            if stream.generation is None:
                await self._take_over(key, stream)
            else:
                await self._work(key, stream, 1, [])
        except asyncio.CancelledError:
            error = Unavailable(f"this gateway ends; resume request {key[1]!r} at another one", retry_after_s=0.0)
            raise
        except Exception as caught:  # its readers raise it
            error = caught
        finally:
            del self._running[key]
            stream.close()
            stream.recording.end(error)

    async def _take_over(self, key: tuple[str, str], stream: "ResumableStream") -> None:
        recorded = await self._journal.take(*key)
        head = pb.JournalHead.FromString(recorded.head)
        plan = decode_head(head, key[0], self._generations)
        outputs = [_decode_output(data, plan) for data in recorded.outputs]
        generation = self._generations.go_on(plan)
        if recorded.end:
            writer = EventWriter(stream.recording.write)
            await generation.replay(writer, outputs, pb.Finished.FromString(recorded.end))
            return
        stream.generation = generation
        await self._work(key, stream, recorded.fence, outputs)

    async def _work(
        self, key: tuple[str, str], stream: "ResumableStream", fence: int, outputs: list[RequestOutput]
    ) -> None:
        generation = stream.generation
        assert generation is not None
        writer, journal = EventWriter(stream.recording.write), JournalWriter(self._journal, *key, fence, len(outputs))

        async def record(output: RequestOutput) -> None:
            tokens = pb.RequestTokens()
            add_output(tokens, output)
            await journal.append(tokens.SerializeToString())

        with self._track(generation):
            finished = await generation.run(writer, recorded=outputs, record=record)
            await journal.append(b"", finished.SerializeToString())
        await generation.finish(writer, finished)


class ResumableStream:
    """One stream in work, and the grace that it has when nobody reads."""

    def __init__(self, generation: Generation | None, grace_s: float) -> None:
        self.recording = Recording()
        self.generation = generation
        self.task: asyncio.Task[None] | None = None
        self._grace_s = grace_s
        self._timer: asyncio.TimerHandle | None = None

    async def read(self, offset: int, write: Callable[[bytes], Awaitable[None]]) -> None:
        self.recording.num_readers += 1
        self.close()
        try:
            await self.recording.read(offset, write)
        finally:
            self.recording.num_readers -= 1
            if not self.recording.num_readers and not self.recording.ended:
                self._timer = asyncio.get_running_loop().call_later(self._grace_s, self._give_up)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        if self.generation is not None:
            self.generation.cancel()


def encode_head(plan: GenerationPlan, digest: bytes) -> pb.JournalHead:
    head = pb.JournalHead(
        submit=encode_submit(0, plan.request),
        stop=plan.stop,
        strip_answer=plan.strip_answer,
        tools=plan.tools,
        forced_call_ids=plan.forced_call,
        include_token_ids=plan.include_token_ids,
        messages_json=json.dumps(plan.messages, ensure_ascii=False),
        digest=digest,
        settings_json=json.dumps(plan.settings),
        num_spliced_ids=plan.num_spliced,
        began_at=plan.began_at,
    )
    if plan.session is not None:
        head.session_id, head.session_version = plan.session.session_id, plan.session.version
        head.affinity = plan.session.affinity
    return head


def decode_head(head: pb.JournalHead, owner: str, generations: Generations) -> GenerationPlan:
    request = decode_submit(head.submit, head.submit.request_id)
    session = None
    if head.session_id:
        session = SessionRecord(session_id=head.session_id, version=head.session_version, affinity=head.affinity)
    return GenerationPlan(
        request=request,
        state=prompt_state(request.prompt_ids, generations.tokenizer.special_ids),
        stop=tuple(head.stop),
        strip_answer=head.strip_answer,
        tools=head.tools,
        forced_call=tuple(head.forced_call_ids),
        include_token_ids=head.include_token_ids,
        owner=owner,
        messages=json.loads(head.messages_json),
        session=session,
        settings=json.loads(head.settings_json or "{}"),
        num_spliced=head.num_spliced_ids,
        began_at=head.began_at,
    )


def _decode_output(data: bytes, plan: GenerationPlan) -> RequestOutput:
    tokens = pb.RequestTokens.FromString(data)
    return decode_output(plan.request.request_id, tokens, with_logprobs=plan.request.sampling.num_logprobs >= 0)
