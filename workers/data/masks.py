"""From rendered text to tokens with a loss weight each, checked token by token at every edge of a mask."""

import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.errors import TrainingFailed
from workers.data.rendering import UNUSABLE_TEMPLATE, Rendered

Ids = NDArray[np.int32]
Weights = NDArray[np.float32]


class Encoder:
    """A tokenizer that never adds special tokens on its own, but for the frame of verbatim texts."""

    def __init__(
        self,
        tokenizer: Any,  # noqa: ANN401 - transformers is untyped
        *,
        param: str = "training_file",
    ) -> None:
        self._tokenizer = tokenizer
        self._param = param
        frame = [int(token) for token in tokenizer("", add_special_tokens=True)["input_ids"]]
        bos = tokenizer.bos_token_id
        self.start_ids: list[int] = [bos] if bos is not None and frame[:1] == [bos] else []
        self.end_ids: list[int] = (
            [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
        )

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, nothing added."""
        if not texts:
            return []
        encoded: list[list[int]] = self._tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        return encoded

    def cut_ids(self, texts: Sequence[str], cuts: Sequence[Sequence[int]]) -> list[list[list[int]]]:
        """Token ids of each text in pieces, cut at ascending character positions.

        Where the text's tokens begin with those of the text up to the cut, token by token, they are cut
        there; a text with a token across a cut is encoded piece by piece, which is how a model would see
        and continue it.

        Raises:
            TrainingFailed: The pieces don't add up to the text; code `unusable_template`.
        """
        wholes = self.ids(texts)
        # The choices of an item share their head.
        heads = list(
            dict.fromkeys(text[:cut] for text, at in zip(texts, cuts, strict=True) for cut in at)
        )
        ids_of = dict(zip(heads, self.ids(heads), strict=True))
        results = []
        for text, at, whole in zip(texts, cuts, wholes, strict=True):
            edges = [ids_of[text[:cut]] for cut in at]
            if all(whole[: len(head)] == head for head in edges):
                lengths = [0, *(len(head) for head in edges), len(whole)]
                results.append([whole[a:b] for a, b in itertools.pairwise(lengths)])
            else:
                results.append(self._encode_pieces(text, at, whole))
        return results

    def encode(self, rows: Sequence[Rendered]) -> list[tuple[Ids, Weights]]:
        """Token ids of each row and the loss weight of each token as a target; the first is never one."""
        cuts = [_cuts(row) for row in rows]
        pieces = self.cut_ids([row.text for row in rows], cuts)
        return [
            self._weigh(row, at, parts) for row, at, parts in zip(rows, cuts, pieces, strict=True)
        ]

    def _weigh(
        self, row: Rendered, cuts: Sequence[int], pieces: Sequence[Sequence[int]]
    ) -> tuple[Ids, Weights]:
        starts = {span.start for span in row.spans}
        ids: list[int] = []
        weights: list[float] = []
        for start, piece in zip((0, *cuts), pieces, strict=True):
            ids += piece
            weights += [1.0 if start in starts else 0.0] * len(piece)
        if row.is_verbatim:
            ids = self.start_ids + ids
            weights = [0.0] * len(self.start_ids) + weights
            if ids[-1:] != self.end_ids:
                ids += self.end_ids
                weights += [1.0] * len(self.end_ids)
        if weights:
            weights[0] = 0.0
        return np.asarray(ids, np.int32), np.asarray(weights, np.float32)

    def _encode_pieces(
        self, text: str, cuts: Sequence[int], whole: Sequence[int]
    ) -> list[list[int]]:
        edges = [0, *cuts, len(text)]
        pieces = self.ids([text[a:b] for a, b in itertools.pairwise(edges)])
        joined = [token for piece in pieces for token in piece]
        if self._decode(joined) != self._decode(whole):
            raise TrainingFailed(
                f"{self._param}: the chat template can't be used: the tokenizer doesn't allow a cut at the "
                "start of an assistant turn",
                self._param,
                UNUSABLE_TEMPLATE,
            )
        return pieces

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text


def tokenizer_sha256(
    tokenizer: Any,  # noqa: ANN401 - transformers is untyped
) -> str:
    """A hash of everything that decides which ids a text gets; kept on the tokenizer after the first call."""
    known = getattr(tokenizer, "_retain_sha256", None)
    if known is not None:
        return str(known)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    digest = hashlib.sha256(type(tokenizer).__name__.encode())
    if backend is not None:
        digest.update(backend.to_str().encode())
    else:
        digest.update(repr(sorted(tokenizer.get_vocab().items())).encode())
    digest.update(repr((tokenizer.bos_token_id, tokenizer.eos_token_id)).encode())
    tokenizer._retain_sha256 = digest.hexdigest()
    return digest.hexdigest()


def _cuts(row: Rendered) -> list[int]:
    """Where a mask begins or ends inside the text; the start of the text is no cut."""
    edges = {edge for span in row.spans for edge in span}
    return sorted(edges - {0, len(row.text)})
