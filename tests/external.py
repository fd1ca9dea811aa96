"""An external run for tests: a stored benchmark, and bodies as a trainer posts them."""

import json
from typing import Any

from sqlalchemy.orm import Session

from app.db.models import BenchmarkVersion, File, Project
from app.services.storage import Storage
from tests.factories import make_benchmark

ITEMS = 1000
RIGHT = 600


def store_benchmark(
    session: Session, storage: Storage, project: Project | None, name: str = "general", **rest: Any
) -> BenchmarkVersion:
    """A benchmark of 1,000 items whose file lies in the store."""
    version = make_benchmark(session, project, name=name, num_items=ITEMS, **rest)
    lines = (json.dumps({"id": f"i{n}", "question": "?"}) for n in range(ITEMS))
    storage.put_bytes("\n".join(lines).encode(), session.get_one(File, version.file_id).path)
    session.commit()
    return version


def scores(benchmark: str = "general", lost: int = 0, **rest: Any) -> dict[str, Any]:
    """The first 600 items right, but for the first `lost`."""
    items = [{"id": f"i{n}", "score": float(lost <= n < RIGHT)} for n in range(ITEMS)]
    return {"benchmark": benchmark, "items": items} | rest


def point(step: int, lost: int = 0, **rest: Any) -> dict[str, Any]:
    """An evaluation of the one benchmark."""
    return {"step": step, "scores": [scores(lost=lost)]} | rest


def registration(**rest: Any) -> dict[str, Any]:
    """A run on a model that this server does not know, with two levers."""
    return {
        "model": "our-own-7b",
        "policy": {"benchmarks": [{"name": "general"}]},
        "levers": [
            {"type": "ewc", "strength": 1.0},
            {"type": "kl", "armed": True, "default": 0.5, "cap": 4.0},
        ],
    } | rest
