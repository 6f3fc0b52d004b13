"""The membership core as readable traces (tests/traces/membership_*.txt, rewritten by EXPERTMESH_REWRITE_TRACES=1)."""

import itertools
import random

import pytest
from membership_trace import Trace, agree, core, member, start

from expertmesh.cluster.membership import State
from expertmesh.cluster.membership_messages import (
    Alive,
    Commit,
    Committed,
    Doubt,
    Join,
    Leave,
    Lost,
    PlacementRequested,
    Prepare,
    Prepared,
    PrepareFailed,
    Probe,
    Retire,
    Rollback,
    Suspect,
    Tick,
    Trouble,
)
from expertmesh.router.placement import uniform


def test_the_first_epoch_forms_when_the_configured_members_are_there():
    trace = Trace("start", core())
    trace.say(Join(member("e1")))
    trace.say(Join(member("a1")))
    assert trace.core.epoch is None
    trace.say(Join(member("e2")))
    agree(trace, 1, ["e1", "a1", "e2"])
    trace.finish()


def test_a_placement_changes_without_a_new_communicator():
    trace = Trace("placement", core())
    start(trace, ["a1", "e1", "e2"])
    trace.say(PlacementRequested(uniform(2, 8, 2, 4)), at=5.0)
    agree(trace, 2, ["a1", "e1", "e2"], leader="a1")
    trace.say(PlacementRequested(uniform(2, 8, 3)), at=6.0)  # for three ranks: not ours
    trace.finish()


def test_a_failed_preparation_is_rolled_back_and_tried_again():
    trace = Trace("prepare_failed", core())
    start(trace, ["a1", "e1", "e2"])
    trace.say(Join(member("e3")), at=5.0)
    trace.say(Prepared("a1", 2))
    trace.say(PrepareFailed("e1", 2, "no memory"), at=6.0)
    trace.say(Prepared("e2", 2))  # too late, but a sign of life
    for name in ("a1", "e1", "e3"):
        trace.say(Alive(name), at=6.2)
    trace.say(Tick(), at=6.5)
    trace.say(Tick(), at=7.0)
    agree(trace, 3, ["a1", "e1", "e2", "e3"], leader="a1")
    trace.finish()


def test_a_dead_newcomer_that_fails_every_preparation_is_asked_for_and_left_out():
    trace = Trace("dead_newcomer", core())
    start(trace, ["a1", "e1", "e2"])
    trace.say(Join(member("e3")), at=5.0)
    trace.say(PrepareFailed("a1", 2, "connection refused"), at=5.1)  # by e3, which has died
    for name in ("a1", "e1", "e2"):
        trace.say(Alive(name))
    assert trace.core.next_deadline() == 7.1  # the retry waits for e3's sign of life
    trace.say(Tick(), at=7.1)
    assert trace.core.ready
    trace.finish()


def test_a_dead_shard_is_left_out_and_its_successor_let_in():
    trace = Trace("death", core())
    start(trace, ["a1", "e1", "e2"])
    trace.say(Trouble("a1", 1, "rank 2 is gone"), at=5.0)
    trace.say(Trouble("e1", 1, "rank 0 is gone"))
    trace.say(Alive("a1"))
    trace.say(Alive("e1"))
    trace.say(Tick(), at=6.9)
    trace.say(Tick(), at=7.0)
    agree(trace, 2, ["a1", "e1"], leader="a1")
    trace.say(Join(member("e2x")), at=9.0)
    agree(trace, 3, ["a1", "e1", "e2x"], leader="a1")
    trace.say(Alive("e2"), at=20.0)  # it was only stopped for a while
    trace.say(Join(member("e2")))
    agree(trace, 4, ["a1", "e1", "e2x", "e2"], leader="a1")
    trace.finish()


