"""Model directories as an operator hands them in: what may be in them, and what their headers say."""

import json
import math
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, Final

import httpx2
import huggingface_hub
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from app.domain.configs.base import ModelKind
from app.domain.estimates_shapes import describe_shape
from app.errors import BadRequest, Unavailable

#: Pickled weights and code run whatever they like when they are loaded.
FORBIDDEN_SUFFIXES: Final = frozenset(
    {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".py", ".h5", ".msgpack", ".npz", ".joblib"}
)
KEPT_SUFFIXES: Final = frozenset(
    {".safetensors", ".json", ".txt", ".model", ".spm", ".jinja", ".tiktoken"}
)
MAX_HEADER_BYTES: Final = 100 * 2**20
MAX_JSON_BYTES: Final = 200 * 2**20
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
_DOWNLOADS = 4  # at a time
_HUB_FAILURES = (
    HfHubHTTPError,
    EntryNotFoundError,
    LocalEntryNotFoundError,
    FileMetadataError,
    OfflineModeIsEnabled,
    httpx2.HTTPError,
)
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")


@dataclass(frozen=True)
class ModelSource:
    """A model's files on local disk, and where they came from."""

    directory: Path
    files: tuple[str, ...]  # names to take, sorted
    source: str
    revision: str | None  # 40 hex digits for a hub id


@dataclass(frozen=True)
class ModelFacts:
    """What a model's config and safetensors headers say."""

    architecture: str
    num_parameters: int
    context_length: int | None
    vocab_size: int | None
    dtype: str
    has_chat_template: bool
    shape: dict[str, Any] | None  # a `ModelShape`, for estimates; None: not that of a decoder


@contextmanager
def open_source(
    source: str, *, revision: str | None, token: str | None, scratch: Path
) -> Iterator[ModelSource]:
    """The files of a directory, or of a hub id downloaded to a place that is cleaned up afterwards.

    Args:
        source: A local directory, else a hub id; `HF_ENDPOINT` names a mirror.
        revision: Branch, tag or commit of a hub id; what it means now is resolved to a commit.
        token: For gated and private ids.
        scratch: Where a download goes.

    Raises:
        BadRequest: No such directory or id, no right to it, or files that are not allowed.
        Unavailable: The hub cannot be reached.
    """
    directory = Path(source).expanduser()
    if directory.is_dir():
        if revision is not None:
            raise BadRequest("A directory has no revision.", "revision")
        yield ModelSource(directory, _names_to_take(directory), str(directory.resolve()), None)
    elif directory.exists() or source.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(source):
        raise BadRequest(f"{source} is neither a directory nor the id of a hub model.", "source")
    else:
        scratch.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix="hub-", dir=scratch) as target:
            with _hub_errors(source):
                found = _download(source, revision, token, Path(target))
            yield found


def read_facts(source: ModelSource) -> ModelFacts:
    """Reads the config and the headers of all weight files.

    Raises:
        BadRequest: The config is missing or wants foreign code, or a weight file is missing or damaged.
    """
    config = _read_json(source.directory / "config.json")
    for name in source.files:
        if name.endswith("config.json") and "auto_map" in _read_json(source.directory / name):
            raise BadRequest(
                f"{name} has an auto_map: the model needs code of its own, which is never run here.",
                "source",
            )
    text_config = config.get("text_config")
    nested: dict[str, Any] = text_config if isinstance(text_config, dict) else {}
    architectures = config.get("architectures") or ["unknown"]
    shards = [name for name in source.files if name.endswith(".safetensors")]
    _check_index(source)
    tensors: dict[str, list[int]] = {}
    dtypes = set()
    for name in shards:
        for tensor, entry in read_safetensors_header(source.directory / name).items():
            tensors[tensor] = entry["shape"]
            dtypes.add(entry["dtype"])
    shape = describe_shape(config, tensors)
    counted = sum(math.prod(sizes) for sizes in tensors.values())
    return ModelFacts(
        architecture=str(architectures[0]),
        num_parameters=counted if shape is None else shape.num_parameters,
        context_length=_first_int((config, nested), _CONTEXT_KEYS),
        vocab_size=_first_int((config, nested), ("vocab_size",)),
        dtype="mixed" if len(dtypes) > 1 else next(iter(dtypes), "unknown"),
        has_chat_template=_has_chat_template(source),
        shape=None if shape is None else shape.model_dump(mode="json"),
    )


def check_kind(source: ModelSource, kind: ModelKind) -> None:
    """Refuses files that can't be a model of this kind, as far as the config tells.

    Raises:
        BadRequest: An encoder lacks a text or an image tower, or a translator is no encoder and decoder.
    """
    config = _read_json(source.directory / "config.json")
    architecture = str((config.get("architectures") or ["unknown"])[0])
    has_towers = bool(
        (config.get("text_config") or config.get("text"))
        and (config.get("vision_config") or config.get("vision"))
    )
    translates = bool(config.get("is_encoder_decoder")) or architecture.endswith(
        ("ConditionalGeneration", "MTModel")
    )
    if kind == "encoder" and (not has_towers or architecture.endswith("ForCausalLM")):
        raise BadRequest(
            f"{architecture} is no dual encoder: its config names no text and image tower.", "kind"
        )
    if kind == "seq2seq" and not translates:
        raise BadRequest(f"{architecture} is no encoder and decoder.", "kind")
    if kind == "causal_lm" and has_towers and config.get("projection_dim"):
        raise BadRequest(
            f"{architecture} embeds and generates nothing; add it with kind encoder.", "kind"
        )


