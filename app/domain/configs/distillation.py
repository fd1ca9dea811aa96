"""Distillation from the model the job started from."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from app.domain.configs.base import StrategyBase
from app.domain.configs.replay import ReplayConfig

Source = Literal["domain", "general", "replay", "generated"]


class DistillationConfig(StrategyBase):
    """Distillation of logits, and of hidden states where asked for, from the model the job started from."""

    type: Literal["distillation"] = "distillation"
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    temperature: float = Field(default=1.0, gt=0, le=100)
    beta: float = Field(default=0.5, gt=0, lt=1)  # of jsd
    jsd_rescale: bool = True
    on: Annotated[tuple[Source, ...], Field(min_length=1)] | Literal["auto"] = "auto"
    # general and generated rows added to a step, each as a share of batch_size
    general_ratio: float = Field(default=0.25, gt=0, le=4)
    every: int = Field(default=1, ge=1, le=1000)  # steps from one distilled step to the next

    teacher: Literal["online", "cached"] = "online"  # cached: the top k, once, before training
    top_k: int = Field(default=64, ge=1, le=65_536)  # tokens kept of each position
    cache_rows: int = Field(default=4096, ge=1, le=10_000_000)  # general rows cached at most

    hidden_coef: float = Field(default=0.0, ge=0, le=100)  # beside the logits; 0: off
    hidden_layers: tuple[Annotated[int, Field(ge=0)], ...] | Literal["auto"] = "auto"
    hidden_loss: Literal["mse", "cosine"] = "mse"

    generated_rows: int = Field(default=64, ge=1, le=100_000)  # decoded at a time
    generated_tokens: int = Field(default=64, ge=1, le=8192)  # new ones a row, at most
    generated_temperature: float = Field(default=1.0, gt=0, le=10)
    generated_prompts: Literal["prompt", "start"] = "prompt"
    generate_every: int | None = Field(default=None, ge=1)  # steps; None: once, as a task starts

    cka_rows: int = Field(default=32, ge=0, le=1024)  # 0: no CKA

    @model_validator(mode="after")
    def _cache_holds_what_it_is_asked_for(self) -> "DistillationConfig":
        if self.teacher == "online":
            return self
        if self.divergence != "forward_kl":
            raise ValueError(
                f"teacher: cached distributions serve forward_kl alone, not {self.divergence}"
            )
        if self.hidden_coef > 0:
            raise ValueError(
                "teacher: the cache holds no hidden states; hidden_coef needs 'online'"
            )
        changing = {"domain", "generated"}.intersection(self.on) if self.on != "auto" else ()
        if changing:
            raise ValueError(
                f"teacher: rows of '{min(changing)}' are not cached, as they are new or change while the"
                " job trains; cached serves 'general' and 'replay'"
            )
        return self

    @property
    def needs_general_rows(self) -> bool:
        """Whether it reads general rows of its own accord; replayed rows are the replay strategy's."""
        return self.on == "auto" or "general" in self.on

    @property
    def keeps_domain_rows(self) -> bool:
        """Whether checkpoints hold text of domain rows: the prompts that the model has continued."""
        return "generated" in self.on and self.generated_prompts == "prompt"


def find_distillation_problem(
    config: DistillationConfig, replay: ReplayConfig | None
) -> str | None:
    """What is wrong with `on`, given the job's replay; None where nothing is."""
    if "replay" not in config.on:
        return None
    if replay is None:
        return "'replay' names the rows of a replay strategy, and the job has none"
    if replay.source == "none":
        return (
            "'replay' names general or decoded rows, and the job's replay has source 'none': it replays"
            " earlier domains' rows, on which the base is no teacher"
        )
    return None
