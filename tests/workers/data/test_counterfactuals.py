"""Rule-based rewordings, the filters of counterparts, and the store made of them."""

import json

import numpy as np
import pytest

from app.domain.rows import parse_row
from app.domain.runplan import RowsPlan
from app.errors import BadRequest
from tests.tiny import make_tokenizer
from workers.data.counterfactuals import (
    Maker,
    answers,
    load_pairs,
    question_parts,
    refusal,
    rule_maker,
    uploaded_maker,
    with_question,
)
from workers.data.rewording import swap_entities, swap_numbers, swap_register
from workers.data.tokens import load_tokens


def rng(seed=0):
    return np.random.Generator(np.random.PCG64(seed))


def completion(prompt, answer, **more):
    return parse_row(json.dumps({"prompt": prompt, "completion": answer, **more}), line_number=1)


def chat(question, answer, *, system="Be brief."):
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]
    return parse_row(json.dumps({"messages": messages}), line_number=1)


# --- rules


def test_a_name_becomes_the_same_other_name_all_over_the_row():
    (first, second) = swap_entities()(
        ["Anna met Boris.", "ANNA's friend saw Anna."], ["a friend"], rng()
    )
    assert "Anna" not in first + second
    assert "Boris" not in first
    name = first.split()[0]
    assert second == f"{name.upper()}'s friend saw {name}."
    assert name[0] in "AEIO"  # an article before it still fits
    assert first.split()[-1] != f"{name}."


def test_a_name_that_an_answer_repeats_stays():
    (text,) = swap_entities()(["Anna met Boris and Ivan."], ["It was Boris."], rng())
    assert "Boris" in text
    assert "Anna" not in text
    assert "Ivan" not in text


def test_words_of_a_group_stand_for_one_another_in_any_case_and_keep_it():
    rule = swap_entities([["phone", "router", "tablet"]])
    for seed in range(8):
        (text,) = rule(["The Phone and the router"], ["repair"], rng(seed))
        assert text == "The Tablet and the router" or text == "The Phone and the tablet"


def test_built_in_names_are_no_ordinary_words_and_parts_of_words_are_left_alone():
    same = ["paul and anna as words, Annapolis, Davidson"]
    assert swap_entities()(same, [""], rng()) == same


def test_numbers_keep_their_digits_and_their_places_and_are_consistent():
    for seed in range(10):
        (text,) = swap_numbers(["ticket 482 costs 7.50, ticket 482 again"], ["repair"], rng(seed))
        first, price, again = (text.split()[k].rstrip(",") for k in (1, 3, 5))
        assert first == again != "482"
        assert len(first) == 3
        assert first[0] != "0"
        assert len(price.split(".")[1]) == 2


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("ticket 482 is open", "close 482"),  # it occurs in the answer
        ("take 3 and 4", "7"),  # it may be computed
        ("take 3 and 4", "seven"),
        ("Is 17 larger than 12?", "yes"),
        ("Is 17 prime?", "yes"),
        ("What is 3+4, in words?", "a lot"),
        ("What happened when the 30 came?", "it rained"),
        ("the plan of 12/05/2024 and item 007", "kept"),
    ],
)
def test_a_number_that_the_answer_may_depend_on_stays(question, answer):
    assert swap_numbers([question], [answer], rng()) == [question]


def test_register_changes_the_tone_and_nothing_else():
    texts = {swap_register(["I do not know what is wrong."], ["help"], rng(s))[0] for s in range(9)}
    assert texts == {"I don't know what's wrong."}
    assert swap_register(["Please list them."], [""], rng()) == ["List them."]
    assert swap_register(["List them."], [""], rng()) == ["Please list them."]
    assert swap_register(["He says you are."], [""], rng()) == ["He says you are."]
    kept = ["Repeat: we do not know."]
    assert swap_register(kept, ["we do not know."], rng()) == kept


def test_a_seed_and_a_line_decide_the_rewording_alone():
    rows = [completion(f"Anna saw Boris, {word}", "fine") for word in ("a", "b", "c")]
    whole = rule_maker(["entities"], [], 7).propose(rows, [1, 2, 3])
    alone = rule_maker(["entities"], [], 7).propose(rows[2:], [3])
    assert alone[0] == whole[2]
    seeds = {
        question_parts(rule_maker(["entities"], [], s).propose(rows[:1], [1])[0][0])[0]
        for s in range(9)
    }
    assert len(seeds) > 3


def test_plain_text_has_no_question_and_so_no_counterpart():
    row = parse_row('{"text": "Anna saw Boris"}', line_number=1)
    assert question_parts(row) == []
    assert rule_maker(["entities"], [], 0).propose([row], [1]) == [[]]


# --- filters


@pytest.mark.parametrize(
    ("question", "other", "why"),
    [
        ("Does the lamp work well?", "Does that lamp work well?", None),
        ("Does the lamp work?", "Does  the lamp\nwork?", "duplicate"),
        ("Does the lamp work?", "Lamp ok?", "length"),
        ("Lamp ok?", "Does the lamp work, and how well does it?", "length"),
        ("The lamp works.", "The lamp never works.", "negation"),
        ("It doesn't work.", "It does not work.", None),
        ("It does not work.", "It does work now.", "negation"),
        ("Does the lamp work?", "Работает ли лампа?", "script"),
    ],
)
def test_why_a_generated_proposal_is_refused(question, other, why):
    row = completion(question, "yes")
    assert refusal(row, completion(other, "yes"), is_generated=True) == why
    if why in ("negation", "script"):  # whoever uploads a pair answers for it
        assert refusal(row, completion(other, "yes"), is_generated=False) is None


