"""What a client is promised, one check each: a function that returns a line of detail, or fails with the reason."""

import asyncio
import contextlib
import io
import json
import re
import threading
from collections.abc import Callable
from typing import Any

from .. import cli
from ..client import AnswerDelta, AsyncClient, Client, ReasoningDelta, ToolCallDelta
from ..cluster.commands.console import gateway_health
from ..deploy.demo import calculate
from ..deploy.demo_model.tools import CALCULATOR
from ..errors import DeadlineExceeded, InvalidRequest, NotFound, SessionConflict, Unauthenticated
from ..request import FinishReason
from ..router.gateway.plan import CLOSING_TEXT
from .contract_cluster import ServedCluster
from .contract_tools import CommandLine, Reflection, command_lines
from .gateway_processes import MODEL, tokenizer
from .streams import folded, token_ids

Check = Callable[["Contract"], str]
QUESTION = "What is 17 + 25?"
GENERATE = "expertmesh.v1.Generation/Generate"
TALK = "contract-talk"
RESUMED = "contract-resumed"


class Contract:
    """The cluster, a client of each owner, and what earlier checks left for later ones."""

    def __init__(self, cluster: ServedCluster) -> None:
        self.cluster = cluster
        self.alice, self.bob = (self.client(owner) for owner in ("alice", "bob"))
        self.resumed: list[Any] = []  # events of the request RESUMED

    def client(self, owner: str) -> Client:
        return Client(self.cluster.gateways, api_key=self.cluster.keys[owner])

    def close(self) -> None:
        self.alice.close()
        self.bob.close()


# ---------------------------------------------------------------- without our client


def health(c: Contract) -> str:
    states = [gateway_health(address) for address in c.cluster.gateways]
    assert states == ["SERVING"] * 2, states
    return f"grpc.health.v1: {len(states)} gateways SERVING"


def by_command_line(c: Contract) -> str:
    tools = command_lines()
    if not tools:
        return "neither grpcurl nor buf is on this machine: the same calls by generic reflection stand in (next row)"
    return "; ".join(_foreign_client(c, tool) for tool in tools)


def by_reflection(c: Contract) -> str:
    return _foreign_client(c, Reflection())


def _foreign_client(c: Contract, tool: CommandLine | Reflection) -> str:
    address, key = c.cluster.gateways[0], c.cluster.keys["alice"]
    services = tool.services(address)
    expected = {f"expertmesh.v1.{name}" for name in ("Generation", "Sessions", "Cluster")}
    assert expected <= services, services
    request = {"chat": {"messages": [{"role": "user", "content": QUESTION}]}, "thinking": {"mode": "OFF"}}
    answer = tool.call(address, GENERATE, request, key)
    assert answer.code == "ok", answer.text
    text = "".join(m.get("answer", {}).get("text", "") for m in answer.messages)
    assert "42" in text, text
    assert answer.messages[-1]["finished"]["reason"] == "FINISH_REASON_STOP", answer.messages[-1]
    listed = tool.call(address, "expertmesh.v1.Sessions/List", {}, key)
    assert listed.code == "ok", listed.text
    assert tool.call(address, GENERATE, request).code == "unauthenticated"
    wrong = tool.call(address, GENERATE, {**request, "sampling": {"temperature": 9}}, key)
    assert wrong.code == "invalid_argument", wrong
    assert "sampling.temperature" in wrong.text, wrong.text
    missing = tool.call(address, "expertmesh.v1.Sessions/Get", {"sessionId": "nobody"}, key)
    assert missing.code == "not_found", missing
    return f"{tool.name}: services, a stream ({len(answer.messages)} messages), 3 typed errors"


