"""Next-token distributions of merged weights and of what training scored, compared token by token."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogpress import phases
from cogpress.merge import adapter as adapters
from cogpress.prompts import NO_LOSS
from cogpress.train.layouts import by_tokens
from cogpress.weights import base, manifest

if TYPE_CHECKING:
    import torch

    from cogpress.prompts import Row

BATCH_TOKENS = 2048
"""Tokens per forward pass, padding included."""

COMPARED_ROWS = 64
"""Rows on which training compares merges: enough for a mean KL, seconds on a laptop."""

STORED_BYTES = 4 << 30
"""Size on the disk from which no more of the reference's distributions are stored: 8,000 tokens of a vocabulary of
128,000."""

_LARGEST_NLL = 700.0
"""Nats from which a perplexity is no number any more."""

Load = Callable[[], "torch.nn.Module"]
"""Loads a model; can be pickled where there is a GPU, as `phases.run` wants it."""


@dataclass(frozen=True)
class Scored:
    """A model's log-probabilities (nats) of a row's labelled tokens, and whether it finds each the most likely."""

    logprobs: list[float]
    most_likely: list[bool]


@dataclass(frozen=True)
class Divergence:
    """KL(reference || candidate) in nats over answer tokens, and the share of them with the same top token.

    The perplexities are of the expected answers, the candidate's and the reference's.
    """

    mean_kl: float
    p99_kl: float
    top1_agreement: float
    perplexity: float
    reference_perplexity: float
    tokens: int
    beside: Any = None
    """What else of the candidate was measured, where that was asked for."""
    values: list[float] = field(default_factory=list, repr=False)
    """The KL at each token, for pictures."""
    scored: list[Scored] = field(default_factory=list, repr=False)
    """What the candidate makes of each row."""
    reference_scored: list[Scored] = field(default_factory=list, repr=False)
    """What the reference makes of each row."""

    def to_dict(self) -> dict[str, Any]:
        """Everything but the values of single tokens and what else was measured."""
        others = ("beside", "values", "scored", "reference_scored")
        return {name: value for name, value in vars(self).items() if name not in others}


def reference_model(base_folder: Path, adapter: Path, *, generates: bool = False) -> torch.nn.Module:
    """The adapter on the base as training held it, in its compute dtype: what the validation loss was measured on.

    Args:
        base_folder: the base.
        adapter: trained on it.
        generates: hold the base dequantized: the same weights, not dequantized anew for every generated token.
    """
    base.quiet_libraries()
    from peft import PeftModel

    facts = manifest.read(adapter) or {}
    model = base.load(base_folder, facts["quantization"], dtype=base.trained_dtype(facts))
    if generates and facts["quantization"] != "none":
        model = model.dequantize()
    _resize(model, adapter)
    return PeftModel.from_pretrained(model, str(adapter)).eval()


def merged_model(folder: Path) -> torch.nn.Module:
    """A folder of weights, as it is."""
    return base.load(folder, "none").eval()


def naive_model(base_folder: Path, adapter: Path) -> torch.nn.Module:
    """peft's `merge_and_unload` onto the weights before quantization: the usual merge, for comparison only."""
    from peft import PeftModel

    model = base.load(base_folder, "none")
    _resize(model, adapter)
    merged: torch.nn.Module = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return merged.eval()


def _resize(model: Any, adapter: Path) -> None:
    """Give the model the rows of the adapter's embedding, which an adapter made elsewhere may have resized."""
    rows = adapters.read(adapter).vocabulary
    if rows is not None and rows != model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(rows, mean_resizing=False)


def compare(
    reference: Load,
    candidates: dict[str, Load],
    rows: Sequence[Row],
    pad_token_id: int,
    *,
    beside: Callable[[Any], Any] | None = None,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda items, _total: items,
) -> dict[str, Divergence]:
    """Divergence of each candidate from the reference on the rows' answer tokens.

    One model is in memory at a time, as `phases.run` has it: the reference's distributions wait in a file, of at most
    `STORED_BYTES`. Where they are larger, the rows are compared in parts, and each model is loaded once for every part.

    Args:
        reference: loads the model to agree with.
        candidates: load models by name, with the reference's vocabulary.
        rows: tokenized examples; only labelled tokens count.
        pad_token_id: fills short rows; its value changes nothing.
        beside: measures something else of each candidate, once; travels as a `Load` does.
        progress: wraps the batches, given how many there are.
    """
    batches = list(_batches(rows))
    total = len(batches) * (1 + len(candidates))
    ticks = iter(progress(range(total), total))
    tick = partial(next, ticks, None)
    expected: dict[int, Scored] = {}
    found = {name: _Sums() for name in candidates}
    done = 0
    while done < len(batches):
        with tempfile.TemporaryDirectory(prefix="cogpress-") as folder:
            at = Path(folder)
            scored, stored = phases.run(
                "reference", _stored, reference, batches[done:], rows, pad_token_id, at, tick=tick
            )
            expected |= scored
            part = batches[done : done + stored]
            for name, load in candidates.items():
                other = beside if found[name].beside is None else None
                found[name].add(
                    phases.run("comparison", _compared, load, part, rows, pad_token_id, at, other, tick=tick)
                )
        done += stored
    tick()  # lets a progress bar finish
    reference_scored = [expected[at] for at in range(len(rows))]
    return {name: sums.divergence(reference_scored) for name, sums in found.items()}


