"""Promise: what waits for a slow reader comes out whole and in pieces, and its bytes are counted while it waits."""

import random

from expertmesh.proto import expertmesh_pb2 as pb
from expertmesh.request import FinishReason, RequestOutput, TokenLogprob
from expertmesh.router.gateway.backlog import ID_BYTES, PIECE_TOKENS, Backlog
from expertmesh.router.gateway.link_messages import add_output, decode_output


def record(ids, *, logprobs=False, **fields) -> pb.RequestTokens:
    output = RequestOutput("r", list(ids), **fields)
    if logprobs:
        output.logprobs = [TokenLogprob(i, -0.5, ((i, -0.5), (7, -1.5))) for i in output.token_ids]
    tokens = pb.RequestTokens()
    add_output(tokens, output)
    return tokens


def take_all(backlog: Backlog) -> list[RequestOutput]:
    outputs = []
    while backlog:
        outputs.append(backlog.take("r"))
    return outputs


def test_a_record_that_is_taken_at_once_is_what_the_link_decodes():
    for with_logprobs in (False, True):
        backlog = Backlog(with_logprobs=with_logprobs)
        for tokens in (
            record([5], queue_s=0.25, num_cached_tokens=16, logprobs=with_logprobs),
            record([6, 7], logprobs=with_logprobs),
            record([], finish_reason=FinishReason.STOP),
        ):
            backlog.add(tokens)
            assert take_all(backlog) == [decode_output("r", tokens, with_logprobs=with_logprobs)]


def test_records_come_out_in_pieces_that_join_to_what_came_and_the_end_is_in_the_last():
    rng = random.Random(5)
    for with_logprobs in (False, True):
        for num_tokens in (1, PIECE_TOKENS - 1, PIECE_TOKENS, PIECE_TOKENS + 1, 5 * PIECE_TOKENS + 3):
            ids = [rng.randrange(151_936) for _ in range(num_tokens)]
            backlog, start = Backlog(with_logprobs=with_logprobs), 0
            while start < num_tokens:
                stop = start + rng.choice((1, 1, 2, 400))
                last = FinishReason.LENGTH if stop >= num_tokens else FinishReason.NONE
                backlog.add(record(ids[start:stop], logprobs=with_logprobs, finish_reason=last, queue_s=0.5))
                start = stop
            outputs = take_all(backlog)
            assert [i for o in outputs for i in o.token_ids] == ids
            assert all(len(o.token_ids) == PIECE_TOKENS for o in outputs[:-1])
            assert [o.finish_reason for o in outputs] == [0] * (len(outputs) - 1) + [FinishReason.LENGTH]
            assert [o.queue_s for o in outputs] == [0.5] + [0.0] * (len(outputs) - 1)
            if with_logprobs:
                assert [x.token_id for o in outputs for x in o.logprobs] == ids
                assert all(x.top[1] == (7, -1.5) for o in outputs for x in o.logprobs)


def test_an_end_that_comes_alone_is_taken():
    backlog = Backlog(with_logprobs=False)
    backlog.add(record([1]))
    assert backlog.take("r").finish_reason is FinishReason.NONE
    backlog.add(record([], finish_reason=FinishReason.STOP))
    assert [(o.token_ids, o.finish_reason) for o in take_all(backlog)] == [([], FinishReason.STOP)]


def test_bytes_are_counted_as_they_come_and_go():
    plain, full = Backlog(with_logprobs=False), Backlog(with_logprobs=True)
    for _ in range(1000):
        plain.add(record([9], logprobs=True))
        full.add(record([9], logprobs=True))
    assert plain.num_bytes == 1000 * ID_BYTES  # nobody asked for the others
    assert full.num_bytes > 1000 * (ID_BYTES + 20)
    for backlog in (plain, full):
        take_all(backlog)
        assert backlog.num_bytes == backlog.num_tokens == 0