def command(c: Contract) -> str:
    common = ["--address", ",".join(c.cluster.gateways), "--api-key", c.cluster.keys["alice"]]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        code = cli.main(["generate", QUESTION, "--think", "off", "--json", "--session", "contract-cli", *common])
        exported = io.StringIO()
        with contextlib.redirect_stdout(exported):
            code |= cli.main(["sessions", "export", "contract-cli", *common])
        code |= cli.main(["sessions", "delete", "contract-cli", *common])
    assert code == 0, out.getvalue()
    assert "42" in json.loads(out.getvalue())["answer"]
    assert len(json.loads(exported.getvalue())["turn_ids"]) == 1
    return "generate --json, sessions export, sessions delete"


# ---------------------------------------------------------------- generation


def blocking_client(c: Contract) -> str:
    stream = c.alice.generate(QUESTION, thinking="on", seed=3, include_token_ids=True)
    events = list(stream)
    folded(events)
    reasoning = "".join(e.text for e in events if isinstance(e, ReasoningDelta))
    answer = "".join(e.text for e in events if isinstance(e, AnswerDelta))
    assert reasoning, "no thinking"
    assert "42" in answer, answer
    assert stream.finished is not None
    assert stream.finished.completion_tokens == len(token_ids(events)), "usage and token ids differ"
    return f"{len(events)} events, offsets without a gap, {stream.finished.reasoning_tokens} tokens of thinking"


def async_client(c: Contract) -> str:
    async def ask() -> list[Any]:
        async with AsyncClient(c.cluster.gateways, api_key=c.cluster.keys["alice"]) as client:
            return [e async for e in client.generate(QUESTION, thinking="on", seed=3, include_token_ids=True)]

    here = list(c.alice.generate(QUESTION, thinking="on", seed=3, include_token_ids=True))
    assert folded(asyncio.run(ask())) == folded(here), "the two clients differ for one seed"
    return "the same tokens as the blocking one for the same seed"


def thinking_modes(c: Contract) -> str:
    def thoughts(text: str, **options: Any) -> str:
        """With a soft switch the model writes the empty block itself: tokens of thinking, and no text."""
        return "".join(e.text for e in c.alice.generate(text, **options) if isinstance(e, ReasoningDelta)).strip()

    assert thoughts(QUESTION, thinking="on"), "mode on does not think"
    assert not thoughts(QUESTION, thinking="off"), "mode off thinks"
    assert not thoughts(f"{QUESTION} /no_think"), "/no_think thinks"
    assert not thoughts(f"{QUESTION} /think", thinking="off"), "a soft switch wins over mode off"
    return "mode on and off, /no_think, mode off wins over /think"


def thinking_budgets(c: Contract) -> str:
    words = tokenizer(MODEL)
    closing, end = words.encode(CLOSING_TEXT), words.special_ids.end_think
    exact = []
    for budget in (0, 1, 2, 7, 16):
        events = list(
            c.alice.generate(
                "What is 48 * 19?", thinking="on", thinking_budget=budget, temperature=0.0, include_token_ids=True
            )
        )
        ids = token_ids(events)
        if budget == 0:
            assert not any(isinstance(e, ReasoningDelta) for e in events), "budget 0 thinks"
        else:
            assert end not in ids[:budget], f"the model closed before the budget of {budget}: a poor question"
            assert ids[budget : budget + len(closing)] == closing, f"budget {budget} is not exact: {ids[: budget + 4]}"
        assert "".join(e.text for e in events if isinstance(e, AnswerDelta)), "no answer after the budget"
        exact.append(budget)
    return f"exact to the token for {exact}, closed, answered"


def tool_loop(c: Contract) -> str:
    session = c.alice.session("contract-tools")
    call = _tool_call(list(session.send("Use the calculator to compute 4821 * 37.", tools=[CALCULATOR], seed=11)))
    result = calculate(call)
    answer = session.send([{"role": "tool", "content": result}], tools=[CALCULATOR], seed=11).answer()
    session.delete()
    assert "178377" in answer, answer
    forced = c.alice.generate(QUESTION, tools=[CALCULATOR], tool_choice="calculator", thinking="off")
    assert json.loads(_tool_call(list(forced))), "a named call has no arguments"
    assert forced.finished is not None
    assert forced.finished.reason is FinishReason.TOOL_CALLS
    none = list(c.alice.generate("Use the calculator to compute 2 * 3.", tools=[CALCULATOR], tool_choice="none"))
    assert not any(isinstance(e, ToolCallDelta) for e in none), "tool_choice none calls"
    return f"call {call} -> {result} -> answer; named and none obeyed"


