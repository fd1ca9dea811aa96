"""Estimates against what torch says: parameter counts, what autograd keeps, and what strategies declare."""

import contextlib
import tempfile

import pytest
import torch

from app.domain.configs.causal import CausalConfig
from app.domain.configs.distillation import DistillationConfig
from app.domain.configs.hybrid import HybridOptimizerConfig
from app.domain.configs.memory import MemoryConfig
from app.domain.configs.meta import MamlProxConfig, ReptileConfig
from app.domain.configs.progressive import ProgressiveConfig
from app.domain.configs.quadratic import EwcConfig, L2SpConfig, MasConfig, SiConfig
from app.domain.configs.replay import ReplayConfig
from app.domain.estimates_memory import Numbers, Trained, layer_activation_bytes
from app.domain.estimates_shapes import describe_shape
from app.domain.estimates_strategies import extra_cost
from app.domain.estimates_work import RowTokens, plan_steps, spare_padding
from app.domain.spec import LoraConfig
from tests.workers.training.runs import ListRows, make_plan, make_run
from workers.data.batches import DrawnRow, split_micros
from workers.training.models import add_adapters

TINY = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3}
FIVE_B = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
}


def llama(**values):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM, LlamaConfig(**{"num_attention_heads": 4, **values})


def qwen(**values):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM, Qwen2Config(**{"num_attention_heads": 4, **values})


def gpt2(**values):
    from transformers import GPT2Config, GPT2LMHeadModel

    drop = dict.fromkeys(("resid_pdrop", "attn_pdrop", "embd_pdrop"), values.pop("drop", 0.0))
    config = GPT2Config(bos_token_id=1, eos_token_id=2, **drop, **values)
    return GPT2LMHeadModel, config


MODELS = {
    "llama": llama(**TINY, num_key_value_heads=2, tie_word_embeddings=True),
    "llama, own head": llama(**TINY, tie_word_embeddings=False),
    "qwen, biases": qwen(**TINY, num_key_value_heads=4, tie_word_embeddings=True),
    "gpt2": gpt2(vocab_size=300, n_embd=64, n_layer=3, n_head=4),
    "gpt2, dropout": gpt2(vocab_size=300, n_embd=64, n_layer=3, n_head=4, drop=0.1),
    "llama, 5B": llama(**FIVE_B, tie_word_embeddings=True),
    "qwen, 5B": qwen(
        **{**FIVE_B, "vocab_size": 152_064},
        num_key_value_heads=8,
        tie_word_embeddings=False,
    ),
}
SMALL = [name for name in MODELS if "5B" not in name]


def build(name, *, meta=False):
    kind, config = MODELS[name]
    with torch.device("meta") if meta else contextlib.nullcontext():
        torch.manual_seed(0)
        return kind(config)


def header(model):
    """Shapes as `save_pretrained` writes them: what is tied lies there once."""
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    is_tied = model.config.tie_word_embeddings
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return {name: size for name, size in state.items() if not (is_tied and name in tied)}


def shape_of(model):
    shape = describe_shape(model.config.to_dict(), header(model))
    assert shape is not None
    return shape


@pytest.mark.parametrize("name", MODELS)
def test_the_headers_count_what_the_model_on_the_meta_device_has(name):
    model = build(name, meta=True)
    shape = shape_of(model)

    assert shape.num_parameters == sum(p.numel() for p in model.parameters())
    layers = model.get_decoder()
    stack = layers.layers if hasattr(layers, "layers") else layers.h
    assert shape.layer_parameters == tuple(sum(p.numel() for p in x.parameters()) for x in stack)
    table = model.get_input_embeddings().weight.numel()
    assert shape.embedding_parameters >= table
    assert shape.is_tied == (
        model.get_output_embeddings().weight is model.get_input_embeddings().weight
    )


