"""The records of `request.py` as messages of the link and back. Pure."""

from ...proto import expertmesh_pb2 as pb
from ...request import (
    AnswerGrammar,
    EngineLoad,
    EngineRequest,
    FinishReason,
    RequestOutput,
    SamplingParams,
    ThinkingBudget,
    TokenLogprob,
)

PROTOCOL_VERSION = 1


def encode_submit(handle: int, request: EngineRequest) -> pb.Submit:
    s = request.sampling
    message = pb.Submit(
        handle=handle,
        request_id=request.request_id,
        prompt_ids=request.prompt_ids,
        output_ids=request.output_ids,
        deadline=request.deadline,
        prefix_salt=request.prefix_salt,
        traceparent=request.traceparent,
        sampling=pb.EngineSampling(
            temperature=s.temperature,
            top_p=s.top_p,
            top_k=s.top_k,
            min_p=s.min_p,
            seed=s.seed,
            max_tokens=s.max_tokens,
            min_tokens=s.min_tokens,
            presence_penalty=s.presence_penalty,
            frequency_penalty=s.frequency_penalty,
            repetition_penalty=s.repetition_penalty,
            stop_token_ids=sorted(s.stop_token_ids),
            num_logprobs=s.num_logprobs,
        ),
    )
    if (t := request.thinking) is not None:
        message.thinking.CopyFrom(
            pb.EngineThinking(
                budget_tokens=t.budget_tokens,
                think_id=t.think_id,
                end_think_id=t.end_think_id,
                closing_ids=t.closing_ids,
                starts_inside=t.starts_inside,
            )
        )
    if (g := request.grammar) is not None:
        message.grammar.CopyFrom(
            pb.EngineGrammar(
                kind=g.kind,
                source=g.source,
                starts_inside=g.starts_inside,
                think_id=g.think_id,
                end_think_id=g.end_think_id,
                separator_id=g.separator_id,
                tool_call_id=g.tool_call_id,
            )
        )
    return message


def decode_submit(message: pb.Submit, request_id: str) -> EngineRequest:
    """`request_id` names it inside the engine, where requests of several gateways meet."""
    s = message.sampling
    return EngineRequest(
        request_id=request_id,
        prompt_ids=tuple(message.prompt_ids),
        output_ids=tuple(message.output_ids),
        deadline=message.deadline,
        prefix_salt=message.prefix_salt,
        traceparent=message.traceparent,
        thinking=_decode_thinking(message.thinking) if message.HasField("thinking") else None,
        grammar=_decode_grammar(message.grammar) if message.HasField("grammar") else None,
        sampling=SamplingParams(
            temperature=s.temperature,
            top_p=s.top_p,
            top_k=s.top_k,
            min_p=s.min_p,
            seed=s.seed,
            max_tokens=s.max_tokens,
            min_tokens=s.min_tokens,
            presence_penalty=s.presence_penalty,
            frequency_penalty=s.frequency_penalty,
            repetition_penalty=s.repetition_penalty,
            stop_token_ids=frozenset(s.stop_token_ids),
            num_logprobs=s.num_logprobs,
        ),
    )


def _decode_thinking(message: pb.EngineThinking) -> ThinkingBudget:
    return ThinkingBudget(
        budget_tokens=message.budget_tokens,
        think_id=message.think_id,
        end_think_id=message.end_think_id,
        closing_ids=tuple(message.closing_ids),
        starts_inside=message.starts_inside,
    )


def _decode_grammar(message: pb.EngineGrammar) -> AnswerGrammar:
    return AnswerGrammar(
        kind=message.kind,
        source=message.source,
        starts_inside=message.starts_inside,
        think_id=message.think_id,
        end_think_id=message.end_think_id,
        separator_id=message.separator_id,
        tool_call_id=message.tool_call_id,
    )


def add_output(tokens: pb.RequestTokens, output: RequestOutput) -> None:
    """Write one step's output, after what an earlier step left unsent."""
    tokens.token_ids.extend(output.token_ids)
    if output.finish_reason:
        tokens.finish_reason = int(output.finish_reason)  # type: ignore[assignment]
    if output.num_cached_tokens:
        tokens.num_cached_tokens = output.num_cached_tokens
    if output.queue_s:
        tokens.queue_s = output.queue_s
    for logprob in output.logprobs:
        tokens.logprobs.append(encode_logprob(logprob))


def encode_logprob(logprob: TokenLogprob) -> pb.TokenLogprob:
    top = [pb.TopLogprob(token_id=i, logprob=value) for i, value in logprob.top]
    return pb.TokenLogprob(token_id=logprob.token_id, logprob=logprob.logprob, top=top)


def decode_output(request_id: str, tokens: pb.RequestTokens, *, with_logprobs: bool) -> RequestOutput:
    output = RequestOutput(request_id, list(tokens.token_ids))
    if tokens.finish_reason:
        output.finish_reason = FinishReason(tokens.finish_reason)
    if tokens.queue_s or tokens.num_cached_tokens:
        output.queue_s, output.num_cached_tokens = tokens.queue_s, tokens.num_cached_tokens
    if with_logprobs:
        output.logprobs.extend(map(decode_logprob, tokens.logprobs))
    return output


def decode_logprob(logprob: pb.TokenLogprob) -> TokenLogprob:
    top = tuple((t.token_id, t.logprob) for t in logprob.top)
    return TokenLogprob(logprob.token_id, logprob.logprob, top)


def encode_load(load: EngineLoad, *, draining: bool, num_submitted: int) -> pb.ReplicaLoad:
    return pb.ReplicaLoad(
        num_running=load.num_running,
        num_waiting=load.num_waiting,
        num_free_kv_blocks=load.num_free_kv_blocks,
        num_kv_blocks=load.num_kv_blocks,
        draining=load.draining or draining,
        num_submitted=num_submitted,
    )


def decode_load(load: pb.ReplicaLoad) -> EngineLoad:
    return EngineLoad(
        num_running=load.num_running,
        num_waiting=load.num_waiting,
        num_free_kv_blocks=load.num_free_kv_blocks,
        num_kv_blocks=load.num_kv_blocks,
        draining=load.draining,
    )
