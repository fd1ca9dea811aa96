"""Rows and benchmark items as text: one piece of code renders both, so that what is scored looks like what is learned.

A chat row is rendered by the chat template in force: the base model's own, else the built-in plain one. A
benchmark question is a user turn followed by the generation prompt, and a choice or answer is the assistant
turn. `prompt`/`completion` rows are taken verbatim, `completion` closed by the end-of-text token: whoever
writes prompts does so in the format of the model. `text` rows are closed by it too and learned whole.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from app.domain.conversations import ChatRow, Message, PreferenceRow
from app.domain.rows import CompletionRow, Row
from workers.data.templates import DEFAULT_CHAT_TEMPLATE, UNUSABLE_TEMPLATE, ChatTemplate

__all__ = ["DEFAULT_CHAT_TEMPLATE", "UNUSABLE_TEMPLATE", "Rendered", "Renderer", "Span"]

_PROBE_ANSWER: Final = "qxj"


class Span(NamedTuple):
    """Characters `start` to `end` (exclusive) of a rendered text, all in the loss."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Rendered:
    """A row as text. `spans` are disjoint and in order; a verbatim text gets the tokenizer's own frame."""

    text: str
    spans: tuple[Span, ...]
    is_verbatim: bool


class Frame(NamedTuple):
    """What stands around a single answer: between generation prompt and answer, and after the answer."""

    lead: str
    tail: str


class Renderer:
    """Renders rows and questions for one tokenizer and chat template."""

    def __init__(
        self,
        tokenizer: Any,  # noqa: ANN401 - transformers is untyped
        *,
        chat_template: str | None,
        param: str = "training_file",
    ) -> None:
        self._tokenizer = tokenizer
        self._source = chat_template
        self._param = param
        self._template: ChatTemplate | None = None

    @property
    def template(self) -> ChatTemplate:
        """The template in force; made when a chat is first rendered, as verbatim rows need none."""
        if self._template is None:
            self._template = ChatTemplate(self._tokenizer, self._source, param=self._param)
        return self._template

    def render_row(self, row: Row) -> Rendered:
        """A training row.

        Raises:
            TrainingFailed: The template can't render it by prefixes; code `unusable_template`.
        """
        if isinstance(row, ChatRow):
            return self._render_chat(row)
        if isinstance(row, CompletionRow):
            text = row.prompt + row.completion
            return Rendered(text, (Span(len(row.prompt), len(text)),), is_verbatim=True)
        if isinstance(row, PreferenceRow):
            raise TypeError("a preference row is two conversations: render each of them")
        return Rendered(row.text, (Span(0, len(row.text)),), is_verbatim=True)

    def render_questions(self, questions: Sequence[str]) -> list[str]:
        """Each question as a user turn with the generation prompt after it."""
        chats = [[{"role": "user", "content": question}] for question in questions]
        return self.template.render_many(chats, add_generation_prompt=True)

    def answer_frame(self, question: str) -> Frame:
        """What a template puts around an answer to a question; the same for every answer.

        Raises:
            TrainingFailed: An answered question doesn't start with the prompt of the unanswered one.
        """
        user = {"role": "user", "content": question}
        prompt = self.template.render([user], add_generation_prompt=True)
        answer = {"role": "assistant", "content": _PROBE_ANSWER}
        whole = self.template.render([user, answer])
        rest = whole.removeprefix(prompt)
        if rest == whole or _PROBE_ANSWER not in rest:
            self.template.refuse("an answered question doesn't start with its generation prompt")
        lead, _, tail = rest.partition(_PROBE_ANSWER)
        return Frame(lead, tail)

    def _render_chat(self, row: ChatRow) -> Rendered:
        messages = [_plain(message) for message in row.messages]
        tools = row.tools
        whole = self.template.render(messages, tools=tools)
        spans: list[Span] = []
        for i, message in enumerate(row.messages):
            if not message.is_learned:
                continue
            is_last = i == len(messages) - 1
            before = self.template.render(messages[:i], tools=tools, add_generation_prompt=True)
            upto = whole if is_last else self.template.render(messages[: i + 1], tools=tools)
            if not (whole.startswith(upto) and upto.startswith(before)):
                self.template.refuse(
                    f"it renders the first {i + 1} of {len(messages)} messages in another way than at the "
                    "start of the whole, so the tokens to learn can't be told"
                )
            spans.append(Span(len(before), len(upto)))
        return Rendered(whole, tuple(spans), is_verbatim=False)


def _plain(message: Message) -> dict[str, Any]:
    """A message as templates read it: `weight` is ours alone, and arguments are an object where they can be."""
    plain = message.model_dump(exclude_none=True, exclude={"weight"})
    plain.setdefault("content", "")  # null beside tool_calls; many templates test for text only
    for call in plain.get("tool_calls", ()):
        arguments = call["function"]["arguments"]
        if isinstance(arguments, str):
            call["function"]["arguments"] = _object_or_text(arguments)
    return plain


def _object_or_text(arguments: str) -> Any:  # noqa: ANN401 - JSON
    try:
        value = json.loads(arguments)
    except ValueError:
        return arguments
    return value if isinstance(value, dict) else arguments