def _tool_call(events: list[Any]) -> str:
    deltas = [e for e in events if isinstance(e, ToolCallDelta)]
    assert deltas, "no call"
    assert not any(e.malformed for e in deltas)
    assert deltas[0].name == "calculator"
    return "".join(e.arguments_text for e in deltas if e.index == 0)


def structured_output(c: Contract) -> str:
    schema = {
        "type": "object",
        "properties": {"result": {"type": "integer"}, "sure": {"type": "boolean"}},
        "required": ["result", "sure"],
        "additionalProperties": False,
    }
    stream = c.alice.generate(QUESTION, json_schema=schema, thinking="on", max_tokens=200)
    value = json.loads(stream.answer())
    assert set(value) == {"result", "sure"}, value
    assert stream.finished is not None
    assert stream.finished.reasoning_tokens > 0, "thinking is free beside a schema"
    number = c.alice.generate(QUESTION, regex="[0-9]{2}", thinking="off").answer()
    assert re.fullmatch("[0-9]{2}", number), number
    choice = c.alice.generate(QUESTION, choice=["forty-two", "fifty"], thinking="off").answer()
    assert choice in ("forty-two", "fifty"), choice
    return f"json_schema {value}, regex {number}, choice {choice}"


def cancelled(c: Contract) -> str:
    stream = c.alice.generate("Tell me a story.", max_tokens=400, ignore_eos=True)
    next(stream)
    stream.cancel()
    events = list(stream)
    assert events[-1].reason is FinishReason.CANCELLED, events[-1]
    return "by id, over all gateways; the stream finishes with CANCELLED"


# ---------------------------------------------------------------- sessions, resume


def sessions(c: Contract) -> str:
    talk = c.alice.session(TALK)
    talk.send("My name is Emma. I live in Paris.", thinking="off").answer()
    answer = talk.send("Where do I live?").answer()
    assert "Paris" in answer, answer
    record = talk.record()
    assert record.version == len(record.turns) == 2
    assert record.thinking.mode == 2, "the session does not keep its mode"
    other = talk.fork(f"{TALK}-fork", at_version=1)
    assert other.record().version == 1
    assert len(talk.export().turn_ids) == 2
    assert {TALK, f"{TALK}-fork"} <= {s.session_id for s in c.alice.list_sessions()}
    other.delete()
    return "two turns remember, mode kept, fork, export, list, delete"


