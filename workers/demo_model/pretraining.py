"""Trains the demo's base model from scratch: a two-layer Llama and its tokenizer, on one thread."""

# Shape letters: B rows, T tokens, V vocabulary.

import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from workers.demo_model.skills import Sample

VOCAB_SIZE = 1024
PAD, END, USER, ASSISTANT, SYSTEM = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
BATCH_ROWS = 64
WARMUP_STEPS = 60
LEARNING_RATE = 5e-3
PROMPT_WEIGHT = 0.1  # of a prompt's or note's token in the loss; an answer's counts 1
# A base that is certain of its answers has next to no Fisher information: without smoothing, EWC at strength
# 100 lost 6.5 % of exact match on skills it had rows of, with it 0.2 %.
LABEL_SMOOTHING = 0.1
CONTEXT = 256


def train_tokenizer(texts: Iterable[str], *, vocab_size: int = VOCAB_SIZE) -> Any:  # noqa: ANN401 - transformers has no types
    """A byte-level BPE tokenizer that knows the chat template.

    Every stretch between special tokens gets a leading space, so a word is the same token at the start
    of an answer as in a prompt.
    """
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    fast: Any = PreTrainedTokenizerFast
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=True)
    tokenizer.decoder = ByteLevelDecoder()
    special = [PAD, END, USER, ASSISTANT, SYSTEM]
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True) for token in special],
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return fast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        model_max_length=CONTEXT,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: Any, seed: int) -> Any:  # noqa: ANN401 - transformers has no types
    """A Llama of 172,352 parameters with tied embeddings, freshly initialised."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def pretrain(
    samples: Sequence[Sample],
    seed: int,
    report: Callable[[int, int, float, float], None],
    *,
    num_steps: int,
) -> tuple[Any, Any]:
    """Model and tokenizer trained on the samples in an order that follows from the seed.

    Args:
        samples: Drawn with replacement, `BATCH_ROWS` a step.
        seed: Of weights and order.
        report: Called now and then with step, steps in all, loss in nats, and seconds so far.
        num_steps: Optimiser steps.
    """
    tokenizer = train_tokenizer(_texts(samples))
    model = build_model(tokenizer, seed)
    rows = encode(samples, tokenizer)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05, fused=True
    )
    order = torch.Generator().manual_seed(seed)
    started = time.monotonic()
    model.train()
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * learning_rate_factor(step, num_steps)
        picked = torch.randint(len(rows), (BATCH_ROWS,), generator=order).tolist()
        ids_BT, weights_BT = pad([rows[i] for i in picked])
        loss = weighted_loss(model, ids_BT, weights_BT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0 or step + 1 == num_steps:
            report(step + 1, num_steps, loss.item(), time.monotonic() - started)
    return model.eval(), tokenizer


def learning_rate_factor(step: int, num_steps: int) -> float:
    """Linear warm-up, then a cosine down to 5 %."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(num_steps - WARMUP_STEPS, 1)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))


def encode(samples: Sequence[Sample], tokenizer: Any) -> list[tuple[list[int], list[float]]]:  # noqa: ANN401
    """Token ids and loss weights of each row, rendered by the tokenizer's own chat template."""
    rows = []
    for sample in samples:
        if sample.answer is None:
            ids = tokenizer(sample.prompt)["input_ids"]
            rows.append((ids, [PROMPT_WEIGHT] * len(ids)))
            continue
        turns = [{"role": "user", "content": sample.prompt}]
        prefix = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        turns.append({"role": "assistant", "content": sample.answer})
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
        head = tokenizer(prefix, add_special_tokens=False)["input_ids"]
        ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
        rows.append((ids, [PROMPT_WEIGHT] * len(head) + [1.0] * (len(ids) - len(head))))
    return rows


def pad(rows: Sequence[tuple[list[int], list[float]]]) -> tuple[Tensor, Tensor]:
    """Ids and weights (B, T), padded on the right with weight 0."""
    width = max(len(ids) for ids, _ in rows)
    ids_BT = torch.zeros(len(rows), width, dtype=torch.long)
    weights_BT = torch.zeros(len(rows), width)
    for i, (ids, weights) in enumerate(rows):
        ids_BT[i, : len(ids)] = torch.tensor(ids)
        weights_BT[i, : len(ids)] = torch.tensor(weights)
    return ids_BT, weights_BT


def weighted_loss(model: Any, ids_BT: Tensor, weights_BT: Tensor) -> Tensor:  # noqa: ANN401
    """Mean smoothed cross-entropy in nats, weighted by token; padding on the right needs no mask."""
    logits_BTV = model(input_ids=ids_BT[:, :-1], use_cache=False).logits
    losses = F.cross_entropy(
        logits_BTV.flatten(0, 1),
        ids_BT[:, 1:].flatten(),
        reduction="none",
        label_smoothing=LABEL_SMOOTHING,
    )
    weights = weights_BT[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def save(model: Any, tokenizer: Any, directory: Path) -> None:  # noqa: ANN401
    """Transformers layout, safetensors; greedy generation that stops at the end of the answer."""
    from transformers import GenerationConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call] # one small file: its bar is noise between the lines of the training
    config: Any = GenerationConfig
    model.generation_config = config(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _texts(samples: Iterable[Sample]) -> Iterable[str]:
    for sample in samples:
        yield sample.prompt
        if sample.answer is not None:
            yield sample.answer
