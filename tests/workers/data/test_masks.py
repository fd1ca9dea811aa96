"""Tokens and their loss weights, also where a tokenizer merges across the edge of a mask."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from app.errors import TrainingFailed
from tests.tiny import make_tokenizer
from workers.data.masks import Encoder, tokenizer_sha256
from workers.data.rendering import Rendered, Span


def merging_tokenizer(*, bos: bool = False) -> PreTrainedTokenizerFast:
    """Letters a, b and x; `ab` is one token."""
    vocabulary = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "x": 4, "ab": 5}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[("a", "b")]))
    tokenizer.decoder = decoders.Fuse()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def verbatim(text: str, *spans: tuple[int, int]) -> Rendered:
    return Rendered(text, tuple(Span(*span) for span in spans), is_verbatim=True)


def encode(tokenizer, rendered) -> tuple[list[int], list[float]]:
    ((ids, weights),) = Encoder(tokenizer).encode([rendered])
    assert ids.dtype == np.int32
    assert weights.dtype == np.float32
    return ids.tolist(), weights.tolist()


def test_a_mask_begins_where_its_text_begins() -> None:
    assert encode(merging_tokenizer(), verbatim("xxab", (2, 4))) == (
        [4, 4, 5, 1],
        [0.0, 0.0, 1.0, 1.0],
    )


def test_a_token_across_the_edge_is_split_as_a_model_would_continue_it() -> None:
    assert encode(merging_tokenizer(), verbatim("xab", (2, 3))) == (
        [4, 2, 3, 1],
        [0.0, 0.0, 1.0, 1.0],
    )


def test_several_spans_with_text_between_and_after() -> None:
    rendered = Rendered("abxabxb", (Span(2, 3), Span(5, 6)), is_verbatim=False)
    assert encode(merging_tokenizer(), rendered) == (
        [5, 4, 5, 4, 3],
        [0.0, 1.0, 0.0, 1.0, 0.0],
    )


def test_the_first_token_is_never_a_target() -> None:
    assert encode(merging_tokenizer(), verbatim("xx", (0, 2))) == ([4, 4, 1], [0.0, 1.0, 1.0])
    assert encode(merging_tokenizer(bos=True), verbatim("xx", (0, 2))) == (
        [0, 4, 4, 1],
        [0.0, 1.0, 1.0, 1.0],
    )


def test_a_chat_gets_nothing_added_even_by_a_tokenizer_that_would() -> None:
    rendered = Rendered("xab", (Span(1, 3),), is_verbatim=False)
    assert encode(merging_tokenizer(bos=True), rendered) == ([4, 5], [0.0, 1.0])


def test_an_end_of_text_that_is_there_is_not_doubled() -> None:
    assert encode(merging_tokenizer(), verbatim("xx</s>", (0, 6)))[0] == [4, 4, 1]


def test_pieces_that_do_not_add_up_are_refused() -> None:
    class Reversing:
        """Encodes texts backwards, so no cut gives the same text."""

        bos_token_id = None
        eos_token_id = None

        def __call__(self, texts, **_):
            if isinstance(texts, str):
                return {"input_ids": []}
            return {"input_ids": [[ord(letter) for letter in reversed(text)] for text in texts]}

        def decode(self, ids, **_):
            return "".join(map(chr, ids))

    with pytest.raises(TrainingFailed, match="doesn't allow a cut") as caught:
        Encoder(Reversing()).cut_ids(["abcb"], [[1, 2, 3]])
    assert caught.value.code == "unusable_template"


def test_the_hash_tells_tokenizers_apart_and_is_stable() -> None:
    first, again = make_tokenizer(), make_tokenizer()
    assert tokenizer_sha256(first) == tokenizer_sha256(first) == tokenizer_sha256(again)
    assert tokenizer_sha256(first) != tokenizer_sha256(merging_tokenizer())
    again.add_tokens(["new"])
    other = make_tokenizer()
    other.add_tokens(["new"])
    assert tokenizer_sha256(other) != tokenizer_sha256(first)
