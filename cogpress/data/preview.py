"""What training would see of a file of examples, for a terminal and as one page of HTML; only a tokenizer is loaded."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from cogpress import config
from cogpress.data import prepare as data
from cogpress.data.example import KEYS, key_paths, meaning
from cogpress.data.prepare import Prepared, Report
from cogpress.data.read import BadRow, rows
from cogpress.prompts import NO_LOSS, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BINS = 10
"""Bars of the histogram."""

CONTEXT = 120
"""Tokens at each end of a stretch of a row that a terminal shows; a page shows all."""

_LEARNT, _GIVEN = ("black on bright_green", "black on green"), ("", "dim")
"""Styles of tokens, in turn, so that each is seen."""


@dataclass(frozen=True, slots=True)
class Token:
    """A piece of a row: the fewest tokens that are whole characters together."""

    text: str
    learnt: bool
    count: int


@dataclass(frozen=True, slots=True)
class Preview:
    """What training would see.

    Attributes:
        path: the file.
        report: what was found in it.
        keys: every key, in how many rows it is, and how it is understood.
        shown: rows as tokens, with their weight and whether they are for training or validation.
        refused: why training would refuse the file; empty where it would not.
    """

    path: Path
    report: Report
    keys: list[tuple[str, int, str]]
    shown: list[tuple[str, list[Token]]]
    refused: str = ""


def make(
    path: Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    settings: config.Config,
    stop_ids: Sequence[int] = (),
    validation_path: Path | None = None,
    count: int = 3,
) -> Preview:
    """Read a file as training does.

    Args:
        path: the examples.
        tokenizer: the base model's.
        settings: `prompt`, `data` and `train` are used.
        stop_ids: as `prepare` takes them.
        validation_path: examples to validate with.
        count: how many rows are shown.

    Raises:
        CogpressError: the file cannot be read.
    """
    refused = ""
    try:
        prepared = data.prepare_as(settings, path, tokenizer, stop_ids, validation_path=validation_path, skip_bad=True)
        if prepared.report.problems:
            refused = data.refusal(prepared.report)
    except data.BadDataError as error:
        prepared, refused = Prepared([], [], [], [], error.report), str(error)
    both = [("training", prepared.train), ("validation", prepared.validation)]
    found = [(part, row) for part, some in both for row in some][:count]
    return Preview(
        path,
        prepared.report,
        _keys(path, settings.data),
        [
            (part if row.weight == 1 else f"{part}, weight {row.weight:g}", tokens(tokenizer, row))
            for part, row in found
        ],
        refused,
    )


def _keys(path: Path, settings: config.Data) -> list[tuple[str, int, str]]:
    found: Counter[str] = Counter()
    for _, item in rows(path, (*KEYS, *settings.rename)):
        if not isinstance(item, BadRow):
            found.update(key_paths(item))
    return [(name, count, _understood(name, settings)) for name, count in sorted(found.items())]


def _understood(path: str, settings: config.Data) -> str:
    if path.rpartition(".")[2] in settings.ignore:
        return "left out by data.ignore"
    name, turns, key = path.partition("[].")
    if name not in settings.rename:
        return meaning(path)
    said = meaning(f"{settings.rename[name]}{turns}{key}")
    return said if turns else f"{settings.rename[name]}: {said}"


def tokens(tokenizer: PreTrainedTokenizerBase, row: Row) -> list[Token]:
    """A row as pieces of text: its tokens, those of one character that several make up together."""
    made: list[Token] = []
    ids: list[int] = []
    for at, token in enumerate(row.input_ids):
        ids.append(token)
        text = str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        learnt = row.labels[at] != NO_LOSS
        last = at + 1 == len(row.labels) or (row.labels[at + 1] != NO_LOSS) != learnt
        if last or "\ufffd" not in text or len(ids) == 4:
            # SentencePiece leaves the space out where a text begins with it.
            piece = tokenizer.convert_ids_to_tokens(ids[0])
            spaced = isinstance(piece, str) and piece.startswith("▁") and not text.startswith(" ")
            made.append(Token(f" {text}" if spaced else text, learnt, len(ids)))
            ids = []
    return made


def histogram(report: Report) -> list[tuple[int, int, int]]:
    """The rows' lengths in at most `BINS` parts: from, to (inclusive, in tokens) and how many; none mixes rows that fit
    in `max_length` with rows that do not.
    """
    longest = max(report.lengths, default=0)
    width = max(1, -(-longest // BINS))
    edges = sorted(
        {*range(width, longest + width, width), *([report.max_length] if report.max_length < longest else [])}
    )
    made, begin = [], 1
    for end in edges:
        made.append((begin, end, sum(begin <= length <= end for length in report.lengths)))
        begin = end + 1
    return made


# --- terminal ---------------------------------------------------------------------------------------------------------


def printed(preview: Preview, console: Console) -> RenderableType:
    """The preview for a terminal; where it has no colours, brackets stand around what is learnt."""
    keys = Table("key", "rows", "understood as", title="Keys", title_justify="left")
    for name, count, said in preview.keys:
        keys.add_row(Text(name), f"{count:,}", Text(said))
    parts: list[RenderableType] = [preview.report.table(), keys, _bars(preview.report)]
    coloured = console.color_system is not None
    if preview.shown:
        legend = Text("Rows as tokens; learnt: ")
        legend.append("green" if coloured else "in ⟦brackets⟧", _LEARNT[0] if coloured else "")
        parts.append(legend)
    for number, (part, some) in enumerate(preview.shown, start=1):
        parts += [Text(f"\n{_heading(number, part, some)}", "bold"), _row(some, coloured)]
    return Group(*parts)


def _heading(number: int, part: str, some: Sequence[Token]) -> str:
    learnt = sum(token.count for token in some if token.learnt)
    return f"Row {number} ({part}): {sum(token.count for token in some):,} tokens, {learnt:,} learnt"


def _bars(report: Report) -> Text:
    bars = histogram(report)
    most = max((count for _, _, count in bars), default=0) or 1
    made = Text.assemble(("Length in tokens\n", "italic"))
    for begin, end, count in bars:
        over = end > report.max_length
        made.append(f"{f'{begin:,}-{end:,}':>15} {count:>7,} ")
        made.append("█" * -(-40 * count // most), "red" if over else "blue")
        made.append(" over max_length\n" if over and count else "\n")
    return made


def _row(some: Sequence[Token], coloured: bool) -> Text:
    made = Text()
    for learnt, stretch in _stretches(some):
        if learnt and not coloured:
            made.append("⟦")
        for index, token in _shortened(stretch):
            if token is None:
                made.append(f" … {index:,} more … ", "italic")
            else:
                made.append(token.text, (_LEARNT if learnt else _GIVEN)[index % 2] if coloured else "")
        if learnt and not coloured:
            made.append("⟧")
    return made


def _stretches(some: Sequence[Token]) -> Iterator[tuple[bool, list[Token]]]:
    """Neighbours that are all learnt, or all not."""
    stretch: list[Token] = []
    for token in some:
        if stretch and token.learnt != stretch[0].learnt:
            yield stretch[0].learnt, stretch
            stretch = []
        stretch.append(token)
    if stretch:
        yield stretch[0].learnt, stretch


def _shortened(stretch: Sequence[Token]) -> Iterator[tuple[int, Token | None]]:
    """Tokens by their index; in the middle of a long stretch, how many are left out and None."""
    left_out = range(CONTEXT, len(stretch) - CONTEXT)
    for index, token in enumerate(stretch):
        if index not in left_out:
            yield index, token
        elif index == CONTEXT:
            yield len(left_out), None


# --- page -------------------------------------------------------------------------------------------------------------

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } td, th { text-align: left; padding: .2rem .8rem .2rem 0; vertical-align: top;
  border-bottom: 1px solid #e4e4e4; overflow-wrap: anywhere; } td.n { text-align: right; }
td.n, td:first-child { white-space: nowrap; }
.bar { display: inline-block; height: .8rem; background: #3b6ea8; } .over { background: #c8553d; }
.refused { color: #a3341d; } pre { font: 13px/1.7 ui-monospace, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; border: 1px solid #e4e4e4; border-radius: 6px; padding: .8rem; }
.g0 { color: #444; } .g1 { color: #444; background: #f1f1f1; } .l0 { background: #b7e4c0; } .l1 { background: #8fd19e; }
.e { color: #999; }
"""


