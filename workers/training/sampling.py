"""Rows decoded by the model in training or by the one it started from: sampled, in batches, with a cache."""

# Shape letters: B rows, T tokens, V vocabulary.

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from workers.evaluation.forward import Reader, pad_rows
from workers.strategies.batch import TokenRow
from workers.strategies.context import Decoding
from workers.strategies.modes import evaluating
from workers.training.forward import SelectedLogits

if TYPE_CHECKING:
    from workers.training.loop import Run

SPREAD_TOKENS = 4  # prompts decoded together differ by no more than this, or by an eighth
FRAME_TOKENS = 8  # of what all rows begin with: the marks of a template, not a shared preamble
FRAME_ROWS = 64  # looked at for it


def sample_rows(
    run: "Run",
    store: str,
    rows: Sequence[int],
    decoding: Decoding,
    generator: torch.Generator,
    *,
    base: bool = False,
) -> list[TokenRow]:
    """A sampled continuation of each row's beginning, in evaluation mode; the same on every rank.

    A row's draws come from its own line of uniform numbers, so they depend neither on what it is batched
    with nor on the ranks, which share the rows out.

    Args:
        run: Whose model decodes.
        store: Where the rows lie.
        rows: Indices into it; one may occur more than once.
        decoding: How.
        generator: Seeds the draws; on the CPU.
        base: Decodes by the starting model in place of the model as it stands.

    Returns:
        Token ids with weight 0 on the prompt and 1 on what was decoded, in the order of `rows`.
    """
    heads = _heads(run, store, rows, decoding.prompts)
    shape = (len(rows), decoding.num_tokens)
    uniforms_BT = torch.rand(shape, generator=generator, dtype=torch.float64)
    share = range(run.ranks.rank, len(rows), run.ranks.world_size)
    said: dict[int, list[int]] = {}
    # At step 0 the model is still the one it started from, so that no copy of it is loaded.
    if base and run.executed + run.step > 0:
        with run.teacher.starting_model() as model:
            _decode_all(run, model, heads, uniforms_BT, decoding.temperature, share, said)
    else:
        _decode_all(run, run.student, heads, uniforms_BT, decoding.temperature, share, said)
    for other in run.ranks.gather(said):
        said.update(other)
    return [
        (head + said[i], [0.0] * len(head) + [1.0] * len(said[i])) for i, head in enumerate(heads)
    ]


def closing_tokens(model: Any) -> frozenset[int]:  # noqa: ANN401 - transformers is untyped
    """The tokens after which a model's text is over, by its generation settings, else its configuration."""
    for settings in (getattr(model, "generation_config", None), model.config):
        ids = getattr(settings, "eos_token_id", None)
        if ids is not None:
            return frozenset([ids] if isinstance(ids, int) else ids)
    return frozenset()


def decode(
    reader: Reader,
    heads: Sequence[Sequence[int]],
    uniforms_BT: Tensor,
    *,
    temperature: float,
    closing: frozenset[int],
) -> list[list[int]]:
    """Sampled continuations of some heads, the closing token included.

    All rows are at the same column in every pass, so none is padded and no mask is needed: of a longer
    head the next token is given, of a shorter one it is drawn, by inverting the distribution function.

    Args:
        reader: Of the model, in evaluation mode, without gradient.
        heads: At least one token each, shorter than the model's context.
        uniforms_BT: A line of numbers in [0, 1) for each row, as many as new tokens at most.
        temperature: Divides the logits.
        closing: Tokens that end a row.
    """
    device = reader.device
    lengths_B = reader.tensor([len(head) for head in heads])
    last_B = (lengths_B + uniforms_BT.shape[1]).clamp(max=reader.max_tokens)
    uniforms_BT = uniforms_BT.to(device)
    said_BT = torch.zeros((len(heads), int(last_B.max())), dtype=torch.int64, device=device)
    said_BT[:, : int(lengths_B.max())] = reader.tensor(pad_rows(heads))
    ends = reader.tensor(sorted(closing))
    stops_B = last_B.clone()  # column behind a row's last token
    alive_B = torch.arange(len(heads), device=device)
    cache = DynamicCache(config=reader.config)
    column = int(lengths_B.min())
    inputs_BT = said_BT[:, :column]
    while True:
        rows, width = inputs_BT.shape
        at = torch.arange(rows, device=device) * width + width - 1
        logits_BV = reader.logits(inputs_BT, at, cache=cache)
        new_B = column - lengths_B[alive_B]  # below 0 where the head goes on
        drawn_B = _draw(logits_BV / temperature, uniforms_BT[alive_B, new_B.clamp(min=0)])
        tokens_B = torch.where(new_B < 0, said_BT[alive_B, column], drawn_B)
        said_BT[alive_B, column] = tokens_B
        ended_B = torch.isin(tokens_B, ends) & (new_B >= 0)
        column += 1
        stops_B[alive_B[ended_B]] = column
        going_B = ~ended_B & (column < last_B[alive_B])
        kept = going_B.nonzero()[:, 0]
        if not kept.numel():
            break
        if kept.numel() < rows:
            alive_B = alive_B[kept]
            cache.batch_select_indices(kept)
        inputs_BT = said_BT[alive_B, column - 1 : column]
    said, edges = said_BT.tolist(), zip(lengths_B.tolist(), stops_B.tolist(), strict=True)
    return [row[start:stop] for row, (start, stop) in zip(said, edges, strict=True)]


