"""Encoders: unit representations of texts and images, by the base model itself or by a dual encoder."""

# Shape letters: B rows, T tokens, W an encoder's own width, D the width asked for.

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

PROJECTION_SEED: Final = 20_011  # one for all: keys of different jobs can be compared
MAX_TOKENS: Final = 8192  # padded tokens of one forward
IMAGE_BATCH: Final = 32

Share = tuple[int, int]  # this rank and how many there are
WHOLE: Final[Share] = (0, 1)
States = Callable[
    [Tensor], Tensor
]  # token ids (B, T), right-padded, to last hidden states (B, T, W)


class BaseEncoder:
    """Mean of the base model's last hidden states over a text's content tokens.

    Args:
        states: The base model's forward, without gradient.
        dim: Of the representations; where the model's width differs, by a fixed projection.
        special_ids: Tokens that carry no content; a row of nothing else counts in full.
        base_sha256: Of the model's files.
    """

    def __init__(
        self, states: States, *, dim: int, special_ids: Sequence[int], base_sha256: str
    ) -> None:
        self._states = states
        self._special = torch.tensor(sorted(set(special_ids)), dtype=torch.int64)
        self.dim = dim
        self.sha256 = base_encoder_sha256(base_sha256, dim)

    def encode(self, rows: Sequence[Sequence[int]], *, share: Share = WHOLE) -> Tensor:
        """Float32 unit representations (rows, D) on the CPU; zeros where another rank's share is.

        Batches follow from the rows alone: however many ranks share them, a row gets the same bits.
        """
        keys_BD = torch.zeros(len(rows), self.dim)
        for batch in _batches([len(row) for row in rows])[share[0] :: share[1]]:
            width = max(len(rows[index]) for index in batch)
            ids_BT = torch.zeros(len(batch), max(width, 1), dtype=torch.int64)
            is_token_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
            for place, index in enumerate(batch):
                row = torch.as_tensor(rows[index], dtype=torch.int64)
                ids_BT[place, : len(row)] = row
                is_token_BT[place, : len(row)] = True
            is_content_BT = is_token_BT & ~torch.isin(ids_BT, self._special)
            is_empty_B = ~is_content_BT.any(dim=1)
            is_content_BT[is_empty_B] = is_token_BT[is_empty_B]
            means_BW = _mean(self._states(ids_BT).float().cpu(), is_content_BT)
            keys_BD[batch] = _project(means_BW, self.dim)
        return keys_BD


