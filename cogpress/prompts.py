"""The one prompt composer: a question or an example and the settings to token ids, the same in training and serving."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import TemplateError, meta

from cogpress.errors import CogpressError
from cogpress.given import REASONING, kind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cogpress.config import Prompt

Message = Mapping[str, Any]
"""`{"role": ..., "content": ...}`; with tools also `tool_calls`, `tool_call_id` and `name`; an assistant's also
`reasoning_content`."""

NO_LOSS = -100
"""Label of a token without loss; PyTorch's cross entropy ignores it."""

SWITCHES = ("enable_thinking", "thinking")
"""Names of the switch for reasoning in chat templates: Qwen's and SmolLM3's, DeepSeek's and Granite's."""

_TEMPLATE_FAULTS = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What rendering raises: a template is a program, so not only what it raises on purpose."""

_CUT = secrets.token_hex(16)
"""Marks where a rendering must be tokenized in two pieces; random, so that no input can contain it."""

_PROBE = secrets.token_hex(16)
"""Stands for an answer, to see what a template writes around it."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, before the settings apply: `messages`, or else `fields`, or else `text`.

    Attributes:
        text: the value of a template with one field, or the whole user's message where it has several.
        fields: the template's values by name.
        messages: a conversation to continue; no template applies to it.
        system: replaces the settings' system text; messages that begin with a system message keep theirs.
        tools: functions that the model may call, as its chat template takes them.
        thinking: whether to reason first; None leaves it to the settings, and these to the chat template.
    """

    text: str = ""
    fields: Mapping[str, Any] | None = None
    messages: Sequence[Message] = ()
    system: str | None = None
    tools: Sequence[Any] = ()
    thinking: bool | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """An example with the settings applied: messages, the last one the assistant's, or plain text."""

    messages: tuple[Message, ...] = ()
    given: int = 0
    """Leading messages that are never trained on, not even an assistant's."""
    text: str = ""
    unlearnt: frozenset[int] = frozenset()
    """Indices of later messages of an assistant that are not trained on either."""
    tools: tuple[Any, ...] = ()
    """As in `Question`."""
    thinking: bool | None = None
    """As in `Question`."""
    weight: float = 1.0
    """Factor on the loss."""

    def learns(self, index: int) -> bool:
        """Whether the message at that index is trained on."""
        return self.messages[index]["role"] == "assistant" and index >= self.given and index not in self.unlearnt

    @property
    def asked(self) -> list[Message]:
        """The messages before the last answer."""
        return list(self.messages[:-1])

    @property
    def prompt(self) -> str:
        """The text before the last answer, without the system message."""
        return "\n\n".join(message["content"] for message in self.asked if message["role"] != "system")

    @property
    def answer(self) -> str:
        """The text of the last answer, without its tool calls and reasoning; all of a plain text."""
        return str(self.messages[-1]["content"]) if self.messages else self.text


@dataclass(frozen=True, slots=True)
class Row:
    """One training sequence: `labels[i]` is `input_ids[i]` where it has loss, else `NO_LOSS`; neither is shifted."""

    input_ids: list[int]
    labels: list[int]
    weight: float = 1.0
    """Factor on the loss in training."""
    like_base: bool = False
    """Whether its tokens are to stay as likely as the base has them, instead of becoming likelier."""

    @property
    def learnt(self) -> int:
        """Number of tokens with loss."""
        return sum(label != NO_LOSS for label in self.labels)


# --- settings applied -------------------------------------------------------------------------------------------------


def conversation(question: Question, settings: Prompt) -> list[Message]:
    """The messages that ask a question: system text and template applied.

    Raises:
        CogpressError: nothing is asked; or a field is missing, unknown, or neither text, number, boolean nor a list of
            these.
    """
    system = settings.system if question.system is None else question.system
    messages = list(question.messages)
    if not messages:
        text = _filled(question, settings)
        if not text.strip():
            raise CogpressError("There is nothing to answer: prompt, messages and fields are all empty. Give one.")
        messages = [{"role": "user", "content": text}]
    if system and all(message["role"] != "system" for message in messages):
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _filled(question: Question, settings: Prompt) -> str:
    names = settings.names
    if question.fields is None:
        if len(names) != 1 or not question.text.strip():
            return question.text
        return settings.template.format(**{names[0]: field_text(names[0], question.text, settings)})
    defaults = {name: field.default for name, field in settings.fields.items() if field.default is not None}
    missing = [name for name in names if name not in question.fields and name not in defaults]
    unknown = [name for name in question.fields if name not in names]
    if missing or unknown:
        wrong = f"lacks {', '.join(missing)}" if missing else f"has the unknown {', '.join(map(str, unknown))[:200]}"
        raise CogpressError(
            f"The prompt template's fields are {', '.join(names)}; the input {wrong}. "
            "Give exactly those, as a JSON object."
        )
    given = {name: question.fields.get(name, defaults.get(name)) for name in names}
    return settings.template.format(**{name: field_text(name, value, settings) for name, value in given.items()})


