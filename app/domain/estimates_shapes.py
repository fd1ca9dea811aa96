"""What a base model consists of, by its config and the headers of its weights: exact counts, no weights read."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal

from app.domain.frozen import Frozen

EMBEDDING_WORDS: Final = ("embed", "wte", "wpe")
#: Saved beside the weights of some models, and trained by none.
BUFFERS: Final = ("masked_bias", "inv_freq")
_LAYER = re.compile(r"\.(\d+)\.")
_HIDDEN = ("hidden_size", "n_embd", "d_model")
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
_HEADS = ("num_attention_heads", "n_head", "num_heads")
_INNER = ("intermediate_size", "n_inner", "ffn_dim")
_ACTIVATION = ("hidden_act", "activation_function", "activation")


class Matrix(Frozen):
    """Linear layers of one name: all of the same shape."""

    name: str  # of the module, such as `q_proj`
    rows: int
    columns: int
    count: int

    @property
    def size(self) -> int:
        """Parameters of one."""
        return self.rows * self.columns


class ModelShape(Frozen):
    """A decoder's counts and widths; every parameter once, tied ones and buffers left out."""

    num_parameters: int
    embedding_parameters: int  # tables by token and by position
    head_parameters: int  # 0 where the head is the embedding table
    layer_parameters: tuple[int, ...]  # of each decoder layer, from the bottom
    matrices: tuple[Matrix, ...]  # of the decoder layers
    vocab_size: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    intermediate_size: int
    is_tied: bool
    is_gated: bool  # the feed-forward layer multiplies two halves
    activation: str
    norm: Literal["rms", "layer"]
    drops: bool  # dropout in the base model's own layers
    active_share: float = 1.0  # of the layers' matrices that a token passes: mixtures of experts

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.layer_parameters)

    @property
    def matrix_parameters(self) -> int:
        """In the linear layers of the decoder layers."""
        return sum(matrix.size * matrix.count for matrix in self.matrices)

    @property
    def head_size_parameters(self) -> int:
        """Of the product that makes logits, tied or not."""
        return self.vocab_size * self.hidden_size

    def lora_parameters(self, rank: int, targets: tuple[str, ...] | str) -> int:
        """Of adapters on the named linear layers, or on all in the decoder layers (`all-linear`)."""
        return sum(
            rank * (matrix.rows + matrix.columns) * matrix.count
            for matrix in self.matrices
            if targets == "all-linear" or matrix.name in targets
        )


def describe_shape(
    config: Mapping[str, Any], tensors: Mapping[str, Iterable[int]]
) -> ModelShape | None:
    """The shape of a decoder.

    Args:
        config: `config.json`.
        tensors: Shapes by name, from the headers of the weights.

    Returns:
        None where the config names no decoder layers or the weights hold none: there is nothing to reckon with.
    """
    text = config.get("text_config")
    sources = (config, text if isinstance(text, Mapping) else {})
    hidden, num_layers = _first(sources, _HIDDEN), _first(sources, _LAYERS)
    heads = _first(sources, _HEADS)
    shapes = {name: sizes for name, raw in tensors.items() if _is_weight(name, sizes := tuple(raw))}
    if not hidden or not num_layers or not heads:
        return None
    tables = {name: sizes for name, sizes in shapes.items() if _is_embedding(name, sizes)}
    heads_of = {
        name: sizes
        for name, sizes in shapes.items()
        if len(sizes) == 2 and _layer_of(name) is None and name not in tables
    }
    is_tied = bool(_value(sources, "tie_word_embeddings", default=not heads_of)) or not heads_of
    layers: Counter[int] = Counter()
    for name, sizes in shapes.items():
        layer = _layer_of(name)
        if layer is not None:
            layers[layer] += math.prod(sizes)
    if set(layers) != set(range(num_layers)) or not tables:
        return None
    left_out = sum(math.prod(sizes) for sizes in heads_of.values()) if is_tied else 0
    return ModelShape(
        num_parameters=sum(math.prod(sizes) for sizes in shapes.values()) - left_out,
        embedding_parameters=sum(math.prod(sizes) for sizes in tables.values()),
        head_parameters=0 if is_tied else sum(math.prod(sizes) for sizes in heads_of.values()),
        layer_parameters=tuple(layers[layer] for layer in range(num_layers)),
        matrices=_matrices(shapes),
        vocab_size=_first(sources, ("vocab_size",)) or next(iter(tables.values()))[0],
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=_first(sources, ("num_key_value_heads",)) or heads,
        head_size=_first(sources, ("head_dim",)) or hidden // heads,
        intermediate_size=_first(sources, _INNER) or 4 * hidden,
        is_tied=is_tied,
        is_gated=any(".gate_proj." in name or ".gate_up_proj." in name for name in shapes),
        activation=next((str(v) for k in _ACTIVATION if (v := _value(sources, k))), "silu"),
        norm="layer" if any(_is_norm_bias(name) for name in shapes) else "rms",
        drops=any(
            bool(_value(sources, key))
            for key in ("resid_pdrop", "hidden_dropout", "residual_dropout")
        ),
        active_share=_active_share(sources),
    )


def _is_weight(name: str, sizes: tuple[int, ...]) -> bool:
    return not name.endswith(BUFFERS) and len(sizes) != 4  # 4: GPT-2's causal masks


def _is_embedding(name: str, sizes: tuple[int, ...]) -> bool:
    lower = name.lower()
    if len(sizes) != 2 or _layer_of(name) is not None or "embed_out" in lower:
        return False
    return any(word in lower for word in EMBEDDING_WORDS)


def _is_norm_bias(name: str) -> bool:
    module, _, kind = name.rpartition(".")
    last = module.rpartition(".")[2]
    return kind == "bias" and (last.startswith("ln") or "norm" in last)


def _layer_of(name: str) -> int | None:
    found = _LAYER.search(name)
    return None if found is None else int(found[1])


def _matrices(shapes: Mapping[str, tuple[int, ...]]) -> tuple[Matrix, ...]:
    """Also those of biased and of transposed layers; an adapter's size is the same either way."""
    counts: Counter[tuple[str, int, int]] = Counter()
    for name, sizes in shapes.items():
        if len(sizes) == 2 and _layer_of(name) is not None and name.endswith(".weight"):
            counts[name.split(".")[-2], sizes[0], sizes[1]] += 1
    return tuple(
        Matrix(name=name, rows=rows, columns=columns, count=count)
        for (name, rows, columns), count in sorted(counts.items())
    )


def _active_share(sources: tuple[Mapping[str, Any], ...]) -> float:
    chosen = _first(sources, ("num_experts_per_tok",))
    total = _first(sources, ("num_local_experts", "num_experts", "n_routed_experts"))
    return min(chosen / total, 1.0) if chosen and total else 1.0


def _value(sources: tuple[Mapping[str, Any], ...], key: str, *, default: object = None) -> object:
    for source in sources:
        if source.get(key) is not None:
            value: object = source[key]
            return value
    return default


def _first(sources: tuple[Mapping[str, Any], ...], keys: tuple[str, ...]) -> int | None:
    for key in keys:
        value = _value(sources, key)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None
