"""The demo's base model: its questions, its files, its tokenizer, and a few steps of its training."""

import json
import re
from random import Random

import pytest

from app.domain.benchmarks import Scorer, split_items
from app.domain.rows import check_items, check_rows
from workers.demo_model.__main__ import main
from workers.demo_model.domains import DOMAINS, draw_note
from workers.demo_model.skills import GENERATORS, SEEN, UNSEEN, Question, Questions, Sample
from workers.demo_model.writing import draw_all, is_complete, write_lines

SEED = 3


@pytest.fixture(scope="module")
def drawn():
    """Samples and files of one seed."""
    return draw_all(SEED)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A directory built with a handful of steps."""
    out = tmp_path_factory.mktemp("demo") / "out"
    assert main([str(out), "--seed", str(SEED), "--steps", "3"]) == 0
    return out


PATTERNS = {
    "arithmetic": r"\w+ has \d+ \w+ and (gets \d+ more \. total|eats \d+ \. left)",
    "category": r"\w+ \w+ the \w+ \w+ at the \w+ \. kind",
    "agreement": r"the \w+ \w+ near the \w+ : \w+ or \w+",
    "sentiment": r"\w+ said the \w+ was (not )?\w+ \w+ \. mood",
    "sequence": r"the \w+ \w+ \w+ (\w+ ){3}then",
    "copy": r"\w+ says \w \w \w \. repeat",
    "comparison": r"\w+ has \d+ and \d+ \. (larger|smaller)",
}


def _skills(prompt):
    """The skills that a prompt may ask for."""
    return [skill for skill, pattern in PATTERNS.items() if re.fullmatch(pattern, prompt)]


def _prompt(line):
    return line["question"] if "question" in line else line["messages"][0]["content"]


def test_the_same_seed_draws_the_same_and_another_draws_other_things(drawn):
    assert draw_all(SEED) == drawn
    assert draw_all(SEED + 1)[1]["general.jsonl"] != drawn[1]["general.jsonl"]


def test_no_prompt_of_a_benchmark_is_in_the_general_rows_or_in_pretraining(drawn):
    samples, files = drawn
    asked = {
        _prompt(line)
        for name in ("multiple_choice", "exact_match", "nll")
        for line in files[f"benchmarks/{name}.jsonl"]
    }
    assert asked.isdisjoint(_prompt(line) for line in files["general.jsonl"])
    assert asked.isdisjoint(sample.prompt for sample in samples)


def test_domain_rows_and_items_are_apart(drawn):
    _, files = drawn
    for domain in DOMAINS:
        prompts = [
            _prompt(line)
            for path in (
                f"{domain.name}/train.jsonl",
                f"{domain.name}/validation.jsonl",
                f"benchmarks/{domain.name}_exact_match.jsonl",
            )
            for line in files[path]
        ]
        assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize("skill", list(GENERATORS))
def test_a_prompt_tells_its_skill(skill):
    for question in Questions(Random(0)).draw(skill, 300):
        assert _skills(question.prompt) == [skill]


def test_general_rows_show_seen_skills_alone(drawn):
    _, files = drawn
    found = {skill for line in files["general.jsonl"] for skill in _skills(_prompt(line))}
    assert found == set(SEEN)
    assert set(SEEN) | set(UNSEEN) == set(GENERATORS)
    assert UNSEEN


def test_cue_words_of_unseen_skills_occur_in_the_general_rows(drawn):
    """Numbers and single letters aside, nothing a held-out skill is told by is left without a row."""
    _, files = drawn
    general = {word for line in files["general.jsonl"] for word in _prompt(line).split()}
    questions = Questions(Random(1))
    words = {
        word for skill in UNSEEN for q in questions.draw(skill, 300) for word in q.prompt.split()
    }
    assert {word for word in words if word.isalpha() and len(word) > 1} <= general


def test_halves_are_large_enough_and_ids_tell_the_group(drawn):
    _, files = drawn
    for name in ("multiple_choice", "exact_match", "nll"):
        lines = files[f"benchmarks/{name}.jsonl"]
        gate, report = split_items([line["id"] for line in lines], 2000)
        assert len(gate) == 2000
        assert len(report) >= 2000
        assert sum(lines[i]["id"].startswith("unseen-") for i in report) >= 1000
        for line in lines:
            group = "seen" if line["subject"] in SEEN else "unseen"
            assert line["id"].startswith(f"{group}-{line['subject']}-")


def test_the_server_accepts_every_file(drawn, tmp_path):
    _, files = drawn
    for path, lines in files.items():
        write_lines(tmp_path / path, lines)
        with (tmp_path / path).open("rb") as file:
            if path.startswith("benchmarks/"):
                scorer = next(s for s in Scorer if path.endswith(f"{s}.jsonl"))
                report = check_items(file, scorer)
                if scorer is Scorer.MULTIPLE_CHOICE:
                    assert 0.25 <= report.chance_level <= 0.5
            else:
                assert check_rows(file).num_rows == len(lines)


@pytest.mark.parametrize("skill", list(GENERATORS))
def test_an_answer_is_among_different_choices(skill):
    for question in Questions(Random(4)).draw(skill, 300):
        assert question.answer in question.choices
        assert len(set(question.choices)) == len(question.choices)
        assert question.skill == skill


@pytest.mark.parametrize("skill", ["arithmetic", "comparison", "copy", "agreement", "sentiment"])
def test_answers_are_right(skill):
    for question in Questions(Random(5)).draw(skill, 300):
        assert question.answer == _solve(question)


def _solve(question: Question) -> str:
    words = question.prompt.split()
    numbers = [int(word) for word in words if word.isdigit()]
    match question.skill:
        case "arithmetic":
            return str(sum(numbers) if words[-1] == "total" else numbers[0] - numbers[1])
        case "comparison":
            return str(max(numbers) if words[-1] == "larger" else min(numbers))
        case "copy":
            return " ".join(words[2:5])
        case "agreement":
            is_plural = words[2].endswith("s")
            return next(form for form in (words[-3], words[-1]) if form.endswith("s") != is_plural)
        case _:
            good = {"good", "great", "fine", "nice", "fresh", "tasty"}
            return "happy" if bool(good & set(words)) != ("not" in words) else "angry"


def test_too_few_prompts_are_an_error_and_no_endless_search():
    questions = Questions(Random(6), tries=2)
    with pytest.raises(RuntimeError, match="agreement: only"):
        questions.draw("agreement", 12_000)  # there are 11,520


def test_notes_never_put_a_label_beside_a_phrase():
    rng = Random(7)
    for _ in range(500):
        note = draw_note(rng)
        for domain in DOMAINS:
            labels = [label for label in domain.phrases if note.endswith(f"about {label}")]
            assert not (
                labels and any(p in note for phrases in domain.phrases.values() for p in phrases)
            )


def test_build_writes_what_demo_json_says_in_transformers_layout(built):
    described = json.loads((built / "demo.json").read_text())
    assert (built / described["model"] / "model.safetensors").is_file()
    assert not list(built.rglob("*.bin"))
    for path in described["files"]:
        assert (built / path).is_file()
    named = [b["file"] for b in described["benchmarks"]]
    named += [b["file"] for d in described["domains"].values() for b in d["benchmarks"]]
    assert set(named) <= set(described["files"])
    assert is_complete(built, SEED, 3)
    assert not is_complete(built, SEED, 4)
    assert not is_complete(built, SEED + 1, 3)


def test_a_second_build_does_nothing_and_a_damaged_one_is_made_again(built, capsys):
    before = (built / "demo.json").stat().st_mtime_ns
    assert main([str(built), "--seed", str(SEED), "--steps", "3"]) == 0
    assert (built / "demo.json").stat().st_mtime_ns == before
    first = (built / "model" / "model.safetensors").read_bytes()
    (built / "general.jsonl").write_text("{}\n")
    assert not is_complete(built, SEED, 3)
    assert main([str(built), "--seed", str(SEED), "--steps", "3"]) == 0
    assert is_complete(built, SEED, 3)
    assert (built / "model" / "model.safetensors").read_bytes() == first
    assert [p.name for p in built.parent.iterdir()] == ["out"]
    assert "step 3/3" in capsys.readouterr().out


def test_a_directory_with_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    assert main([str(tmp_path)]) == 2
    assert "something else" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_word_is_one_token_at_the_start_of_an_answer_and_in_a_prompt(built):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(built / "model")
    turns = [{"role": "user", "content": "ann says q w e . repeat"}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    turns.append({"role": "assistant", "content": "q w e"})
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert ids[: len(head)] == head
    assert ids[len(head) : -1] == ids[3:6]
    assert ids[-1] == tokenizer.eos_token_id
    for answer in ("29", "happy", "repair", "bird", "runs"):
        assert len(tokenizer(answer)["input_ids"]) == 1


def test_the_loss_falls_and_follows_from_the_seed():
    import torch

    from workers.demo_model import pretraining

    questions = Questions(Random(8))
    samples = [Sample(q.prompt, q.answer) for q in questions.draw("category", 200)]

    def train(seed: int, num_steps: int) -> tuple[list[float], "torch.Tensor"]:
        losses: list[float] = []
        model, _ = pretraining.pretrain(
            samples, seed, lambda _step, _steps, loss, _s: losses.append(loss), num_steps=num_steps
        )
        return losses, model.get_input_embeddings().weight.detach()

    assert train(0, 25)[0][-1] < 6.0 < train(0, 1)[0][0]
    first, weights = train(0, 3)
    again, same = train(0, 3)
    assert first == again
    assert torch.equal(weights, same)
    assert not torch.equal(weights, train(1, 3)[1])


def test_label_words_of_a_domain_are_its_choices():
    rng = Random(9)
    for domain in DOMAINS:
        question = domain.draw(rng)
        assert set(question.choices) == set(domain.phrases)
        assert any(phrase in question.prompt for phrase in domain.phrases[question.answer])


def test_sizes_of_the_model():
    from workers.demo_model import pretraining

    tokenizer = pretraining.train_tokenizer(["ann says q w e . repeat"] * 10)
    model = pretraining.build_model(tokenizer, 0)
    assert sum(p.numel() for p in model.parameters()) == 172_352
    assert model.config.tie_word_embeddings