def field_text(name: str, value: Any, settings: Prompt) -> str:
    """A field's value as the template takes it, by the field's description, the same in training and serving.

    A list is written one item a line, however it was given; a number in its shortest form, so that 8 and 8.0 are one
    prompt; a boolean as `True` or `False`.

    Raises:
        CogpressError: it is not of the field's type, or out of its bounds.
    """
    field = settings.fields.get(name)
    if field is None:
        return _as_text(name, value)
    size: float | None = None
    if field.type == "list":
        items = [_as_text(name, item) for item in (value if isinstance(value, list) else list_items(str(value)))]
        text, size, unit = "\n".join(items), len(items), " items"
    elif field.type == "number":
        size, unit = _number(name, value), ""
        text = str(int(size)) if size.is_integer() else repr(size)
    elif field.type == "boolean":
        if str(value).lower() not in ("true", "false"):
            raise CogpressError(f"Field {name} must be true or false, not {value!r}.")
        text = str(value).lower().capitalize()
    else:
        text = _as_text(name, value)
        if field.type == "choice" and text not in field.choices:
            raise CogpressError(f"Field {name} is {text[:80]!r}; choose one of {', '.join(field.choices)}.")
        size, unit = (len(text), " characters") if field.type != "choice" else (None, "")
    for bound, wrong in ((field.minimum, "at least"), (field.maximum, "at most")):
        if size is not None and bound is not None and (size < bound if wrong == "at least" else size > bound):
            raise CogpressError(f"Field {name} has {size:g}{unit}; it must have {wrong} {bound:g}.")
    return text


def list_items(text: str) -> list[Any]:
    """The items of a list typed as text: a JSON list, or one a line, or, in one line, separated by commas."""
    if text.lstrip().startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            found = json.loads(text)
            if isinstance(found, list):
                return found
    return [item.strip() for item in text.split("\n" if "\n" in text else ",") if item.strip()]


def _number(name: str, value: Any) -> float:
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?\s*", value, re.ASCII):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise CogpressError(f"Field {name} must be a number, not {str(value)[:80]!r}.")
    return float(value)


def described(settings: Prompt, form: Prompt) -> Prompt:
    """Settings with the descriptions of the form's fields, where they have none and the same fields."""
    if settings.fields or set(settings.names) != set(form.fields):
        return settings
    return settings.model_copy(update={"fields": form.fields})


def _as_text(name: str, value: Any) -> str:
    """A field's value in a template; a list is written one item a line."""
    if isinstance(value, list):
        return "\n".join(_as_text(name, item) for item in value)
    if isinstance(value, str | int | float):
        return str(value)
    raise CogpressError(f"Field {name} must be text, a number or a list of these, not {kind(value)}.")


def with_answer(
    question: Question, settings: Prompt, answer: Sequence[Message], unlearnt: Collection[int] = ()
) -> Conversation:
    """A question with its answer as it is trained on, but for the messages of `unlearnt`; raises as `conversation`."""
    asked = conversation(question, settings)
    return Conversation(
        (*asked, *answer),
        len(asked),
        unlearnt=frozenset(len(asked) + index for index in unlearnt),
        tools=tuple(question.tools),
        thinking=_thinking(question, settings),
    )


def _thinking(question: Question, settings: Prompt) -> bool | None:
    return settings.thinking if question.thinking is None else question.thinking


# --- to token ids -----------------------------------------------------------------------------------------------------


