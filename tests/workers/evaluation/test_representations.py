"""Encoders: pooling against a plain forward, the fixed projection, and both towers of a tiny CLIP."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import make_tiny_model, make_tokenizer
from workers.evaluation.representations import (
    BaseEncoder,
    DualEncoder,
    base_encoder_sha256,
    directory_sha256,
    projection,
)
from workers.strategies.reservoir import Entry, MemoryStore

SPECIAL = tuple(range(7))


def make_clip(directory, *, projection_dim=512, images=True):
    """A tiny CLIP with random weights, saved as a registered encoder's directory is."""
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tower = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = CLIPConfig(
        text_config={
            **tower,
            "vocab_size": 300,
            "max_position_embeddings": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        vision_config={**tower, "image_size": 16, "patch_size": 8},
        projection_dim=projection_dim,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(config)
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    if images:
        CLIPImageProcessorPil(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
        ).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = make_tiny_model(tmp_path_factory.mktemp("base"))
    return AutoModelForCausalLM.from_pretrained(directory).eval(), AutoTokenizer.from_pretrained(
        directory
    )


def encoder_of(model, dim):
    def states(ids_BT):
        with torch.no_grad():
            return model.model(input_ids=ids_BT).last_hidden_state

    return BaseEncoder(states, dim=dim, special_ids=SPECIAL, base_sha256="b")


def test_the_base_encoder_is_the_mean_over_content_tokens(base):
    model, tokenizer = base
    texts = ["a", "<s><|user|>red and blue<|end|>", "</s>", "a much longer text than the others"]
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    keys = encoder_of(model, 32).encode(rows)
    for row, key in zip(rows, keys, strict=True):  # one row at a time, by transformers' own forward
        with torch.no_grad():
            out = model(input_ids=torch.tensor([row]), output_hidden_states=True)
        states = out.hidden_states[-1][0]
        content = [n for n, token in enumerate(row) if token not in SPECIAL] or range(len(row))
        mean = states[list(content)].mean(0)
        assert torch.allclose(key, mean / mean.norm(), atol=1e-5)


def test_a_projection_up_keeps_cosines_and_one_down_is_orthonormal(base):
    model, _ = base
    rows = [torch.randint(7, 263, (n + 3,)).tolist() for n in range(12)]
    plain, wide = encoder_of(model, 32).encode(rows), encoder_of(model, 512).encode(rows)
    assert wide.shape == (12, 512)
    assert torch.allclose(plain @ plain.T, wide @ wide.T, atol=1e-5)
    down = projection(64, 8).double()
    assert torch.allclose(down.T @ down, torch.eye(8, dtype=torch.float64), atol=1e-6)
    assert torch.equal(projection(64, 8), projection.__wrapped__(64, 8))


def test_the_global_generator_is_left_alone(base, tmp_path):
    before = torch.get_rng_state()
    projection(40, 20)
    DualEncoder.load(make_clip(tmp_path), dim=512, device=torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)


def test_hashes_tell_encoders_apart(tmp_path):
    assert base_encoder_sha256("a", 8) != base_encoder_sha256("b", 8)
    assert base_encoder_sha256("a", 8) != base_encoder_sha256("a", 16)
    (tmp_path / "x").write_text("1")
    first = directory_sha256(tmp_path)
    (tmp_path / "x").write_text("2")
    assert directory_sha256(tmp_path) != first


def test_texts_and_images_of_a_dual_encoder_live_together(tmp_path):
    encoder = DualEncoder.load(make_clip(tmp_path), dim=512, device=torch.device("cpu"))
    texts = [f"the number {n} is {'even' if n % 2 == 0 else 'odd'}" for n in range(20)]
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 255, (20, 24, 3), dtype=np.uint8) for _ in range(40)]
    text_keys, image_keys = encoder.encode_texts(texts), encoder.encode_images(images)
    assert (text_keys.shape, image_keys.shape) == ((20, 512), (40, 512))
    assert torch.cat([text_keys, image_keys]).norm(dim=1).tolist() == pytest.approx([1.0] * 60)
    alone = torch.cat([encoder.encode_texts([text]) for text in texts])
    assert torch.allclose(alone, text_keys, atol=1e-5)  # padding changes nothing
    whole = encoder._model.get_image_features(
        pixel_values=encoder._processor(images[:1], return_tensors="pt")["pixel_values"]
    ).pooler_output[0]
    assert torch.allclose(image_keys[0], whole / whole.norm(), atol=1e-5)

    store = MemoryStore(capacity=100, dim=512, encoder=encoder.sha256, seed=0)
    store.offer(text_keys, [Entry(0, f"t{n}", "a", text=text) for n, text in enumerate(texts)])
    store.offer(image_keys, [Entry(0, f"i{n}", "pictures", "image") for n in range(40)])
    kinds = [entry.modality for entry in store.entries]
    assert kinds.count("text") > 10
    assert kinds.count("image") > 10
    picture = store.entries[-1]
    number = int(picture.content.removeprefix("i"))
    ((best, *_),) = store.search(image_keys[number : number + 1], 5, modality="image")
    assert best.entry == picture
    ((hit, *_),) = store.search(text_keys[:1], 5, among="text")
    assert hit.entry.text == store.entries[0].text
    assert {r.entry.modality for r in store.search(text_keys[:1], 100)[0]} == {"text", "image"}


def test_a_dual_encoder_of_another_width_is_projected_and_needs_a_processor_for_images(tmp_path):
    directory = make_clip(tmp_path, projection_dim=24, images=False)
    encoder = DualEncoder.load(directory, dim=512, device=torch.device("cpu"))
    assert encoder.encode_texts(["a", "b" * 500]).shape == (2, 512)
    with pytest.raises(ValueError, match=r"preprocessor_config\.json"):
        encoder.encode_images([np.zeros((16, 16, 3), np.uint8)])
    assert encoder.sha256 != DualEncoder.load(directory, dim=24, device=torch.device("cpu")).sha256


def test_a_model_without_towers_is_refused(tmp_path):
    make_tiny_model(tmp_path)
    with pytest.raises(ValueError, match="no text and image towers"):
        DualEncoder.load(tmp_path, dim=512, device=torch.device("cpu"))
