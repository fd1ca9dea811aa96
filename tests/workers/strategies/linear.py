"""A linear model of fixed features, whose importance has closed forms."""

import torch
from torch import nn

from tests.workers.strategies.stage import F64, VOCABULARY, make_micro
from workers.strategies.batch import Forward
from workers.strategies.context import Context


class Linear(nn.Module):
    """Logits W x of fixed features, one token a row."""

    def __init__(self, classes=4, inputs=3):
        super().__init__()
        rng = torch.Generator().manual_seed(1)
        self.features = torch.randn(VOCABULARY, inputs, generator=rng, dtype=F64)
        self.weight = nn.Parameter(torch.randn(classes, inputs, generator=rng, dtype=F64))

    def forward(self, input_ids_BT, positions_N):
        return self.features[input_ids_BT.flatten()[positions_N]] @ self.weight.T


def draw_pairs(count=40):
    """Tokens and labels of rows with one supervised token each."""
    rng = torch.Generator().manual_seed(2)
    ids = torch.randint(1, VOCABULARY, (count,), generator=rng)
    return ids, torch.randint(0, 4, (count,), generator=rng)


def linear_context(model, kind, ids, labels):
    """A context whose general rows are these tokens with these labels."""
    rows = [[0, int(i), int(y)] for i, y in zip(ids, labels, strict=True)]
    return Context(
        model=model,
        params={"weight": model.weight},
        lora_pairs=(),
        coefs={kind: 1.0},
        run_seed=0,
        device=torch.device("cpu"),
        batch_size=8,
        num_training_rows=0,
        num_general_rows=len(rows),
        general_micros=lambda r: iter([make_micro([("general", i, rows[i], False) for i in r])]),
        forward=lambda micro: Forward(model(micro.input_ids_BT, micro.positions_N)),
    )
