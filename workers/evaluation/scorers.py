"""What a generated answer is worth against its accepted ones: from 0 to 1, by each scorer of generation."""

import importlib
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Final

from app.domain.benchmarks import SCORER_MODULES, Scorer
from app.errors import TrainingFailed

Score = Callable[[str, Sequence[str]], float]

_ARTICLES: Final = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION: Final = str.maketrans("", "", string.punctuation)
# Letters and digits of every script; equals rouge-score's own rule wherever the text is ASCII, while its own
# drops all other letters, so that answers in most languages would have nothing in common.
_WORD: Final = re.compile(r"[^\W_]+")


def find_scorer(scorer: Scorer) -> Score:
    """The function that scores an answer against its accepted ones.

    Raises:
        TrainingFailed: The scorer's library is not installed here; code `scorer_not_available`.
    """
    if scorer in SCORER_MODULES:
        module, package = SCORER_MODULES[scorer]
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise TrainingFailed(
                f"The scorer '{scorer.value}' needs {package}, which this worker has not installed.",
                "scorer",
                "scorer_not_available",
            ) from error
    return _SCORES[scorer]


def normalise_answer(text: str) -> str:
    """What two answers must share to be equal: letter case and white space don't count, all else does."""
    return " ".join(text.casefold().split())


def normalise_squad(text: str) -> str:
    """SQuAD's normalisation: lower case, without ASCII punctuation and the articles a, an, the; single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, accepted: Sequence[str]) -> float:
    """1 when the answer equals an accepted one but for letter case and white space, else 0."""
    said = normalise_answer(answer)
    return float(any(said == normalise_answer(text) for text in accepted))


def normalised_match(answer: str, accepted: Sequence[str]) -> float:
    """SQuAD's exact match: 1 when the answer equals an accepted one after SQuAD's normalisation, else 0."""
    said = normalise_squad(answer)
    return float(any(said == normalise_squad(text) for text in accepted))


def token_f1(answer: str, accepted: Sequence[str]) -> float:
    """SQuAD's F1 of the words of both, as multisets, of the best accepted answer."""
    return max(_token_f1(answer, text) for text in accepted)


def bleu4(answer: str, accepted: Sequence[str]) -> float:
    """sacrebleu's sentence BLEU with up to 4-grams, exponential smoothing and effective order, over 100."""
    return min(float(_bleu().sentence_score(answer, list(accepted)).score) / 100, 1.0)


def rouge_l(answer: str, accepted: Sequence[str]) -> float:
    """rouge-score's ROUGE-L F-measure without stemming, of the best accepted answer."""
    return float(_rouge().score_multi(list(accepted), answer)["rougeL"].fmeasure)


_SCORES: Final[Mapping[Scorer, Score]] = MappingProxyType(
    {
        Scorer.EXACT_MATCH: exact_match,
        Scorer.NORMALISED_MATCH: normalised_match,
        Scorer.TOKEN_F1: token_f1,
        Scorer.BLEU4: bleu4,
        Scorer.ROUGE_L: rouge_l,
    }
)


def _token_f1(answer: str, text: str) -> float:
    said, wanted = normalise_squad(answer).split(), normalise_squad(text).split()
    if not said or not wanted:
        return float(said == wanted)
    shared = sum((Counter(said) & Counter(wanted)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(said), shared / len(wanted)
    return 2 * precision * recall / (precision + recall)


class _Words:
    """rouge-score's tokenizer for every script."""

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.lower())


@lru_cache(maxsize=1)
def _bleu() -> Any:  # noqa: ANN401 - an optional library
    return importlib.import_module("sacrebleu.metrics").BLEU(effective_order=True)


@lru_cache(maxsize=1)
def _rouge() -> Any:  # noqa: ANN401 - an optional library
    module = importlib.import_module("rouge_score.rouge_scorer")
    return module.RougeScorer(["rougeL"], use_stemmer=False, tokenizer=_Words())
