"""Layers are told apart in models of several families, made by hand and by transformers."""

import pytest
import torch
from torch import nn

from app.domain.spec import LoraConfig
from tests.tiny import make_llama
from workers.strategies.depth import embedding_names, find_layers, layer_depths
from workers.training.models import add_adapters


def test_a_llama_has_embeddings_layers_and_a_final_norm():
    model = make_llama(layers=3)
    assert find_layers(model) == ("model.layers", 3)
    depths = layer_depths(model)
    assert set(depths) == {name for name, _ in model.named_parameters()}
    assert depths["model.embed_tokens.weight"] == 0  # the tied head is this one parameter
    assert depths["model.layers.0.mlp.up_proj.weight"] == 1
    assert depths["model.layers.2.input_layernorm.weight"] == 3
    assert depths["model.norm.weight"] == 4


def test_adapters_belong_to_the_layer_that_they_adapt():
    model = add_adapters(make_llama(), LoraConfig(r=2), seed=0)
    depths = layer_depths(model)
    adapters = {n: d for n, d in depths.items() if ".lora_" in n}
    assert {d for n, d in adapters.items() if ".layers.0." in n} == {1}
    assert {d for n, d in adapters.items() if ".layers.1." in n} == {2}


def test_gpt2_keeps_its_layers_elsewhere():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=30, n_positions=16)
    )
    assert find_layers(model) == ("transformer.h", 2)
    names = embedding_names(model)
    assert names == {"transformer.wte.weight", "transformer.wpe.weight"}
    assert layer_depths(model)["transformer.ln_f.weight"] == 3


def test_experts_and_a_deeper_tower_are_not_taken_for_the_decoder():
    def tower(depth, experts):
        return nn.ModuleList(
            nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(2, 2) for _ in range(experts))})
            for _ in range(depth)
        )

    model = nn.ModuleDict({"vision": tower(5, 1), "text": tower(3, 9)})
    assert find_layers(model, 3) == ("text", 3)
    assert find_layers(model) == ("vision", 5)
    assert layer_depths(model, 3)["text.2.experts.8.weight"] == 3
    assert layer_depths(model, 3)["vision.4.experts.0.weight"] == 4  # no part of the stack


def test_a_model_without_a_list_of_layers_is_refused():
    with pytest.raises(ValueError, match="no list of layers"):
        find_layers(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no list of layers"):
        find_layers(nn.Sequential(nn.Embedding(3, 2), nn.ModuleList()))


def test_a_table_that_is_its_own_head_counts_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(4, 3)
            self.head = nn.Linear(3, 4, bias=False)
            self.head.weight = self.table.weight

    model = Tied()
    assert embedding_names(model) == {"table.weight"}
    assert len(list(model.named_parameters())) == 1
    assert torch.equal(model.head.weight, model.table.weight)
