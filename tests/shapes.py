"""Shapes of decoders without their weights: headers as a checkpoint of a Llama has them."""

from app.domain.estimates_shapes import ModelShape, describe_shape

#: 4,988,276,736 parameters: what the table of a 5B model is reckoned with.
FIVE_B = {"hidden": 4096, "inner": 11_008, "layers": 24, "heads": 32, "vocab": 32_000}


def llama_shape(
    *, hidden: int = 32, inner: int = 64, layers: int = 2, heads: int = 4, vocab: int = 300
) -> ModelShape:
    """A Llama with as many key heads as heads and a tied head."""
    config = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "vocab_size": vocab,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
    }
    tensors = {"model.embed_tokens.weight": [vocab, hidden], "model.norm.weight": [hidden]}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors[f"{at}.self_attn.{name}.weight"] = [hidden, hidden]
        tensors[f"{at}.mlp.gate_proj.weight"] = [inner, hidden]
        tensors[f"{at}.mlp.up_proj.weight"] = [inner, hidden]
        tensors[f"{at}.mlp.down_proj.weight"] = [hidden, inner]
        tensors[f"{at}.input_layernorm.weight"] = [hidden]
        tensors[f"{at}.post_attention_layernorm.weight"] = [hidden]
    shape = describe_shape(config, tensors)
    assert shape is not None
    return shape
