"""What the board compares: strategies, combinations and controls, each with the settings its search may try."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from pydantic import TypeAdapter

from app.domain.strategies import StrategyConfig, default_strength, needs_general_data

Protocol = Literal["sequence", "joint", "early_stop", "frozen", "oracle_adapters"]
Group = Literal["strategy", "combination", "control", "curve", "peer"]
Fields = Mapping[str, Any]

FULL_RATE, LORA_RATE = 2e-3, 1e-2
STEPS = 120  # a domain
ALPHA = 0.5  # of a merge with the base, unless the search says otherwise


@dataclass(frozen=True)
class Setting:
    """One point of a method's search; what it leaves out is the default.

    Args:
        label: As the report names it.
        rate: Multiplies the learning rate.
        steps: Multiplies the steps.
        strength: Multiplies the default strength of every strategy, or of those named.
        fields: Fields of a strategy's configuration by its type.
        alpha: Where the weights are read on the line from base to tuned; None: tuned.
    """

    label: str = "default"
    rate: float = 1.0
    steps: float = 1.0
    strength: float | Mapping[str, float] = 1.0
    fields: Mapping[str, Fields] = field(default_factory=dict)
    alpha: float | None = None


@dataclass(frozen=True)
class Method:
    """A row of the board.

    Args:
        name: As the report names it.
        strategies: Configurations as a job would send them.
        settings: What the search may choose from, the default first.
        training: Which weights are trained.
        protocol: How a sequence of domains is gone through.
        group: Where the report puts it.
        general_rows: Whether it is given general rows; None: if a strategy can't do without.
    """

    name: str
    strategies: tuple[Fields, ...] = ()
    settings: tuple[Setting, ...] = (Setting(),)
    training: Literal["full", "lora"] = "full"
    protocol: Protocol = "sequence"
    group: Group = "strategy"
    general_rows: bool | None = None

    def __post_init__(self) -> None:
        """Plain dictionaries, which travel to other processes."""
        object.__setattr__(self, "strategies", tuple(dict(given) for given in self.strategies))

    def kinds(self) -> tuple[str, ...]:
        """Types of its strategies."""
        return tuple(str(config["type"]) for config in self.strategies)


class NotBuilt(Exception):
    """A strategy of the method is not known to this version of the program."""


@cache
def _adapter() -> TypeAdapter[Any]:
    return TypeAdapter(StrategyConfig)


@cache
def known_kinds() -> frozenset[str]:
    """Types that a job may name in this version."""
    return frozenset(_adapter().json_schema()["discriminator"]["mapping"])


def resolve(method: Method, setting: Setting) -> tuple[StrategyConfig, ...]:
    """The configurations of a method at a setting, with every strength a number.

    Raises:
        NotBuilt: A strategy is not there yet.
        pydantic.ValidationError: A configuration is refused.
    """
    lora = method.training == "lora"
    resolved: list[StrategyConfig] = []
    for given in method.strategies:
        kind = str(given["type"])
        if kind not in known_kinds():
            raise NotBuilt(kind)
        fields = {**given, **setting.fields.get(kind, {})}
        factor = (
            setting.strength
            if isinstance(setting.strength, float)
            else setting.strength.get(kind, 1.0)
        )
        if fields.get("strength") is None:  # some kinds have a default of their own in some modes
            validated = _adapter().validate_python(fields).strength
            fields["strength"] = (
                default_strength(kind, lora=lora) if validated is None else validated
            )
        fields["strength"] = fields["strength"] * factor
        resolved.append(_adapter().validate_python(fields))
    return tuple(resolved)


def uses_general_rows(method: Method) -> bool:
    """Whether it is given general rows."""
    if method.general_rows is not None:
        return method.general_rows
    return any(needs_general_data(config) for config in resolve(method, method.settings[0]))


def rate_of(method: Method, setting: Setting) -> float:
    """Its learning rate."""
    return (LORA_RATE if method.training == "lora" else FULL_RATE) * setting.rate


def by_strength(factor: float, kinds: Sequence[str] = ()) -> tuple[Setting, ...]:
    """Four settings: the default, weaker, stronger, and the default at less than half the learning rate."""

    def scaled(value: float) -> float | Mapping[str, float]:
        return dict.fromkeys(kinds, value) if kinds else value

    return (
        Setting(),
        Setting(f"strength /{factor:g}", strength=scaled(1.0 / factor)),
        Setting(f"strength x{factor:g}", strength=scaled(factor)),
        Setting("rate x0.4", rate=0.4),
    )


def by_rate(*others: Setting) -> tuple[Setting, ...]:
    """Four settings: the default and three learning rates, less those that are given."""
    rates = (
        Setting("rate x0.4", rate=0.4),
        Setting("rate x0.15", rate=0.15),
        Setting("rate x2", rate=2.0),
    )
    return (Setting(), *others, *rates)[:4]


def with_fields(kind: str, *options: tuple[str, Fields], rate: float = 0.4) -> tuple[Setting, ...]:
    """The default, two other knobs, and the default at another learning rate."""
    own = tuple(Setting(label, fields={kind: fields}) for label, fields in options)
    return (Setting(), *own, Setting(f"rate x{rate:g}", rate=rate))
