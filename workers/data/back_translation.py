"""Back-translation: a question into another language and back, by two sequence-to-sequence models."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from app.domain.conversations import ChatRow
from app.domain.rows import CompletionRow, Row
from app.errors import TrainingFailed
from workers.data.counterfactuals import Encoded, Maker, question_parts, with_question

BATCH_TEXTS: Final = 16
LONGEST: Final = 512  # tokens of a text; a longer one is not translated
PIVOT_BEAMS: Final = 1  # the way out is sampled, the way back is the most likely of its beams
BACK_BEAMS: Final = 4


class Translator:
    """One direction, from a local directory of safetensors; nothing of the model's own code is run."""

    def __init__(self, directory: str, device: torch.device) -> None:
        from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(directory, **options)
            model: Any = AutoModelForSeq2SeqLM.from_pretrained(
                directory, use_safetensors=True, **options
            )
        except (OSError, ValueError) as error:
            raise TrainingFailed(
                f"back_translation: {Path(directory).name} is no sequence-to-sequence model in safetensors: "
                f"{error}",
                "retention.strategies",
                "bad_translator",
            ) from error
        self._model = model.to(device).eval()
        self._device = device

    def translate(self, texts: Sequence[str], **options: Any) -> list[list[str]]:  # noqa: ANN401
        """Translations of each text, as many as `num_return_sequences` says; none of a text too long."""
        ids = self._tokenizer(list(texts))["input_ids"]
        translated: list[list[str]] = [[] for _ in texts]
        order = [k for k in sorted(range(len(texts)), key=lambda k: len(ids[k])) if ids[k]]
        order = [k for k in order if len(ids[k]) <= LONGEST]
        for start in range(0, len(order), BATCH_TEXTS):
            batch = order[start : start + BATCH_TEXTS]
            fed = self._tokenizer([texts[k] for k in batch], return_tensors="pt", padding=True)
            width = int(fed["input_ids"].shape[1])
            with torch.no_grad():
                out = self._model.generate(
                    input_ids=fed["input_ids"].to(self._device),
                    attention_mask=fed["attention_mask"].to(self._device),
                    max_new_tokens=2 * width + 16,
                    **options,
                )
            found = self._tokenizer.batch_decode(out, skip_special_tokens=True)
            share = len(found) // len(batch)
            for place, k in enumerate(batch):
                translated[k] = [t.strip() for t in found[place * share : (place + 1) * share]]
        return translated


class BackTranslator:
    """Proposals for a row: its questions there and back, as many times as asked for.

    The way into the other language is sampled from the smallest set of tokens with probability `top_p`, each
    time anew; the way back is by beams. Answers, and turns that are not the user's, are never translated.

    Args:
        forward: Into the other language.
        backward: Back.
        candidates: Proposals a row.
        top_p: Of the sampling.
        seed: With the row's line it decides what is sampled.
    """

    def __init__(
        self, forward: Translator, backward: Translator, *, candidates: int, top_p: float, seed: int
    ) -> None:
        self._forward = forward
        self._backward = backward
        self._candidates = candidates
        self._top_p = top_p
        self._seed = seed

    def propose(self, rows: Sequence[Row], lines: Sequence[int]) -> list[list[Row]]:
        """See the class; the global random state is left as it was."""
        parts = [question_parts(row) for row in rows]
        is_asked = [_is_users(row) for row in rows]
        texts = [
            text
            for own, asked in zip(parts, is_asked, strict=True)
            for text, is_one in zip(own, asked, strict=True)
            if is_one and text.strip()
        ]
        digest = hashlib.sha256(json.dumps([self._seed, list(lines)]).encode()).digest()
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(int.from_bytes(digest[:7], "little"))
            reworded = dict(zip(texts, self._there_and_back(texts), strict=True))
        proposed = []
        for row, own, asked in zip(rows, parts, is_asked, strict=True):
            found = []
            for k in range(self._candidates):
                others = [
                    _at(reworded.get(text, []), k, text) if is_one else text
                    for text, is_one in zip(own, asked, strict=True)
                ]
                if others != own:
                    found.append(with_question(row, others))
            proposed.append(found)
        return proposed

    def _there_and_back(self, texts: Sequence[str]) -> list[list[str]]:
        pivots = self._forward.translate(
            texts,
            do_sample=True,
            top_p=self._top_p,
            top_k=0,
            num_beams=PIVOT_BEAMS,
            num_return_sequences=self._candidates,
        )
        flat = [pivot for own in pivots for pivot in own]
        back = iter(
            self._backward.translate(
                flat, do_sample=False, num_beams=BACK_BEAMS, num_return_sequences=1
            )
        )
        return [[text for _ in own for text in next(back)] for own in pivots]


def back_translation_maker(
    translator: Callable[[], BackTranslator],
    nats: Callable[[Sequence[Encoded]], Sequence[float]],
    *,
    key: Sequence[Any],
) -> Maker:
    """Of the proposals that keep the answer, the one that the base finds hardest.

    Args:
        translator: Called when the first row is to be translated: never where the pairs are cached.
        nats: Mean loss of rows under the base.
        key: Digests of the models, and all settings.
    """
    made: list[BackTranslator] = []

    def propose(rows: Sequence[Row], lines: Sequence[int]) -> list[list[Row]]:
        if not made:
            made.append(translator())
        return made[0].propose(rows, lines)

    return Maker(json.dumps(["back_translation", *key]), propose, nats, keeps_numbers=True)


def directory_sha256(directory: str) -> str:
    """Of the names and contents of a model's files."""
    digest = hashlib.sha256()
    for path in sorted(p for p in Path(directory).rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(directory)}\0".encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _is_users(row: Row) -> list[bool]:
    """For each of a row's question parts, whether a user wrote it."""
    if isinstance(row, ChatRow):
        return [
            m.role == "user" for m in row.messages if m.content is not None and not m.is_learned
        ]
    return [True] if isinstance(row, CompletionRow) else []


def _at(texts: Sequence[str], index: int, otherwise: str) -> str:
    return texts[index] if index < len(texts) and texts[index] else otherwise
