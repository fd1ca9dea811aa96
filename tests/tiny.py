"""A small Llama and a byte-level tokenizer, made in memory and saved as a base model directory."""

from pathlib import Path
from typing import Any

PLAIN_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")


def make_tiny_model(
    directory: Path,
    *,
    seed: int = 0,
    vocab_size: int = 300,
    hidden: int = 32,
    layers: int = 2,
    chat_template: bool = False,
) -> Path:
    """Saves a randomly initialised Llama (tied head, context 512) and its tokenizer; returns `directory`.

    Args:
        directory: Created where missing.
        seed: Of the weights; the caller's global RNG state is left as it was.
        vocab_size: At least 263: 256 bytes and 7 special tokens.
        hidden: Width, a multiple of 8.
        layers: Decoder layers.
        chat_template: Whether the tokenizer carries one.
    """
    import torch

    tokenizer = make_tokenizer(vocab_size=vocab_size, chat_template=chat_template)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make_llama(vocab_size=vocab_size, hidden=hidden, layers=layers)
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def make_llama(*, vocab_size: int = 300, hidden: int = 32, layers: int = 2) -> Any:
    """A Llama of the global RNG's state, in memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def make_tokenizer(*, vocab_size: int = 300, chat_template: bool = False) -> Any:
    """One token a byte, special tokens first; ids above 263 are never produced."""
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import PreTrainedTokenizerFast

    if vocab_size < len(SPECIAL_TOKENS) + 256:
        raise ValueError(f"vocab_size: {vocab_size} is below {len(SPECIAL_TOKENS) + 256}")
    letters = sorted(ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *letters))}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=512,
    )
    if chat_template:
        fast.chat_template = PLAIN_TEMPLATE
    return fast