def encode(tokenizer: PreTrainedTokenizerBase, question: Question, settings: Prompt) -> list[int]:
    """Token ids of a question up to where the answer begins; raises as `conversation` and `encode_prompt` do."""
    thinking = _thinking(question, settings)
    return encode_prompt(tokenizer, conversation(question, settings), tools=question.tools, thinking=thinking)


def at_least(tokenizer: PreTrainedTokenizerBase, question: Question, settings: Prompt) -> int:
    """How many tokens a question certainly has, told without tokenizing it; raises as `conversation` does.

    Chat templates may drop what an assistant said before and the blanks around a text, and no more.
    """
    texts = [message["content"] for message in conversation(question, settings) if message["role"] != "assistant"]
    return sum(len(text.strip()) for text in texts) // _longest_token(tokenizer)


@functools.lru_cache(maxsize=8)
def _longest_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The most characters that a token stands for; byte-level vocabularies write no fewer."""
    return max(map(len, tokenizer.get_vocab()))


def encode_example(tokenizer: PreTrainedTokenizerBase, example: Conversation) -> list[int]:
    """Token ids of an example up to where its last answer begins; raises as `encode_prompt`."""
    return encode_prompt(tokenizer, example.asked, tools=example.tools, thinking=example.thinking)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    tools: Sequence[Any] = (),
    thinking: bool | None = None,
) -> list[int]:
    """Token ids of a conversation up to where the model's next answer begins.

    The ids are those of `tokenizer.apply_chat_template(messages, add_generation_prompt=True)`, except that the text of
    a control token in a message is tokenized as ordinary text. Without a chat template, the messages must be
    `[system?, user]` and their plain text is the prompt. `tools` and `thinking` are as in `Question`.

    Raises:
        CogpressError: the template refuses the messages, knows no tools or has no switch for reasoning; or there is no
            template and the messages are a conversation.
    """
    more = _options(tokenizer, tools, thinking)
    if not tokenizer.chat_template:
        return encode_plain(tokenizer, plain_prompt(messages))
    merged = _system_first(messages)
    try:
        rendered = _render(tokenizer, messages, ask=True, **more)
        left_out = [one for one in messages if one["role"] == "system" and one["content"].strip() not in rendered]
    except CogpressError:
        if merged == list(messages):
            raise
        rendered, left_out = "", list(messages)
    if left_out and merged != list(messages):
        # Many templates take one system message, at the beginning; some drop others without a word.
        rendered = _render(tokenizer, merged, ask=True, **more)
    return _encode_rendered(tokenizer, rendered)


def _options(tokenizer: PreTrainedTokenizerBase, tools: Sequence[Any], thinking: bool | None) -> dict[str, Any]:
    """Tools and the switch for reasoning as variables of the chat template."""
    knows = variables(tokenizer)
    if tools and "tools" not in knows:
        raise CogpressError("This model's chat template knows no tools. Leave tools empty, or describe them in text.")
    switch = next((name for name in SWITCHES if name in knows), None)
    if thinking is not None and switch is None:
        raise CogpressError("This model's chat template has no switch for reasoning. Leave thinking empty.")
    more: dict[str, Any] = {"tools": list(tools)} if tools else {}
    if thinking is not None and switch is not None:
        more[switch] = thinking
    return more


def _system_first(messages: Sequence[Message]) -> list[Message]:
    """A conversation with all its system messages as one before the others."""
    texts = [message["content"] for message in messages if message["role"] == "system"]
    others = [message for message in messages if message["role"] != "system"]
    return [{"role": "system", "content": "\n\n".join(texts)}, *others] if texts else others


def variables(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """What the chat template reads besides messages, such as `tools` or a switch for reasoning."""
    template: Any = tokenizer.chat_template or ""
    named = template.values() if isinstance(template, Mapping) else [template]
    return frozenset[str]().union(*map(_variables, named))


@functools.lru_cache(maxsize=8)
def _variables(template: str) -> frozenset[str]:
    # transformers' own block, which marks answers in training; plain Jinja does not know it.
    plain = re.sub(r"\{%-?\s*(?:end)?generation\s*-?%\}", "", template)
    # The template is only parsed; autoescape, which is for HTML, has no effect.
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=True)
    try:
        return frozenset(meta.find_undeclared_variables(environment.parse(plain)))
    except TemplateError:
        return frozenset()  # rendering reports it


def plain_prompt(messages: Sequence[Message]) -> str:
    """The prompt of a model without a chat template: the system text, a blank line and the user's text.

    Raises:
        CogpressError: the messages are not `[system?, user]`.
    """
    roles = [message["role"] for message in messages]
    if roles not in (["user"], ["system", "user"]):
        raise CogpressError(
            "The base model's tokenizer has no chat template, so it cannot be given a conversation. Use the "
            "instruction-tuned variant of the model, or give one prompt and one completion per example."
        )
    return "\n\n".join(message["content"] for message in messages if message["content"])


def encode_plain(tokenizer: PreTrainedTokenizerBase, text: str, *, begin: bool = True) -> list[int]:
    """Token ids of text without a template and without an end token; control-token text stays ordinary text.

    Args:
        begin: put the tokenizer's begin token first, if it has one.
    """
    first, *others = _harmless(tokenizer, text).split(_CUT)
    ids = _encode(tokenizer, first, special=begin)
    if ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()  # some tokenizers end every text, but the model must continue this one
    for piece in others:
        ids += _encode(tokenizer, piece)
    return ids


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, ask: bool, **more: Any) -> str:
    """The chat template's text for messages, which only `_encode_rendered` may tokenize.

    Args:
        ask: end where the assistant's answer begins, instead of after the last message; in the assistant's last
            message, where that is the last.
        more: other variables of the template.
    """
    named = [
        {**message, **dict.fromkeys(REASONING, message[REASONING[0]])} if message.get(REASONING[0]) else message
        for message in messages
    ]
    safe = _all_harmless(tokenizer, named)
    more = _all_harmless(tokenizer, more)
    if ask and messages[-1]["role"] == "assistant":
        ask, more = False, {**more, "continue_final_message": True}
    try:
        try:
            text: Any = tokenizer.apply_chat_template(safe, tokenize=False, add_generation_prompt=ask, **more)
        except TypeError:  # some templates, such as DeepSeek's, take arguments as JSON text
            as_text = [_with_text_arguments(message) for message in safe]
            text = tokenizer.apply_chat_template(as_text, tokenize=False, add_generation_prompt=ask, **more)
    except _TEMPLATE_FAULTS as error:
        reason = " ".join(str(error).split()).replace(_CUT, "")
        raise CogpressError(
            f"The base model's chat template refuses turns {', '.join(m['role'] for m in messages)}: {reason}"
        ) from None
    return str(text)


def _with_text_arguments(message: Mapping[str, Any]) -> dict[str, Any]:
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        for call in message.get("tool_calls") or ()
    ]
    return {**message, "tool_calls": calls} if calls else dict(message)


def _encode_rendered(tokenizer: PreTrainedTokenizerBase, rendered: str) -> list[int]:
    """Token ids of what `_render` returned, or of part of it. The template itself writes the begin token."""
    ids: list[int] = []
    for piece in rendered.split(_CUT):
        ids += _encode(tokenizer, piece)
    return ids


def control_texts(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """The texts that steer a chat: what the template writes around messages, and the named special tokens.

    Not among them are other special tokens, such as a code model's `<filename>`, which people may well write.
    """
    return _controls(tokenizer, str(tokenizer.chat_template or "")).steering


def token_bytes(tokenizer: PreTrainedTokenizerBase, token: int) -> bytes | None:
    """The bytes that a token stands for; None where the tokenizer does not tell."""
    text = tokenizer.convert_ids_to_tokens(token)
    if not isinstance(text, str) or token in tokenizer.added_tokens_decoder:
        return None
    if found := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", text):  # SentencePiece
        return bytes([int(found[1], 16)])
    letters = _byte_letters()
    return bytes(letters[letter] for letter in text) if all(letter in letters for letter in text) else None


@functools.cache
def _byte_letters() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for (GPT-2's scheme)."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: byte for byte, letter in bytes_to_unicode().items()}


def is_control(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    """Whether text in a message can never become this id."""
    return token in _controls(tokenizer, str(tokenizer.chat_template or "")).ids


@dataclass(frozen=True, slots=True)
class _Controls:
    steering: frozenset[str]
    ids: frozenset[int]
    texts: tuple[str, ...]
    inside: re.Pattern[str]
    """Matches one character wherever a control token's text begins."""
    folds: bool
    """Whether a control token is matched after normalization, so that other texts can become it."""


