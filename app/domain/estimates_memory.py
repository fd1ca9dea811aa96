"""Device memory of a run: what lasts, what a micro-batch holds between forward and backward, and the peak."""

from typing import Final, Literal, NamedTuple

from app.domain.estimates_shapes import ModelShape
from app.domain.frozen import Frozen
from app.domain.spec import Quantization

WIDE: Final = 4  # bytes of a float32
HALF: Final = 2
NF4_BLOCK: Final = 64  # weights that share a float32 scale
#: Float32 tensors of the optimiser that are as large as what is trained.
MOMENTS: Final = {"adamw": 2, "radam": 2, "sgd": 1, "adafactor": 0}
#: Bytes of a logit: itself, its log-probability, and the gradients of both.
LOGIT_BYTES: Final = 16
#: Tensors as wide as the feed-forward layer that its activation leaves behind, its own output included.
KEPT_BY_ACTIVATION: Final = {"gelu_new": 5, "relu": 1}
KEPT_BY_FUSED_ACTIVATION: Final = 2


class Numbers(NamedTuple):
    """The types of a run's tensors."""

    is_mixed: bool  # bf16 autocast
    base_bytes: int  # of a weight of the frozen base, or of one that is trained

    @classmethod
    def of(cls, *, device: Literal["cuda", "cpu"], precision: str, lora: bool) -> "Numbers":
        """As `workers.training.build` chooses them."""
        is_mixed = precision == "bf16" or (precision == "auto" and device == "cuda")
        is_half = is_mixed and device == "cuda" and lora
        return cls(is_mixed, HALF if is_half else WIDE)


class Trained(Frozen):
    """What a run trains."""

    parameters: int
    is_lora: bool
    rank: int = 0  # of the adapters, 0 without
    adapted: int = 0  # linear layers with an adapter, all together
    top_layers: int  # decoder layers that gradients pass through
    moments: int = 2
    checkpointing: bool = False
    quantization: Quantization = "none"  # of the frozen base


class MicroSize(NamedTuple):
    """A micro-batch."""

    rows: int
    width: int  # tokens of its longest row
    supervised: int  # positions with logits

    @property
    def tokens(self) -> int:
        """Padded ones."""
        return self.rows * self.width


