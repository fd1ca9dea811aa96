"""Models as a run needs them: the base from its directory, adapters around it, the device under it."""

import os
import warnings
from typing import Any

import torch
from torch import nn

from app.domain.runplan import BasePlan
from app.domain.spec import LoraConfig, ResolvedTraining
from app.errors import TrainingFailed
from workers.strategies.context import LoraPair
from workers.training.quantization import QuantizedLinear, quantize_model

ADAPTER = "default"


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
    """The base model from its local directory: safetensors only, no code of its own; quantised as planned.

    Raises:
        TrainingFailed: It is to be quantised and can't be.
    """
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            base.directory,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
    if base.quantization != "none":
        quantize_model(model.requires_grad_(requires_grad=False), base.quantization, device)
    return model.to(device)


def load_tokenizer(base: BasePlan) -> Any:  # noqa: ANN401 - transformers has no types
    """The base model's tokenizer, from its local directory."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        base.directory, local_files_only=True, trust_remote_code=False
    )


def add_adapters(
    model: nn.Module, lora: LoraConfig, *, seed: int, name: str = ADAPTER
) -> nn.Module:
    """Wraps the model with a fresh adapter in float32 that changes nothing yet; adds one to a wrapped model.

    Only a first adapter is active then, and only an active one requires gradients.
    """
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
            if isinstance(model, peft.PeftModel):
                model.add_adapter(name, config)
                return model
            wrapped: nn.Module = peft.get_peft_model(
                model, config, adapter_name=name, autocast_adapter_dtype=True
            )
        except ValueError as error:
            raise TrainingFailed(
                f"training.lora.target_modules: {error}", "training.lora.target_modules"
            ) from error
    return wrapped


def lora_pairs(model: nn.Module) -> tuple[LoraPair, ...]:
    """Every adapted linear layer, once for each of its adapters; none without adapters."""
    pairs = []
    for name, module in model.named_modules():
        factors: Any = getattr(module, "lora_A", None)
        for adapter in factors if isinstance(factors, nn.ModuleDict) else ():
            layer: Any = module
            base_layer = layer.get_base_layer()
            is_quantized = isinstance(base_layer, QuantizedLinear)
            pairs.append(
                LoraPair(
                    name=name if adapter == ADAPTER else f"{name}.{adapter}",
                    lora_A=layer.lora_A[adapter].weight,
                    lora_B=layer.lora_B[adapter].weight,
                    scale=float(layer.scaling[adapter]),
                    base_weight=base_layer.shape_alone if is_quantized else base_layer.weight,
                    adapter=adapter,
                    dense=base_layer.dense if is_quantized else None,
                )
            )
    return tuple(pairs)
