"""Forward passes: logits at supervised positions alone, by the student and by the starting model."""

# Shape letters: B rows, T tokens, N supervised positions, S those of the teacher's rows, V vocabulary.

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from app.errors import TrainingFailed
from workers.export.merge import keeping_flags
from workers.strategies.base import Needs
from workers.strategies.batch import Forward, Micro
from workers.strategies.modes import evaluating

PROBE_TOKENS = 24
PROBE_TOLERANCE = 1e-3


class SelectedLogits:
    """Runs the body on whole rows and the head on the selected positions.

    A model whose logits are more than `head(body)` (soft-capping, scaling) shows on a probe, and is then
    run whole.
    """

    def __init__(self, model: nn.Module, *, autocast: torch.dtype | None) -> None:
        self.model = model
        self._autocast = autocast
        inner: Any = model
        if hasattr(inner, "get_base_model"):  # adapters stay active in what they wrap
            inner = inner.get_base_model()
        self._inner = inner
        self._body: Any = inner.get_decoder()
        self._head: Any = inner.get_output_embeddings()
        self.has_split_head = self._check()

    def __call__(self, input_ids_BT: Tensor, positions_N: Tensor) -> Tensor:
        """Logits (N, V) at flat positions (row * T + column)."""
        return self.with_hidden(input_ids_BT, positions_N, frozenset())[0]

    def with_hidden(
        self, input_ids_BT: Tensor, positions_N: Tensor, layers: frozenset[int]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Logits at the positions, and the hidden states (B, T, D) behind the layers asked for.

        Layer 0 is the embeddings' output; the last, `num_layers`, is what the head reads.
        """
        asked = {"output_hidden_states": True} if layers else {}
        with self.precision(input_ids_BT.device):
            if not self.has_split_head:
                out = self._inner(input_ids=input_ids_BT, use_cache=False, **asked)
                logits: Tensor = _flat(out.logits)[positions_N]
            else:
                out = self._body(input_ids=input_ids_BT, use_cache=False, **asked)
                logits = self._head(_flat(out.last_hidden_state).index_select(0, positions_N))
        return logits, {layer: out.hidden_states[layer] for layer in layers}

    @property
    def num_layers(self) -> int:
        """Hidden states are numbered 0 to this."""
        return int(self._inner.config.get_text_config().num_hidden_layers)

    def probe_hash(self) -> str:
        """Hash of the logits of a fixed probe: equal hashes, equal function."""
        with torch.no_grad(), evaluating(self.model):
            logits = self(*self._probe())
        return hashlib.sha256(logits.float().cpu().numpy().tobytes()).hexdigest()

    def precision(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """The arithmetic of the run, as a context."""
        if self._autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=self._autocast)

    def _probe(self) -> tuple[Tensor, Tensor]:
        embedding = self._inner.get_input_embeddings().weight
        ids = (torch.arange(PROBE_TOKENS) * 7 + 3) % embedding.shape[0]
        device = embedding.device
        return ids[None].to(device), torch.arange(PROBE_TOKENS, device=device)

    def _check(self) -> bool:
        if self._body is None or self._head is None or self._body is self._inner:
            return False
        ids_BT, positions_N = self._probe()
        with torch.no_grad(), evaluating(self.model), self.precision(ids_BT.device):
            whole = _flat(self._inner(input_ids=ids_BT, use_cache=False).logits)
            body = self._body(input_ids=ids_BT, use_cache=False).last_hidden_state
            split = self._head(_flat(body).index_select(0, positions_N))
        scale = float(whole.float().abs().max()) + 1e-6
        return bool((whole - split).float().abs().max() <= PROBE_TOLERANCE * scale)


class Teacher:
    """The starting model: adapters switched off, or a frozen copy loaded when it is first asked."""

    def __init__(self, student: SelectedLogits, load: Callable[[], SelectedLogits] | None) -> None:
        self._student = student
        self._load = load  # None: the student under `disable_adapter`
        self._copy: SelectedLogits | None = None
        self._has_dropout = any(
            isinstance(m, nn.Dropout) and m.p > 0 for m in student.model.modules()
        )
        self.probe: str | None = None

    def check(self) -> None:
        """Refuses a run whose starting model is no longer reachable.

        Raises:
            TrainingFailed: With adapters off, the probe's logits differ from those before surgery.
        """
        if self._load is None and self.probe is not None:
            with self._switched_off():
                seen = self._student.probe_hash()
            if seen != self.probe:
                raise TrainingFailed(
                    "With adapters disabled the model differs from the base model, so it can't serve as "
                    "the teacher.",
                    "retention.strategies",
                    "base_changed",
                )

    def __call__(self, micro: Micro, mask_N: Tensor) -> Tensor:
        """Logits (S, V) at the positions of the masked rows, in order, without gradient."""
        return self.with_hidden(micro, mask_N, frozenset())[0]

    def hidden(self, micro: Micro, mask_N: Tensor, layers: frozenset[int]) -> dict[int, Tensor]:
        """Hidden states (S, D) there, by layer."""
        return self.with_hidden(micro, mask_N, layers)[1]

    def with_hidden(
        self, micro: Micro, mask_N: Tensor, layers: frozenset[int]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Logits (S, V) and hidden states (S, D) at the positions of the masked rows, in order."""
        rows = torch.unique(micro.row_of_N[mask_N])
        width = micro.input_ids_BT.shape[1]
        new_row = torch.full((micro.input_ids_BT.shape[0],), -1, device=rows.device)
        new_row[rows] = torch.arange(len(rows), device=rows.device)
        old_positions = micro.positions_N[mask_N]
        positions = new_row[micro.row_of_N[mask_N]] * width + old_positions % width
        with torch.no_grad(), self.starting_model() as model:
            logits, hidden = model.with_hidden(micro.input_ids_BT[rows], positions, layers)
        return logits, {layer: _flat(h_BTD)[positions] for layer, h_BTD in hidden.items()}

    def release(self) -> None:
        """Lets go of the copy, where one was loaded; it is loaded again when it is asked."""
        self._copy = None

    @contextlib.contextmanager
    def starting_model(self) -> Iterator[SelectedLogits]:
        """The starting model inside: the copy, or the student with its adapters switched off."""
        if self._load is None:
            with self._switched_off():
                yield self._student
            return
        if self._copy is None:
            with torch.random.fork_rng(devices=[]):
                self._copy = self._load()
        yield self._copy

    @contextlib.contextmanager
    def _switched_off(self) -> Iterator[None]:
        model: Any = self._student.model
        quiet = evaluating(model) if self._has_dropout else contextlib.nullcontext()
        with quiet, keeping_flags(model), model.disable_adapter():
            yield


def student_forward(
    student: SelectedLogits, teacher: Teacher, micro: Micro, needs: Sequence[Needs]
) -> Forward:
    """One forward of the student for all strategies; the teacher first, on the rows that need it."""
    sources: frozenset[str] = frozenset().union(*(n.teacher_sources for n in needs))
    teacher_layers: frozenset[int] = frozenset().union(*(n.teacher_hidden_layers for n in needs))
    layers: frozenset[int] = frozenset().union(*(n.hidden_layers for n in needs))
    teacher_logits, mask, taught = None, None, dict[int, Tensor]()
    if sources:
        mask = micro.source_mask_N(sources)
        if bool(mask.any()):
            teacher_logits, taught = teacher.with_hidden(micro, mask, teacher_layers)
        else:
            mask = None
    logits, hidden = student.with_hidden(micro.input_ids_BT, micro.positions_N, layers)
    return Forward(logits, teacher_logits, mask, hidden, taught)


def wide(values: Tensor) -> Tensor:
    """At least float32: losses of half precision lose the tails of the logits."""
    return values.float() if values.dtype.itemsize < 4 else values


def _flat(values_BTX: Tensor) -> Tensor:
    return values_BTX.reshape(-1, values_BTX.shape[-1])
