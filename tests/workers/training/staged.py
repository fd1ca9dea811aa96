"""Small runs of several stages with one adapter each."""

from app.domain.configs.adapters import DomainAdaptersConfig
from app.domain.runplan import RowsPlan, StagePlan
from tests.workers.training.runs import ListRows, make_plan, make_run, make_training

STEPS = 4  # a stage
NAMES = ("law", "medicine", "code")


def make_staged_plan(scratch, *configs, names=NAMES, kind="lora", trains=(), training=None, **more):
    """Stages of four steps over rows of their own, each with the seed and the numbers of the job."""
    values = {"type": kind, "total_steps": STEPS, "learning_rate": 1e-2, **(training or {})}
    stages = tuple(
        StagePlan(
            name=name,
            training_rows=RowsPlan(path="rows.jsonl", sha256=str(index) * 64),
            training=make_training(**values),
            trains=trains[index] if trains else "all",
        )
        for index, name in enumerate(names)
    )
    whole = {**values, "total_steps": STEPS * len(names)}
    return make_plan(scratch, strategies=configs, training=whole, stages=stages, **more)


def make_staged_stores(count):
    stores = {"general": ListRows(60, seed=2)}
    for index in range(count):
        stores[f"training-{index}" if index else "training"] = ListRows(24, seed=10 + index)
    return stores


def make_staged_run(scratch, *configs, names=NAMES, start=True, ranks=None, dtype=None, **more):
    plan = make_staged_plan(scratch, *configs, names=names, **more)
    stores = make_staged_stores(len(names))
    return make_run(plan, stores=stores, start=start, ranks=ranks, dtype=dtype)


def adapters(**knobs):
    """A configuration with adapters large enough to learn in a few steps."""
    return DomainAdaptersConfig(**{"r": 4, "strength": 1.0, **knobs})


def all_weights(run):
    return {name: p.detach().clone() for name, p in run.all_params.items()}