def page(preview: Preview) -> str:
    """The preview as one page of HTML that loads nothing; every token of the shown rows is on it."""
    escape = html.escape
    name = escape(preview.path.name)
    keys = "".join(
        f'<tr><td><code>{escape(key)}</code></td><td class="n">{count:,}</td><td>{escape(said)}</td></tr>'
        for key, count, said in preview.keys
    )
    found = "".join(
        f'<tr><td>{escape(what)}</td><td class="n">{escape(count)}</td><td>{escape(done)}</td></tr>'
        for what, count, done in preview.report.told()
    )
    bars = histogram(preview.report)
    most = max((count for _, _, count in bars), default=0) or 1
    over = preview.report.max_length
    lengths = "".join(
        f'<tr><td class="n">{begin:,} to {end:,}</td><td class="n">{count:,}</td><td>'
        f'<span class="bar{" over" if end > over else ""}" style="width:{24 * count / most:.2f}rem"></span>'
        f"{' over max_length' if end > over and count else ''}</td></tr>"
        for begin, end, count in bars
    )
    shown = "".join(
        f"<h2>{escape(_heading(number, part, some))}</h2>\n<pre>{''.join(map(_span, range(len(some)), some))}</pre>\n"
        for number, (part, some) in enumerate(preview.shown, start=1)
    )
    refused = f'<p class="refused">{escape(preview.refused)}</p>' if preview.refused else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{name}</title><style>{_STYLE}</style></head>\n<body>\n"
        f"<h1>What training sees of {name}</h1>\n{refused}\n<table>{found}</table>\n"
        f"<h2>Keys</h2>\n<table><tr><th>key</th><th>rows</th><th>understood as</th></tr>{keys}</table>\n"
        f"<h2>Length in tokens</h2>\n<table>{lengths}</table>\n"
        '<p>Below, each box is a token; <span class="l0">green</span> ones are learnt.</p>\n'
        f"{shown}</body></html>\n"
    )


def _span(index: int, token: Token) -> str:
    text = html.escape(token.text).replace("\n", '<span class="e">↵</span>\n')
    return f'<span class="{"l" if token.learnt else "g"}{index % 2}">{text}</span>'
