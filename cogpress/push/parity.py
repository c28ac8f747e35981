"""Replicate versus transformers here: greedy tokens and log-probabilities of the same weights, and speed."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cogpress.cog import form
from cogpress.config import Config, Prompt
from cogpress.errors import CogpressError
from cogpress.prompts import Conversation, answer_text, encode_example, rows
from cogpress.push import testcases
from cogpress.replicate.api import Replicate, code_of, text_of
from cogpress.serve import model as serving
from cogpress.verify import distributions, limits, parity, references
from cogpress.verify import run as verify
from cogpress.verify.limits import Limits
from cogpress.verify.report import Check
from cogpress.weights import base, fetch, manifest
from cogpress.weights.filenames import ADAPTER

_CAUSE = (
    "Replicate's answers differ from those of transformers here with the same weights. Check serve.* in model.yaml "
    "(mode, dtype), the hardware, and whether the image has these weights."
)


@dataclass(frozen=True)
class Reference:
    """The local weights and the questions.

    Attributes:
        folder: of the weights.
        examples: held out.
        scheme: the weights' quantization.
        answers: the verification's reference answers to the examples, None where one was not asked; empty where there
            are none at all.
    """

    folder: Path
    examples: list[Conversation]
    scheme: str
    answers: list[str | None]

    @property
    def expected(self) -> list[str]:
        """The answers as a server would give them."""
        tokenizer = base.tokenizer(self.folder)
        return [answer_text(tokenizer, row) for row in rows(tokenizer, self.examples, base.stop_ids(self.folder))]

    def depends(self) -> Any:
        """What the comparison depends on, as JSON."""
        asked = [[example.asked, example.tools, example.messages[-1]] for example in self.examples]
        return [asked, self.scheme, manifest.fingerprint(self.folder), self.answers]


def reference(settings: Config, root: Path) -> Reference:
    """Find the weights that the image serves, and held-out examples.

    Raises:
        CogpressError: there are none.
    """
    try:
        # Weights that are fetched at the start are the ones served, whatever this folder holds.
        named_source = settings.serve.weights if settings.push.weights == "fetched" else None
        folder = fetch.model(serving.find_weights(named_source, root, settings.serve), root / ".cache").folder
        facts = manifest.read(folder) or {}
        named = settings.verify.examples is not None
        run = None
        try:
            run = verify.find_run(root, folder, facts)
        except CogpressError:
            if not named:
                raise
        prompt = Prompt.model_validate(facts["prompt"]) if "prompt" in facts else settings.prompt
        examples = verify.held_out(settings.verify, root, run or root, prompt, settings.data)
        examples = examples[: settings.push.rows]
    except CogpressError as error:
        raise CogpressError(f"{error} Or set push.parity to false in model.yaml to skip the comparison.") from None
    answers: list[str | None] = []
    if run is not None:
        tokenizer = base.tokenizer(folder)
        prompts = [encode_example(tokenizer, example) for example in examples]
        answers = references.kept(run, manifest.fingerprint(run / ADAPTER), prompts)
    return Reference(folder, examples, (facts.get("compression") or {}).get("scheme", "none"), answers)


def inputs(reference: Reference) -> list[dict[str, Any]]:
    """Inputs for Replicate: greedy, with each token's log-probability."""
    tokenizer = base.tokenizer(reference.folder)
    longest = max(len(tokenizer.encode(answer)) for answer in reference.expected)
    common = {"system_prompt": "", "temperature": 0, "max_tokens": 2 * longest + 16, "logprobs": 0}
    return [
        {
            "messages": json.dumps(example.asked, ensure_ascii=False),
            **({"tools": json.dumps(example.tools, ensure_ascii=False)} if example.tools else {}),
            **common,
        }
        for example in reference.examples
    ]


