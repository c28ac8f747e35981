"""How far weights may be from what training scored: limits for each scheme of quantization, and the user's own."""

from __future__ import annotations

from dataclasses import dataclass

from cogpress.config import Merge, Verify


@dataclass(frozen=True)
class Limits:
    """The limits. KL in nats per token; shares from 0 to 1; log-probabilities in nats."""

    mean_kl: float
    p99_kl: float
    top1_agreement: float
    perplexity_ratio: float
    score_loss: float
    general_ratio: float = 5.0
    general_kl: float = 2.0
    instructions: float = 0.25
    memorized: float = 0.1
    overfit: float = 0.5
    served_agreement: float = 0.99
    served_difference: float = 0.03


LIMITS = {
    "none": Limits(mean_kl=0.003, p99_kl=0.06, top1_agreement=0.995, perplexity_ratio=1.02, score_loss=0.02),
    "int8": Limits(mean_kl=0.02, p99_kl=0.4, top1_agreement=0.98, perplexity_ratio=1.05, score_loss=0.03),
    "fp8": Limits(mean_kl=0.02, p99_kl=0.4, top1_agreement=0.98, perplexity_ratio=1.05, score_loss=0.03),
    "int4": Limits(mean_kl=0.08, p99_kl=1.5, top1_agreement=0.95, perplexity_ratio=1.15, score_loss=0.05),
    "awq": Limits(mean_kl=0.08, p99_kl=1.5, top1_agreement=0.95, perplexity_ratio=1.15, score_loss=0.05),
}
"""By scheme of quantization. The faithful merge of the worked example measures 0.00005, the usual one 0.006 and more
(docs/measurements.md); a quantized model is allowed what its scheme cannot avoid."""

LEFT_OUT = {"nf4": "int4", "int8": "int8", "none": "none"}
"""The scheme whose limits the usual merge gets, where `merge: original` asks for it: it leaves out the error of the
base's quantization, which is as large as that of weights quantized so."""


def left_out(quantization: str, onto: Merge) -> str | None:
    """The scheme whose error a merge leaves out, as `limits` takes it.

    Args:
        quantization: of the base in training.
        onto: what was merged into.
    """
    return LEFT_OUT[quantization] if onto == "original" else None


def of(settings: Verify, scheme: str, left_out: str | None = None) -> Limits:
    """The limits for weights of a scheme; those in `model.yaml` take precedence.

    Args:
        settings: the section `verify`.
        scheme: how the weights are quantized.
        left_out: the scheme that the base was quantized with, where the merge left its error out; the wider limits of
            the two hold.
    """
    own = {name: value for name, value in settings if name in Limits.__annotations__ and value is not None}
    both = [LIMITS.get(one, LIMITS["int4"]) for one in (scheme, left_out) if one is not None]
    return Limits(**{**vars(max(both, key=lambda found: found.mean_kl)), **own})
