"""A published adapter over its base, as others load it."""

import warnings
from pathlib import Path

from torch import nn


def load_adapter(base: nn.Module, directory: Path) -> nn.Module:
    """The base model wrapped with a peft adapter, ready to evaluate.

    Args:
        base: Is changed in place.
        directory: In peft's layout.
    """
    import peft

    with warnings.catch_warnings():
        # peft still asks under a name that transformers has renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        model: nn.Module = peft.PeftModel.from_pretrained(base, str(directory))
    return model
