"""Forward passes for scoring: logits at chosen positions alone, with or without a cache."""

# Shape letters: B rows, T tokens, N chosen positions, D width, V vocabulary.

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from workers.strategies.modes import evaluating

CHUNK_ELEMENTS: Final = 2**24  # of logits made float32 at once: 64 MiB

# What `check_trees` found, by model, attention in force and precision.
_TREES: WeakKeyDictionary[nn.Module, dict[tuple[str, bool], bool]] = WeakKeyDictionary()


@contextlib.contextmanager
def scoring(model: nn.Module) -> Iterator[None]:
    """Evaluation and inference mode inside, the former mode after."""
    with evaluating(model), torch.inference_mode():
        yield


class Reader:
    """A causal model that is asked for logits at chosen positions.

    The choice is made at the head's input, so that what a model does to its logits afterwards (scaling,
    soft-capping) still happens, and the head costs nothing where nothing is asked.
    """

    def __init__(self, model: Any) -> None:  # noqa: ANN401 - transformers is untyped
        self._model = model
        self._head: nn.Module | None = self._model.get_output_embeddings()
        self.device: torch.device = next(model.parameters()).device
        self.config: Any = self._model.config
        text_config = self.config.get_text_config()
        self.max_tokens: int = int(getattr(text_config, "max_position_embeddings", 0) or 2**20)
        self.vocab_size: int = int(text_config.vocab_size)
        is_mixed = torch.is_autocast_enabled(self.device.type)
        self.is_exact = next(model.parameters()).dtype == torch.float32 and not is_mixed

    def logits(
        self,
        input_ids_BT: Tensor,
        positions_N: Tensor,
        *,
        cache: Any = None,  # noqa: ANN401 - transformers is untyped
        tree: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Logits (N, V) at flat positions (row * T + column) of these columns.

        Args:
            input_ids_BT: Right-padded rows without a mask: causal attention never looks at what follows.
            positions_N: At least one.
            cache: A transformers cache of the columns before, extended in place; None for none.
            tree: Rows that branch: position ids (B, T), and which columns (B, 1, T, T) each may look at.
        """
        was_chosen = False

        def choose(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            nonlocal was_chosen
            was_chosen = True
            hidden_BTD = inputs[0]
            flat = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
            return (flat.index_select(0, positions_N)[None], *inputs[1:])

        with contextlib.ExitStack() as stack:
            if self._head is not None:
                handle = self._head.register_forward_pre_hook(choose)
                stack.callback(handle.remove)
            more: dict[str, Tensor] = {}
            if tree is not None:
                more = {"position_ids": tree[0], "attention_mask": self._mask(tree[1])}
            out = self._model(
                input_ids=input_ids_BT, past_key_values=cache, use_cache=cache is not None, **more
            )
        logits: Tensor = out.logits.reshape(-1, out.logits.shape[-1])
        return logits if was_chosen else logits.index_select(0, positions_N)

    def takes_trees(self, num_tokens: int) -> bool:
        """Whether attention of every layer follows a mask of ours over rows of this length."""
        config = self.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ("full_attention",))
        window = getattr(config, "sliding_window", None) or num_tokens
        return (
            getattr(config, "_attn_implementation", None) in ("sdpa", "eager")
            and kinds <= {"full_attention", "sliding_attention"}
            and num_tokens <= min(window, self.max_tokens)
        )

    def check_trees(self, probe: Callable[[], bool]) -> bool:
        """The probe's answer for this model, asked once: it depends on its code, not on its weights."""
        key = (self.config.get_text_config()._attn_implementation, self.is_exact)
        known = _TREES.setdefault(self._model, {})
        if key not in known:
            known[key] = probe()
        return known[key]

    def _mask(self, allowed_B1TT: Tensor) -> Tensor:
        """As the attention in force wants it: SDPA takes booleans, the eager form an addend."""
        if self.config.get_text_config()._attn_implementation == "sdpa":
            return allowed_B1TT
        addend = torch.zeros(allowed_B1TT.shape, device=self.device)
        return addend.masked_fill(~allowed_B1TT, torch.finfo(addend.dtype).min)

    def tensor(self, values: Any) -> Tensor:  # noqa: ANN401 - whatever torch takes
        """An int64 tensor on the model's device."""
        return torch.as_tensor(np.asarray(values, np.int64), device=self.device)


def log_probs(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Float32 log-probability (N,) of a target at each position, a chunk of positions at a time."""
    step = max(CHUNK_ELEMENTS // logits_NV.shape[-1], 1)
    parts = []
    for chunk, targets in zip(logits_NV.split(step), targets_N.split(step), strict=True):
        values = chunk.float()
        picked = values.gather(1, targets[:, None])[:, 0]
        parts.append(picked - values.logsumexp(dim=-1))
    return torch.cat(parts)


def pad_rows(rows: Sequence[Sequence[int] | NDArray[np.int32]]) -> NDArray[np.int64]:
    """Rows of token ids as one array, padded on the right with id 0."""
    padded = np.zeros((len(rows), max(len(row) for row in rows)), np.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded


def token_batches(
    order: Sequence[int], lengths: Sequence[int] | NDArray[np.int64], token_budget: int
) -> Iterator[list[int]]:
    """Consecutive members of `order`, as many as fit the budget when padded to the longest; at least one."""
    batch: list[int] = []
    longest = 0
    for index in order:
        longest = max(longest, int(lengths[index]))
        if batch and longest * (len(batch) + 1) > token_budget:
            yield batch
            batch, longest = [], int(lengths[index])
        batch.append(index)
    if batch:
        yield batch