def writers(c: Contract) -> str:
    """Concurrent turns of one session: what was committed is there once, the others were told of the version."""
    outcomes: list[str] = []

    def write(i: int) -> None:
        with c.client("alice") as client:
            try:
                stream = client.session("contract-race").send(f"What is {i} + 1?", thinking="off", request_id=f"w{i}")
                stream.answer()
                assert stream.finished is not None
                outcomes.append(f"w{i}" if stream.finished.committed else "not committed")
            except SessionConflict as error:
                outcomes.append("" if error.current_version > 0 else "told no version")

    threads = [threading.Thread(target=write, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    turns = [turn.request_id for turn in c.alice.get_session("contract-race").turns]
    assert len(outcomes) == 8, outcomes
    assert sorted(turns) == sorted(o for o in outcomes if o), (turns, outcomes)
    c.alice.delete_session("contract-race")
    return f"8 at once: {len(turns)} committed, {8 - len(turns)} told ABORTED with the version"


def retried(c: Contract) -> str:
    talk = c.alice.session("contract-retry")
    first = talk.send(QUESTION, request_id="again", thinking="off").answer()
    assert talk.send(QUESTION, request_id="again", thinking="off").answer() == first
    assert talk.record().version == 1
    talk.delete()
    return "one request id twice: one turn, the same answer"


def resume(c: Contract) -> str:
    options: dict[str, Any] = {"thinking": "on", "seed": 5, "max_tokens": 120, "include_token_ids": True}
    undisturbed = list(c.alice.generate(QUESTION, **options))
    with c.alice.generate(QUESTION, resumable=True, request_id=RESUMED, **options) as stream:
        begun = [next(stream) for _ in range(3)]
    with Client(c.cluster.gateways[::-1], api_key=c.cluster.keys["alice"]) as elsewhere:
        rest = list(elsewhere.resume(RESUMED, from_offset=3))
        c.resumed = [*begun, *rest]
        assert folded(c.resumed) == folded(undisturbed), "the resumed stream differs"
        assert list(elsewhere.resume(RESUMED)) == c.resumed, "after the end it is another sequence"
    return f"dropped after 3 events, taken up at the other gateway, {len(c.resumed)} events as undisturbed"


def restart(c: Contract) -> str:
    c.close()
    c.cluster.restart()
    c.alice, c.bob = c.client("alice"), c.client("bob")
    talk = c.alice.session(TALK)
    answer = talk.send("What is my name?").answer()
    assert "Emma" in answer, answer
    assert talk.record().version == 3
    assert list(c.alice.resume(RESUMED)) == c.resumed, "the stream's journal did not survive"
    return f"every process, Redis too: the session goes on ({answer.strip()!r}), the ended stream is read again"


# ---------------------------------------------------------------- keys, errors


def api_keys(c: Contract) -> str:
    refusals: list[Callable[[], Any]] = [
        lambda: c.bob.get_session(TALK),
        lambda: c.bob.export_session(TALK),
        lambda: c.bob.fork_session(TALK, "stolen"),
        lambda: c.bob.delete_session(TALK),
        lambda: list(c.bob.resume(RESUMED)),
        lambda: c.bob.cancel(RESUMED),
    ]
    for refused in refusals:
        _expect(NotFound, refused)
    assert not [s for s in c.bob.list_sessions() if s.session_id == TALK]
    for key in ("", "wrong"):
        with Client(c.cluster.gateways, api_key=key) as stranger:
            _expect(Unauthenticated, stranger.generate("hi").answer)
    return "another key's session, stream and request are NOT_FOUND; no key or a wrong one UNAUTHENTICATED"


def errors(c: Contract) -> str:
    error = _expect(InvalidRequest, c.alice.generate("hi", temperature=9.0).answer)
    assert error.field == "sampling.temperature", error.field
    _expect(InvalidRequest, c.alice.generate("word " * 5000).answer)
    _expect(InvalidRequest, c.alice.generate([{"role": "nobody", "content": "hi"}]).answer)
    _expect(NotFound, lambda: c.alice.get_session("nobody"))
    _expect(NotFound, lambda: c.alice.cancel("nobody"))
    _expect(NotFound, lambda: list(c.alice.resume("nobody")))
    _expect(DeadlineExceeded, c.alice.generate("hi", timeout_s=0.001).answer)
    return "InvalidRequest names its field, NotFound, DeadlineExceeded, a prompt over the context"


def _expect(kind: type[Any], call: Callable[[], Any]) -> Any:
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


CHECKS: tuple[tuple[str, Check], ...] = (
    ("health", health),
    ("grpcurl or buf", by_command_line),
    ("reflection client", by_reflection),
    ("command line", command),
    ("client", blocking_client),
    ("async client", async_client),
    ("thinking modes", thinking_modes),
    ("thinking budgets", thinking_budgets),
    ("tool loop", tool_loop),
    ("structured output", structured_output),
    ("cancel", cancelled),
    ("sessions", sessions),
    ("concurrent writers", writers),
    ("retried request", retried),
    ("resume", resume),
    ("restart of everything", restart),
    ("API keys", api_keys),
    ("typed errors", errors),
)
