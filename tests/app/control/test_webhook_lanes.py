"""Whose turn it is: lanes keep a slow receiver from holding up the others."""

import time
from datetime import UTC, datetime
from uuid import UUID, uuid4

from app.control.webhook_http import Reply
from app.control.webhook_lanes import MAX_IN_FLIGHT, PER_ENDPOINT, Claim, Lanes
from app.control.webhook_results import GAPS_SECONDS, judge, summarise
from app.db.repositories.webhook_deliveries import ClaimedDelivery
from app.domain.states import DeliveryState

FAILED, DONE = Reply(500, "answered 500"), Reply(200, None)


def claimed(endpoint_id: UUID, *, tries: int = 0, is_probe: bool = False) -> ClaimedDelivery:
    return ClaimedDelivery(
        id=uuid4(),
        event_id=uuid4(),
        endpoint_id=endpoint_id,
        url="https://example.org/",
        payload={},
        secrets_encrypted=(),
        tries=tries,
        is_probe=is_probe,
        claimed_until=datetime.now(UTC),
    )


def claims(endpoint_id: UUID, count: int) -> list[Claim]:
    return [Claim(claimed(endpoint_id), time.monotonic() + 60) for _ in range(count)]


def test_an_endpoint_gets_two_tries_at_once_and_the_next_when_one_ends() -> None:
    lanes, key = Lanes(), uuid4()
    lanes.add(claims(key, 4), {key: 4})
    first, second = lanes.take()
    assert lanes.take_of(key) is None
    lanes.ended(first, 0.01)
    assert lanes.take_of(key) is not None
    assert (lanes.num_running, lanes.num_held) == (PER_ENDPOINT, 3)
    lanes.ended(second, 0.01)
    assert lanes.num_held == 2


def test_more_is_claimed_ahead_for_those_that_answer_fast() -> None:
    lanes, fast, slow = Lanes(), uuid4(), uuid4()
    lanes.add(claims(fast, 1) + claims(slow, 1), {})  # idle lanes are forgotten
    for _ in range(8):
        for key, seconds in ((fast, 0.005), (slow, 15.0)):
            lanes.add(claims(key, 1), {key: 1})
            claim = lanes.take_of(key)
            assert claim is not None
            lanes.ended(claim, seconds)
    lanes.add(claims(fast, 1), {fast: 1})
    room = lanes.room()
    assert room[fast] > 40
    assert room[slow] == PER_ENDPOINT - 1
    assert lanes.is_hungry(fast)


def test_fifty_tries_run_at_once_and_who_waits_gets_the_next_slot() -> None:
    lanes = Lanes()
    keys = [uuid4() for _ in range(MAX_IN_FLIGHT)]
    lanes.add([claim for key in keys for claim in claims(key, 2)], {})
    running = list(lanes.take())
    assert len(running) == MAX_IN_FLIGHT
    assert {claim.delivery.endpoint_id for claim in running} == set(
        keys
    )  # nobody's second before all firsts
    assert lanes.is_crowded
    lanes.ended(running[0], 0.1)
    assert len(list(lanes.take())) == 1


def test_a_closed_lane_starts_nothing_until_it_is_opened() -> None:
    lanes, key = Lanes(), uuid4()
    lanes.add(claims(key, 4), {key: 4})
    for claim in list(lanes.take()):
        lanes.ended(claim, 0.01)
    assert len(lanes.close(key)) == 2
    lanes.add([], {})
    assert lanes.room() == {key: 0}
    lanes.reopen([key])
    assert lanes.room()[key] >= PER_ENDPOINT


def test_the_schedule_ends_after_its_last_gap_and_probes_use_up_nothing() -> None:
    key = uuid4()
    for tries, gap in enumerate(GAPS_SECONDS):
        outcome = judge(claimed(key, tries=tries), FAILED, scale=1)
        assert outcome.state is DeliveryState.PENDING
        assert 0.8 * gap <= outcome.retry_seconds <= 1.2 * gap
    last = len(GAPS_SECONDS)
    assert judge(claimed(key, tries=last), FAILED, scale=1).state is DeliveryState.DEAD
    probe = claimed(key, tries=last, is_probe=True)
    assert judge(probe, FAILED, scale=1).state is DeliveryState.PENDING
    assert judge(probe, DONE, scale=1).state is DeliveryState.DELIVERED
    assert judge(claimed(key), Reply(410, "answered 410"), scale=1).state is DeliveryState.DEAD
    for status, waits in ((429, 7200.0), (503, 7200.0), (500, 0.0)):
        reply = Reply(status, "busy", retry_after="7200")
        assert judge(claimed(key), reply, scale=1).wait_seconds == waits


def test_a_success_ends_the_failures_before_it_and_none_after_it() -> None:
    key, other = uuid4(), uuid4()
    tries = [(key, FAILED), (key, DONE), (other, FAILED), (key, FAILED), (other, FAILED)]
    first, second = summarise([(claimed(each), reply) for each, reply in tries])
    assert (first.endpoint_id, first.has_answered, first.num_failures) == (key, True, 1)
    assert (second.endpoint_id, second.has_answered, second.num_failures) == (other, False, 2)
