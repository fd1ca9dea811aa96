"""The demo's webhook receiver: it believes signatures and nothing else."""

from datetime import UTC, datetime

import httpx
import pytest
from standardwebhooks.webhooks import Webhook

from app.demo.receiver import Receiver

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
BODY = '{"type": "retention.rolled_back", "data": {"id": "ftjob-1"}}'


@pytest.fixture
def heard():
    return []


@pytest.fixture
def receiver(heard):
    with Receiver(heard.append) as running:
        yield running


def _post(receiver, *, secret=SECRET, body=BODY, message_id="msg_1"):
    now = datetime.now(UTC)
    headers = {
        "webhook-id": message_id,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": Webhook(secret).sign(message_id, now, BODY),
    }
    return httpx.post(receiver.url, content=body, headers=headers, trust_env=False).status_code


def test_a_signed_event_is_kept_and_reported(receiver, heard):
    receiver.trust(SECRET)
    assert _post(receiver) == 204
    assert [event["type"] for event in heard] == ["retention.rolled_back"]
    assert receiver.num_refused == 0


def test_a_second_delivery_of_an_event_counts_once(receiver, heard):
    receiver.trust(SECRET)
    assert [_post(receiver), _post(receiver)] == [204, 204]
    assert len(heard) == len(receiver.events) == 1


@pytest.mark.parametrize(
    "wrong",
    [{"body": BODY.replace("ftjob-1", "ftjob-2")}, {"secret": "whsec_" + "A" * 32}],
)
def test_what_is_not_signed_as_agreed_is_refused(receiver, heard, wrong):
    receiver.trust(SECRET)
    assert _post(receiver, **wrong) == 400
    assert not heard
    assert receiver.num_refused == 1


def test_nothing_is_believed_before_the_secret_is_known(receiver, heard):
    assert _post(receiver) == 400
    assert not heard


def test_a_request_without_headers_is_refused(receiver):
    receiver.trust(SECRET)
    assert httpx.post(receiver.url, content=BODY, trust_env=False).status_code == 400
