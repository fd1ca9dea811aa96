"""A chosen optimiser with decoupled decay toward an anchor, layer-wise rates and layer-wise steps."""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from workers.strategies.base import Cost, Needs, OptimizerChoice, StateDict, Strategy, check_tensors
from workers.strategies.context import Context
from workers.strategies.decay import (
    Block,
    Role,
    largest_rate,
    layer_scales,
    parameter_roles,
    schedule_factors,
    split_groups,
    total_shrink,
    trust_ratio,
)
from workers.strategies.penalties import wide_type
from workers.strategies.pulls import Pull, Tally

MOST_SHRINK = 0.5  # of lr_free over a whole run, unless forced
LAMB_LARGEST_NORM = 10.0  # LAMB's phi: a weight's norm counts up to this
# Decay is applied once so much has come due, in units of the weights' rounding: smaller steps would be lost
# (2e-5 * 1e-5 = 2e-10 a step, and float32 resolves 1.2e-7).
RESOLVED = 32.0


class HybridOptimizer(Strategy):
    """Decoupled decay by group, theta <- a + (theta - a) (1 - rate), whatever the optimiser is.

    The rate is strength * wd * learning rate, or strength * wd * schedule in `lr_free`. It is part of the
    implicit step of hook 13a and alone equals AdamW's own decay, taken after the step. With `importance` it
    is theta <- a + (theta - a) / (1 + rate * F / mean(F)), F the running mean of squared gradients.

    Args:
        optimizer: The algorithm; `beta1`, `beta2` and `epsilon` are of adamw and radam, `momentum` of sgd.
        wd_backbone: Decay of matrices, embeddings and heads.
        wd_adapter: Decay of LoRA factors.
        decay_anchor: `zero`, `pretrained` (starting weights; B's are zero), or `auto`: starting weights for
            the backbone, zero for B, and no decay of A, as B at zero already is no change.
        decay_mode: Whether the decay is multiplied by the learning rate or by its schedule alone.
        force: Lets `lr_free` shrink by more than half in all.
        importance: What decay is weighted by, element by element.
        importance_decay: Weight of the past in the running mean.
        trust_ratio: Length of a matrix's step: `lamb` learning rate * min(|w|, 10), `lars` learning rate *
            trust_coefficient * |w|; directions stay. Not of adapters.
        layer_decay: Learning rate of a layer as a multiple of that of the layer above.
        lora_plus_ratio: Learning rate of B as a multiple of A's.
    """

    kind: ClassVar[str] = "hybrid_optimizer"

    def __init__(  # noqa: PLR0913 - the fields of its configuration
        self,
        *,
        optimizer: Literal["adamw", "radam", "sgd", "adafactor"] = "adamw",
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
        momentum: float = 0.9,
        wd_backbone: float = 1e-5,
        wd_adapter: float = 1e-3,
        decay_anchor: Literal["auto", "zero", "pretrained"] = "auto",
        decay_mode: Literal["lr_scaled", "lr_free"] = "lr_scaled",
        force: bool = False,
        importance: Literal["none", "gradient_ema"] = "none",
        importance_decay: float = 0.99,
        trust_ratio: Literal["none", "lars", "lamb"] = "none",
        trust_coefficient: float = 1e-3,
        layer_decay: float = 1.0,
        lora_plus_ratio: float = 1.0,
    ) -> None:
        self._choice = OptimizerChoice(optimizer, (beta1, beta2), epsilon, momentum)
        self.wd_backbone, self.wd_adapter = wd_backbone, wd_adapter
        self.decay_anchor = decay_anchor
        self.decay_mode = decay_mode
        self.force = force
        self.importance = importance
        self.importance_decay = importance_decay
        self.trust_ratio = trust_ratio
        self.trust_coefficient = trust_coefficient
        self.layer_decay = layer_decay
        self.lora_plus_ratio = lora_plus_ratio
        self.anchor: dict[str, Tensor] = {}  # starting weights, where they are the anchor
        self.squares: dict[str, Tensor] = {}  # running means of squared gradients
        self._tally = Tally()
        self._measured: Tally | None = None
        self._trust: float | Tensor = 0.0
        self._blocks: list[Block] = []
        self._roles: dict[str, Role] = {}
        self._decays_twice = False
        self._shapes: dict[str, torch.Size] = {}
        self._shrink: dict[str, float] = {}
        self._shrink_strength = -1.0  # at which that was foreseen
        self._factors: Tensor | None = None  # the task's schedule
        self._limit = math.inf  # of strength * wd

    def step_needs(self, ctx: Context) -> Needs:
        """The weights from before the step, for layer-wise steps at any strength."""
        return Needs(snapshot=self.trust_ratio != "none")

    def cost(self) -> Cost:
        """The anchor, the importance and the snapshot are copies of what is trained."""
        copies = (
            self.decay_anchor != "zero",
            self.importance != "none",
            self.trust_ratio != "none",
        )
        return Cost(step_share=0.02 * (1 + sum(copies)), trainable_copies=float(sum(copies)))

    def choose_optimizer(self, ctx: Context) -> OptimizerChoice | None:
        """The algorithm asked for."""
        return None if self._choice == OptimizerChoice() else self._choice

    def edit_param_groups(self, ctx: Context, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Splits the groups by role and learning rate; those at the full rate come first."""
        self._roles = parameter_roles(ctx)
        ordered = split_groups(groups, self._roles, self._scales(ctx))
        self._blocks = [
            Block(role, group["names"], group["base_lr"])
            for role, group in ordered
            if self._decay_of(role) > 0
        ]
        self._decays_twice = any(group["weight_decay"] > 0 for group in groups)
        self._shapes = {name: p.shape for name, p in ctx.model.named_parameters()}
        self._factors = None
        return [group for _, group in ordered]

    def on_task_start(self, ctx: Context) -> None:
        """Takes anchors of what was never trained before, and says how far decay will go.

        Raises:
            ValueError: The optimiser decays weights, too.
        """
        if self._decays_twice and self._blocks and ctx.strength(self.kind) > 0:
            raise ValueError("hybrid_optimizer decays the weights itself; weight_decay must be 0")
        for name in self._anchored_names():
            if name not in self.anchor:
                parameter = ctx.params[name].detach()
                self.anchor[name] = parameter.to(wide_type(parameter), copy=True)
        self._foresee(ctx)
        self._say(ctx)

    def on_step_start(self, ctx: Context) -> None:
        """Decides whether this step is measured, and how far decay goes at the strength in force."""
        self._measured = self._tally.begin(ctx.step, ctx.strength(self.kind))
        self._foresee(ctx)

    def prox_pulls(self, ctx: Context) -> Mapping[str, Pull]:
        """Decay that has come due."""
        strength = ctx.strength(self.kind)
        if strength <= 0:
            return {}
        is_last = ctx.step == ctx.task_first_step + ctx.task_steps - 1
        weight = 1.0 if self.importance == "none" else self._importance_weight()
        pulls: dict[str, Pull] = {}
        for block in self._blocks:
            first = ctx.params[block.names[0]]
            rate = ctx.learning_rates[block.names[0]]
            if rate <= 0:
                continue
            block.owed += self._come_due(block, strength, rate)
            if block.owed < RESOLVED * torch.finfo(wide_type(first)).eps and not is_last:
                continue
            # 1 / (1 + rate * coefficient) = exp(-owed); weighted by importance, the coefficient is linear
            due = math.expm1(block.owed) if self.importance == "none" else block.owed
            for name in block.names:
                importance = self.squares.get(name)
                if self.importance == "none" or (importance is not None and weight > 0):
                    anchor = self._anchor_of(name, ctx.params[name])
                    pulls[name] = Pull(due / rate * weight, importance, anchor, self._measured)
            if weight > 0:
                block.owed = 0.0
        return pulls

    def edit_update(
        self, ctx: Context, old: Mapping[str, Tensor], delta: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Gives each matrix's step its layer-wise length (You 2017, LARS; You 2020, LAMB algorithm 2)."""
        factor, largest = self.trust_coefficient, math.inf
        if self.trust_ratio == "lamb":
            factor, largest = 1.0, LAMB_LARGEST_NORM
        ratios = []
        for name, step in delta.items():
            if self._roles[name] in (Role.MATRIX, Role.EMBEDDING):
                wished = ctx.learning_rates[name] * factor
                ratios.append(trust_ratio(old[name], step, wished, largest))
                delta[name] = step * ratios[-1]
        if ratios:
            self._trust = torch.stack(ratios).mean()
        return delta

    def on_step_end(self, ctx: Context) -> None:
        """Updates the importance from the step's gradients."""
        if self.importance == "none":
            return
        for block in self._blocks:
            for name in block.names:
                gradient = ctx.params[name].grad
                if gradient is None:
                    continue
                wide = gradient.detach().to(wide_type(gradient))
                if name in self.squares:
                    self.squares[name].lerp_(wide * wide, 1.0 - self.importance_decay)
                else:
                    self.squares[name] = wide * wide

    def metrics(self) -> Mapping[str, float]:
        """`applied_norm` and `penalty` of the last measured step, `implied_shrink_backbone` and `_adapter` of the
        task at the strength in force, and the mean `trust_ratio` of the last step.
        """
        trust = {} if self.trust_ratio == "none" else {"trust_ratio": float(self._trust)}
        return {**self._tally.read(), **self._shrink, **trust}

    def state_dict(self) -> StateDict:
        """Anchors and importance, and the decay that has not come due."""
        tensors = {f"anchor/{n}": t for n, t in self.anchor.items()}
        tensors |= {f"importance/{n}": t for n, t in self.squares.items()}
        scalars = {
            "groups": self._digest(),
            "owed": [block.owed for block in self._blocks],
            "measured": self._tally.save(),
            "trust": float(self._trust),
        }
        return {**super().state_dict(), "tensors": tensors, "scalars": scalars}

    def load_state_dict(self, state: StateDict) -> None:
        """Takes up a saved state.

        Raises:
            ValueError: Its groups or its weights are not those of this run.
        """
        super().load_state_dict(state)
        scalars, tensors = state["scalars"], state["tensors"]
        if scalars["groups"] != self._digest():
            raise ValueError("state of hybrid_optimizer: other groups, anchor or decay mode")
        needed = {f"anchor/{name}" for name in self._anchored_names()} | tensors.keys()
        known = {k: n for k in needed if (n := k.partition("/")[2]) in self._shapes}
        check_tensors(self.kind, tensors, {k: self._shapes[n] for k, n in known.items()})
        copies = {key: tensor.detach().clone() for key, tensor in tensors.items()}
        self.anchor = {known[k]: t for k, t in copies.items() if k.startswith("anchor/")}
        self.squares = {known[k]: t for k, t in copies.items() if k.startswith("importance/")}
        for block, owed in zip(self._blocks, scalars["owed"], strict=True):
            block.owed = float(owed)
        self._tally = Tally(last=dict(scalars["measured"]))
        self._trust = float(scalars["trust"])

    def _scales(self, ctx: Context) -> dict[str, float]:
        """Learning rate of each parameter as a multiple of the job's."""
        scales = dict.fromkeys(ctx.params, 1.0)
        if self.layer_decay != 1.0:
            scales |= layer_scales(ctx.model, ctx.num_layers, self.layer_decay)
        for name, role in self._roles.items():
            if role is Role.ADAPTER_B:
                scales[name] *= self.lora_plus_ratio
        return scales

    def _decay_of(self, role: Role) -> float:
        if role is Role.VECTOR or (role is Role.ADAPTER_A and self.decay_anchor == "auto"):
            return 0.0
        is_adapter = role in (Role.ADAPTER_A, Role.ADAPTER_B)
        return self.wd_adapter if is_adapter else self.wd_backbone

    def _anchored_names(self) -> list[str]:
        """Parameters whose anchor is where they started."""
        if self.decay_anchor == "zero":
            return []
        return [n for b in self._blocks if b.role is not Role.ADAPTER_B for n in b.names]

    def _anchor_of(self, name: str, parameter: nn.Parameter) -> Tensor:
        if name in self.anchor:
            return self.anchor[name]
        zero = torch.zeros((), dtype=wide_type(parameter), device=parameter.device)
        return zero.expand(parameter.shape)  # zeros that take no memory

    def _importance_weight(self) -> float:
        """1 / mean importance over all that decays; 0 before there is one."""
        if not self.squares:
            return 0.0
        total = torch.stack([t.sum(dtype=torch.float64) for t in self.squares.values()]).sum()
        mean = float(total) / sum(t.numel() for t in self.squares.values())
        return 1.0 / mean if mean > 0 else 0.0

    def _rate(self, role: Role, strength: float) -> float:
        return min(strength * self._decay_of(role), self._limit)

    def _come_due(self, block: Block, strength: float, learning_rate: float) -> float:
        factor = learning_rate if self.decay_mode == "lr_scaled" else learning_rate / block.base_lr
        rate = self._rate(block.role, strength) * factor
        if self.importance == "none":
            return -math.log1p(-min(rate, 1.0 - 1e-6))
        return rate

    def _foresee(self, ctx: Context) -> None:
        """How far the decay of this task goes at the strength in force."""
        strength = ctx.strength(self.kind)
        if self._factors is None:
            self._factors = schedule_factors(ctx)
            self._limit = math.inf
            if self.decay_mode == "lr_free" and not self.force:
                share = 1.0 - (1.0 - MOST_SHRINK) ** (1.0 / ctx.num_tasks)
                self._limit = largest_rate(self._factors, share)
        elif self._shrink_strength == strength:
            return
        self._shrink, self._shrink_strength = {}, strength
        for block in self._blocks:
            is_adapter = block.role in (Role.ADAPTER_A, Role.ADAPTER_B)
            name = f"implied_shrink_{'adapter' if is_adapter else 'backbone'}"
            rate = self._rate(block.role, strength)
            rate *= block.base_lr if self.decay_mode == "lr_scaled" else 1.0
            self._shrink[name] = max(self._shrink.get(name, 0.0), total_shrink(self._factors, rate))

    def _say(self, ctx: Context) -> None:
        found = self._shrink
        parts = [
            f"the {name.rpartition('_')[2]}'s weights {100 * value:.3g} %"
            for name, value in found.items()
        ]
        text = (
            f"Weight decay ({self.decay_mode}, strength {ctx.strength(self.kind):g}) moves "
            f"{' and '.join(parts) or 'no weights'} of the way to their anchor over the task's "
            f"{ctx.task_steps} steps."
        )
        if self.decay_mode == "lr_free" and not self.force:
            wished = max((self._decay_of(b.role) for b in self._blocks), default=0.0)
            if wished * ctx.strength(self.kind) > self._limit:
                text += " That is capped: no more than half over the whole run, unless forced."
        if ctx.lora_pairs and "implied_shrink_backbone" not in found:
            text += " The backbone is frozen, so wd_backbone applies to nothing."
        ctx.note("decay_shrink", text, dict(found))

    def _digest(self) -> str:
        groups = [[b.role, b.names, b.base_lr] for b in self._blocks]
        text = json.dumps([self.decay_anchor, self.decay_mode, groups])
        return hashlib.sha256(text.encode()).hexdigest()
