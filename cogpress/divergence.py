"""How far merged weights are from what training scored, token by token.

Knows the three models that matter (the adapter on the quantized base, merged weights, the usual merge onto the
original base) and compares their next-token distributions on answers; leaves the engine that serves them out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogpress import base, manifest

if TYPE_CHECKING:
    import torch

    from cogpress.data import Row

BATCH = 8
"""Rows per forward pass."""


@dataclass(frozen=True)
class Divergence:
    """KL(reference || candidate) in nats over answer tokens, and the share of them with the same top token."""

    mean_kl: float
    p99_kl: float
    top1_agreement: float
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def reference_model(base_folder: Path, adapter: Path) -> torch.nn.Module:
    """The adapter on the base as training held it: what the validation loss was measured on."""
    base.quiet_libraries()
    from peft import PeftModel

    facts = manifest.read(adapter) or {}
    model = base.load(base_folder, facts["quantization"])
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

    from cogpress.trainer import IGNORE, Collator

    collate = Collator(pad_token_id)
    ordered = sorted(rows, key=lambda row: len(row.input_ids))
    batches = [ordered[at : at + BATCH] for at in range(0, len(ordered), BATCH)]
    kl: dict[str, list[torch.Tensor]] = {name: [] for name in candidates}
    same: dict[str, int] = dict.fromkeys(candidates, 0)
    device = base.device()
    with torch.no_grad():
        for batch in progress(batches, len(batches)):
            inputs = {name: tensor.to(device) for name, tensor in collate(batch).items()}
            labelled = inputs["labels"][:, 1:] != IGNORE
            # What training evaluated: its matrix products ran in the compute dtype.
            with torch.autocast(device.type, dtype=base.compute_dtype()):
                expected = _log_probs(reference, inputs, labelled)
            for name, model in candidates.items():
                got = _log_probs(model, inputs, labelled)
                kl[name].append((expected.exp() * (expected - got)).sum(-1).cpu())
                same[name] += int((expected.argmax(-1) == got.argmax(-1)).sum())
    result = {}
    for name, parts in kl.items():
        values = torch.cat(parts)
        result[name] = Divergence(
            mean_kl=float(values.mean()),
            p99_kl=float(values.quantile(0.99)),
            top1_agreement=same[name] / values.numel(),
            tokens=values.numel(),
        )
    return result


def answer_loss(model: torch.nn.Module, rows: Sequence[Row], pad_token_id: int) -> float:
    """Mean negative log-likelihood (nats) of the rows' labelled tokens, computed as training computes."""
    import torch

    from cogpress.trainer import IGNORE, Collator

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


def _log_probs(model: torch.nn.Module, inputs: dict[str, torch.Tensor], labelled: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the tokens before each labelled one, shape (labelled tokens, vocabulary), float32."""
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).logits
    selected: torch.Tensor = logits[:, :-1][labelled].float()
    return selected.log_softmax(-1)
