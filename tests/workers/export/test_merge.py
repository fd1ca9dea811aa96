"""Merging: the merged model computes what the adapted one did, and a wrong merge is found out."""

import pytest
import torch
from peft.tuners.lora.layer import Linear

from app.errors import TrainingFailed
from tests.workers.export.cases import logits, make_adapted, make_model
from workers.export.merge import adapter_change, merge_adapter


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"target_modules": ["q_proj"]}])
def test_a_merged_adapter_computes_the_same(config) -> None:
    model = make_adapted(**config)
    adapted = logits(model)
    merged = merge_adapter(model)
    assert not hasattr(merged, "peft_config")
    assert type(merged) is type(make_model())
    torch.testing.assert_close(logits(merged), adapted, rtol=1e-5, atol=1e-5)
    assert (logits(merged) - logits(make_model())).abs().max() > 1e-3


def test_the_change_is_scale_times_b_times_a() -> None:
    layer = make_adapted().base_model.model.model.layers[1].mlp.up_proj
    torch.testing.assert_close(
        adapter_change(layer, "default"), layer.get_delta_weight("default").detach()
    )


def test_a_merge_that_is_not_base_plus_change_is_found_out(monkeypatch) -> None:
    model = make_adapted()
    plain = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda s, a: plain(s, a) * 1.01)
    with pytest.raises(TrainingFailed, match="is not base plus change") as caught:
        merge_adapter(model)
    assert caught.value.code == "merge_failed"


def test_dora_and_merged_adapters_are_refused() -> None:
    with pytest.raises(TrainingFailed, match="is no plain LoRA"):
        merge_adapter(make_adapted(use_dora=True))
    model = make_adapted()
    model.merge_adapter()
    with pytest.raises(TrainingFailed, match="active or merged"):
        merge_adapter(model)