class DualEncoder:
    """A CLIP-like model's text and image towers, which share one space.

    Args:
        model: With `get_text_features` and `get_image_features`.
        tokenizer: Of its text tower.
        processor: Of its images; None where it has none, and then it reads texts alone.
        dim: Of the representations; where the model's differs, by a fixed projection.
        sha256: Of its files.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,  # noqa: ANN401 - transformers has no types
        processor: Any,  # noqa: ANN401 - transformers has no types
        *,
        dim: int,
        sha256: str,
    ) -> None:
        self._model: Any = model
        self._tokenizer = tokenizer
        self._processor = processor
        config: Any = self._model.config
        text: Any = getattr(config, "text_config", None) or config.text
        self._max_length = int(
            min(getattr(text, "max_position_embeddings", 512), tokenizer.model_max_length)
        )
        self.dim = dim
        self.sha256 = hashlib.sha256(f"{sha256}/{dim}".encode()).hexdigest()

    @classmethod
    def load(cls, directory: Path, *, dim: int, device: torch.device) -> "DualEncoder":
        """An encoder from its local directory: safetensors only, no code of its own.

        Raises:
            ValueError: It has no text and image towers.
        """
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        local = {"local_files_only": True, "trust_remote_code": False}
        with torch.random.fork_rng(devices=[]):
            model = AutoModel.from_pretrained(
                directory, use_safetensors=True, dtype=torch.float32, **local
            )
        if not hasattr(model, "get_text_features") or not hasattr(model, "get_image_features"):
            raise ValueError(f"{type(model).__name__} has no text and image towers")
        processor = None
        if (directory / "preprocessor_config.json").exists():
            images: Any = AutoImageProcessor
            processor = images.from_pretrained(directory, **local)
        tokenizer = AutoTokenizer.from_pretrained(directory, **local)
        model = model.to(device).eval().requires_grad_(requires_grad=False)
        return cls(model, tokenizer, processor, dim=dim, sha256=directory_sha256(directory))

    def encode_texts(self, texts: Sequence[str], *, share: Share = WHOLE) -> Tensor:
        """As `BaseEncoder.encode`, of texts; one too long for the tower is cut."""
        keys_BD = torch.zeros(len(texts), self.dim)
        ids = [
            self._tokenizer(text, truncation=True, max_length=self._max_length)["input_ids"]
            for text in texts
        ]
        for batch in _batches([len(row) for row in ids])[share[0] :: share[1]]:
            padded = self._tokenizer.pad(
                {"input_ids": [ids[index] for index in batch]}, return_tensors="pt"
            ).to(self._model.device)
            with torch.inference_mode():
                out = self._model.get_text_features(
                    input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]
                )
            keys_BD[batch] = self._finish(out)
        return keys_BD

    def encode_images(self, images: Sequence[Any]) -> Tensor:
        """Float32 unit representations (images, D) on the CPU, of whatever the processor reads.

        Raises:
            ValueError: The encoder came without an image processor.
        """
        if self._processor is None:
            raise ValueError("the encoder's directory has no preprocessor_config.json")
        parts = [torch.zeros(0, self.dim)]
        for start in range(0, len(images), IMAGE_BATCH):
            pixels = self._processor(list(images[start : start + IMAGE_BATCH]), return_tensors="pt")
            with torch.inference_mode():
                out = self._model.get_image_features(
                    pixel_values=pixels["pixel_values"].to(self._model.device)
                )
            parts.append(self._finish(out))
        return torch.cat(parts)

    def _finish(
        self,
        out: Any,  # noqa: ANN401 - transformers has no types
    ) -> Tensor:
        pooled_BW = (out if isinstance(out, Tensor) else out.pooler_output).float().cpu()
        return _project(pooled_BW, self.dim)


@functools.cache
def projection(width: int, dim: int) -> Tensor:
    """A fixed (width, dim) map with orthonormal rows (up) or columns (down), the same everywhere up to rounding.

    Going up it keeps every cosine; going down it is a random subspace, scaled away by the unit length.
    """
    generator = torch.Generator().manual_seed(PROJECTION_SEED)
    drawn = torch.randn(max(width, dim), min(width, dim), generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(drawn)
    q = q * torch.sign(torch.diagonal(r))  # the factorisation is unique with a positive diagonal
    map_WD: Tensor = q if width >= dim else q.T
    return map_WD.float()


def base_encoder_sha256(base_sha256: str, dim: int) -> str:
    """What keys of the base model's own states are known by."""
    facts = ["base", base_sha256, "mean of content tokens", "last", dim, PROJECTION_SEED]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def directory_sha256(directory: Path) -> str:
    """Hash of all files of a directory, by name and content."""
    digest = hashlib.sha256()
    for path in sorted(p for p in directory.iterdir() if p.is_file()):
        with path.open("rb") as file:
            digest.update(
                f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}".encode()
            )
    return digest.hexdigest()


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Rows of about one length together, as many as `MAX_TOKENS` padded tokens allow; at least one."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * lengths[index] <= MAX_TOKENS:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _mean(states_BTW: Tensor, is_content_BT: Tensor) -> Tensor:
    weights_BT1 = is_content_BT[..., None].float()
    return (states_BTW * weights_BT1).sum(1) / weights_BT1.sum(1).clamp_min(1.0)


def _project(keys_BW: Tensor, dim: int) -> Tensor:
    width = keys_BW.shape[1]
    keys_BD = keys_BW if width == dim else keys_BW @ projection(width, dim)
    lengths_B1: Tensor = keys_BD.norm(dim=1, keepdim=True)
    return keys_BD / lengths_B1.clamp_min(1e-12)