@functools.lru_cache(maxsize=8)
def _controls(tokenizer: PreTrainedTokenizerBase, template: str) -> _Controls:
    added = {token.content: (index, token) for index, token in tokenizer.added_tokens_decoder.items()}
    named = set(tokenizer.all_special_tokens)
    written = _written_by_template(tokenizer, added)
    special = {text for text, (_, token) in added.items() if token.special}
    steering = {text for text in named | written | {text for text in special if text in template} if text.strip()}
    every = sorted(steering | {text for text in special if text.strip()}, key=len, reverse=True)
    pattern = f"(?=(?:{'|'.join(map(re.escape, every))}))." if every else r"(?!)"
    return _Controls(
        steering=frozenset(steering),
        ids=frozenset(added[text][0] for text in every if text in added),
        texts=tuple(every),
        inside=re.compile(pattern, re.DOTALL),
        folds=any(added[text][1].normalized for text in every if text in added),
    )


def _written_by_template(tokenizer: PreTrainedTokenizerBase, added: Iterable[str]) -> set[str]:
    """Added tokens that the template writes around a question.

    Some models do not mark their turn tokens as special. Only a question is rendered, because templates put `<think>`
    and the like around answers, which answers may contain themselves.
    """
    if not tokenizer.chat_template:
        return set()
    text = ""
    user, system = {"role": "user", "content": "x"}, {"role": "system", "content": "x"}
    for messages in ([user], [system, user]):
        with contextlib.suppress(*_TEMPLATE_FAULTS):  # such as no system role; `_render` reports a broken template
            text += str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False))
    return {token for token in added if token.strip() and token in text}


