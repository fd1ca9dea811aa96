"""Webhook secrets, and bodies signed with them by Standard Webhooks 1.0."""

import base64
import hashlib
import hmac
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson
from cryptography.fernet import InvalidToken, MultiFernet

from app.errors import Unavailable

SECRET_PREFIX: Final = "whsec_"  # noqa: S105 - what a secret begins with
_SECRET_BYTES = 32


@dataclass(frozen=True)
class SignedRequest:
    """What is posted to a receiver."""

    headers: dict[str, str]
    body: bytes


def make_secret() -> str:
    """A new secret."""
    # Padded base64: the openai client decodes it strictly.
    return SECRET_PREFIX + base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode()


def decrypt_secret(cipher: MultiFernet, encrypted: bytes) -> str:
    """The secret that was encrypted.

    Raises:
        Unavailable: It was encrypted under another key.
    """
    try:
        return cipher.decrypt(encrypted).decode()
    except InvalidToken:
        raise Unavailable(
            "The webhook secret was encrypted under another key: restore RETAIN_SECRET_KEY."
        ) from None


def sign_request(secrets_in_force: Sequence[str], payload: dict[str, Any]) -> SignedRequest:
    """The payload as bytes, with the headers that prove who sent them; signed anew for each try."""
    body = orjson.dumps(payload, option=orjson.OPT_SORT_KEYS)
    timestamp = int(time.time())
    message_id = str(payload["id"])
    signature = sign(secrets_in_force, message_id=message_id, timestamp=timestamp, body=body)
    headers = {
        "content-type": "application/json",
        "accept-encoding": "identity",
        "user-agent": "Retain-Webhooks/1",
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": signature,
    }
    return SignedRequest(headers, body)


def sign(secrets_in_force: Sequence[str], *, message_id: str, timestamp: int, body: bytes) -> str:
    """The `webhook-signature` header: one `v1` signature for each secret."""
    text = f"{message_id}.{timestamp}.".encode() + body
    signatures = []
    for secret in secrets_in_force:
        key = base64.b64decode(secret.removeprefix(SECRET_PREFIX))
        digest = hmac.new(key, text, hashlib.sha256).digest()
        signatures.append("v1," + base64.b64encode(digest).decode())
    return " ".join(signatures)
