"""The key under which secrets lie in the database."""

import contextlib
import os
from pathlib import Path

from cryptography.fernet import Fernet, MultiFernet

from app.errors import BadRequest
from app.settings import Settings


def load_cipher(settings: Settings) -> MultiFernet:
    """The cipher of `RETAIN_SECRET_KEY`, else of `<data_dir>/secret.key`, which is made when missing.

    The setting may hold several keys with commas between: the first encrypts, all decrypt.

    Raises:
        BadRequest: It is not a Fernet key.
    """
    if settings.secret_key is not None:
        text = settings.secret_key.get_secret_value()
    else:
        text = _load_or_make(settings.data_dir / "secret.key")
    try:
        return MultiFernet([Fernet(key.strip()) for key in text.split(",")])
    except ValueError:
        raise BadRequest(
            "RETAIN_SECRET_KEY is not a Fernet key (32 bytes as URL-safe base64).", "secret_key"
        ) from None


def _load_or_make(path: Path) -> str:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f".secret.key.{os.getpid()}")
        fresh.touch(mode=0o600)
        fresh.write_bytes(Fernet.generate_key())
        # Linked, not renamed: of two processes that start at once the first wins, and both read its key.
        with contextlib.suppress(FileExistsError):
            path.hardlink_to(fresh)
        fresh.unlink()
    return path.read_text()