class Memory(Frozen):
    """Bytes of one device; `peak` is below the sum where gradients come as activations go."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    strategies: int
    overhead: int = 0  # measured: what the device class takes besides
    peak: int

    @property
    def lasting(self) -> int:
        """What is there between two steps."""
        return self.weights + self.optimizer + self.strategies


def measure_memory(
    shape: ModelShape,
    trained: Trained,
    numbers: Numbers,
    micro: MicroSize,
    *,
    strategy_bytes: int = 0,
    device: Literal["cuda", "cpu"] = "cuda",
    is_split: bool = True,
) -> Memory:
    """The memory of a run whose largest micro-batch is `micro`.

    Args:
        shape: Of the base model.
        trained: What is trained of it.
        numbers: Types.
        micro: The largest micro-batch.
        strategy_bytes: What strategies keep.
        device: Kernels of a CPU keep attention weights where there is dropout.
        is_split: Steps have several micro-batches, so gradients are there while activations are.
    """
    frozen = shape.num_parameters if trained.is_lora else 0
    weights = numbers.base_bytes * (frozen or shape.num_parameters)
    if trained.quantization != "none":
        weights = base_bytes(shape, trained.quantization, numbers)
    if trained.is_lora:
        weights += WIDE * trained.parameters
    gradients = WIDE * trained.parameters
    optimizer = WIDE * trained.moments * trained.parameters
    activations = _activations(shape, trained, numbers, micro, device)
    logits = LOGIT_BYTES * micro.supervised * shape.vocab_size
    if (
        trained.quantization != "none"
    ):  # one layer's whole weight at a time, made anew for each product
        largest = max((matrix.size for matrix in shape.matrices), default=0)
        activations += largest * (HALF if numbers.is_mixed else WIDE)
    lasting = weights + optimizer + strategy_bytes
    head = 0 if trained.is_lora else WIDE * shape.head_size_parameters
    at_loss = activations + logits + (gradients if is_split else 0)
    in_backward = activations + logits // 4 + head + (gradients if is_split else 0)
    peak = lasting + max(at_loss, in_backward, gradients + head)
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        logits=logits,
        strategies=strategy_bytes,
        peak=peak,
    )


def base_bytes(shape: ModelShape, quantization: Quantization, numbers: Numbers) -> int:
    """Bytes of the frozen base: codes and scales of its layers' matrices, all else in the run's own type.

    int8: a byte each and a float32 scale for every output. nf4: half a byte each and one for every 64.
    """
    quantized = 0
    for matrix in shape.matrices:
        if quantization == "nf4":
            scales = -(-matrix.size // NF4_BLOCK)
            quantized += matrix.count * (-(-matrix.size // 2) + WIDE * scales)
        elif quantization == "int8":
            quantized += matrix.count * (matrix.size + WIDE * matrix.rows)
        else:
            quantized += matrix.count * matrix.size * numbers.base_bytes
    return quantized + (shape.num_parameters - shape.matrix_parameters) * numbers.base_bytes


def layer_activation_bytes(
    shape: ModelShape, trained: Trained, numbers: Numbers, *, width: int, device: str
) -> float:
    """What one decoder layer keeps of a token between forward and backward; checked against autograd.

    A norm keeps its input, and its normalised input where its own weight is trained; a linear layer keeps its
    input (each its own copy under autocast); attention keeps queries, keys, values and its output; a gated
    feed-forward layer four tensors of its width.
    """
    h, lora = shape.hidden_size, trained.is_lora
    heads = shape.num_heads * shape.head_size
    kv = shape.num_kv_heads * shape.head_size
    narrow = HALF if numbers.is_mixed else WIDE
    is_rms = shape.norm == "rms"
    norms = (2 if is_rms and not lora else 1) * 2 * h * WIDE
    readers = 5 if shape.is_gated else 2  # linear layers that read a norm's output
    inputs = readers * HALF * h if numbers.is_mixed else 2 * h * WIDE
    attention = (heads + 2 * kv + heads) * narrow
    if lora and numbers.is_mixed:
        attention += heads * HALF  # the adapter's own copy of what the output layer reads
    kept = 4 if shape.is_gated else _kept(shape.activation)
    feed_forward = kept * shape.intermediate_size * narrow
    statistics = (2 + shape.num_heads) * WIDE
    adapters = trained.rank * trained.adapted / max(shape.num_layers, 1) * narrow if lora else 0.0
    dropped = 0.0
    if shape.drops:
        dropped = 2 * h * (WIDE if device == "cpu" else 1)
        if device == "cpu":
            dropped += 3 * shape.num_heads * width * WIDE
    return norms + inputs + attention + feed_forward + statistics + adapters + dropped


def _activations(
    shape: ModelShape, trained: Trained, numbers: Numbers, micro: MicroSize, device: str
) -> int:
    layer = layer_activation_bytes(shape, trained, numbers, width=micro.width, device=device)
    residual = shape.hidden_size * (HALF if numbers.base_bytes == HALF else WIDE)
    layers = trained.top_layers
    of_layers = layers * residual + layer if trained.checkpointing else layers * layer
    around = (
        (1 if trained.is_lora else 3) * shape.hidden_size * WIDE
    )  # final norm and the head's input
    casts = 0
    if numbers.is_mixed and not trained.is_lora:
        casts = HALF * (shape.matrix_parameters + shape.head_size_parameters)
    return int(micro.tokens * (of_layers + around)) + casts


def _kept(activation: str) -> int:
    return KEPT_BY_ACTIVATION.get(activation, KEPT_BY_FUSED_ACTIVATION)


def sharded_peak(memory: Memory, shape: ModelShape, numbers: Numbers, num_gpus: int) -> int:
    """The peak of one of several GPUs, were weights and their state spread over them; runs here do not do so.

    What lasts is divided; activations stay, as do the weights of the layer at work and of the one fetched ahead.
    """
    lasting = memory.lasting + memory.gradients
    passing = memory.activations + memory.logits
    gathered = 2 * max(shape.layer_parameters) * numbers.base_bytes
    table = shape.head_size_parameters * numbers.base_bytes
    return lasting // num_gpus + passing + gathered + table
