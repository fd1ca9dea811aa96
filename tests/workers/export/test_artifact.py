"""Published directories: they load with the plain libraries and say where they came from."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.errors import TrainingFailed
from tests.tiny import PLAIN_TEMPLATE, make_tokenizer
from tests.workers.export.cases import logits, make_adapted, make_model
from workers.export.artifact import ArtifactKind, load_provenance, save_artifact
from workers.export.interpolate import Interpolation
from workers.export.merge import merge_adapter

PROVENANCE = {
    "job": "ftjob-1",
    "base_model": "tiny",
    "base_sha256": "0" * 64,
    "template": "built_in",
}


def save(directory: Path, model, kind: ArtifactKind, alpha: float = 1.0, **more) -> Path:
    return save_artifact(
        directory / "artifact",
        model,
        make_tokenizer(),
        kind=kind,
        provenance={**PROVENANCE, "alpha": alpha},
        **more,
    )


def load_adapter(directory: Path):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        return PeftModel.from_pretrained(make_model(), directory).eval()


def test_full_weights_load_with_transformers(tmp_path) -> None:
    model = make_model(3)
    directory = save(tmp_path, model, "full")
    loaded = AutoModelForCausalLM.from_pretrained(directory, use_safetensors=True).eval()
    assert torch.equal(logits(loaded), logits(model))
    names = {path.name for path in directory.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "retain.json"} <= names


def test_an_adapter_loads_with_peft(tmp_path) -> None:
    model = make_adapted()
    directory = save(tmp_path, model, "adapter")
    assert torch.equal(logits(load_adapter(directory)), logits(model))
    names = {path.name for path in directory.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "retain.json"} <= names
    assert "README.md" not in names
    assert not any("embed" in name for name in load_file(directory / "adapter_model.safetensors"))


def test_an_adapter_inside_the_line_loads_scaled(tmp_path) -> None:
    model = make_adapted()
    with Interpolation.of_adapter(model) as line:
        line.set(0.4)
        at_point = logits(model)
        directory = save(tmp_path, model, "adapter", alpha=0.4)
    assert torch.equal(logits(load_adapter(directory)), at_point)
    assert not torch.equal(logits(model), at_point)
    assert load_provenance(directory)["alpha"] == 0.4


def test_a_merged_model_is_published_as_full_weights(tmp_path) -> None:
    merged = merge_adapter(make_adapted())
    directory = save(tmp_path, merged, "full")
    loaded = AutoModelForCausalLM.from_pretrained(directory).eval()
    assert torch.equal(logits(loaded), logits(merged))


def test_the_template_in_force_is_published_and_the_tokenizer_stays_as_it_was(tmp_path) -> None:
    tokenizer = make_tokenizer()
    directory = save_artifact(
        tmp_path / "a",
        make_model(),
        tokenizer,
        kind="full",
        provenance={**PROVENANCE, "alpha": 1.0},
        chat_template=PLAIN_TEMPLATE,
    )
    assert tokenizer.chat_template is None
    assert AutoTokenizer.from_pretrained(directory).chat_template == PLAIN_TEMPLATE


def test_the_record_names_job_base_and_files_and_finds_damage(tmp_path) -> None:
    directory = save(tmp_path, make_model(), "full")
    record = load_provenance(directory)
    assert {key: record[key] for key in PROVENANCE} == PROVENANCE
    assert (record["kind"], record["alpha"]) == ("full", 1.0)
    assert set(record["files"]) == {p.name for p in directory.iterdir()} - {"retain.json"}
    weights = directory / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    with pytest.raises(TrainingFailed, match=r"model\.safetensors not as recorded") as caught:
        load_provenance(directory)
    assert caught.value.code == "damaged_artifact"


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_no_file_holds_a_path_of_this_machine_or_anything_but_data(tmp_path, kind) -> None:
    base = tmp_path / "where-the-base-lies"
    make_model().save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    if kind == "adapter":
        model = make_adapted()
        model.peft_config["default"].base_model_name_or_path = str(base)
    directory = save_artifact(
        tmp_path / "a",
        model,
        AutoTokenizer.from_pretrained(base),
        kind=kind,
        provenance={**PROVENANCE, "alpha": 1.0},
    )
    for path in directory.iterdir():
        assert b"where-the-base-lies" not in path.read_bytes(), path.name
        assert path.suffix in {".json", ".safetensors", ".jinja"}
    if kind == "adapter":
        config = json.loads((directory / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "tiny"


def test_an_artifact_is_replaced_whole(tmp_path) -> None:
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact/old.bin").write_text("left over")
    (tmp_path / ".artifact.partial").mkdir()
    directory = save(tmp_path, make_model(), "full")
    assert [p.name for p in tmp_path.iterdir()] == ["artifact"]
    assert not (directory / "old.bin").exists()


def test_a_file_that_is_no_data_is_refused(tmp_path) -> None:
    class Odd:
        def save_pretrained(self, directory: Path) -> None:
            (directory / "pytorch_model.bin").write_bytes(b"x")

    with pytest.raises(TrainingFailed, match=r"unexpected files pytorch_model\.bin") as caught:
        save(tmp_path, Odd(), "full")
    assert caught.value.code == "export_failed"
    assert not (tmp_path / "artifact").exists()
