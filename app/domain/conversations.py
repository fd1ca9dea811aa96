"""Conversations as rows of files: a chat that is learned, and two answers that are compared."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from app.domain.frozen import Frozen


class FunctionCall(Frozen):
    """What an assistant calls; `arguments` is JSON text, as OpenAI writes it, or the object itself."""

    name: str = Field(min_length=1, max_length=256)
    arguments: str | dict[str, Any]


class ToolCall(Frozen):
    """One call of an assistant turn."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Frozen):
    """One turn; `weight` 0 takes an assistant turn out of the loss."""

    role: Literal["system", "user", "assistant", "tool", "developer"]
    content: str | None = None
    weight: Literal[0, 1] | None = None
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] | None = Field(default=None, min_length=1)
    tool_call_id: str | None = None

    @field_validator("weight", mode="before")
    @classmethod
    def _true_is_no_weight(cls, value: object) -> object:
        if isinstance(value, bool):
            raise ValueError("must be 0 or 1, not true or false")  # noqa: TRY004 - pydantic's protocol
        return value

    @model_validator(mode="after")
    def _fits_its_role(self) -> Self:
        is_assistant = self.role == "assistant"
        if self.content is None and not (is_assistant and self.tool_calls):
            raise ValueError("content: must be a string (null only beside tool_calls)")
        if self.weight is not None and not is_assistant:
            raise ValueError("weight: only an assistant message has one")
        if self.tool_calls is not None and not is_assistant:
            raise ValueError("tool_calls: only an assistant message has them")
        if self.tool_call_id is not None and self.role != "tool":
            raise ValueError("tool_call_id: only a tool message has one")
        return self

    @property
    def is_learned(self) -> bool:
        """Whether the turn's tokens are in the loss."""
        return self.role == "assistant" and self.weight != 0


class ChatContent(Frozen):
    """A conversation; every assistant turn counts unless its weight is 0."""

    messages: tuple[Message, ...] = Field(min_length=1)
    tools: tuple[dict[str, Any], ...] | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _something_is_learned(self) -> Self:
        if not any(message.is_learned for message in self.messages):
            raise ValueError("messages: no assistant message with a weight other than 0")
        return self


Environment = Annotated[str, Field(min_length=1, max_length=64)]


class ChatRow(ChatContent):
    """A conversation with what strategies may read of it.

    `counterfactual` is the same conversation put in another way, with the same answers; `domain` names the
    environment that the row comes from. Both are ignored by strategies that don't ask for them.
    """

    counterfactual: ChatContent | None = None
    domain: Environment | None = None


class PreferenceInput(Frozen):
    """What is asked: the conversation before the two answers."""

    messages: tuple[Message, ...] = Field(min_length=1)
    tools: tuple[dict[str, Any], ...] | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _waits_for_an_answer(self) -> Self:
        if self.messages[-1].role == "assistant":
            raise ValueError(
                "messages: the last one is an assistant's; what is compared belongs in preferred_output"
            )
        return self


class PreferenceRow(Frozen):
    """Two answers to one conversation, of which the first is preferred; `domain` as of a chat row."""

    input: PreferenceInput
    preferred_output: tuple[Message, ...] = Field(min_length=1)
    non_preferred_output: tuple[Message, ...] = Field(min_length=1)
    domain: Environment | None = None

    @model_validator(mode="after")
    def _answers(self) -> Self:
        sides = {name: getattr(self, name) for name in ("preferred_output", "non_preferred_output")}
        for name, turns in sides.items():
            for place, turn in enumerate(turns):
                if turn.role not in ("assistant", "tool"):
                    raise ValueError(f"{name}: {place}: must be of an assistant, or of a tool")
            if "tool" in (turns[0].role, turns[-1].role):
                raise ValueError(f"{name}: must begin and end with an assistant message")
        for name, turns in (("input", self.input.messages), *sides.items()):
            if any(turn.weight is not None for turn in turns):
                raise ValueError(f"{name}: a preference row has no weights; leave `weight` out")
        return self

    @property
    def preferred(self) -> ChatRow:
        """The conversation with the preferred answer, which alone counts."""
        return self._answered(self.preferred_output)

    @property
    def rejected(self) -> ChatRow:
        """The same with the other answer."""
        return self._answered(self.non_preferred_output)

    def _answered(self, answer: tuple[Message, ...]) -> ChatRow:
        asked = tuple(
            turn.model_copy(update={"weight": 0}) if turn.role == "assistant" else turn
            for turn in self.input.messages
        )
        return ChatRow(
            messages=asked + answer,
            tools=self.input.tools,
            parallel_tool_calls=self.input.parallel_tool_calls,
            domain=self.domain,
        )