def test_a_suspect_shard_is_drained_where_another_can_do_its_work():
    trace = Trace("suspect", core(num_expert=1))
    start(trace, ["a1", "e1"])
    trace.say(Suspect("a1", "e1", "3 bad rows"), at=5.0)  # the only one: it serves on
    assert trace.core.ready
    trace.say(Join(member("e2")), at=6.0)
    agree(trace, 2, ["a1", "e1", "e2"], leader="a1")
    trace.say(Suspect("a1", "e1", "3 bad rows"), at=65.0)
    trace.say(Suspect("a1", "e1", "3 bad rows"))  # another attention replica saw it too
    agree(trace, 3, ["a1", "e2"], leader="a1")
    trace.say(Committed("e1", 3))
    trace.say(Suspect("a1", "e1", "late news"), at=70.0)
    assert trace.core.ready
    trace.finish()


def test_an_epoch_that_breaks_again_and_again_is_formed_at_a_slower_pace():
    trace = Trace("relapses", core(num_expert=1))
    start(trace, ["a1", "e1"])
    for number in range(1, 6):
        trace.say(Trouble("a1", number, "a product is not finite"), at=trace.now + 0.1)
        trace.say(Alive("a1"))
        trace.say(Alive("e1"))
        trace.say(
            Tick(), at=max(trace.now, trace.core.next_deadline() or 0.0) if not trace.core.changing else trace.now
        )
        agree(trace, number + 1, ["a1", "e1"], leader="a1")
    assert 7.0 < trace.now < 8.0  # two at once, then after 1, 2 and 4 s
    trace.say(Trouble("a1", 6, "much later"), at=30.0)
    trace.say(Alive("a1"))
    trace.say(Alive("e1"))
    assert trace.core.changing
    agree(trace, 7, ["a1", "e1"], leader="a1")
    trace.finish()


def test_a_death_that_is_known_needs_no_probe():
    trace = Trace("lost", core())
    start(trace, ["a1", "e1", "e2"])
    trace.say(Lost("e2"), at=5.0)
    trace.say(Prepared("a1", 2))
    trace.say(Lost("e1"))  # within the transition; nobody is left who owns experts
    trace.say(Join(member("e3")), at=8.0)
    agree(trace, 3, ["a1", "e3"], leader="a1")
    trace.finish()


def test_a_member_leaves_in_good_order_the_leader_too():
    trace = Trace("leave", core(num_attention=2))
    start(trace, ["a1", "a2", "e1", "e2"])
    trace.say(Leave("e1"), at=5.0)
    agree(trace, 2, ["a1", "a2", "e2"], leader="a1")
    trace.say(Committed("e1", 2))
    trace.say(Leave("a1"), at=6.0)
    for name in ("a2", "e2"):
        trace.say(Prepared(name, 3))
    trace.say(Committed("a1", 3))  # its last step is over: now the others
    for name in ("a2", "e2"):
        trace.say(Committed(name, 3))
    trace.say(Leave("e2"), at=7.0)  # the last that owns experts stays until another comes
    trace.say(Join(member("e3")), at=9.0)
    agree(trace, 4, ["a2", "e3"], leader="a2")
    trace.say(Committed("e2", 4))
    trace.finish()


def test_a_member_that_hangs_while_it_prepares_is_left_out():
    trace = Trace("hang_in_prepare", core())
    start(trace, ["a1", "e1", "e2"])
    trace.say(Join(member("e3")), at=5.0)
    for name in ("a1", "e1", "e2"):
        trace.say(Prepared(name, 2))
    trace.say(Tick(), at=15.0)
    trace.say(Tick(), at=25.0)
    trace.finish()


def test_a_restarted_conductor_adopts_the_highest_epoch():
    trace = Trace("restart", core())
    start(trace, ["a1", "e1", "e2"])
    epoch = trace.core.epoch
    trace.core = core(first_key=101)
    trace.lines.append("       (restart)")
    trace.say(Join(member("e1"), epoch, 2), at=0.0)  # it had prepared an epoch 2 that never was committed
    trace.say(Join(member("a1"), epoch, 1))
    trace.say(Tick(), at=9.0)
    trace.say(Join(member("e2"), epoch, 1))
    assert trace.core.ready
    trace.say(Join(member("e3")), at=20.0)
    agree(trace, 1003, ["a1", "e1", "e2", "e3"], leader="a1")
    trace.finish()


