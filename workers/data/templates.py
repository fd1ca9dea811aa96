"""Chat templates: the built-in plain one, and rendering with a limit on time and size."""

import contextlib
import hashlib
import signal
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any, Final, NoReturn

from jinja2 import TemplateError

from app.errors import TrainingFailed

MAX_TEMPLATE_BYTES: Final = 2**18
MAX_RENDERED_CHARS: Final = 2**23
MAX_CPU_SECONDS: Final = 10.0  # of one call; a row takes some 50 microseconds
UNUSABLE_TEMPLATE: Final = "unusable_template"

# For a base model that has none. A turn's line break comes before the next turn, so that every rendering of
# the first turns is a prefix of the rendering of all, and nothing is learned after the end mark.
DEFAULT_CHAT_TEMPLATE: Final = (
    "{{ bos_token }}"
    "{% if tools %}Tools: {{ tools | tojson }}\n{% endif %}"
    "{% for message in messages %}"
    "{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{% if message['role'] == 'assistant' %}"
    "Assistant:"
    "{% if message['content'] %} {{ message['content'] }}{% endif %}"
    "{% if message['tool_calls'] %} {{ message['tool_calls'] | tojson }}{% endif %}"
    "{{ eos_token }}"
    "{% elif message['role'] == 'user' %}User: {{ message['content'] }}"
    "{% elif message['role'] == 'tool' %}Tool: {{ message['content'] }}"
    "{% else %}System: {{ message['content'] }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n' }}Assistant:{% endif %}"
)


class ChatTemplate:
    """A tokenizer's chat template, or another one in its place, compiled in transformers' sandbox.

    Args:
        tokenizer: A transformers tokenizer.
        source: Jinja text; None takes the tokenizer's own.
        param: The request field that an error names.

    Raises:
        TrainingFailed: There is none, or it is over the size limit; code `unusable_template`.
    """

    def __init__(
        self,
        tokenizer: Any,  # noqa: ANN401 - transformers is untyped
        source: str | None,
        *,
        param: str,
    ) -> None:
        self.param = param
        self._tokenizer = tokenizer
        self.origin = "base model's" if source is None else "given"
        if source == DEFAULT_CHAT_TEMPLATE:
            self.origin = "built-in"
        text = tokenizer.chat_template if source is None else source
        if text is None:
            self.refuse("the tokenizer has none; name the built-in one")
        self._source = source
        self.source_text = text if isinstance(text, str) else repr(sorted(text.items()))
        if len(self.source_text.encode()) > MAX_TEMPLATE_BYTES:
            self.refuse(f"it is larger than {MAX_TEMPLATE_BYTES:,} bytes")

    @property
    def sha256(self) -> str:
        """Of the source."""
        return hashlib.sha256(self.source_text.encode()).hexdigest()

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """The conversation as text.

        Raises:
            TrainingFailed: The template refuses it or takes too long; code `unusable_template`.
        """
        return self.render_many(
            [list(messages)], tools=tools, add_generation_prompt=add_generation_prompt
        )[0]

    def render_many(
        self,
        conversations: Sequence[list[dict[str, Any]]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> list[str]:
        """Several conversations at once."""
        try:
            with _limit_cpu_seconds(MAX_CPU_SECONDS):
                texts: list[str] = self._tokenizer.apply_chat_template(
                    list(conversations),
                    tools=None if tools is None else list(tools),
                    chat_template=self._source,
                    add_generation_prompt=add_generation_prompt,
                    tokenize=False,
                )
        except (TemplateError, TypeError, ValueError, KeyError, OverflowError) as error:
            self.refuse(str(error)[:500] or type(error).__name__)
        except TimeoutError:
            self.refuse(f"it took longer than {MAX_CPU_SECONDS:g} s of CPU time")
        if any(len(text) > MAX_RENDERED_CHARS for text in texts):
            self.refuse(f"it rendered more than {MAX_RENDERED_CHARS:,} characters")
        return texts

    def refuse(self, problem: str) -> NoReturn:
        """Ends the run.

        Raises:
            TrainingFailed: Always, with code `unusable_template`.
        """
        raise TrainingFailed(
            f"{self.param}: the {self.origin} chat template can't be used: {problem}",
            self.param,
            UNUSABLE_TEMPLATE,
        )


@contextlib.contextmanager
def _limit_cpu_seconds(seconds: float) -> Iterator[None]:
    """Raises TimeoutError inside once the process spent so much CPU time; only the main thread can have it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise TimeoutError

    former = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, former)