def _all_harmless(tokenizer: PreTrainedTokenizerBase, value: Any) -> Any:
    """JSON with every text made harmless, names of fields included: a template may write them."""
    if isinstance(value, str):
        return _harmless(tokenizer, value)
    if isinstance(value, Mapping):
        return {_harmless(tokenizer, str(name)): _all_harmless(tokenizer, one) for name, one in value.items()}
    if isinstance(value, list):
        return [_all_harmless(tokenizer, one) for one in value]
    return value


def _harmless(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Text with `_CUT` inside everything that would become a control token.

    The cut comes after the first character, so that a template sees nearly the original text and may trim it or branch
    on it. The tokenizers' own switch, `split_special_tokens`, is state that a concurrent request could flip, and does
    not cover turn tokens that are not marked special.
    """
    controls = _controls(tokenizer, str(tokenizer.chat_template or ""))
    if not controls.folds and not any(control in text for control in controls.texts):
        return text
    cut = controls.inside.sub(lambda found: found.group() + _CUT, text)
    if any(token in controls.ids for piece in cut.split(_CUT) for token in _encode(tokenizer, piece)):
        raise CogpressError("A message holds a control token's text in a form that cannot be made harmless. Remove it.")
    return cut


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = False) -> list[int]:
    # verbose off: the caller checks the length, so no warning
    encoded: Any = tokenizer(text, add_special_tokens=special, return_attention_mask=False, verbose=False)
    return list(encoded["input_ids"])


# --- training rows ----------------------------------------------------------------------------------------------------


def stops(tokenizer: PreTrainedTokenizerBase, others: Collection[int] = ()) -> frozenset[int]:
    """The ids that end an answer: the tokenizer's end token, and others on which generation stops.

    Raises:
        CogpressError: the tokenizer has no end token.
    """
    return frozenset({_end(tokenizer), *others})


def rows(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation], stop_ids: Collection[int] = ()
) -> list[Row]:
    """`row` of each conversation."""
    ends = stops(tokenizer, stop_ids)
    return [row(tokenizer, one, ends) for one in conversations]


def row(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, ends: frozenset[int]) -> Row:
    """The training row of a conversation, of any length: answers with their end token have loss; of plain text, all.

    Args:
        tokenizer: the model's.
        conversation: the example.
        ends: `stops` of the model.

    Raises:
        CogpressError: it contains the text of a control token, the chat template refuses it, or the template renders
            its beginning differently once it continues, so that training and serving would differ.
    """
    controls = sorted(control_texts(tokenizer))
    for content in _texts([conversation.text, conversation.tools, *conversation.messages]):
        for control in controls:
            if control in content:
                raise CogpressError(
                    f"The example contains the control text {control}. Give text without it, and chats as messages."
                )
    if not conversation.messages:
        ids = [*encode_plain(tokenizer, conversation.text), _end(tokenizer)]
        return Row(ids, ids.copy(), conversation.weight)
    made = (_chat_row if tokenizer.chat_template else _plain_row)(tokenizer, conversation, ends)
    return replace(made, weight=conversation.weight)


def _texts(value: Any) -> Iterator[str]:
    """Every text in JSON, names of fields included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, one in value.items():
            yield str(name)
            yield from _texts(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _texts(one)


def answer_text(tokenizer: PreTrainedTokenizerBase, row: Row) -> str:
    """The last answer of a row as a server would give it, with its reasoning and tool calls, without control tokens."""
    end = next((at for at in range(len(row.labels), 0, -1) if row.labels[at - 1] != NO_LOSS), 0)
    begin = next((at for at in range(end, 0, -1) if row.labels[at - 1] == NO_LOSS), 0)
    answer: Any = tokenizer.decode(row.labels[begin:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(answer)


def _end(tokenizer: PreTrainedTokenizerBase) -> int:
    end: Any = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise CogpressError("The base model's tokenizer has no end-of-sequence token, so a model cannot learn to stop.")
    return end


def _plain_row(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, _ends: frozenset[int]) -> Row:
    for name in ("tool_calls", REASONING[0]):
        if any(message.get(name) for message in conversation.messages):
            raise CogpressError(f"The base model's tokenizer has no chat template, so {name} cannot be written.")
    asked = encode_example(tokenizer, conversation)
    whole = encode_plain(tokenizer, plain_prompt(conversation.asked) + conversation.answer)
    answer = whole[len(asked) :]
    if whole[: len(asked)] != asked:  # a token would span both, but a server is given the prompt alone
        answer = encode_plain(tokenizer, conversation.answer, begin=False)
    answer = [*answer, _end(tokenizer)]
    return Row([*asked, *answer], [*[NO_LOSS] * len(asked), *answer])


def _chat_row(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, ends: frozenset[int]) -> Row:
    messages = conversation.messages
    options = _options(tokenizer, conversation.tools, conversation.thinking)
    ids: list[int] = []
    labels: list[int] = []
    done = ""
    for index in range(len(messages)):
        if not conversation.learns(index):
            continue
        asked = _render(tokenizer, messages[:index], ask=True, **options)
        answered = _render(tokenizer, messages[: index + 1], ask=False, **options)
        _check_written(tokenizer, messages[index], answered)
        if not _reasons(messages[index]) and (opened := re.search(r"(<think>|\[THINK\])\s*$", asked)):
            raise CogpressError(
                f"The base model's chat template opens reasoning ({opened[1]}) before each answer, and this answer has "
                "none. Set prompt.thinking to false if the template has a switch, give reasoning_content, or choose "
                "another base."
            )
        if not asked.startswith(done) or not answered.startswith(asked):
            raise _unfit_template(conversation)
        ids = _longer(tokenizer, ids, asked, asked[len(done) :], conversation)
        labels += [NO_LOSS] * (len(ids) - len(labels))
        body = _without_opening(tokenizer, messages[: index + 1], asked, answered[len(asked) :], options)
        answered = asked + body
        whole = _longer(tokenizer, ids, answered, body, conversation)
        last = index == len(messages) - 1
        answer, rest = _answer_and_rest(tokenizer, whole[len(ids) :], ends, last)
        ids = [*ids, *answer, *rest]
        labels += [*answer, *[NO_LOSS] * len(rest)]
        done = answered
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and not conversation.learns(index):  # its reasoning may go later
            _check_written(tokenizer, message, _render(tokenizer, messages[: index + 1], ask=False, **options))
        elif message["role"] in ("system", "tool"):
            _check_written(tokenizer, message, done)
    for tool in conversation.tools:
        if not _is_written(tokenizer, str(_named(tool)), done):
            raise CogpressError(
                f"The base model's chat template leaves out the tool {_named(tool)}. Choose another base."
            )
    return Row(ids, labels)


def _reasons(message: Message) -> bool:
    return bool(message.get(REASONING[0])) or "</think>" in message["content"]


def _named(tool: Any) -> Any:
    return tool["function"]["name"]


def _is_written(tokenizer: PreTrainedTokenizerBase, text: str, rendered: str) -> bool:
    """Whether a template wrote a text, as it is or as JSON."""
    text = _harmless(tokenizer, text.strip())
    return text in rendered or json.dumps(text, ensure_ascii=False)[1:-1] in rendered


def _check_written(tokenizer: PreTrainedTokenizerBase, message: Message, rendered: str) -> None:
    """Refuse what the template leaves out of a message that ends a rendering, or writes around it a second time."""
    given = [("text", text) for text in re.split(r"</?think>", message["content"])]
    if message["role"] == "assistant" and len(given) > 1:
        given = [*[("reasoning", text) for _, text in given[:-1]], given[-1]]
    if message["role"] == "tool" and re.search(r"<tool_response>\s*<tool_response>", rendered):
        raise CogpressError(
            "The base model's chat template writes <tool_response> around a tool's result, and this one holds it "
            "already. Give what is inside of it."
        )
    given += [("reasoning_content", message.get(REASONING[0]) or "")]
    given += [("tool_calls", _named(call)) for call in message.get("tool_calls") or ()]
    for what, text in given:
        if not _is_written(tokenizer, text, rendered):
            raise CogpressError(
                f"The base model's chat template leaves out the {what} of this message by {message['role']}, so it "
                "would not be learnt. Leave it out of the row, or choose another base."
            )


def _without_opening(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    asked: str,
    body: str,
    options: Mapping[str, Any],
) -> str:
    """A last answer without what the template writes before its text, such as an empty reasoning block.

    A server would show it as part of the answer. White space and control tokens, which it does not show, stay.
    """
    text = _harmless(tokenizer, messages[-1]["content"]).strip()
    if (text and body.startswith(text)) or messages[-1].get(REASONING[0]):
        return body
    probe = {**messages[-1], "content": _PROBE}
    rendered = _render(tokenizer, [*messages[:-1], probe], ask=False, **options)
    opening, found, _ = rendered[len(asked) :].partition(_PROBE)
    shown = str(tokenizer.decode(_encode_rendered(tokenizer, opening), skip_special_tokens=True)).strip()
    without = body.removeprefix(opening)
    known = rendered.startswith(asked) and found and shown and body.startswith(opening)
    return without if known and without.lstrip().startswith(text) else body


def _longer(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str, added: str, conversation: Conversation
) -> list[int]:
    """Ids of `text` that begin with `ids`, those of `text` without `added` at its end.

    The whole is tokenized, as in serving. Only where a token would span the border (an answer that begins with a line
    break after a template that ends in one) are the parts tokenized apart, because the model is asked up to the border.
    """
    whole = _encode_rendered(tokenizer, text)
    if whole[: len(ids)] == ids:
        return whole
    apart = [*ids, *_encode_rendered(tokenizer, added)]
    if _decode(tokenizer, apart) != _decode(tokenizer, whole):
        raise _unfit_template(conversation)
    return apart


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _unfit_template(conversation: Conversation) -> CogpressError:
    several = sum(message["role"] == "assistant" for message in conversation.messages) > 1
    remedy = (
        "Give every answer its own example, with the turns before it as `prompt`"
        if several
        else "Correct the chat template beside the tokenizer, or choose another base"
    )
    return CogpressError(
        "The base model's chat template writes a conversation differently once it continues, so training and serving "
        f"would differ. {remedy}."
    )


def _answer_and_rest(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], ends: frozenset[int], last: bool
) -> tuple[list[int], list[int]]:
    """The part of an assistant's turn that has loss, and what the template puts after it.

    Loss ends with the first token on which generation stops. Without one, the last answer gets the tokenizer's end
    token, after the template's own end-of-turn token if it has one.
    """
    for position, token in enumerate(ids):
        if token in ends:
            return list(ids[: position + 1]), list(ids[position + 1 :])
    end = len(ids)
    while end and not is_control(tokenizer, ids[end - 1]) and not _decode(tokenizer, [ids[end - 1]]).strip():
        end -= 1
    if last:
        return [*ids[:end], _end(tokenizer)], []
    return list(ids[:end]), list(ids[end:])
