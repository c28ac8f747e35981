"""Greedy answers of a base and its tuned model, side by side."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cogpress import prompts
from cogpress.files import write_json
from cogpress.prompts import Conversation
from cogpress.train.layouts import by_tokens
from cogpress.weights import base

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWERS = "answers.json"
"""The file of a run that holds them."""

GENERATED_TOKENS = 8192
"""Places of a batch whose answers are generated together, prompts and answers: 1 GiB of the keys and values of an 8 B
model."""

JUDGED = 32
"""Validation answers that a model is judged on where its first ones are all wrong."""

SHOWN_CHARACTERS = 400
"""Of each text in a table."""


def generate(model: Any, tokenizer: PreTrainedTokenizerBase, asked: Sequence[list[int]], max_tokens: int) -> list[str]:
    """Greedy answers to prompts of token ids, computed as training computes, in batches of `GENERATED_TOKENS`."""
    found: dict[int, str] = {}
    for batch in by_tokens([len(prompt) + max_tokens for prompt in asked], GENERATED_TOKENS):
        found |= zip(batch, _together(model, tokenizer, [asked[at] for at in batch], max_tokens), strict=True)
    return [found[at] for at in range(len(asked))]


def _together(model: Any, tokenizer: PreTrainedTokenizerBase, asked: Sequence[list[int]], max_tokens: int) -> list[str]:
    import torch

    longest = max(map(len, asked))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    # Padded on the left, so that every answer starts at the same place.
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in asked], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in asked], device=model.device)
    training = model.training
    model.eval()
    with torch.no_grad(), base.autocast(model.dtype):
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False, pad_token_id=pad
        )
    model.train(training)
    return [str(tokenizer.decode(row[longest:], skip_special_tokens=True)).strip() for row in out]


def compare(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Conversation],
    run: Path,
    console: Console,
    *,
    count: int = 4,
    score: Callable[[str, str], bool] | None = None,
) -> list[dict[str, str]]:
    """Greedy answers of the base and of the tuned model to validation prompts.

    Shown as a table and written to `answers.json` in the run's folder. Where the base gives a right answer and the
    tuned model none, more are asked, for a few can be bad luck.

    Args:
        model: the base with its adapter, which is switched off for the base's answers.
        tokenizer: the base's.
        examples: for validation.
        run: the run's folder.
        console: where the table goes.
        count: how many examples are shown.
        score: from the expected and the given answer to whether it is right.
    """
    (run / ANSWERS).unlink(missing_ok=True)  # of an earlier training
    asked = [example for example in examples if example.messages]
    if not asked:
        return []
    rows = _ask(model, tokenizer, asked[:count])
    if score and fails(rows, score):
        rows += [row for at in range(count, JUDGED, count) for row in _ask(model, tokenizer, asked[at : at + count])]
    write_json(run / ANSWERS, rows)
    console.print(table(rows[:count], "Validation answers", marked=not console.is_terminal))
    return rows


def fails(rows: Sequence[dict[str, str]], score: Callable[[str, str], bool]) -> bool:
    """Whether the tuned model gives no right answer where the base gives some; not where the score fails itself."""
    try:
        right = {name: any(score(row["expected"], row[name]) for row in rows) for name in ("base", "tuned")}
    except Exception:  # noqa: BLE001 - a user's function must not end a training; scripts/verify shows its error
        return False
    return right["base"] and not right["tuned"]


def _ask(model: Any, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Conversation]) -> list[dict[str, str]]:
    if not examples:
        return []
    asked = [prompts.encode_example(tokenizer, example) for example in examples]
    expected = [prompts.answer_text(tokenizer, row).strip() for row in prompts.rows(tokenizer, examples)]
    # A base that does not know the task rarely ends by itself.
    max_tokens = max(len(tokenizer.encode(answer)) for answer in expected) + 8
    with model.disable_adapter():
        before = generate(model, tokenizer, asked, max_tokens)
    after = generate(model, tokenizer, asked, max_tokens)
    return [
        {"prompt": example.prompt, "expected": answer, "base": old, "tuned": new}
        for example, answer, old, new in zip(examples, expected, before, after, strict=True)
    ]


def table(rows: Sequence[dict[str, str]], title: str, *, marked: bool) -> Table:
    """Prompts and answers below each other, so that each has the terminal's whole width.

    The expected answer stands right above the last one, in which differences are marked.

    Args:
        rows: the prompt first, then answers by what gave them, one of them `expected`.
        title: of the table.
        marked: put differences into brackets, for where no colours are seen.
    """
    made = Table(title=title, title_justify="left", show_header=False, expand=True)
    made.add_column(no_wrap=True, style="bold")
    made.add_column(no_wrap=True)
    made.add_column(ratio=1, overflow="fold")
    for row in rows:
        prompt, *names = [name for name in row if name != "expected"]
        flat = {name: " ".join(text.split()) for name, text in row.items()}
        made.add_row(prompt, "", _short(flat[prompt]))
        for name in [*names[:-1], "expected", *names[-1:]]:
            right = flat[name] == flat["expected"]
            mark = "" if name == "expected" else Text("✓", "green") if right else Text("✗", "bold red")
            made.add_row(name, mark, differences(flat["expected"], flat[name], marked=marked))
        made.add_section()
    return made


def differences(expected: str, given: str, *, marked: bool = False) -> Text:
    """A given answer with what is not as expected in red; one that has little in common with it stays plain."""
    wanted, got = (re.findall(r"\w+|\W", text) for text in (expected, given))
    matcher = difflib.SequenceMatcher(None, wanted, got, autojunk=False)
    if given == expected or matcher.ratio() < 0.5:
        return Text(_short(given))
    shown = Text()
    for kind, _, _, start, end in matcher.get_opcodes():
        piece = "".join(got[start:end])
        if kind == "equal":
            shown.append(piece)
        else:
            # What is missing leaves nothing that could be red.
            shown.append(f"[{piece}]" if marked or not piece else piece, "bold red")
    return shown


def _short(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"
