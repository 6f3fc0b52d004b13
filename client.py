"""The client of an expertmesh cluster: typed events, sessions, cancel on close, another gateway when one is away.

    with Client(["127.0.0.1:50051"]) as client:
        for event in client.generate("Why is the sky blue?"):
            if isinstance(event, AnswerDelta):
                print(event.text, end="")
        talk = client.session("holiday-plans")
        print(talk.send("Where is it warm in March?").answer())

`AsyncClient` is the same with `async for` and `await`. Every failure is an error of `expertmesh.errors` with its facts.
A request moves to the next gateway of the list as long as no event came. A stream that broke later is resumed, at
whichever gateway answers, if it was asked to be `resumable=True`: its events go on without a gap or a repetition. Else
it is an error, as nobody knows what was said last. Leaving the loop, or `close()`, cancels the work; that of a
resumable stream goes on for a grace, unless `cancel` ends it."""

from .router.client.asynchronous import AsyncClient, AsyncSession, AsyncStream
from .router.client.blocking import Client, Session, Stream
from .router.client.events import AnswerDelta, Event, Finished, ReasoningDelta, Started, ToolCallDelta
from .router.client.gateways import DEFAULT_ADDRESS
from .router.client.requests import GenerateOptions, Messages, make_request
from .router.gateway.tls import ClientTls

__all__ = [
    "DEFAULT_ADDRESS",
    "AnswerDelta",
    "AsyncClient",
    "AsyncSession",
    "AsyncStream",
    "Client",
    "ClientTls",
    "Event",
    "Finished",
    "GenerateOptions",
    "Messages",
    "ReasoningDelta",
    "Session",
    "Started",
    "Stream",
    "ToolCallDelta",
    "make_request",
]