def _draw(logits_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """The first token at which the distribution function passes the row's number."""
    mass_BV = torch.softmax(logits_BV.double(), -1).cumsum(-1)
    targets_B1 = (uniforms_B * mass_BV[:, -1])[:, None]
    return torch.searchsorted(mass_BV, targets_B1, right=True)[:, 0].clamp(
        max=logits_BV.shape[-1] - 1
    )


def _decode_all(
    run: "Run",
    model: SelectedLogits,
    heads: Sequence[Sequence[int]],
    uniforms_BT: Tensor,
    temperature: float,
    share: Sequence[int],
    said: dict[int, list[int]],
) -> None:
    """Fills in this rank's share, in batches of like lengths that fit a micro-batch's tokens."""
    closing = closing_tokens(model.model)
    order = sorted(share, key=lambda i: (len(heads[i]), i))
    with evaluating(model.model), torch.inference_mode(), model.precision(run.ctx.device):
        reader = Reader(model.model)
        for batch in _batches(order, heads, uniforms_BT.shape[1], run):
            own = decode(
                reader,
                [heads[i] for i in batch],
                uniforms_BT[batch],
                temperature=temperature,
                closing=closing,
            )
            said.update(zip(batch, own, strict=True))


def _batches(
    order: Sequence[int], heads: Sequence[Sequence[int]], num_tokens: int, run: "Run"
) -> list[list[int]]:
    batches: list[list[int]] = []
    for i in order:
        if batches:
            shortest = len(heads[batches[-1][0]])
            is_near = len(heads[i]) - shortest <= max(SPREAD_TOKENS, len(heads[i]) // 8)
            tokens = (len(batches[-1]) + 1) * (len(heads[i]) + num_tokens)
            if is_near and tokens <= run.training.max_tokens_per_micro_batch:
                batches[-1].append(i)
                continue
        batches.append([i])
    return batches


def _heads(
    run: "Run", store: str, rows: Sequence[int], prompts: Literal["prompt", "start"]
) -> list[list[int]]:
    """What is given of each row; a head that leaves no room loses tokens from its start."""
    source = run.stores[store]
    room = max(run.training.max_seq_length - 1, 1)
    if prompts == "start":
        frame = _frame([source.row(i)[0] for i in range(min(FRAME_ROWS, len(source.lengths)))])
        return [[int(t) for t in source.row(row)[0][: max(frame, 1)]][:room] for row in rows]
    heads = []
    for row in rows:
        ids, weights = source.row(row)
        supervised = np.flatnonzero(weights[1:] > 0)
        length = int(supervised[0]) + 1 if supervised.size else max(len(ids) - 1, 1)
        heads.append([int(t) for t in ids[:length]][-room:])
    return heads


def _frame(rows: Sequence[Any]) -> int:
    """How many tokens all of these rows begin with, at most 8."""
    length = min(FRAME_TOKENS, *(len(ids) - 1 for ids in rows))
    for column in range(max(length, 0)):
        if len({int(ids[column]) for ids in rows}) > 1:
            return column
    return max(length, 0)
