"""Progressive tuning: where updates may point, and the pace at which rows come."""

from typing import Annotated, Any, Final, Literal

from pydantic import Field, model_validator

from app.domain.configs.base import StrategyBase

ModelName = Annotated[str, Field(min_length=1, max_length=512)]

CONE_STRENGTH: Final = 0.8  # the least cosine where a cone is asked for without one

#: How many models each source of a direction names.
NUM_MODELS: Final = {"trajectory": 1, "difference": 2}


class ProgressiveConfig(StrategyBase):
    """A direction that updates keep to, a curriculum, and general rows that fade out.

    `strength` is the least cosine of a cone (default 0.8), the share of the conflict that `a_gem` and `gpm`
    remove, and for `none` the factor on the general rows' share (default 1).
    """

    type: Literal["progressive"] = "progressive"
    strength: float | None = Field(default=None, ge=0, le=1)
    mode: Literal["cone", "a_gem", "gpm", "none"] = "a_gem"
    scope: Literal["block", "global"] = "block"  # of a cone: each weight matrix, or all as one
    # ema: this run's first steps, later the task before; trajectory: of an earlier job; difference: from the
    # second to the first of two models; general: against the gradient on general rows; auto: ema for a cone
    reference: Literal["auto", "ema", "trajectory", "difference", "general"] = "auto"
    reference_models: tuple[ModelName, ...] = Field(default=(), max_length=2)
    ref_beta: float = Field(default=0.99, ge=0, lt=1)  # of ema, a step
    ref_refresh: int = Field(default=50, ge=1)  # steps between gradients on general rows
    ref_rows: int = Field(default=64, ge=1, le=100_000)  # general rows of such a gradient
    warmup_ref_steps: int = Field(default=100, ge=1)  # of ema: recorded before anything is held
    gpm_threshold: float = Field(default=0.97, gt=0, lt=1)  # share of the old inputs' energy
    gpm_rows: int = Field(default=256, ge=1, le=100_000)  # rows behind each extension of the bases
    record_trajectory: bool = False  # publishes the run's displacement beside its weights
    curriculum: Literal["none", "nll", "length"] = "nll"
    c0: float = Field(default=0.1, gt=0, le=1)  # share of the rows, easiest first, at the start
    p: float = Field(default=2.0, gt=0, le=10)  # of the competence: 1 linear, 2 square root
    curriculum_steps: float = Field(default=0.4, gt=0, le=1)  # share of a task's steps
    mix_start: float | None = Field(default=0.5, gt=0, le=0.9)  # general share of a step's rows
    mix_end: float = Field(default=0.05, ge=0.05, le=0.9)

    @model_validator(mode="before")
    @classmethod
    def _a_cone_has_its_own_default(cls, data: Any) -> Any:  # noqa: ANN401 - whatever was sent
        is_cone = isinstance(data, dict) and data.get("mode") == "cone"
        if is_cone and data.get("strength") is None and not data.get("armed"):
            return {**data, "strength": CONE_STRENGTH}
        return data

    @model_validator(mode="after")
    def _parts_fit(self) -> "ProgressiveConfig":
        allowed = {"cone": {"auto", *NUM_MODELS, "ema", "general"}, "a_gem": {"auto", "general"}}
        if self.reference not in allowed.get(self.mode, {"auto"}):
            raise ValueError(f"reference: '{self.reference}' is not for mode '{self.mode}'")
        wanted = NUM_MODELS.get(self.reference, 0)
        if len(self.reference_models) != wanted:
            raise ValueError(f"reference_models: '{self.reference}' names {wanted} models")
        if self.mode == "cone" and self.armed:
            raise ValueError("armed: a cone's strength is a cosine; name it instead")
        does_nothing = self.curriculum == "none" and self.mix_start is None
        if self.mode == "none" and does_nothing and not self.record_trajectory:
            raise ValueError(
                "mode: 'none' needs a curriculum, general rows to mix in, or a trajectory to record"
            )
        return self

    def named_models(self) -> tuple[tuple[str, str], ...]:
        """The models that a trajectory or a difference is read from."""
        return tuple(("reference_models", name) for name in self.reference_models)

    @property
    def reads_general_rows(self) -> bool:
        """Whether it can't do without general data."""
        return (
            self.mode in ("a_gem", "gpm")
            or self.reference == "general"
            or self.mix_start is not None
        )
