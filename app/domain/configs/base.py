"""What every strategy's configuration has.

`strength` is the coefficient of the strategy's card, in the card's units; None means the strategy's
default (`Card.default_strength`). `armed` prepares everything (anchor, Fisher) at strength 0, and lets
the controller activate it at that default.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, Final, Literal

from pydantic import Field, model_validator

from app.domain.frozen import Frozen

#: What a registered model is: a decoder that jobs train, towers that embed, or a translator.
ModelKind = Literal["causal_lm", "encoder", "seq2seq"]
CAUSAL_LM: Final[ModelKind] = "causal_lm"


class StrategyBase(Frozen):
    """What every strategy has."""

    strength: float | None = Field(default=None, ge=0, le=1e9)
    armed: bool = False

    #: The kind that a field of `named_models` needs; a field that is not listed names a causal model.
    model_kinds: ClassVar[Mapping[str, ModelKind]] = MappingProxyType({})

    def named_models(self) -> tuple[tuple[str, str], ...]:
        """Other models that the strategy reads: (field, name), base models or published versions.

        At submit each has to exist; the run finds its directory under its name in `RunPlan.models`.
        """
        return ()

    @property
    def keeps_domain_rows(self) -> bool:
        """Whether rows of a finished domain are kept for later ones, or published with the model."""
        return False

    @model_validator(mode="after")
    def _armed_has_no_strength(self) -> "StrategyBase":
        if self.armed and self.strength:
            raise ValueError(
                "strength: leave it out or 0 when armed is true; activation uses the default"
            )
        return self
