"""What the answer must be, as the client said it -> `AnswerGrammar`; a mistake is an InvalidRequest before any work.

What would end the answer before it is whole, or keep it from ending, does not go with a format: stop strings, stop ids,
min_tokens, ignore_eos, a call that must come instead of an answer. Tools that may be called do: a turn that calls is
free, a turn that answers keeps the format."""

import asyncio
import json

from ...errors import InvalidRequest
from ...proto import expertmesh_pb2 as pb
from ...request import AnswerGrammar
from ..grammar import library, parse
from .conversation import State
from .json_schema import Unsupported, check
from .regex_limits import UnsupportedRegex, check_regex
from .tokenizer import Tokenizer

MAX_CHOICES, MAX_CHOICE_BYTES = 256, 1024


def check_format(request: pb.GenerateRequest) -> None:
    """Form, sizes, and what a format does not go with. Pure."""
    if not request.HasField("response_format"):
        return
    kind = request.response_format.WhichOneof("format")
    match kind:
        case "json_schema":
            try:
                check(request.response_format.json_schema)
            except Unsupported as error:
                raise InvalidRequest("response_format.json_schema", _shown(request), str(error)) from None
        case "regex":
            try:
                check_regex(request.response_format.regex)
            except UnsupportedRegex as error:
                raise InvalidRequest("response_format.regex", _shown(request), str(error)) from None
        case "choice":
            _check_choices(list(request.response_format.choice.values))
        case _:
            raise InvalidRequest("response_format", "nothing", "one of json_schema, regex and choice")
    _check_beside(request)


def _check_beside(request: pb.GenerateRequest) -> None:
    sampling = request.sampling
    for field, value in (("stop", sampling.stop), ("stop_token_ids", sampling.stop_token_ids)):
        if value:
            raise InvalidRequest(
                f"sampling.{field}", list(value), "unset with response_format: it would cut the answer"
            )
    if sampling.min_tokens:
        raise InvalidRequest("sampling.min_tokens", sampling.min_tokens, "unset with response_format")
    if sampling.ignore_eos:
        raise InvalidRequest("sampling.ignore_eos", True, "unset with response_format: the answer must end")
    mode = request.tool_choice.mode
    if mode in (pb.ToolChoice.REQUIRED, pb.ToolChoice.NAMED):
        name = pb.ToolChoice.Mode.Name(mode)
        raise InvalidRequest("response_format", "set", f"unset with tool_choice {name}, whose answer is a call")


async def answer_grammar(
    request: pb.GenerateRequest, tokenizer: Tokenizer, state: State, *, tools: bool, vocab_size: int
) -> AnswerGrammar | None:
    """The grammar of a request that `check_format` has passed. MissingPackage where the library is not installed."""
    if not request.HasField("response_format"):
        return None
    kind = request.response_format.WhichOneof("format") or ""
    special = tokenizer.special_ids
    if not any(i < vocab_size for i in special.eos):
        raise InvalidRequest("response_format", "set", "unset: this model has no token that ends a turn")
    separator = tokenizer.encode("\n\n")
    grammar = AnswerGrammar(
        kind=kind,
        source=_source(request.response_format, kind),
        starts_inside=state is State.REASONING,
        think_id=_id(special.think) if state is State.OPEN else -1,
        end_think_id=_id(special.end_think),
        separator_id=separator[0] if len(separator) == 1 else -1,
        tool_call_id=_id(special.tool_call) if tools else -1,
    )
    try:
        await asyncio.to_thread(_parse, grammar)
    except ValueError as error:
        raise InvalidRequest(f"response_format.{kind}", _shown(request), f"one that compiles: {error}") from None
    return grammar


def _source(response_format: pb.ResponseFormat, kind: str) -> str:
    match kind:
        case "json_schema":
            return check(response_format.json_schema)
        case "choice":
            return json.dumps(list(response_format.choice.values))
    return response_format.regex


def _parse(grammar: AnswerGrammar) -> None:
    library()
    parse(grammar)


def _id(token_id: int | None) -> int:
    return -1 if token_id is None else token_id


def _shown(request: pb.GenerateRequest) -> str:
    return str(getattr(request.response_format, request.response_format.WhichOneof("format") or "", ""))


def _check_choices(choices: list[str]) -> None:
    field = "response_format.choice.values"
    if not 1 <= len(choices) <= MAX_CHOICES or len(set(choices)) < len(choices):
        raise InvalidRequest(field, f"{len(choices)} values", f"1..{MAX_CHOICES} different ones")
    for i, choice in enumerate(choices):
        if not 1 <= len(choice.encode()) <= MAX_CHOICE_BYTES or choice != choice.strip("\n"):
            raise InvalidRequest(
                f"{field}[{i}]", choice, f"1..{MAX_CHOICE_BYTES} bytes, not beginning or ending in a newline"
            )
