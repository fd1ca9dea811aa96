"""What never reaches a log."""

from app.services.logs import hide_secrets


def test_secrets_are_taken_out_wherever_they_stand() -> None:
    event = hide_secrets(
        None,
        "info",
        {
            "event": "key rt_live_abcd1234_" + "S" * 43 + " and whsec_U0VDUkVU+/= end",
            "url": "postgresql://retain:SECRETPASS@127.0.0.1:5432/retain",
            "header": "Authorization: Bearer SECRETSECRET",
            "password": "SECRET",
            "number": 3,
        },
    )
    text = repr(event)
    assert "SECRET" not in text
    assert "SSS" not in text
    assert "U0VDUkVU" not in text
    assert "rt_live_abcd1234_***" in text
    assert event["url"] == "postgresql://retain:***@127.0.0.1:5432/retain"
    assert event["number"] == 3
