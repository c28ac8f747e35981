"""Examples as training rows: token ids, and which of them are learnt.

How messages become token ids is `cogpress.prompts`'s, shared with serving; batching and padding are training's.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cogpress import prompts
from cogpress.data.example import BadExample, Example, as_dicts
from cogpress.errors import CogpressError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_LOSS = -100
"""The label of a token that is read and not learnt; the value that PyTorch's cross entropy ignores."""


@dataclass(frozen=True, slots=True)
class Row:
    """One training sequence: `labels[i]` is `input_ids[i]` where it is learnt, else -100; neither is shifted."""

    input_ids: list[int]
    labels: list[int]

    @property
    def learnt(self) -> int:
        """Number of tokens with loss."""
        return sum(label != NO_LOSS for label in self.labels)


def rows(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], stop_ids: Collection[int] = ()) -> list[Row]:
    """Examples that were read, tokenized as training does, uncut.

    Raises:
        CogpressError: one cannot be tokenized.
    """
    stops = all_stops(tokenizer, stop_ids)
    try:
        return [tokenize(tokenizer, example, stops) for example in examples]
    except BadExample as bad:
        raise CogpressError(f"An example cannot be tokenized: {bad}.") from None


def all_stops(tokenizer: PreTrainedTokenizerBase, others: Collection[int]) -> frozenset[int]:
    """The ids that end an answer when the model writes one: the tokenizer's end token, and others."""
    return frozenset({_end(tokenizer), *others})


def tokenize(tokenizer: PreTrainedTokenizerBase, example: Example, stops: frozenset[int]) -> Row:
    """One example's row, of whatever length. Learnt are the answers with their end token; of `text`, all of it.

    Args:
        stops: the ids that end an answer when the model writes one, the tokenizer's end token among them.

    Raises:
        BadExample: it holds what stands for a control token, or the template refuses it.
        CogpressError: the template renders a conversation so far differently once it goes on, so that what would be
            trained is not what is served.
    """
    controls = sorted(prompts.control_texts(tokenizer))
    for content in [example.text or ""] if example.messages is None else [turn.content for turn in example.messages]:
        for control in controls:
            if control in content:
                raise BadExample(f"contains the control text {control}: give text without it, and chats as messages")
    if example.messages is None:
        ids = [*prompts.encode_plain(tokenizer, example.text or ""), _end(tokenizer)]
        return Row(ids, ids.copy())
    if not tokenizer.chat_template:
        return _plain_row(tokenizer, example)
    return _chat_row(tokenizer, example, stops)


def _end(tokenizer: PreTrainedTokenizerBase) -> int:
    end: Any = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise CogpressError("The base model's tokenizer has no end-of-sequence token, so a model cannot learn to stop.")
    return end


def _plain_row(tokenizer: PreTrainedTokenizerBase, example: Example) -> Row:
    if example.format == "messages":
        raise CogpressError(
            "The base model's tokenizer has no chat template, so `messages` cannot be trained on. Use the "
            "instruction-tuned variant of the model, or give examples as `prompt` and `completion`."
        )
    asked = prompts.encode_prompt(tokenizer, example.asked)
    whole = prompts.encode_plain(tokenizer, prompts.plain_prompt(example.asked) + example.answer)
    answer = whole[len(asked) :]
    if whole[: len(asked)] != asked:  # a token would span both, but a server is given the prompt alone
        answer = prompts.encode_plain(tokenizer, example.answer, begin=False)
    answer = [*answer, _end(tokenizer)]
    return Row([*asked, *answer], [*[NO_LOSS] * len(asked), *answer])


def _chat_row(tokenizer: PreTrainedTokenizerBase, example: Example, stops: frozenset[int]) -> Row:
    assert example.messages is not None
    ids: list[int] = []
    labels: list[int] = []
    done = ""
    for index, turn in enumerate(example.messages):
        if turn.role != "assistant" or index < example.context:
            continue
        try:
            asked = prompts.render(tokenizer, as_dicts(example.messages[:index]), ask=True)
            answered = prompts.render(tokenizer, as_dicts(example.messages[: index + 1]), ask=False)
        except CogpressError as error:
            raise BadExample(str(error).rstrip(".")) from None
        if not asked.startswith(done) or not answered.startswith(asked):
            raise _unfit_template(example)
        ids = _longer(tokenizer, ids, asked, asked[len(done) :], example)
        labels += [NO_LOSS] * (len(ids) - len(labels))
        whole = _longer(tokenizer, ids, answered, answered[len(asked) :], example)
        last = index == len(example.messages) - 1
        answer, rest = _answer_and_rest(tokenizer, whole[len(ids) :], stops, last)
        ids = [*ids, *answer, *rest]
        labels += [*answer, *[NO_LOSS] * len(rest)]
        done = answered
    return Row(ids, labels)


def _longer(tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str, added: str, example: Example) -> list[int]:
    """Ids of `text` that begin with `ids`, those of `text` without `added` at its end.

    Tokenizing the whole is what serving does, and the rule. But where the whole would merge a token across the border
    (an answer that begins with a line break, after a template that ends in one), the model is asked with the border
    as it is, and so the two parts are tokenized apart.
    """
    whole = prompts.encode_rendered(tokenizer, text)
    if whole[: len(ids)] == ids:
        return whole
    apart = [*ids, *prompts.encode_rendered(tokenizer, added)]
    if _decode(tokenizer, apart) != _decode(tokenizer, whole):
        raise _unfit_template(example)
    return apart


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _unfit_template(example: Example) -> CogpressError:
    several = sum(turn.role == "assistant" for turn in example.messages or ()) > 1
    remedy = (
        "Give every answer its own example, with the turns before it as `prompt`"
        if several
        else "Correct the chat template beside the tokenizer, or choose another base"
    )
    return CogpressError(
        f"The base model's chat template writes a conversation differently once it goes on ({example.source} line "
        f"{example.line}), so what would be trained is not what the model is asked when it is served. {remedy}."
    )


def _answer_and_rest(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stops: frozenset[int], last: bool
) -> tuple[list[int], list[int]]:
    """What of an assistant's turn is learnt, and what the template puts behind it.

    An answer is learnt up to the first token on which generation stops. Without one, the last answer is given the
    tokenizer's end token, after the template's own end-of-turn token if it has one.
    """
    for position, token in enumerate(ids):
        if token in stops:
            return list(ids[: position + 1]), list(ids[position + 1 :])
    end = len(ids)
    while end and not prompts.is_control(tokenizer, ids[end - 1]) and not _decode(tokenizer, [ids[end - 1]]).strip():
        end -= 1
    if last:
        return [*ids[:end], _end(tokenizer)], []
    return list(ids[:end]), list(ids[end:])