def test_a_late_answer_to_a_former_conductor_is_none_to_the_new_one():
    """It had asked for an epoch that nobody had told of when the new one numbers its first."""
    trace = Trace("late_answer", core())
    start(trace, ["a1", "e1", "e2"])
    epoch = trace.core.epoch
    trace.core = core(first_key=101)
    trace.lines.append("       (restart; epoch 2 was being prepared)")
    trace.say(Join(member("a1"), epoch, 1), at=0.0)
    trace.say(Join(member("e1"), epoch, 1))
    trace.say(Tick(), at=10.0)
    assert trace.core._transition.epoch.number == 1002
    trace.say(Prepared("a1", 2))
    trace.say(Prepared("e1", 2))
    assert trace.core._transition.waiting == {"a1", "e1"}
    agree(trace, 1002, ["a1", "e1"], leader="a1")
    trace.finish()


def test_who_was_given_up_and_joined_again_is_not_let_go_with_the_epoch_that_left_it_out():
    trace = Trace("returned", core())
    start(trace, ["a1", "e1", "e2"])
    trace.say(Trouble("a1", 1, "control channel of 'e2' closed", "e2"), at=5.0)  # a false alarm
    trace.say(Join(member("e2"), trace.core.epoch, 1), at=5.1)
    trace.say(Prepared("a1", 2), at=5.2)
    trace.say(Prepared("e1", 2))
    trace.say(Committed("a1", 2))
    told = trace.say(Committed("e1", 2))
    assert [type(c) for c in told if c.member_id == "e2"] == [Prepare]
    agree(trace, 3, ["a1", "e1", "e2"], leader="a1")
    trace.finish()


def test_a_restart_inside_a_commit_brings_all_into_one_epoch():
    trace = Trace("restart_in_commit", core())
    start(trace, ["a1", "e1", "e2"])
    first = trace.core.epoch
    second = trace.say(PlacementRequested(uniform(2, 8, 2, 4)), at=5.0)[0].epoch
    trace.core = core(first_key=101)
    trace.lines.append("       (restart; only a1 was told to commit)")
    trace.say(Join(member("e1"), first, 2), at=6.0)
    trace.say(Join(member("a1"), second, 2))
    trace.say(Join(member("e2"), first, 2))
    agree(trace, 1003, ["a1", "e1", "e2"], leader="a1")
    trace.finish()


