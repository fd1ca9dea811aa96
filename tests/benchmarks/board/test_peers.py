"""Other libraries' methods: the rows they are given, their schedule, and their place on the page."""

import numpy as np
import pytest
import torch

from tests.benchmarks.board.material import TokenRows
from tests.benchmarks.board.methods import STEPS
from tests.benchmarks.board.peer_methods import IGNORED, padded, peft_osf, schedule
from tests.benchmarks.board.peers import OSF, PEERS, PeerCell, final_cells, search_cells
from tests.benchmarks.board.report import write_report
from tests.benchmarks.board.standing import stand
from tests.benchmarks.board.test_board import fill_references, make_scope
from tests.benchmarks.board.test_figures import trial
from tests.tiny import make_llama


def test_labels_are_the_next_tokens_of_answers_alone():
    rows = TokenRows(
        [
            (np.asarray([5, 6, 7, 8], np.int32), np.asarray([0, 0, 1, 1], np.float32)),
            (np.asarray([5, 9], np.int32), np.asarray([0, 1], np.float32)),
        ]
    )
    inputs_BT, labels_BT = padded(rows)
    assert inputs_BT.tolist() == [[5, 6, 7], [5, 0, 0]]
    assert labels_BT.tolist() == [[IGNORED, 7, 8], [9, IGNORED, IGNORED]]


def test_the_learning_rate_is_the_boards():
    rates = [schedule(step) for step in range(STEPS)]
    assert rates[0] == pytest.approx(1 / 6)
    assert max(rates) == rates[5] == rates[6] == 1.0
    assert 0 < rates[-1] < 1e-3
    assert rates[6:] == sorted(rates[6:], reverse=True)


@pytest.mark.parametrize("method", PEERS, ids=lambda m: m.name)
def test_peers_have_the_search_budget_of_the_boards_own(method):
    assert len({cell.key() for cell in search_cells(method)}) == 4


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks for it
def test_subspaces_train_the_linear_layers_alone(monkeypatch):
    model = make_llama()
    monkeypatch.setattr("tests.benchmarks.board.peer_methods.STEPS", 3)
    rng = np.random.default_rng(0)
    weights = np.asarray([0] * 4 + [1] * 4, np.float32)
    rows = TokenRows([(rng.integers(5, 60, 8).astype(np.int32), weights) for _ in range(32)])

    class Material:
        training = (rows, rows)
        seed = 0

    before = {name: value.clone() for name, value in model.state_dict().items()}
    models = peft_osf(model, Material, {"preserved": 0.5, "rate": 1.0}, 2)  # type: ignore[arg-type]
    next(models)
    after = next(models).state_dict()
    assert after.keys() == before.keys()
    moved = {name for name in before if not torch.allclose(before[name], after[name], atol=1e-6)}
    assert any("q_proj" in name for name in moved)
    assert not any("norm" in name for name in moved)


def test_peers_stand_on_the_page_once_they_were_run(tmp_path):
    scope = make_scope(tmp_path)
    fill_references(scope)
    assert "peft: OSF: not run" in write_report(stand(scope), "make board")
    for cell in final_cells(OSF, scope.cache, scope.seeds, scope.num_stages):
        assert isinstance(cell, PeerCell)
        result = trial([0.9, 0.8], [[0.9], [0.5, 0.9]])
        scope.cache.save(cell, {**result, "steps": 10, "package": "peft 1.0"})
    page = write_report(stand(scope), "make board")
    assert "Other libraries on the same models" in page
    assert "half kept (peft 1.0)" in page