def compare(
    replicate: Replicate,
    version: str,
    settings: Config,
    found: Reference,
    fields: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> tuple[list[Check], dict[str, Any]]:
    """Ask Replicate, compare with transformers and measure speed.

    Args:
        replicate: where.
        version: the pushed version's id.
        settings: limits and the task's score.
        found: the local weights and the examples.
        fields: the version's inputs, as `schema.fields` gives them; required ones that messages replace are filled.

    Returns:
        the checks and the metrics: agreement, difference, scores, speeds.

    Raises:
        CogpressError: a prediction fails or has no log-probabilities.
    """

    def ask(given: dict[str, Any]) -> dict[str, Any]:
        made = testcases.predict(replicate, version, given, settings.push.timeout)
        if made.get("status") != "succeeded":
            told = code_of(made) or made.get("error")
            raise CogpressError(f"Replicate's answer to a held-out example {made.get('status')}: {told}")
        return made

    asked = [form.completed(given, fields) for given in inputs(found)]
    began = time.monotonic()
    with ThreadPoolExecutor(settings.push.parallel) as pool:
        answers = list(pool.map(ask, asked))
    seconds = time.monotonic() - began
    served = parity.Served([_answer(made) for made in answers], [], 0.0, 0.0, 0.0)
    base.quiet_libraries()
    tokenizer = base.tokenizer(found.folder)
    prompts = [encode_example(tokenizer, example) for example in found.examples]
    same = parity.compare(
        partial(distributions.merged_model, found.folder), prompts, [], served, tokenizer.pad_token_id or 0
    )
    metrics = {
        "examples": len(answers),
        "predict_seconds": sum(map(testcases.seconds_of, answers)),
        "served_agreement": same.agreement,
        "served_difference": same.mean_difference,
        **_scores(settings, found, [answer.text for answer in served.answers]),
        **_speeds(answers, seconds),
    }
    return _checks(limits.of(settings.verify, found.scheme), metrics), metrics


def _answer(made: dict[str, Any]) -> parity.Answer:
    tokens = (made.get("metrics") or {}).get("logprobs")
    if not isinstance(tokens, list):
        raise CogpressError(
            "The pushed version records no log-probabilities in its metrics, so its answers cannot be compared. Record "
            "them as predict.py does, or set push.parity to false in model.yaml."
        )
    text = text_of(made.get("output") or "")
    return parity.Answer(text, [int(one["id"]) for one in tokens], [float(one["logprob"]) for one in tokens])


def _scores(settings: Config, found: Reference, answers: Sequence[str]) -> dict[str, float]:
    score = verify.scorer(settings.verify.score)
    scored = [score(one, answer) for one, answer in zip(found.expected, answers, strict=True)]
    scores = {"score": sum(scored) / len(scored)}
    known = {at: answer for at, answer in enumerate(found.answers) if answer is not None}
    if known:
        reference = [score(found.expected[at], answer) for at, answer in known.items()]
        scores |= {
            "reference_examples": len(known),
            "reference_score": sum(reference) / len(known),
            "score_loss": sum(reference) / len(known) - sum(scored[at] for at in known) / len(known),
        }
    return scores


def _speeds(answers: Sequence[dict[str, Any]], seconds: float) -> dict[str, float]:
    def median(name: str) -> float:
        values = [float(made["metrics"][name]) for made in answers if (made.get("metrics") or {}).get(name) is not None]
        return statistics.median(values) if values else 0.0

    tokens = sum(int((made.get("metrics") or {}).get("output_token_count") or 0) for made in answers)
    return {
        "time_to_first_token": median("time_to_first_token"),
        "stream_tokens_per_second": median("tokens_per_second"),
        "tokens_per_second": tokens / seconds if seconds else 0.0,
    }


def _checks(allowed: Limits, metrics: dict[str, Any]) -> list[Check]:
    agreement, difference = metrics["served_agreement"], metrics["served_difference"]
    least, most = allowed.served_agreement, allowed.served_difference
    checks = [
        Check("served tokens agree", agreement, least, agreement >= least, _CAUSE, at_least=True),
        Check("served log-probability difference", difference, most, difference <= most, _CAUSE),
    ]
    if "score_loss" in metrics:
        lower = metrics["score_loss"]
        passed = lower <= allowed.score_loss
        checks.append(Check("score below the reference", lower, allowed.score_loss, passed, _CAUSE))
    return checks
