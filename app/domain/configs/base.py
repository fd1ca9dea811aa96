"""What every strategy's configuration has.

`strength` is the coefficient of the strategy's card, in the card's units; None means the strategy's
default (`Card.default_strength`). `armed` prepares everything (anchor, Fisher) at strength 0, and lets
the controller activate it at that default.
"""

from pydantic import Field, model_validator

from app.domain.frozen import Frozen


class StrategyBase(Frozen):
    """What every strategy has."""

    strength: float | None = Field(default=None, ge=0, le=1e9)
    armed: bool = False

    @model_validator(mode="after")
    def _armed_has_no_strength(self) -> "StrategyBase":
        if self.armed and self.strength:
            raise ValueError(
                "strength: leave it out or 0 when armed is true; activation uses the default"
            )
        return self
