"""From a RunPlan to objects: model, adapters, strategies, optimiser, and the run that holds them."""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, assert_never

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from app.domain.decisions import ControllerState
from app.domain.runplan import BasePlan, RunPlan
from app.domain.spec import LoraConfig, ResolvedTraining
from app.domain.strategies import (
    DistillationConfig,
    EwcConfig,
    L2SpConfig,
    ReplayConfig,
    StrategyConfig,
    strength_in_force,
)
from app.errors import TrainingFailed
from workers.data.batches import DOMAIN, DrawnRow, Rows, RowSampler, build_micro, split_micros
from workers.strategies.base import Context, Forward, LoraPair, Micro, Strategy, Stream
from workers.training.forward import SelectedLogits, Teacher
from workers.training.loop import Run
from workers.training.ranks import Ranks

ADAPTER = "default"
BETAS = (0.9, 0.999)
SHARED_FIELDS = {"type", "strength", "armed"}  # of every strategy; the run holds them


def choose_device() -> torch.device:
    """This rank's GPU, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def autocast_type(training: ResolvedTraining, device: torch.device) -> torch.dtype | None:
    """bf16 where asked for, or where a GPU has it; None computes in float32."""
    if training.precision == "bf16":
        return torch.bfloat16
    if training.precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.bfloat16
    return None


def load_base(base: BasePlan, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The base model from its local directory: safetensors only, no code of its own."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            base.directory,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
    return model.to(device)


def load_tokenizer(base: BasePlan) -> Any:  # noqa: ANN401 - transformers has no types
    """The base model's tokenizer, from its local directory."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        base.directory, local_files_only=True, trust_remote_code=False
    )


def add_adapters(model: nn.Module, lora: LoraConfig, *, seed: int) -> nn.Module:
    """Wraps the model with fresh adapters in float32 that change nothing yet."""
    import peft

    targets = lora.target_modules
    config = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type] # any number will do
        lora_dropout=lora.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # peft still asks under a name that transformers has renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        torch.manual_seed(seed)
        try:
            wrapped: nn.Module = peft.get_peft_model(model, config, autocast_adapter_dtype=True)
        except ValueError as error:
            raise TrainingFailed(
                f"training.lora.target_modules: {error}", "training.lora.target_modules"
            ) from error
    return wrapped


def lora_pairs(model: nn.Module) -> tuple[LoraPair, ...]:
    """Every adapted linear layer; none without adapters."""
    pairs = []
    for name, module in model.named_modules():
        factors: Any = getattr(module, "lora_A", None)
        if isinstance(factors, nn.ModuleDict) and ADAPTER in factors:
            layer: Any = module
            pairs.append(
                LoraPair(
                    name=name,
                    lora_A=layer.lora_A[ADAPTER].weight,
                    lora_B=layer.lora_B[ADAPTER].weight,
                    scale=float(layer.scaling[ADAPTER]),
                    base_weight=layer.get_base_layer().weight,
                )
            )
    return tuple(pairs)


def build_strategies(configs: Sequence[StrategyConfig]) -> tuple[Strategy, ...]:
    """The strategies of a job, sorted by kind: the order of the list never matters."""
    return tuple(sorted((_build_strategy(config) for config in configs), key=lambda s: s.kind))


def first_controller(plan: RunPlan) -> ControllerState:
    """The coefficients at step 0."""
    lora = plan.training.type == "lora"
    return ControllerState(
        strengths={c.type: strength_in_force(c, lora=lora) for c in plan.strategies},
        branch=plan.branch,
    )


def param_groups(
    params: Mapping[str, nn.Parameter], training: ResolvedTraining
) -> list[dict[str, Any]]:
    """Matrices with weight decay, vectors (norms, biases) without; names beside the parameters."""
    groups = []
    for is_matrix, decay in ((True, training.weight_decay), (False, 0.0)):
        names = [name for name, p in params.items() if (p.ndim >= 2) == is_matrix]
        if names:
            groups.append(
                {
                    "params": [params[name] for name in names],
                    "names": names,
                    "lr": training.learning_rate,
                    "base_lr": training.learning_rate,
                    "weight_decay": decay,
                }
            )
    return groups


