"""The board's methods: every strategy, the recommended combinations and the controls."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from tests.benchmarks.board.methods import (
    ALPHA,
    Method,
    Setting,
    by_rate,
    by_strength,
    with_fields,
)
from workers.demo_model.skills import NAMES

ADAPTERS: Mapping[str, Any] = MappingProxyType(
    {"type": "domain_adapters", "r": 8}
)  # by the budget the tiny model would get rank 1
DISTILL: Mapping[str, Any] = MappingProxyType({"type": "distillation"})
REPLAY: Mapping[str, Any] = MappingProxyType(
    {"type": "replay", "strength": 0.3, "domain_store_fraction": 0.1}
)
CAUSAL: Mapping[str, Any] = MappingProxyType({"type": "causal", "entities": (NAMES,)})
RATIOS = (
    Setting(),
    Setting("strength x3", strength=3.0),
    Setting("strength x5", strength=5.0),
    Setting("strength x3, rate x0.4", strength=3.0, rate=0.4),
)
MERGES = (
    Setting(f"alpha {ALPHA:g}", alpha=ALPHA),
    Setting("alpha 0.3", alpha=0.3),
    Setting("alpha 0.7", alpha=0.7),
    Setting(f"alpha {ALPHA:g}, rate x0.4", alpha=ALPHA, rate=0.4),
)


def _named(kind: str, name: str | None = None, **fields: Any) -> Method:
    """A strategy alone on all weights, whose search turns its strength."""
    return Method(name or kind, ({"type": kind, **fields},), by_strength(10.0))


STRATEGIES = (
    _named("ewc"),
    _named("ewc", "ewc (in the loss)", penalty_mode="gradient", strength=1.0),
    _named("l2sp"),
    _named("si"),
    _named("mas"),
    Method("replay", ({"type": "replay"},), RATIOS),
    Method("replay (and earlier domains)", (REPLAY,), by_strength(1.6, ("replay",))),
    Method(
        "replay (earlier domains alone)",
        ({**REPLAY, "source": "none"},),
        by_strength(1.6, ("replay",)),
    ),
    Method(
        "replay (rows the base decoded)",
        ({**REPLAY, "source": "generated", "generated_tokens": 24},),
        by_strength(1.6, ("replay",)),
    ),
    Method("replay (DER++)", ({**REPLAY, "der_alpha": 0.5},), by_strength(1.6, ("replay",))),
    Method("distillation", (DISTILL,), by_strength(3.0)),
    Method("distillation (cached top k)", ({**DISTILL, "teacher": "cached"},), by_strength(3.0)),
    Method(
        "distillation (domain rows, every 4)",
        ({**DISTILL, "on": ("domain",), "every": 4},),
        by_strength(3.0),
    ),
    Method(
        "distillation (generated rows, every 4)",
        ({**DISTILL, "on": ("generated",), "every": 4, "generated_tokens": 24},),
        by_strength(3.0),
    ),
    Method(
        "distillation (hidden states)",
        ({**DISTILL, "hidden_coef": 1.0},),
        by_strength(3.0),
    ),
    Method(
        "domain_adapters",
        (ADAPTERS,),
        with_fields("domain_adapters", ("r 16", {"r": 16}), ("r 4", {"r": 4}), rate=2.0),
        training="lora",
        general_rows=True,
    ),
    Method(
        "domain_adapters (bottleneck)",
        ({**ADAPTERS, "kind": "bottleneck", "r": 16},),
        with_fields("domain_adapters", ("r 32", {"r": 32}), ("r 8", {"r": 8}), rate=2.0),
        training="lora",
        general_rows=True,
    ),
    Method("memory", ({"type": "memory"},), by_strength(3.0), general_rows=True),
    Method(
        "progressive (cone)",
        (
            {
                "type": "progressive",
                "mode": "cone",
                "reference": "general",
                "curriculum": "none",
                "mix_start": None,
                "ref_refresh": 8,
                "strength": 0.2,
            },
        ),
        (*by_strength(2.0)[:2], Setting("strength x4", strength=4.0), by_rate()[1]),
    ),
    Method(
        "progressive (A-GEM)",
        ({"type": "progressive", "mode": "a_gem", "curriculum": "none", "mix_start": None},),
        with_fields(
            "progressive",
            ("reference every 8", {"ref_refresh": 8}),
            ("every 1", {"ref_refresh": 1}),
        ),
    ),
    Method(
        "progressive (GPM)",
        ({"type": "progressive", "mode": "gpm", "curriculum": "none", "mix_start": None},),
        with_fields(
            "progressive", ("energy 0.99", {"gpm_threshold": 0.99}), ("0.9", {"gpm_threshold": 0.9})
        ),
    ),
    Method(
        "progressive (curriculum and mixing)",
        ({"type": "progressive", "mode": "none"},),
        with_fields(
            "progressive", ("mix to 0.2", {"mix_end": 0.2}), ("mix to 0.4", {"mix_end": 0.4})
        ),
    ),
    Method(
        "hybrid_optimizer (toward the base)",
        ({"type": "hybrid_optimizer", "decay_anchor": "pretrained", "wd_backbone": 1.0},),
        by_strength(10.0)[:2]
        + with_fields(
            "hybrid_optimizer", ("weighed by importance", {"importance": "gradient_ema"})
        )[1:],
    ),
    Method(
        "hybrid_optimizer (layer-wise)",
        ({"type": "hybrid_optimizer", "layer_decay": 0.5},),
        with_fields(
            "hybrid_optimizer",
            ("lamb", {"trust_ratio": "lamb"}),
            ("layer decay 0.2", {"layer_decay": 0.2}),
        ),
    ),
    Method(
        "freeze",
        ({"type": "freeze"},),
        by_rate(Setting("embeddings trained", fields={"freeze": {"embeddings": False}})),
    ),
    Method("maml_prox", ({"type": "maml_prox"},), by_strength(3.0)),
    Method("reptile", ({"type": "reptile"},), by_rate()),
    Method("causal", (CAUSAL,), by_strength(3.0), general_rows=True),
    Method("causal (pairs alone)", ({**CAUSAL, "vrex_beta": 0.0},), by_strength(3.0)),
)

COMBINATIONS = (
    Method(
        "replay + distillation",
        (REPLAY, DISTILL),
        by_strength(3.0, ("distillation",)),
        group="combination",
    ),
    Method(
        "ewc + replay",
        ({"type": "ewc"}, REPLAY),
        by_strength(10.0, ("ewc",)),
        group="combination",
    ),
    Method(
        "ewc + replay + distillation",
        ({"type": "ewc"}, REPLAY, DISTILL),
        by_strength(10.0, ("ewc",)),
        group="combination",
    ),
    Method(
        "ewc (in the loss) + replay",
        ({"type": "ewc", "penalty_mode": "gradient", "strength": 1.0}, REPLAY),
        by_strength(10.0, ("ewc",)),
        group="combination",
    ),
    Method(
        "ewc (in the loss) + distillation",
        ({"type": "ewc", "penalty_mode": "gradient", "strength": 1.0}, DISTILL),
        by_strength(10.0, ("ewc",)),
        group="combination",
    ),
    Method(
        "ewc + memory",
        ({"type": "ewc"}, {"type": "memory", "strength": 0.3}),
        by_strength(10.0, ("ewc",)),
        group="combination",
    ),
    Method(
        "domain_adapters + replay + distillation",
        (ADAPTERS, REPLAY, DISTILL),
        with_fields("domain_adapters", ("r 16", {"r": 16}), ("r 4", {"r": 4}), rate=2.0),
        training="lora",
        general_rows=True,
        group="combination",
    ),
    Method(
        "l2sp + LoRA + merge",
        ({"type": "l2sp"},),
        (
            Setting("alpha 0.8", alpha=0.8),
            Setting("alpha 0.6", alpha=0.6),
            Setting("alpha 0.8, strength /10", alpha=0.8, strength=0.1),
            Setting("alpha 0.8, strength x10", alpha=0.8, strength=10.0),
        ),
        training="lora",
        group="combination",
    ),
)

CONTROLS = (
    Method("plain", settings=(Setting(),), group="control"),
    Method("plain, searched", settings=by_rate(), group="control"),
    Method("plain LoRA", settings=by_rate(), training="lora", group="control"),
    Method("plain, stopped early", settings=by_rate(), protocol="early_stop", group="control"),
    Method("merge with the base", settings=MERGES, group="control"),
    Method("frozen base", protocol="frozen", group="control"),
    Method(
        "oracle-routed adapters",
        settings=by_rate(),
        training="lora",
        protocol="oracle_adapters",
        group="control",
    ),
    Method("joint training", settings=by_rate(), protocol="joint", group="control"),
)

# Plain training at other rates and lengths: what retention it has at each domain accuracy.
CURVE = (
    Method("plain, rate x0.1", settings=(Setting("rate x0.1", rate=0.1),), group="curve"),
    Method("plain, rate x0.25", settings=(Setting("rate x0.25", rate=0.25),), group="curve"),
    Method("plain, rate x0.5", settings=(Setting("rate x0.5", rate=0.5),), group="curve"),
    Method("plain, half the steps", settings=(Setting("steps x0.5", steps=0.5),), group="curve"),
    Method(
        "plain, rate x0.25, twice the steps",
        settings=(Setting("rate x0.25, steps x2", rate=0.25, steps=2.0),),
        group="curve",
    ),
)

METHODS = (*CONTROLS, *STRATEGIES, *COMBINATIONS, *CURVE)
PLAIN, FROZEN = "plain", "frozen base"