def test_an_answer_is_preserved_verbatim_also_where_the_question_quotes_it():
    row = completion("Which is red, the rose or the lily?", "the rose")
    assert (
        refusal(
            row, completion("Which is red, the lily or the rose?", "the rose"), is_generated=True
        )
        is None
    )
    assert (
        refusal(row, completion("Which is red, a rose or the lily?", "the rose"), is_generated=True)
        == "answer"
    )
    assert (
        refusal(row, completion("What is red, the rose or the lily?", "a rose"), is_generated=False)
        == "answer"
    )


def test_numbers_are_kept_where_asked():
    left, right = completion("ticket 4 is open now", "x"), completion("ticket 5 is open now", "x")
    assert refusal(left, right, is_generated=True) is None
    assert refusal(left, right, is_generated=True, keeps_numbers=True) == "numbers"


def test_turns_that_are_not_learned_are_replaced_and_no_others():
    row = chat("Where is Anna?", "At home.")
    other = with_question(row, ["Be kind.", "Where is Ivan?"])
    assert question_parts(other) == ["Be kind.", "Where is Ivan?"]
    assert answers(other) == answers(row) == ["At home."]


# --- the store


def write(directory, lines):
    path = directory / "rows.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return RowsPlan(path=str(path), sha256=f"{len(lines):064d}")


def make_pairs(directory, rows, maker, *, length=200):
    tokenizer = make_tokenizer()
    options = {"chat_template": None, "max_seq_length": length, "cache_directory": directory}
    training = load_tokens(rows, tokenizer, **options)
    return training, load_pairs(rows, training, tokenizer, maker, **options), tokenizer


LINES = [
    {"prompt": "Anna saw Boris. Mood: ", "completion": "fine"},
    {"prompt": "Nobody came. Mood: ", "completion": "sad"},
    {"prompt": "Ivan slept. Mood: ", "completion": "fine"},
]


def test_counterparts_lie_in_a_store_of_their_own_with_the_same_targets(tmp_path):
    rows = write(tmp_path, LINES)
    training, pairs, tokenizer = make_pairs(tmp_path, rows, rule_maker(["entities"], [], 3))
    assert pairs.row_of.tolist() == [0, -1, 1]
    assert pairs.store.lines.tolist() == [1, 3]
    for row, other in ((0, 0), (2, 1)):
        ids, weights = training.row(row)
        other_ids, other_weights = pairs.store.row(other)
        assert ids[weights > 0].tolist() == other_ids[other_weights > 0].tolist()
        assert tokenizer.decode(ids) != tokenizer.decode(other_ids)


def test_the_cache_gives_the_same_pairs_and_a_new_seed_others(tmp_path):
    rows = write(tmp_path, LINES)
    calls = []

    def counting(seed):
        maker = rule_maker(["entities"], [], seed)

        def propose(own, lines):
            calls.append(len(own))
            return maker.propose(own, lines)

        return Maker(maker.key, propose)

    _, first, _ = make_pairs(tmp_path, rows, counting(3))
    _, again, _ = make_pairs(tmp_path, rows, counting(3))
    assert len(calls) == 1
    assert again.digest == first.digest
    assert again.row_of.tolist() == first.row_of.tolist()
    assert again.store.input_ids.tolist() == first.store.input_ids.tolist()
    _, other, _ = make_pairs(tmp_path, rows, counting(4))
    assert other.digest != first.digest
    assert len(calls) == 2


def test_uploaded_counterparts_are_taken_where_they_keep_the_answer(tmp_path):
    lines = [
        {**LINES[0], "counterfactual": {"prompt": "Boris was seen. Mood: ", "completion": "fine"}},
        {**LINES[1], "counterfactual": {"prompt": "Everyone came. Mood: ", "completion": "glad"}},
        {**LINES[2], "domain": "nights"},
    ]
    rows = write(tmp_path, lines)
    training, pairs, tokenizer = make_pairs(tmp_path, rows, uploaded_maker())
    assert pairs.row_of.tolist() == [0, -1, -1]
    assert dict(pairs.refused) == {"answer": 1}
    assert "Boris was seen" in tokenizer.decode(pairs.store.row(0)[0])
    assert training.environments == ("", "", "nights")


def test_a_counterpart_whose_answer_is_cut_off_is_refused(tmp_path):
    lines = [
        {
            "prompt": "a b: ",
            "completion": "done",
            "counterfactual": {"prompt": "a bcd: ", "completion": "done"},
        }
    ]
    rows = write(tmp_path, lines)
    _, pairs, _ = make_pairs(tmp_path, rows, uploaded_maker(), length=11)
    assert pairs.row_of.tolist() == [-1]
    assert dict(pairs.refused) == {"answer": 1}


def test_rows_without_a_domain_have_no_environments(tmp_path):
    training, _, _ = make_pairs(tmp_path, write(tmp_path, LINES), uploaded_maker())
    assert training.environments == ()


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"counterfactual": {"prompt": "b"}}, "counterfactual.completion: Field required"),
        ({"counterfactual": {"text": "b"}}, "counterfactual.prompt: Field required"),
        (
            {"counterfactual": {"prompt": "b", "completion": "c", "domain": "x"}},
            "counterfactual.domain: Extra",
        ),
        ({"domain": "x" * 65}, "domain: String should have at most 64"),
        ({"domain": 3}, "domain: Input should be a valid string"),
        ({"domain": ""}, "domain: String should have at least 1"),
    ],
)
def test_bad_optional_keys_name_their_path(more, text):
    with pytest.raises(BadRequest, match="line 1") as caught:
        completion("a", "b", **more)
    assert text in str(caught.value)