@pytest.mark.parametrize("name", [name for name in MODELS if name != "gpt2, dropout"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # peft corrects it for transposed layers
def test_adapters_have_the_parameters_that_peft_gives_them(name):
    model = build(name, meta=True)
    shape = shape_of(model)
    with torch.device("meta"):
        wrapped = add_adapters(model, LoraConfig(r=8), seed=0)

    counted = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert shape.lora_parameters(8, "all-linear") == counted


def test_buffers_and_a_tied_head_that_was_saved_as_well_are_not_counted():
    model = build("gpt2")
    plain = header(model)
    more = plain | {
        "transformer.h.0.attn.bias": (1, 1, 1024, 1024),
        "transformer.h.0.attn.masked_bias": (),
        "lm_head.weight": (300, 64),
    }

    assert describe_shape(model.config.to_dict(), more) == shape_of(model)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_a_layer_keeps_the_bytes_that_autograd_saves(name, kind, autocast):
    """Within 10 %: of storages that autograd holds between forward and backward, weights and casts left out."""
    rows, width = 8, 64
    model = build(name)
    shape = shape_of(model)
    if kind == "lora":
        base = model.to(torch.bfloat16) if autocast else model
        model = add_adapters(base, LoraConfig(r=8), seed=0)
    numbers = Numbers(autocast, 2 if autocast and kind == "lora" else 4)
    trained = Trained(
        parameters=1,
        is_lora=kind == "lora",
        rank=8,
        adapted=sum(m.count for m in shape.matrices),
        top_layers=shape.num_layers,
    )

    # Twice the tokens: the difference is what grows with them, without the casts of weights.
    once, twice = (saved_bytes(model, n, width, autocast) for n in (rows, 2 * rows))
    kept = (twice - once) / (rows * width)
    layer = layer_activation_bytes(shape, trained, numbers, width=width, device="cpu")
    around = (1 if kind == "lora" else 3) * shape.hidden_size * 4
    assert shape.num_layers * layer + around == pytest.approx(kept, rel=0.1)


def saved_bytes(model, rows, width, autocast):
    held = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    ids = torch.randint(3, 250, (rows, width), generator=torch.Generator().manual_seed(0))
    precision = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), precision:
        out = inner.get_decoder()(input_ids=ids, use_cache=False)
    assert out is not None
    return sum(size for size, _ in held.values())


CONFIGS = (
    EwcConfig(),
    MasConfig(),
    L2SpConfig(),
    DistillationConfig(on=("general",)),
    DistillationConfig(on=("domain", "general"), every=2, general_ratio=0.5),
    DistillationConfig(on=("general",), teacher="cached"),
    ReplayConfig(strength=0.25),
    MemoryConfig(strength=0.2),
    ProgressiveConfig(),
    ProgressiveConfig(mode="cone", mix_start=None, record_trajectory=True),
    ProgressiveConfig(mode="gpm", curriculum="none"),
    MamlProxConfig(inner_steps=3),
    ReptileConfig(),
    CausalConfig(),
    CausalConfig(consistency_coef=0.0, general_ratio=0.25),
    HybridOptimizerConfig(),
    HybridOptimizerConfig(importance="gradient_ema", trust_ratio="lamb", decay_anchor="zero"),
)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.type)
def test_a_strategy_costs_what_its_implementation_declares(config):
    """One truth: the server, which imports no torch, reckons with the numbers that the strategies give."""
    with tempfile.TemporaryDirectory() as scratch:
        run = make_run(make_plan(scratch, strategies=(config,)), start=False)
    (strategy,) = run.strategies
    declared, known = strategy.cost(), extra_cost(config, lora=False)

    assert known.step_share == pytest.approx(declared.step_share)
    assert known.trainable_copies == declared.trainable_copies
    assert known.model_copies == declared.model_copies


def test_si_costs_what_it_declares():
    from workers.training.strategies import build_strategies

    (strategy,) = build_strategies((SiConfig(),))
    known = extra_cost(SiConfig(), lora=False)
    assert (known.step_share, known.trainable_copies) == (
        strategy.cost().step_share,
        strategy.cost().trainable_copies,
    )


def test_steps_are_split_as_the_trainer_splits_them():
    rows = ListRows(64, seed=3, longest=200)
    lengths = {"training": rows.lengths}
    plan = plan_steps(
        [RowTokens(len(ids), int((w[1:] > 0).sum())) for ids, w in rows.rows],
        batch_size=16,
        max_tokens=512,
        spare=64,
    )

    order = sorted(range(64), key=lambda i: int(rows.lengths[i]))
    micros = []
    for start in range(0, 64, 16):
        drawn = [DrawnRow("domain", "training", i, is_task=True) for i in order[start : start + 16]]
        micros += split_micros(drawn, lengths, max_tokens=512, spare_padding=64)
    widths = [max(int(rows.lengths[d.row]) - 1 for d in micro) for micro in micros]
    padded = [len(micro) * width for micro, width in zip(micros, widths, strict=True)]
    assert plan.micros == len(micros) / 4
    assert plan.tokens == sum(padded) / 4
    assert plan.largest_micro.tokens == max(padded)


def test_the_padding_that_is_spared_is_the_trainers():
    from workers.training.build import _spare_padding

    model = build("llama")
    assert spare_padding(shape_of(model).num_parameters, "cpu") == _spare_padding(
        model, torch.device("cpu")
    )
