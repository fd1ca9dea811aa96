"""Back-translation: tiny translators made on the spot, and which of several proposals is kept."""

import json

import numpy as np
import pytest
import torch

from app.domain.configs.causal import CausalConfig
from app.domain.rows import parse_row
from app.domain.runplan import RowsPlan
from app.errors import TrainingFailed
from tests.tiny import make_tokenizer
from tests.workers.training.rows import make_supervisor
from tests.workers.training.runs import make_plan, make_run
from workers.data.back_translation import (
    BackTranslator,
    Translator,
    back_translation_maker,
    directory_sha256,
)
from workers.data.counterfactuals import load_pairs
from workers.data.tokens import load_tokens
from workers.training.pairs import row_nats

CPU = torch.device("cpu")


def make_t5(directory, seed):
    """A random two-layer T5 over bytes, saved as safetensors with its tokenizer."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=300,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = T5ForConditionalGeneration(config)
    model.generation_config.decoder_start_token_id = 0
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("translators")
    return make_t5(root / "there", 1), make_t5(root / "back", 2)


def completion(prompt, answer, line=1):
    return parse_row(json.dumps({"prompt": prompt, "completion": answer}), line_number=line)


def translator_of(directories, *, candidates=3, seed=0):
    there, back = (Translator(directory, CPU) for directory in directories)
    return BackTranslator(there, back, candidates=candidates, top_p=0.9, seed=seed)


def test_a_translator_gives_as_many_texts_as_asked_for_and_skips_what_is_too_long(directories):
    translator = Translator(directories[0], CPU)
    found = translator.translate(
        ["a lamp", "x" * 600, "two lamps"], do_sample=False, num_beams=3, num_return_sequences=2
    )
    assert [len(texts) for texts in found] == [2, 0, 2]
    assert found[0] != found[2]


def test_questions_go_there_and_back_and_answers_never_do(directories):
    rows = [completion("where is it? ", "here"), completion("and now? ", "there")]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = translator_of(directories).propose(rows, [1, 2])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(
        other.completion == row.completion
        for row, others in zip(rows, first, strict=True)
        for other in others
    )
    assert all(1 <= len(others) <= 3 for others in first)
    assert translator_of(directories).propose(rows, [1, 2]) == first
    assert translator_of(directories, seed=1).propose(rows, [1, 2]) != first


def test_of_a_chat_the_users_turns_alone_are_translated(directories):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "Here."},
    ]
    row = parse_row(json.dumps({"messages": messages}), line_number=1)
    (others,) = translator_of(directories).propose([row], [1])
    for other in others:
        texts = [m.content for m in other.messages]
        assert texts[0] == "Be brief."
        assert texts[1] != "Where?"
        assert texts[2] == "Here."


def test_a_directory_that_holds_no_translator_is_refused(tmp_path):
    with pytest.raises(TrainingFailed, match="no sequence-to-sequence model") as caught:
        Translator(str(tmp_path), CPU)
    assert caught.value.code == "bad_translator"


# --- which proposal is kept

QUESTIONS = ("the red stone is here? ", "a blue lamp by the river? ", "no 4 clouds today? ")
PROPOSALS = {
    QUESTIONS[0]: [
        "here is the red stone? ",
        "is here a stone that is red? ",
        "zqx red vvk stone jjw?? ",
        "the red stone is not here? ",  # its label may have changed
    ],
    QUESTIONS[1]: ["by the river, a lamp of blue? ", "x", "a blue lamp by the river? "],
    QUESTIONS[2]: ["no 7 clouds today? "],  # another number
}


class Scripted(BackTranslator):
    """Stands for two translators."""

    def __init__(self):
        pass

    def propose(self, rows, lines):
        return [
            [row.model_copy(update={"prompt": p}) for p in PROPOSALS[row.prompt]] for row in rows
        ]


def test_the_proposal_that_keeps_the_answer_and_is_hardest_for_the_base_is_kept(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [{"prompt": q, "completion": "yes"} for q in QUESTIONS]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    rows = RowsPlan(path=str(path), sha256="7" * 64)
    run = make_run(make_plan(tmp_path))
    tokenizer = make_tokenizer()
    options = {"chat_template": None, "max_seq_length": 200, "cache_directory": tmp_path}
    training = load_tokens(rows, tokenizer, **options)
    maker = back_translation_maker(Scripted, row_nats(run), key=["scripted"])
    pairs = load_pairs(rows, training, tokenizer, maker, **options)

    def loss_by_transformers(prompt):
        """Mean loss of the answer's tokens, by the model's own loss on labels."""
        ids = tokenizer(prompt + "yes")["input_ids"] + [tokenizer.eos_token_id]
        labels = [-100] * len(tokenizer(prompt)["input_ids"]) + ids[-4:]
        with torch.no_grad():
            out = run.model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels]))
        return float(out.loss)

    losses = [loss_by_transformers(p) for p in PROPOSALS[QUESTIONS[0]][:3]]
    assert max(losses) - min(losses) > 1e-4
    assert pairs.row_of.tolist() == [0, 1, -1]
    kept = tokenizer.decode(pairs.store.row(0)[0], skip_special_tokens=True)
    assert kept == PROPOSALS[QUESTIONS[0]][int(np.argmax(losses))] + "yes"
    only = tokenizer.decode(pairs.store.row(1)[0], skip_special_tokens=True)
    assert only == PROPOSALS[QUESTIONS[1]][0] + "yes"
    assert dict(pairs.refused) == {"negation": 1, "length": 1, "duplicate": 1, "numbers": 1}


def test_rows_are_scored_as_transformers_scores_them(tmp_path):
    run = make_run(make_plan(tmp_path))
    rows = [run.stores["training"].row(index) for index in range(5)]
    found = row_nats(run)(rows)
    for (ids, token_weights), nats in zip(rows, found, strict=True):
        labels = torch.from_numpy(np.where(token_weights > 0, ids, -100).astype("int64"))
        with torch.no_grad():
            out = run.model(
                input_ids=torch.from_numpy(ids.astype("int64"))[None], labels=labels[None]
            )
        assert nats == pytest.approx(float(out.loss), rel=1e-5)


def test_a_model_is_known_by_its_files(directories):
    there, back = directories
    assert directory_sha256(there) == directory_sha256(there) != directory_sha256(back)


def test_a_job_reads_its_translators_from_the_plan(tmp_path, directories):
    lines = [{"prompt": f"where is {k}? ", "completion": "here"} for k in range(12)]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    models = {"forward": "there", "backward": "back", "candidates": 2}
    config = CausalConfig(
        pairs="back_translation", back_translation=models, vrex_beta=1.0, min_rows_per_env=2
    )
    assert config.named_models() == (
        ("back_translation.forward", "there"),
        ("back_translation.backward", "back"),
    )
    supervisor = make_supervisor(
        tmp_path,
        with_suite=False,
        strategies=(config,),
        training={"total_steps": 1},
        training_rows=RowsPlan(path=str(path), sha256="8" * 64),
        models=dict(zip(("there", "back"), directories, strict=True)),
    )
    code = supervisor.run_here()
    (told,) = [m for m in supervisor.of("note") if m.code == "counterfactual_pairs"]
    # Random translators write no sentences: what passes is a counterpart, and the rest was counted.
    assert told.data["rows"] == 12
    assert told.data["pairs"] + sum(told.data["refused"].values()) >= 12
    assert (code == 0) == (told.data["pairs"] > 0)
