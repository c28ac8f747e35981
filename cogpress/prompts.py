"""Messages to token ids, in one place, so that training and serving feed the model the same ids.

Knows the tokenizer's chat template, which of its tokens are control tokens, and how to keep text that merely looks
like one from becoming one. Knows nothing of files, examples or losses, and imports nothing that a server does not
have, so that serving does not need what training needs.
"""

from __future__ import annotations

import contextlib
import functools
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import TemplateError, meta

from cogpress.errors import CogpressError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]
"""`{"role": ..., "content": ...}`; where the template has tools, `tool_calls`, `tool_call_id` and `name`, too."""

_TEMPLATE_FAULTS = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What rendering raises: a template is a program, and not only what it raises on purpose."""

_CUT = secrets.token_hex(16)
"""Stands in a rendering where the text must be tokenized in two pieces; random, so that no input can hold it."""


def chat(prompt: str, system: str = "") -> list[dict[str, str]]:
    """The messages that ask one question: `[system?, user]`; an empty system text adds no system message."""
    messages = [{"role": "system", "content": system}] if system else []
    return [*messages, {"role": "user", "content": prompt}]


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    tools: Sequence[Any] = (),
    thinking: bool | None = None,
) -> list[int]:
    """Token ids of a conversation up to where the model's next answer begins.

    The ids are those of `tokenizer.apply_chat_template(messages, add_generation_prompt=True)`, except where a message
    holds the text of a control token: that text is tokenized as ordinary text. Without a chat template the messages
    must be `[system?, user]`, and their plain text is the prompt.

    Args:
        tokenizer: the model's.
        messages: the conversation.
        tools: descriptions of the functions that the model may call, as its template takes them.
        thinking: whether to reason first; None leaves it to the template.

    Raises:
        CogpressError: the template refuses the messages, or has no tools or switch for reasoning, or there is no
            template and they are a conversation.
    """
    knows = variables(tokenizer)
    if tools and "tools" not in knows:
        raise CogpressError("This model's chat template knows no tools. Leave tools empty, or describe them in text.")
    switch = next((name for name in SWITCHES if name in knows), None)
    if thinking is not None and switch is None:
        raise CogpressError("This model's chat template has no switch for reasoning. Leave thinking empty.")
    if not tokenizer.chat_template:
        return encode_plain(tokenizer, plain_prompt(messages))
    more: dict[str, Any] = {"tools": list(tools)} if tools else {}
    if thinking is not None and switch is not None:
        more[switch] = thinking
    return encode_rendered(tokenizer, render(tokenizer, messages, ask=True, **more))


SWITCHES = ("enable_thinking", "thinking")
"""By what names chat templates know the switch for reasoning: Qwen's and SmolLM3's, and DeepSeek's and Granite's."""


def variables(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """What the chat template asks for beside messages: `tools`, a switch for reasoning, and the like."""
    return _variables(str(tokenizer.chat_template or ""))


@functools.lru_cache(maxsize=8)
def _variables(template: str) -> frozenset[str]:
    # A block of transformers' own, which marks answers in training and which plain Jinja does not know.
    plain = re.sub(r"\{%-?\s*(?:end)?generation\s*-?%\}", "", template)
    # autoescape is for HTML: nothing is rendered here, only parsed.
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=True)
    try:
        return frozenset(meta.find_undeclared_variables(environment.parse(plain)))
    except TemplateError:
        return frozenset()  # rendering will say what is wrong with it


def plain_prompt(messages: Sequence[Message]) -> str:
    """What a model without a chat template is asked: the system text, a blank line and the user's text.

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
    """Token ids of text that no template wraps, without an end token; control-token text in it stays ordinary text.

    Args:
        begin: put the tokenizer's begin token first, if it has one.
    """
    first, *others = _harmless(tokenizer, text).split(_CUT)
    ids = _encode(tokenizer, first, special=begin)
    if ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()  # some tokenizers end every text; the model is to go on from here
    for piece in others:
        ids += _encode(tokenizer, piece)
    return ids


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, ask: bool, **more: Any) -> str:
    """The chat template's text for messages, to be tokenized by `encode_rendered` and by nothing else.

    Args:
        ask: end where the assistant's answer begins, instead of after the last message.
        more: what else the template takes.

    Raises:
        CogpressError: the template refuses these messages (it has no system role, wants other turns, ...).
    """
    safe = _all_harmless(tokenizer, list(messages))
    more = _all_harmless(tokenizer, more)
    try:
        text: Any = tokenizer.apply_chat_template(safe, tokenize=False, add_generation_prompt=ask, **more)
    except _TEMPLATE_FAULTS as error:
        reason = " ".join(str(error).split()).replace(_CUT, "")
        raise CogpressError(
            f"The base model's chat template refuses turns {', '.join(m['role'] for m in messages)}: {reason}"
        ) from None
    return str(text)


def encode_rendered(tokenizer: PreTrainedTokenizerBase, rendered: str) -> list[int]:
    """Token ids of what `render` returned, or of a part of it. The template itself writes the begin token."""
    ids: list[int] = []
    for piece in rendered.split(_CUT):
        ids += _encode(tokenizer, piece)
    return ids


def control_texts(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """The texts that steer a chat: what the template writes around messages, and the named special tokens.

    Other special tokens (`<filename>` in a code model, say) may well be written by people and are not among them;
    `encode_prompt` makes ordinary text of those as well.
    """
    return _controls(tokenizer, str(tokenizer.chat_template or "")).steering


def is_control(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    """Whether this id is one that text in a message never becomes."""
    return token in _controls(tokenizer, str(tokenizer.chat_template or "")).ids


@dataclass(frozen=True, slots=True)
class _Controls:
    steering: frozenset[str]
    ids: frozenset[int]
    texts: tuple[str, ...]
    inside: re.Pattern[str]
    """Matches one character wherever the text of a control token begins."""
    folds: bool
    """Whether texts other than its own can become a control token, because it is matched after normalization."""


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

    Some models do not mark their turn tokens as special, so the mark alone does not find them. A question is used and
    not an answer because templates put `<think>` and the like around answers, which answers may hold themselves.
    """
    if not tokenizer.chat_template:
        return set()
    text = ""
    for messages in (chat("x"), chat("x", "x")):
        with contextlib.suppress(*_TEMPLATE_FAULTS):  # no system role, say: what is wrong with a template, render tells
            text += str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False))
    return {token for token in added if token.strip() and token in text}


def _all_harmless(tokenizer: PreTrainedTokenizerBase, value: Any) -> Any:
    """JSON with every text in it made harmless; names of fields, too, which a template may write."""
    if isinstance(value, str):
        return _harmless(tokenizer, value)
    if isinstance(value, Mapping):
        return {_harmless(tokenizer, str(name)): _all_harmless(tokenizer, one) for name, one in value.items()}
    if isinstance(value, list):
        return [_all_harmless(tokenizer, one) for one in value]
    return value


def _harmless(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Text cut inside everything that would become a control token.

    The cut is after the first character, so a template still sees nearly the text it was given and may trim it or
    branch on it, and no piece between two cuts holds the whole text of a control token. Tokenizers have a switch for
    this (`split_special_tokens`), but it is state of the tokenizer that a concurrent request could flip, and it does
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
    # verbose off: a text longer than the model's context is judged by the caller, not by a warning
    encoded: Any = tokenizer(text, add_special_tokens=special, return_attention_mask=False, verbose=False)
    return list(encoded["input_ids"])