@dataclass
class _Sums:
    """What a candidate's batches gave so far."""

    kl: list[float] = field(default_factory=list)
    same: int = 0
    scored: dict[int, Scored] = field(default_factory=dict)
    beside: Any = None

    def add(self, more: _Sums) -> None:
        self.kl += more.kl
        self.same += more.same
        self.scored |= more.scored
        self.beside = self.beside if more.beside is None else more.beside

    def divergence(self, reference_scored: list[Scored]) -> Divergence:
        import torch

        values = torch.tensor(self.kl)
        scored = [self.scored[at] for at in range(len(reference_scored))]
        return Divergence(
            beside=self.beside,
            mean_kl=float(values.mean()),
            p99_kl=float(values.quantile(0.99)),
            top1_agreement=self.same / values.numel(),
            perplexity=math.exp(mean_nll(scored)),
            reference_perplexity=math.exp(mean_nll(reference_scored)),
            tokens=values.numel(),
            values=self.kl,
            scored=scored,
            reference_scored=reference_scored,
        )


def _stored(
    load: Load,
    batches: list[list[int]],
    rows: Sequence[Row],
    pad_token_id: int,
    folder: Path,
    tick: Callable[[], object],
) -> tuple[dict[int, Scored], int]:
    """Write the reference's log-probabilities, a file for each batch, as far as they may; return how many batches."""
    import numpy as np
    import torch

    scored: dict[int, Scored] = {}
    written, number = 0, 0
    model = load()
    with torch.no_grad():
        for number, batch in enumerate(batches, 1):
            chosen = [rows[at] for at in batch]
            # What training evaluated: its matrix products ran in the compute dtype.
            with base.autocast(model.dtype):  # type: ignore[arg-type]
                logprobs, targets = _log_probs(model, chosen, pad_token_id)
            scored |= zip(batch, _by_row(logprobs, targets, chosen), strict=True)
            np.save(folder / f"{number - 1}.npy", logprobs.cpu().numpy())
            written += logprobs.nbytes
            tick()
            if written >= STORED_BYTES:
                break
    return scored, number


def _compared(
    load: Load,
    batches: list[list[int]],
    rows: Sequence[Row],
    pad_token_id: int,
    folder: Path,
    beside: Callable[[Any], Any] | None,
    tick: Callable[[], object],
) -> _Sums:
    import numpy as np
    import torch

    sums = _Sums()
    model = load()
    if beside is not None:
        sums.beside = beside(model)
    with torch.no_grad():
        for number, batch in enumerate(batches):
            chosen = [rows[at] for at in batch]
            got, targets = _log_probs(model, chosen, pad_token_id)
            expected = torch.from_numpy(np.load(folder / f"{number}.npy")).to(got.device)
            sums.kl += (expected.exp() * (expected - got)).sum(-1).tolist()
            sums.same += int((expected.argmax(-1) == got.argmax(-1)).sum())
            sums.scored |= zip(batch, _by_row(got, targets, chosen), strict=True)
            tick()
    return sums


def mean_nll(scored: Iterable[Scored]) -> float:
    """Mean negative log-likelihood (nats) of labelled tokens."""
    values = [value for one in scored for value in one.logprobs]
    return -sum(values) / max(len(values), 1)


def perplexity(model: Any, rows: Sequence[Row], pad_token_id: int) -> float:
    """A model's perplexity of the rows' labelled tokens."""
    return perplexity_of(mean_nll(score(model, rows, pad_token_id)))


def perplexity_of(nll: float) -> float:
    """The perplexity of a mean negative log-likelihood in nats; a finite one, unless that is none."""
    return math.exp(min(nll, _LARGEST_NLL))


def answer_loss(model: Any, rows: Sequence[Row], pad_token_id: int) -> float:
    """Mean negative log-likelihood (nats) of the rows' labelled tokens, computed as training computes."""
    training = model.training
    model.eval()
    with base.autocast(model.dtype):
        scored = score(model, rows, pad_token_id)
    model.train(training)
    return mean_nll(scored)


def score(model: Any, rows: Sequence[Row], pad_token_id: int) -> list[Scored]:
    """What a model makes of each row's labelled tokens."""
    import torch

    found: dict[int, Scored] = {}
    with torch.no_grad():
        for batch, logprobs, targets in each(model, rows, pad_token_id):
            found |= zip(batch, _by_row(logprobs, targets, [rows[at] for at in batch]), strict=True)
    return [found[at] for at in range(len(rows))]


def each(model: Any, rows: Sequence[Row], pad_token_id: int) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """Batches of rows, always the same: their indices, log-probabilities before each labelled token, and these tokens.

    The log-probabilities are float32, shape (labelled tokens, vocabulary).
    """
    for batch in _batches(rows):
        yield batch, *_log_probs(model, [rows[at] for at in batch], pad_token_id)


def _batches(rows: Sequence[Row]) -> Iterator[list[int]]:
    """Indices of the rows, by length, in batches of at most `BATCH_TOKENS`."""
    return by_tokens([len(row.input_ids) for row in rows], BATCH_TOKENS)


def _log_probs(model: Any, rows: Sequence[Row], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities before each labelled token, shape (labelled tokens, vocabulary), float32, and these tokens."""
    from cogpress.train.objective import AnswerLogits, Collator

    made = Collator(pad_token_id)(rows).items()
    batch = {name: one.to(base.device()) if hasattr(one, "to") else one for name, one in made}
    logits = AnswerLogits(model)
    try:
        found, targets = logits(model, batch)
    finally:
        logits.release()
    return found.float().log_softmax(-1), targets


def _by_row(log_probs: torch.Tensor, targets: torch.Tensor, rows: Sequence[Row]) -> Iterator[Scored]:
    values = log_probs.gather(-1, targets[:, None])[:, 0].tolist()
    best = (log_probs.argmax(-1) == targets).tolist()
    end = 0
    for row in rows:
        start, end = end, end + sum(label != NO_LOSS for label in row.labels[1:])
        yield Scored(values[start:end], best[start:end])