@pytest.mark.parametrize("seed", range(150))
def test_random_histories_never_mix_epochs_and_always_settle(seed):
    """Members obey, fail, die, come and leave at random; answers arrive late. Never is one epoch number two epochs or
    one placement version two tables; never does a member commit what it did not prepare; in the end all are in one
    epoch."""
    rng = random.Random(seed)
    membership, now = core(num_attention=2, num_expert=2), 0.0
    alive = {name: [] for name in ("a1", "a2", "e1", "e2", "e3")}  # name -> answers not delivered yet
    prepared, epochs, tables, names = {}, {}, {}, itertools.count(10)
    answers, victims = [Join(member(name)) for name in alive], []

    def perform(commands):
        for command in commands:
            name = command.member_id
            match command:
                case Prepare(_, epoch):
                    assert epochs.setdefault(epoch.number, epoch) is epoch
                    table = epoch.placement.physical_to_logical
                    assert tables.setdefault(epoch.placement_version, table).equal(table)
                    assert len({m.member_id for m in epoch.members}) == len(epoch.members)
                    if name in alive:
                        prepared.setdefault(name, set()).add(epoch.number)
                        answers.append(Prepared(name, epoch.number))
                case Commit(_, number) | Retire(_, number):
                    if name in alive:
                        assert isinstance(command, Retire) or number in prepared[name], "commit without prepare"
                        answers.append(Committed(name, number))
                case Rollback(_, number):
                    if name in alive:
                        prepared[name].discard(number)
                case Probe():
                    if name in alive:
                        answers.append(Alive(name))
                case _:
                    if name in alive:
                        answers.append(Join(member(name)))

    for _ in range(120):
        now += 0.05
        dice = rng.random()
        if dice < 0.04 and len([n for n in alive if n[0] == "e"]) > 1:
            victim = rng.choice([n for n in alive if n[0] == "e"])
            del alive[victim]
            victims.append(victim)
            if rng.random() < 0.5:
                answers.append(Lost(victim))
            elif membership.epoch:
                answers.append(Trouble(rng.choice(sorted(alive)), membership.epoch.number, f"{victim} is gone"))
        elif dice < 0.08:
            name = f"{rng.choice('ae')}{next(names)}"
            alive[name] = []
            answers.append(Join(member(name)))
        elif dice < 0.10 and membership.epoch:
            answers.append(PlacementRequested(uniform(2, 8, max(1, len(membership.epoch.expert_ranks)), 4)))
        elif dice < 0.13 and membership.changing:
            answers.append(PrepareFailed(rng.choice(sorted(alive)), membership._transition.epoch.number, "chance"))
        elif dice < 0.2:
            answers.append(Tick())
        if answers:
            perform(membership.step(answers.pop(rng.randrange(len(answers)) if rng.random() < 0.2 else 0), now))
    while len([n for n in alive if n[0] == "e"]) < 2:  # the first epoch waits for as many
        name = f"e{next(names)}"
        alive[name] = []
        answers.append(Join(member(name)))
    answers += [Lost(victim) for victim in victims]  # at last every death is known
    for _ in range(400):  # quiet: everything is delivered, time passes
        if answers:
            perform(membership.step(answers.pop(0), now))
        else:
            answers += [Join(member(name)) for name in alive if not membership.knows(name)]  # as its next poll does
            now = max(now + 0.1, membership.next_deadline() or 0.0)
            perform(membership.step(Tick(), now))
            if membership.ready and not answers:
                break
    assert membership.ready, membership.last_failure
    assert {m.member_id for m in membership.epoch.members} <= set(alive)
    assert all(membership.states[m.member_id] is State.READY for m in membership.epoch.members)


def test_who_missed_the_deadline_is_not_waited_for_when_all_others_answer():
    """A stopped shard: the others name it and each other, and answer; nobody else is given up in haste."""
    trace = Trace("missed_deadline", core())
    start(trace, ["a1", "e1", "e2"])
    trace.say(Trouble("a1", 1, "rank 2 sent nothing for 3.0 s", "", "e2"), at=5.0)
    trace.say(Trouble("e1", 1, "rank 0 sent nothing for 3.0 s", "", "a1"), at=5.05)  # it waits behind the other two
    assert trace.core.next_deadline() == pytest.approx(5.15)
    trace.say(Alive("a1"))
    trace.say(Alive("e1"))
    trace.say(Tick(), at=5.3)
    agree(trace, 2, ["a1", "e1"], leader="a1")
    trace.say(Join(member("e2")), at=6.0)
    agree(trace, 3, ["a1", "e1", "e2"], leader="a1")
    trace.say(Trouble("a1", 3, "rank 2 sent nothing for 3.0 s", "", "e2"), at=20.0)
    trace.say(Tick(), at=20.3)  # e1 has not answered either: all are slow, nobody is given up yet
    assert trace.core.states["e2"] is not State.DEAD
    trace.say(Alive("a1"), at=20.3)
    trace.say(Alive("e1"), at=20.4)
    assert trace.core.next_deadline() == pytest.approx(20.55)  # a moment more than the slowest other needed
    trace.say(Alive("e2"), at=20.5)
    agree(trace, 4, ["a1", "e1", "e2"], leader="a1")
    trace.say(Trouble("a1", 4, "rank 2 sent nothing for 3.0 s", "", "e2"), at=30.0)
    trace.say(Alive("a1"), at=30.1)
    trace.say(Tick(), at=30.25)
    trace.say(Alive("e1"), at=30.6)  # slow, and there
    trace.say(Tick(), at=30.85)
    agree(trace, 5, ["a1", "e1"], leader="a1")
    trace.finish()


