"""Counterparts of training rows, made before the first step for the strategies that ask for them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from app.domain.configs.causal import CausalConfig
from app.domain.runplan import RunPlan
from workers.data.back_translation import (
    BackTranslator,
    Translator,
    back_translation_maker,
    directory_sha256,
)
from workers.data.batches import DrawnRow, build_micro
from workers.data.counterfactuals import (
    Encoded,
    Maker,
    PairStore,
    load_pairs,
    rule_maker,
    uploaded_maker,
)
from workers.data.rendering import DEFAULT_CHAT_TEMPLATE
from workers.data.tokens import TokenStore
from workers.strategies.context import Pairs
from workers.strategies.modes import evaluating
from workers.training.conversation import Conversation
from workers.training.forward import wide
from workers.training.loop import Run
from workers.training.outlook import ListedRows
from workers.training.tasks import store_name


def add_pairs(plan: RunPlan, run: Run, tokenizer: Any, talk: Conversation) -> None:  # noqa: ANN401
    """Gives a fresh run its counterparts, from the cache or made by rank 0; tells how many there are.

    The weights must still be the base's: of several back-translations the one that the base finds hardest is
    kept. After a resume the pairs are the same ones, or the checkpoint is refused.

    Raises:
        TrainingFailed: A model of a back-translation can't be used.
    """
    configs = [c for c in plan.strategies if isinstance(c, CausalConfig) and c.consistency_coef > 0]
    if not configs:
        return
    config, ranks = configs[0], run.ranks
    if not ranks.is_speaker:
        ranks.broadcast(None)
    files = [stage.training_rows for stage in plan.stages] or [plan.training_rows]
    maker = _maker(plan, run, config)
    found: dict[str, Pairs] = {}
    for index, rows in enumerate(files):
        name = store_name(index)
        training = run.stores[name]
        if not isinstance(training, TokenStore):
            raise TypeError(f"the store {name} was not made of a file")
        pairs = load_pairs(
            rows,
            training,
            tokenizer,
            maker,
            chat_template=DEFAULT_CHAT_TEMPLATE if plan.base.default_template else None,
            max_seq_length=plan.training.max_seq_length,
            cache_directory=Path(plan.cache_directory),
        )
        own_name = name.replace("training", "counterfactual")
        run.stores[own_name] = pairs.store
        run.sampler.add_store(own_name, pairs.store.lengths)
        found[name] = Pairs(own_name, pairs.row_of.tolist(), pairs.digest)
        _tell(talk, name, pairs, config.pairs)
    if ranks.is_speaker:
        ranks.broadcast(None)
    run.ctx.pairs = found
    run.ctx.store_sizes = {name: len(store.lengths) for name, store in run.stores.items()}
    run.refresh_streams()


def row_nats(run: Run) -> Callable[[Sequence[Encoded]], list[float]]:
    """Mean loss in nats per supervised token of tokenised rows, by the model as it stands at the call."""

    def nats(rows: Sequence[Encoded]) -> list[float]:
        store = ListedRows([(ids.tolist(), weights.tolist()) for ids, weights in rows])
        drawn = [DrawnRow("scored", "scored", row, is_task=False) for row in range(len(rows))]
        micro = build_micro(drawn, {"scored": store}, run.ctx.device)
        with torch.no_grad(), evaluating(run.model):
            logits_NV = run.student(micro.input_ids_BT, micro.positions_N)
        losses_N = F.cross_entropy(wide(logits_NV), micro.targets_N, reduction="none").double()
        sums = losses_N.new_zeros(2, len(rows))
        sums[0].index_add_(0, micro.row_of_N, losses_N * micro.weights_N)
        sums[1].index_add_(0, micro.row_of_N, micro.weights_N.double())
        means: list[float] = (sums[0] / sums[1]).tolist()
        return means

    return nats


def _maker(plan: RunPlan, run: Run, config: CausalConfig) -> Maker:
    seed, models = plan.training.seed, config.back_translation
    if config.pairs == "uploaded":
        return uploaded_maker()
    if models is None:
        return rule_maker(config.rules, config.entities, seed)
    there, back = plan.models[models.forward], plan.models[models.backward]

    def translator() -> BackTranslator:
        device = run.ctx.device
        return BackTranslator(
            Translator(there, device),
            Translator(back, device),
            candidates=models.candidates,
            top_p=models.top_p,
            seed=seed,
        )

    hashes = [directory_sha256(there), directory_sha256(back), plan.base.sha256]
    key = [*hashes, models.candidates, models.top_p, seed]
    return back_translation_maker(translator, row_nats(run), key=key)


def _tell(talk: Conversation, store: str, pairs: PairStore, source: str) -> None:
    count, rows = len(pairs.store), len(pairs.row_of)
    left_out = ", ".join(f"{n} by {name}" for name, n in sorted(pairs.refused.items()))
    talk.note(
        "info",
        "counterfactual_pairs",
        f"{count} of {rows} training rows have a counterpart ({source})"
        + (f"; proposals refused: {left_out}." if left_out else "."),
        store=store,
        rows=rows,
        pairs=count,
        refused=dict(pairs.refused),
    )