def read_safetensors_header(path: Path) -> dict[str, dict[str, Any]]:
    """Shape, type and place of each tensor of a file, which is not read further.

    Raises:
        BadRequest: The file is no safetensors file, or is cut off.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise BadRequest(f"{path.name} is not a safetensors file.", "source")
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        ends = [entry["data_offsets"][1] for entry in header.values()]
        shapes = [entry["shape"] for entry in header.values()]
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        raise BadRequest(f"{path.name} has a damaged header.", "source") from None
    if not header or not all(isinstance(n, int) and n >= 0 for shape in shapes for n in shape):
        raise BadRequest(f"{path.name} has a damaged header.", "source")
    if max(ends) != size - 8 - length:
        raise BadRequest(f"{path.name} is cut off or damaged: its size does not fit.", "source")
    return dict(header)


def copy_files(source: ModelSource, target: Path) -> None:
    """Copies the files to take, and nothing else, into a directory made here."""
    target.mkdir(parents=True)
    for name in source.files:
        shutil.copyfile(source.directory / name, target / name)


def _names_to_take(directory: Path) -> tuple[str, ...]:
    names = sorted(path.name for path in directory.iterdir() if path.is_file())
    return _checked_names(names, str(directory))


def _checked_names(names: list[str], where: str, *, is_hub: bool = False) -> tuple[str, ...]:
    """The names to take; a directory must not hold pickles or code, of a hub id they are not fetched."""
    forbidden = [name for name in names if PurePosixPath(name).suffix in FORBIDDEN_SUFFIXES]
    if not any(name.endswith(".safetensors") for name in names):
        hint = f" but {forbidden[0]}, which would have to be unpickled" if forbidden else ""
        raise BadRequest(f"{where} has no *.safetensors file{hint}.", "source")
    if forbidden and not is_hub:
        raise BadRequest(
            f"{where} holds {forbidden[0]}: pickled weights and code are refused. Remove it, or hand in a"
            " directory with safetensors, JSON and tokenizer files alone.",
            "source",
        )
    return tuple(
        name
        for name in sorted(names)
        if PurePosixPath(name).suffix in KEPT_SUFFIXES and not name.startswith(".")
    )


def _download(source: str, revision: str | None, token: str | None, target: Path) -> ModelSource:
    info = huggingface_hub.HfApi().model_info(source, revision=revision, token=token)
    commit = info.sha or ""
    if not _COMMIT.fullmatch(commit):
        raise Unavailable(f"The hub did not say which commit {source} is at.")
    top = [item.rfilename for item in info.siblings or () if "/" not in item.rfilename]
    names = _checked_names(top, source, is_hub=True)
    # File by file: `snapshot_download` falls back on whatever an earlier try left behind.
    fetch = partial(
        huggingface_hub.hf_hub_download, source, revision=commit, token=token, local_dir=target
    )
    with ThreadPoolExecutor(_DOWNLOADS) as pool:
        list(pool.map(fetch, names))
    return ModelSource(target, names, source, commit)


@contextmanager
def _hub_errors(source: str) -> Iterator[None]:
    try:
        yield
    except GatedRepoError:
        raise BadRequest(
            f"{source} is gated: accept its terms on the hub, and set RETAIN_HF_TOKEN.", "source"
        ) from None
    except RevisionNotFoundError:
        raise BadRequest(f"{source} has no such revision.", "revision") from None
    except RepositoryNotFoundError:
        raise BadRequest(
            f"There is no directory {source}, and no hub model of this id that the token"
            " (RETAIN_HF_TOKEN) may read.",
            "source",
        ) from None
    except _HUB_FAILURES as error:
        reason = str(error).strip().partition("\n")[0]
        raise Unavailable(
            f"The hub ({huggingface_hub.constants.ENDPOINT}) does not deliver {source}: {reason}"
        ) from error


def _check_index(source: ModelSource) -> None:
    for name in source.files:
        if name.endswith(".safetensors.index.json"):
            wanted = set(_read_json(source.directory / name).get("weight_map", {}).values())
            missing = sorted(wanted - set(source.files))
            if missing:
                raise BadRequest(f"{name} names {missing[0]}, which is missing.", "source")


def _has_chat_template(source: ModelSource) -> bool:
    if "chat_template.jinja" in source.files or "chat_template.json" in source.files:
        return True
    name = "tokenizer_config.json"
    return name in source.files and bool(_read_json(source.directory / name).get("chat_template"))


def _first_int(configs: tuple[dict[str, Any], ...], keys: tuple[str, ...]) -> int | None:
    for config in configs:
        for key in keys:
            if isinstance(config.get(key), int):
                return int(config[key])
    return None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise BadRequest(f"{path.name} is missing.", "source")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise BadRequest(f"{path.name} is too large.", "source")
    try:
        value = json.loads(path.read_bytes())
    except ValueError:
        raise BadRequest(f"{path.name} is not JSON.", "source") from None
    if not isinstance(value, dict):
        raise BadRequest(f"{path.name} is not a JSON object.", "source")
    return value