def test_who_hangs_in_a_long_step_is_given_up_with_the_word_that_it_missed_the_deadline():
    """Asked in time, silent since and named by the exchange: nothing is left to wait for. Two at once too."""
    trace = Trace("hang_in_a_long_step", core(num_expert=4))
    start(trace, ["a1", "e1", "e2", "e3", "e4"])
    trace.say(Doubt("a1", 1), at=5.0)
    trace.say(Doubt("e1", 1), at=5.1)  # of the same step: all are asked already
    for name in ("a1", "e1", "e4"):
        trace.say(Alive(name))
    trace.say(Tick(), at=5.15)
    trace.say(Trouble("e1", 1, "rank 0 sent nothing for 3.0 s", "", "a1"), at=6.5)  # a1 has answered: it only waits
    assert trace.core.states["a1"] is State.READY
    trace.say(Trouble("a1", 1, "rank 2 sent nothing for 3.0 s", "", "e2"))
    assert trace.core.states["e2"] is State.DEAD
    trace.say(Trouble("e4", 1, "rank 3 sent nothing for 3.0 s", "", "e3"))
    assert trace.core.states["e3"] is State.DEAD
    agree(trace, 3, ["a1", "e1", "e4"], leader="a1")
    trace.finish()


def test_who_answers_late_in_a_long_step_is_not_given_up_in_haste():
    trace = Trace("slow_in_a_long_step", core())
    start(trace, ["a1", "e1", "e2"])
    trace.say(Doubt("a1", 1), at=5.0)
    trace.say(Alive("a1"))
    trace.say(Alive("e1"))
    trace.say(Tick(), at=5.15)
    trace.say(Alive("e2"), at=6.4)  # busy, and there
    trace.say(Trouble("a1", 1, "rank 2 sent nothing for 3.0 s", "", "e2"), at=6.5)
    assert trace.core.states["e2"] is State.READY
    for name in ("a1", "e1", "e2"):
        trace.say(Alive(name))
    agree(trace, 2, ["a1", "e1", "e2"], leader="a1")
    trace.say(Doubt("e1", 2), at=20.0)  # so late that there is no time to answer
    trace.say(Trouble("a1", 2, "rank 2 sent nothing for 3.0 s", "", "e2"), at=20.01)
    assert trace.core.states["e2"] is State.READY
    trace.say(Alive("e2"), at=20.02)
    trace.say(Alive("e1"))
    trace.say(Alive("a1"))
    agree(trace, 3, ["a1", "e1", "e2"], leader="a1")
    trace.say(Tick(), at=20.2)
    trace.say(Doubt("a1", 2), at=30.0)  # of an epoch that is over
    assert trace.core.next_deadline() is None
    trace.finish()


def test_a_closed_connection_needs_no_probe_and_a_member_may_return_only_to_leave():
    trace = Trace("closed_connection", core())
    start(trace, ["a1", "e1", "e2"])
    trace.say(Trouble("e1", 1, "rank 2 is gone"), at=5.0)
    trace.say(Trouble("a1", 1, "control channel of 'e2' closed", "e2"), at=5.0)
    agree(trace, 2, ["a1", "e1"], leader="a1")
    assert trace.core.ready
    trace.say(Trouble("a1", 1, "old news", "e1"))  # of an epoch that is over
    trace.say(Join(member("e2"), leaving=True))
    assert trace.core.ready
    trace.finish()
