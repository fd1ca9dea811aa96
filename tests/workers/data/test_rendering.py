"""Rendering: rows and questions look alike, masks follow prefixes, and bad templates are named."""

import json
from pathlib import Path

import pytest

from app.domain.conversations import ChatRow
from app.domain.rows import parse_row
from app.errors import TrainingFailed
from tests.tiny import PLAIN_TEMPLATE, make_tokenizer
from workers.data.masks import Encoder
from workers.data.rendering import DEFAULT_CHAT_TEMPLATE, Renderer
from workers.data.templates import MAX_TEMPLATE_BYTES, ChatTemplate

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {"built-in": DEFAULT_CHAT_TEMPLATE, "plain": PLAIN_TEMPLATE, "chatml": CHATML}
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3+3? "},
    {"role": "assistant", "content": "six, that is 6"},
]


def row_of(*turns, **more):
    return parse_row(json.dumps({"messages": turns, **more}), line_number=1)


def learned(rendered) -> list[str]:
    return [rendered.text[span.start : span.end] for span in rendered.spans]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_every_learned_turn_is_a_span_of_the_whole(template) -> None:
    rendered = Renderer(make_tokenizer(), chat_template=template).render_row(row_of(*TURNS))
    first, second = learned(rendered)
    assert first.strip().startswith("4")
    assert second.strip().startswith("six, that is 6")
    assert all("2+2" not in text and "3+3" not in text for text in (first, second))


def test_the_built_in_template_reads_as_written_in_its_documentation() -> None:
    rendered = Renderer(make_tokenizer(), chat_template=DEFAULT_CHAT_TEMPLATE).render_row(
        row_of(*TURNS)
    )
    assert rendered.text == (
        "<s>System: Be brief.\nUser: 2+2?\nAssistant: 4</s>\n"
        "User: And 3+3? \nAssistant: six, that is 6</s>"
    )
    assert learned(rendered) == [" 4</s>", " six, that is 6</s>"]


def test_weight_zero_takes_a_turn_out() -> None:
    turns = [*TURNS[:2], {**TURNS[2], "weight": 0}, *TURNS[3:]]
    rendered = Renderer(make_tokenizer(), chat_template=PLAIN_TEMPLATE).render_row(row_of(*turns))
    assert learned(rendered) == ["six, that is 6<|end|>"]


def test_tools_and_calls_reach_the_template_as_objects() -> None:
    call = {"function": {"name": "add", "arguments": '{"a": 2}'}}
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    rendered = Renderer(make_tokenizer(), chat_template=DEFAULT_CHAT_TEMPLATE).render_row(
        row_of(
            TURNS[1],
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "4"},
            TURNS[2],
            tools=tools,
        )
    )
    head, tail = learned(rendered)
    assert '"arguments": {"a": 2}' in head
    assert tail == " 4</s>"
    assert rendered.text.startswith('<s>Tools: [{"type": "function"')
    assert "\nTool: 4\n" in rendered.text


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_question_is_the_start_of_the_row_that_answers_it(template) -> None:
    renderer = Renderer(make_tokenizer(), chat_template=template)
    row = renderer.render_row(row_of(TURNS[1], TURNS[2]))
    (prompt,) = renderer.render_questions([TURNS[1]["content"]])
    frame = renderer.answer_frame(TURNS[1]["content"])
    assert row.text == prompt + frame.lead + "4" + frame.tail
    assert learned(row) == [frame.lead + "4" + frame.tail]


def test_verbatim_rows_are_not_templated() -> None:
    renderer = Renderer(make_tokenizer(), chat_template=None)
    pair = renderer.render_row(parse_row('{"prompt": "a ", "completion": "b"}', line_number=1))
    assert (pair.text, learned(pair), pair.is_verbatim) == ("a b", ["b"], True)
    text = renderer.render_row(parse_row('{"text": "abc"}', line_number=1))
    assert (text.text, learned(text), text.is_verbatim) == ("abc", ["abc"], True)


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ messages|length }}{% for m in messages %}{{ m.content }}{% endfor %}", "renders the"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}{{ raise_exception('no') }}", "no"),
        ("{% for m in messages %}", "Unexpected end of template"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("x" * (MAX_TEMPLATE_BYTES + 1), "larger than 262,144 bytes"),
    ],
)
def test_an_unusable_template_is_named(template, problem) -> None:
    with pytest.raises(TrainingFailed) as caught:
        Renderer(make_tokenizer(), chat_template=template).render_row(row_of(*TURNS))
    assert caught.value.code == "unusable_template"
    assert "the given chat template can't be used" in str(caught.value)
    assert problem in str(caught.value)


def test_a_tokenizer_without_a_template_is_refused_for_chats() -> None:
    with pytest.raises(TrainingFailed, match="the tokenizer has none") as caught:
        Renderer(make_tokenizer(), chat_template=None).render_row(row_of(*TURNS))
    assert caught.value.param == "training_file"


def test_a_template_that_never_ends_is_stopped(monkeypatch) -> None:
    monkeypatch.setattr("workers.data.templates.MAX_CPU_SECONDS", 0.2)
    loops = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"
    with pytest.raises(TrainingFailed, match=r"longer than 0\.2 s of CPU time"):
        ChatTemplate(make_tokenizer(), loops, param="x").render([])


def test_a_template_that_does_not_lead_to_its_answer_is_refused() -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    with pytest.raises(TrainingFailed, match="doesn't start with its generation prompt"):
        Renderer(make_tokenizer(), chat_template=template).answer_frame("q")


DATA = Path(__file__).parents[4] / "shared" / "data"


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data sets are not here")
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_real_rows_are_masked_to_their_answers(template) -> None:
    tokenizer = make_tokenizer()
    lines = (DATA / "domains/medical_medquad/validation.jsonl").read_text().splitlines()[:50]
    rows = [parse_row(line, line_number=i) for i, line in enumerate(lines, start=1)]
    renderer = Renderer(tokenizer, chat_template=template)
    encoded = Encoder(tokenizer).encode([renderer.render_row(row) for row in rows])
    for row, (ids, weights) in zip(rows, encoded, strict=True):
        assert isinstance(row, ChatRow)
        text = tokenizer.decode(ids[weights > 0], skip_special_tokens=True)
        assert text.replace("<|im_end|>", "").strip() == str(row.messages[-1].content).strip()
