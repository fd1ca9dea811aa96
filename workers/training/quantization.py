"""A frozen base whose linear layers are kept in 8 or 4 bits (QLoRA), computed with in the run's own type.

bitsandbytes quantises and dequantises, on the CPU and on GPUs. Its own layers are not used: their 8-bit
product rounds activations where it evaluates and not where it trains, and their 4-bit weights are repacked
on some CPUs at the first evaluation, so training and evaluation would see two models. Here a layer is the
linear map of its dequantised weight, always, so gradients are exactly those of that map.
"""

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from app.domain.spec import Quantization
from app.errors import TrainingFailed

BLOCK: Final = 64  # weights that share a scale in nf4; int8 has one for each output
PARAM: Final = "training.quantization"


class QuantizedLinear(nn.Linear):
    """A linear layer with a quantised weight that never learns.

    `weight` holds codes: int8 of the weight's shape, or two 4-bit ones in each byte. `scales` are float32.

    Args:
        layer: What is quantised; its bias is taken over as it is.
        kind: `int8` (absolute maximum of a row) or `nf4` (of a block of 64, 16 levels at normal quantiles).
        device: Where the codes are to lie.
    """

    def __init__(self, layer: nn.Linear, kind: Quantization, device: torch.device) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.kind = kind
        codes, scales = _quantize(layer.weight.detach().to(device), kind)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.bias = layer.bias
        self.shape_alone = nn.Parameter.__new__(
            nn.Parameter, torch.empty(self.shape, device="meta"), requires_grad=False
        )
        self._dense: nn.Parameter | None = None

    def __setattr__(self, name: str, value: Any) -> None:  # noqa: ANN401 - as torch has it
        """Keeps what is no weight of the model out of its parameters."""
        if name in {"shape_alone", "_dense"}:
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight: outputs, inputs."""
        return self.out_features, self.in_features

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight that the codes stand for."""
        operators: Any = torch.ops.bitsandbytes
        if self.kind == "int8":
            found: Tensor = operators.int8_vectorwise_dequant(self.weight.data, self.scales.data)
            return found.to(dtype)
        whole: Tensor = operators.dequantize_4bit(
            self.weight.data, self.scales.data, BLOCK, "nf4", self.shape, dtype
        )
        return whole

    @contextlib.contextmanager
    def dense(self) -> Iterator[nn.Parameter]:
        """Inside, the layer computes with a whole weight in float32, of which a gradient can be taken."""
        self._dense = nn.Parameter(self.dequantized(torch.float32), requires_grad=False)
        try:
            yield self._dense
        finally:
            self._dense = None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as torch calls it
        """The linear map of the dequantised weight."""
        if self._dense is not None:
            return F.linear(input, self._dense, self.bias)
        kind = input.device.type
        is_mixed = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if is_mixed else input.dtype
        product: Tensor = _Product.apply(input.to(dtype), self)  # type: ignore[no-untyped-call]
        bias: Tensor | None = self.bias
        return product if bias is None else product + bias.to(dtype)

    def extra_repr(self) -> str:
        """Beside torch's own."""
        return f"{super().extra_repr()}, {self.kind}"


class _Product(torch.autograd.Function):
    """x W^T; the whole weight lives within each direction, and is made again for the other."""

    @staticmethod
    def forward(ctx: Any, input_XI: Tensor, layer: QuantizedLinear) -> Tensor:  # noqa: ANN401
        ctx.layer = layer
        return F.linear(input_XI, layer.dequantized(input_XI.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        (grad_XO,) = grads
        return grad_XO @ ctx.layer.dequantized(grad_XO.dtype), None


def quantize_model(model: nn.Module, kind: Quantization, device: torch.device) -> None:
    """Quantises the linear layers in place, one at a time; head, embeddings, norms and biases stay as they are.

    Args:
        model: On the CPU, so that the device never holds the whole of it.
        kind: Not `none`.
        device: Where the codes go; the rest is left where it is.

    Raises:
        TrainingFailed: bitsandbytes is not installed or has no kernels here (`quantization_unavailable`), or
            the model has no linear layer (`quantization_unsupported`).
    """
    check_backend(device)
    inner: Any = model
    head = inner.get_output_embeddings()
    found = [
        (name, module)
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not head
    ]
    if not found:
        raise TrainingFailed(
            f"{PARAM}: the model has no plain linear layer that could be quantised",
            PARAM,
            "quantization_unsupported",
        )
    for name, layer in found:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, QuantizedLinear(layer, kind, device))


def check_backend(device: torch.device) -> None:
    """Refuses where nothing can quantise on this device: there is no other way that would be taken.

    Raises:
        TrainingFailed: bitsandbytes is missing, or was built without kernels for the device; code
            `quantization_unavailable`.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise TrainingFailed(
            f"{PARAM}: this worker has no bitsandbytes; install Retain's extra 'quantization' there, or"
            " set training.quantization to 'none'",
            PARAM,
            "quantization_unavailable",
        )
    try:
        import bitsandbytes  # noqa: F401 - registers its operators

        probe = nn.Linear(BLOCK, 1, bias=False)
        for kind in ("int8", "nf4"):
            codes, _ = _quantize(probe.weight.detach().to(device), kind)
            assert codes.device.type == device.type
    except (ImportError, OSError, RuntimeError) as error:
        raise TrainingFailed(
            f"{PARAM}: bitsandbytes can't quantise on {device.type} here: {error}",
            PARAM,
            "quantization_unavailable",
        ) from error


def count_weights(model: nn.Module) -> int:
    """Weights of a model, adapters included, a quantised one counted as the numbers that it stands for."""
    total = sum(p.numel() for p in model.parameters())
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            total += module.shape_alone.numel() - module.weight.numel() - module.scales.numel()
    return total


def _quantize(weight_OI: Tensor, kind: Quantization) -> tuple[Tensor, Tensor]:
    """Codes and scales."""
    operators: Any = torch.ops.bitsandbytes
    if kind == "int8":
        # the GPU's kernel takes half precision alone
        codes, scales, _ = operators.int8_vectorwise_quant(weight_OI.half())
    else:
        codes, scales = operators.quantize_4bit(weight_OI.contiguous(), BLOCK, "nf4", torch.uint8)
    return codes, scales
