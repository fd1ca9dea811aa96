"""Bottleneck adapters: the base while they are off, additive where they act, and loadable again."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from app.errors import TrainingFailed
from tests.tiny import make_tokenizer
from tests.workers.export.cases import IDS, logits, make_model
from workers.export.artifact import load_provenance, save_artifact
from workers.export.bottleneck import BottleneckModel, find_blocks, load_bottlenecks
from workers.export.interpolate import Interpolation
from workers.export.merge import active_adapters


def make_bottlenecks(*, trained=True):
    model = BottleneckModel(make_model(), ["one", "two"], 3, seed=5).eval()
    if trained:
        rng = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name in model.names:
                for bottleneck in model.adapter(name).values():
                    bottleneck.up.copy_(0.2 * torch.randn(bottleneck.up.shape, generator=rng))
    return model


def test_fresh_and_inactive_adapters_are_the_base_bit_for_bit() -> None:
    base = logits(make_model())
    fresh = make_bottlenecks(trained=False)
    fresh.activate(["one", "two"])
    assert torch.equal(logits(fresh), base)
    trained = make_bottlenecks()
    assert torch.equal(logits(trained), base)
    trained.activate(["two"])
    assert not torch.equal(logits(trained), base)
    with trained.disable_adapter():
        assert torch.equal(logits(trained), base)
    assert active_adapters(trained) == ("two",)


def test_a_block_gives_its_output_and_what_each_active_adapter_makes_of_it() -> None:
    model = make_bottlenecks()
    layer = model.get_base_model().model.layers[1]
    hidden = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = layer.mlp(hidden)
        model.activate(["one", "two"])
        found = layer.mlp(hidden)
        expected = plain
        for name in ("one", "two"):
            own = model.adapter(name)["1_mlp"]
            expected = expected + F.gelu(plain @ own.down.T) @ own.up.T
    torch.testing.assert_close(found, expected)


def test_every_layer_has_one_behind_attention_and_one_behind_the_mlp() -> None:
    assert set(find_blocks(make_model())) == {
        f"{i}.{b}" for i in (0, 1) for b in ("self_attn", "mlp")
    }
    model = make_bottlenecks()
    size = sum(p.numel() for p in model.bottlenecks["adapter_one"].parameters())
    assert size == 4 * 2 * 32 * 3
    assert not any(p.requires_grad for p in model.base_model.parameters())
    names = {n for n, _ in model.base_model.named_parameters()}
    assert names == {n for n, _ in make_model().named_parameters()}  # the base's own names


def test_a_model_without_known_blocks_is_refused() -> None:
    class Odd(nn.Module):
        def get_decoder(self) -> nn.Module:
            return self

    with pytest.raises(TrainingFailed, match="no attention or MLP block") as caught:
        find_blocks(Odd())
    assert caught.value.code == "adapters_unsupported"
    with pytest.raises(ValueError, match="no adapter 'three'"):
        make_bottlenecks().activate(["three"])


def test_the_line_scales_the_active_adapter_and_ends_at_both_ends_bit_for_bit() -> None:
    model = make_bottlenecks()
    model.activate(["one"])
    tuned = logits(model)
    other = model.adapter("two")["0_mlp"].up.detach().clone()
    with Interpolation.of_adapters(model, active_adapters(model)) as line:
        line.set(0.0)
        assert torch.equal(logits(model), logits(make_model()))
        line.set(0.5)
        assert not torch.equal(logits(model), tuned)
        assert torch.equal(model.adapter("two")["0_mlp"].up, other)
    assert torch.equal(logits(model), tuned)


def save(tmp_path, model):
    return save_artifact(
        tmp_path / "artifact",
        model,
        make_tokenizer(),
        kind="adapter",
        provenance={"alpha": 1.0, "job": "ftjob-1", "base_model": "tiny"},
    )


def test_an_artifact_loads_again_with_its_active_adapters(tmp_path) -> None:
    model = make_bottlenecks()
    model.activate(["two"])
    directory = save(tmp_path, model)
    names = set(load_provenance(directory)["files"])
    assert {"bottleneck_config.json", "one/bottleneck.safetensors"} <= names
    loaded = load_bottlenecks(make_model(), directory).eval()
    assert loaded.active == ("two",)
    for active in (["two"], ["one"], ["one", "two"], []):
        model.activate(active)
        loaded.activate(active)
        assert torch.equal(logits(loaded), logits(model))


def test_an_artifact_of_another_shape_is_refused(tmp_path) -> None:
    directory = save(tmp_path, make_bottlenecks())
    path = directory / "one" / "bottleneck.safetensors"
    tensors = load_file(path)
    tensors["0_mlp.up"] = tensors["0_mlp.up"][:, :2].clone()
    save_file(tensors, path)
    with pytest.raises(TrainingFailed, match="'one' does not fit") as caught:
        load_bottlenecks(make_model(), directory)
    assert caught.value.code == "damaged_artifact"


def test_what_the_base_can_do_the_wrapped_model_can() -> None:
    model = make_bottlenecks()
    assert model.config is model.base_model.config
    assert model.get_output_embeddings() is model.base_model.get_output_embeddings()
    assert model.get_base_model() is model.base_model
    with pytest.raises(AttributeError):
        _ = model.nothing_of_the_kind
    model.activate(["one"])
    generated = model.generate(input_ids=IDS, max_new_tokens=2, do_sample=False)
    assert generated.shape[1] == IDS.shape[1] + 2
