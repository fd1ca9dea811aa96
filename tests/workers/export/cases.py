"""Tiny full and adapted models for the tests of export."""

import warnings
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from tests.tiny import make_llama

IDS = torch.tensor([[7, 20, 33, 46, 59, 72]])


def make_model(seed: int = 0) -> Any:
    """A tiny Llama in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make_llama().eval()


def make_adapted(**config: Any) -> Any:
    """The same model with an adapter whose factors are both random, so that it changes something."""
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | config
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # peft still asks under a name that transformers has renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        torch.manual_seed(1)
        model: Any = get_peft_model(make_model(), LoraConfig(task_type="CAUSAL_LM", **settings))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    """Of fixed ids."""
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found
