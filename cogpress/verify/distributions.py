"""How far merged weights are from what training scored, token by token.

Knows the three models that matter (the adapter on the quantized base, merged weights, the usual merge onto the
original base) and compares their next-token distributions on answers; leaves the engine that serves them out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogpress.weights import base, manifest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from cogpress.data.tokenize import Row

BATCH = 8
"""Rows per forward pass."""


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
    values: list[float] = field(default_factory=list, repr=False)
    """The KL at each token, for pictures."""

    def to_dict(self) -> dict[str, Any]:
        """Everything but the values of single tokens."""
        return {name: value for name, value in asdict(self).items() if name != "values"}


def reference_model(base_folder: Path, adapter: Path, *, generates: bool = False) -> torch.nn.Module:
    """The adapter on the base as training held it: what the validation loss was measured on.

    Args:
        base_folder: the base.
        adapter: trained on it.
        generates: hold the base dequantized, which computes the same and not anew for every generated token.
    """
    base.quiet_libraries()
    from peft import PeftModel

    facts = manifest.read(adapter) or {}
    model = base.load(base_folder, facts["quantization"])
    if generates and facts["quantization"] != "none":
        model = model.dequantize()
    return PeftModel.from_pretrained(model, str(adapter)).eval()


def merged_model(folder: Path) -> torch.nn.Module:
    """A folder of weights, as it is."""
    return base.load(folder, "none").eval()


def naive_model(base_folder: Path, adapter: Path) -> torch.nn.Module:
    """peft's `merge_and_unload` onto the weights before quantization: the usual merge, for comparison only."""
    from peft import PeftModel

    model = base.load(base_folder, "none")
    merged: torch.nn.Module = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return merged.eval()


def compare(
    reference: torch.nn.Module,
    candidates: dict[str, torch.nn.Module],
    rows: Sequence[Row],
    pad_token_id: int,
    *,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda items, _total: items,
) -> dict[str, Divergence]:
    """Divergence of each candidate from the reference on the rows' answer tokens.

    Args:
        reference: the model to agree with.
        candidates: models by name, with the reference's vocabulary.
        rows: tokenized examples; only labelled tokens count.
        pad_token_id: fills short rows; its value changes nothing.
        progress: wraps the batches, given how many there are.
    """
    import torch

    from cogpress.train.loop import IGNORE, Collator

    collate = Collator(pad_token_id)
    ordered = sorted(rows, key=lambda row: len(row.input_ids))
    batches = [ordered[at : at + BATCH] for at in range(0, len(ordered), BATCH)]
    kl: dict[str, list[torch.Tensor]] = {name: [] for name in candidates}
    same: dict[str, int] = dict.fromkeys(candidates, 0)
    nll: dict[str, float] = dict.fromkeys(candidates, 0.0)
    reference_nll = 0.0
    device = base.device()
    with torch.no_grad():
        for batch in progress(batches, len(batches)):
            inputs = {name: tensor.to(device) for name, tensor in collate(batch).items()}
            labelled = inputs["labels"][:, 1:] != IGNORE
            targets = inputs["labels"][:, 1:][labelled][:, None]
            # What training evaluated: its matrix products ran in the compute dtype.
            with torch.autocast(device.type, dtype=base.compute_dtype()):
                expected = _log_probs(reference, inputs, labelled)
            reference_nll -= float(expected.gather(-1, targets).sum())
            for name, model in candidates.items():
                got = _log_probs(model, inputs, labelled)
                kl[name].append((expected.exp() * (expected - got)).sum(-1).cpu())
                nll[name] -= float(got.gather(-1, targets).sum())
                same[name] += int((expected.argmax(-1) == got.argmax(-1)).sum())
    result = {}
    for name, parts in kl.items():
        values = torch.cat(parts)
        result[name] = Divergence(
            mean_kl=float(values.mean()),
            p99_kl=float(values.quantile(0.99)),
            top1_agreement=same[name] / values.numel(),
            perplexity=math.exp(nll[name] / values.numel()),
            reference_perplexity=math.exp(reference_nll / values.numel()),
            tokens=values.numel(),
            values=values.tolist(),
        )
    return result


def answer_loss(model: torch.nn.Module, rows: Sequence[Row], pad_token_id: int) -> float:
    """Mean negative log-likelihood (nats) of the rows' labelled tokens, computed as training computes."""
    import torch

    from cogpress.train.loop import IGNORE, Collator

    collate = Collator(pad_token_id)
    device = base.device()
    total, count = 0.0, 0
    training = model.training
    model.eval()
    with torch.no_grad(), torch.autocast(device.type, dtype=base.compute_dtype()):
        for at in range(0, len(rows), BATCH):
            inputs = {name: tensor.to(device) for name, tensor in collate(rows[at : at + BATCH]).items()}
            labelled = inputs["labels"][:, 1:] != IGNORE
            targets = inputs["labels"][:, 1:][labelled]
            log_probs = _log_probs(model, inputs, labelled)
            total -= float(log_probs.gather(-1, targets[:, None]).sum())
            count += targets.numel()
    model.train(training)
    return total / max(count, 1)


def token_logprobs(
    model: torch.nn.Module, rows: Sequence[Row], pad_token_id: int
) -> list[tuple[list[float], list[bool]]]:
    """For each row, the log-probability (nats) of each labelled token, and whether the model finds it most likely."""
    import torch

    from cogpress.train.loop import IGNORE, Collator

    collate = Collator(pad_token_id)
    device = base.device()
    order = sorted(range(len(rows)), key=lambda at: len(rows[at].input_ids))
    found: dict[int, tuple[list[float], list[bool]]] = {}
    with torch.no_grad():
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            inputs = {name: tensor.to(device) for name, tensor in collate([rows[at] for at in batch]).items()}
            labels = inputs["labels"][:, 1:]
            labelled = labels != IGNORE
            log_probs = _log_probs(model, inputs, labelled)
            targets = labels[labelled]
            values = log_probs.gather(-1, targets[:, None])[:, 0].tolist()
            best = (log_probs.argmax(-1) == targets).tolist()
            end = 0
            for at, count in zip(batch, labelled.sum(1).tolist(), strict=True):
                found[at] = (values[end : end + count], best[end : end + count])
                end += count
    return [found[at] for at in range(len(rows))]


def answers(model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], max_tokens: int) -> list[str]:
    """Greedy answers to prompts of token ids, computed as training computes, all at once."""
    import torch

    longest = max(map(len, prompts))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    # Padded on the left, so that every answer starts at the same place.
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    training = model.training
    model.eval()
    with torch.no_grad(), torch.autocast(model.device.type, dtype=base.compute_dtype()):
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False, pad_token_id=pad
        )
    model.train(training)
    return [str(tokenizer.decode(row[longest:], skip_special_tokens=True)).strip() for row in out]


def _log_probs(model: torch.nn.Module, inputs: dict[str, torch.Tensor], labelled: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the tokens before each labelled one, shape (labelled tokens, vocabulary), float32."""
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).logits
    selected: torch.Tensor = logits[:, :-1][labelled].float()
    return selected.log_softmax(-1)