def build_run(
    plan: RunPlan,
    stores: Mapping[str, Rows],
    ranks: Ranks,
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    strategies: tuple[Strategy, ...] | None = None,
) -> Run:
    """A run at step 0 of a plan, before `on_task_start`.

    Args:
        plan: What to train.
        stores: Tokenised rows: `training`, and `general` where there are any.
        ranks: Of this run.
        device: Of this rank.
        dtype: Of the weights; None takes float32, or bf16 for a frozen base under bf16.
        strategies: In place of those of the plan.
    """
    training = plan.training
    autocast = autocast_type(training, device)
    is_lora = training.type == "lora"
    frozen_type = torch.bfloat16 if autocast and device.type == "cuda" else torch.float32
    weights_type = dtype or (frozen_type if is_lora else torch.float32)
    if strategies is None:
        strategies = build_strategies(plan.strategies)
    model = load_base(plan.base, device, weights_type)
    if training.gradient_checkpointing:
        enable: Any = model.activation_checkpointing_enable
        enable(activation_checkpointing_kwargs={"use_reentrant": False})
    probe = SelectedLogits(model, autocast=autocast).probe_hash() if is_lora else None
    if is_lora:
        model = add_adapters(model, training.lora, seed=training.seed)
    ctx = Context(
        model=model,
        params={},
        lora_pairs=(),
        coefs={},
        run_seed=training.seed,
        device=device,
        batch_size=training.batch_size,
        num_training_rows=len(stores["training"].lengths),
        num_general_rows=len(stores["general"].lengths) if "general" in stores else 0,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    for strategy in strategies:
        model = strategy.edit_model(ctx, model)
    model.train()
    ctx.model = model
    ctx.params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ctx.lora_pairs = lora_pairs(model)
    student = SelectedLogits(model, autocast=autocast)

    def load_copy() -> SelectedLogits:
        copy = load_base(plan.base, device, dtype or frozen_type).eval()
        return SelectedLogits(copy.requires_grad_(requires_grad=False), autocast=autocast)

    teacher = Teacher(student, None if is_lora else load_copy)
    teacher.probe = probe
    groups = param_groups(ctx.params, training)
    for strategy in strategies:
        groups = strategy.edit_param_groups(ctx, groups)
    run = Run(
        training=training,
        model=model,
        student=student,
        teacher=teacher,
        optimizer=torch.optim.AdamW(groups, lr=training.learning_rate, betas=BETAS, fused=True),
        strategies=strategies,
        ctx=ctx,
        ranks=ranks,
        stores=stores,
        sampler=RowSampler(
            seed=training.seed,
            batch_size=training.batch_size,
            lengths={name: store.lengths for name, store in stores.items()},
        ),
        domain_stream=Stream(
            DOMAIN, tuple(range(ctx.num_training_rows)), "training", 1.0, counts_as_task=True
        ),
        controller=first_controller(plan),
        spare_padding=_spare_padding(model, device),
        branch=plan.branch,
    )
    _show_the_run(plan, run)
    run.use(run.controller)
    return run


def _show_the_run(plan: RunPlan, run: Run) -> None:
    """Gives strategies their view of the run: passes over general rows, forwards, the cache."""
    ctx, ranks = run.ctx, run.ranks

    def general_micros(rows: Sequence[int]) -> Iterator[Micro]:
        drawn = [DrawnRow("general", "general", row, is_task=False) for row in rows]
        lengths = {"general": run.stores["general"].lengths}
        planned = split_micros(
            drawn,
            lengths,
            max_tokens=run.training.max_tokens_per_micro_batch,
            spare_padding=run.spare_padding,
        )
        for part in planned[ranks.rank :: ranks.world_size]:
            yield build_micro(part, run.stores, ctx.device)

    def forward(micro: Micro) -> Forward:
        return Forward(logits_NV=run.student(micro.input_ids_BT, micro.positions_N))

    ctx.all_reduce = ranks.all_reduce
    ctx.general_micros = general_micros
    ctx.forward = forward
    ctx.base_forward = run.teacher
    ctx.cached = _Cache(plan, run.model, ranks, ctx.device)


class _Cache:
    """Tensors that follow from (base, general rows, settings), kept under the cache directory."""

    def __init__(self, plan: RunPlan, model: nn.Module, ranks: Ranks, device: torch.device) -> None:
        training = plan.training
        settings = {
            "base": plan.base.sha256,
            "default_template": plan.base.default_template,
            "general": None if plan.general_rows is None else plan.general_rows.sha256,
            "max_seq_length": training.max_seq_length,
            "type": training.type,
            "precision": str(autocast_type(training, device)),
            "device": device.type,
            "lora": training.lora.model_dump() if training.type == "lora" else None,
            "seed": training.seed,
            "dtype": str(next(model.parameters()).dtype),
        }
        self._settings = json.dumps(settings, sort_keys=True)
        self._directory = Path(plan.cache_directory) / "strategies"
        self._ranks = ranks
        self._device = device

    def __call__(self, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        name = hashlib.sha256(f"{self._settings}/{key}".encode()).hexdigest()
        path = self._directory / f"{name}.safetensors"
        found = self._load(path)
        seen = self._ranks.sum_counts({"found": float(found is not None)})
        if found is not None and seen["found"] == self._ranks.world_size:
            return found
        made = make()
        if self._ranks.is_speaker:
            self._directory.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            save_file({k: v.detach().cpu().contiguous() for k, v in made.items()}, temporary)
            temporary.replace(path)
        return made

    def _load(self, path: Path) -> dict[str, Tensor] | None:
        """None where nothing readable lies there: a torn file is made again."""
        try:
            return dict(load_file(path, device=str(self._device)))
        except (OSError, safetensors.SafetensorError):
            return None


def _spare_padding(model: nn.Module, device: torch.device) -> int:
    """Padded tokens worth another forward: about 10 ms of a core, or of a GPU, at 6 operations a parameter."""
    operations = 1e12 if device.type == "cuda" else 5e8
    num_params = sum(p.numel() for p in model.parameters())
    return max(64, int(operations / (6 * num_params)))


def _build_strategy(config: StrategyConfig) -> Strategy:
    from workers.strategies.methods.distillation import Distillation
    from workers.strategies.methods.ewc import Ewc
    from workers.strategies.methods.l2sp import L2Sp
    from workers.strategies.methods.replay import Replay

    match config:
        case EwcConfig():
            return Ewc(**config.model_dump(exclude=SHARED_FIELDS))
        case L2SpConfig():
            return L2Sp(**config.model_dump(exclude=SHARED_FIELDS))
        case ReplayConfig():
            return Replay(**config.model_dump(exclude=SHARED_FIELDS))
        case DistillationConfig():
            return Distillation(**config.model_dump(exclude=SHARED_FIELDS))
        case _:
            assert_never(config)
