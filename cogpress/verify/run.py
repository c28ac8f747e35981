"""Are these weights what training measured, and does the engine answer with them as it should?

The reference is the adapter on the quantized base, which training scored; the candidate is a folder of weights, however
it was made, served by the configured engine.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from cogpress import phases
from cogpress.cli import progress_bar, step
from cogpress.config import Config, Data, Merge, Prompt, Verify
from cogpress.data.prepare import read_examples
from cogpress.draft import file as draft
from cogpress.errors import CogpressError
from cogpress.merge import general, merge
from cogpress.prompts import Conversation, Row, answer_text, encode_example, rows, stops
from cogpress.serve import model as serving
from cogpress.train import run as training
from cogpress.train.answers import generate
from cogpress.train.run import HELD_OUT, TRAINED_ON
from cogpress.verify import distributions, forgotten, limits, parity, references
from cogpress.verify.distributions import Divergence
from cogpress.verify.limits import Limits
from cogpress.verify.report import Check, Verdict, write
from cogpress.weights import base, fetch, manifest, tensors
from cogpress.weights.filenames import tokenizer_folder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

Score = Callable[[str, str], bool]
"""From the expected and the given answer to whether the given one is right."""


_NOTHING = (
    "Neither the model nor the reference gives one expected answer, so nothing can be concluded from their score. "
    "Train longer, or choose another verify.score."
)

_ROUNDING = 2.0**-8
"""Relative distance of two tensors, as vectors, that bfloat16 rounding alone can make: half a unit in the last of its
8 bits for each value, doubled because both may be rounded."""


_PART = 2.0
"""Size of what a balanced merge keeps of a layer's quantization error, or leaves out, against the whole error."""


@dataclass(frozen=True)
class _Case:
    """What is verified against what."""

    config: Config
    weights: Path
    adapter: Path
    adapter_facts: dict[str, Any]
    base: Path
    facts: dict[str, Any]
    scheme: str
    onto: Merge
    limits: Limits
    examples: list[Conversation]
    rows: list[Row]
    trained: list[Row]
    """Some of the rows that it was trained on; none where the run does not know them."""
    probe: forgotten.Probe
    cache: Path
    """Takes what bases make of general text."""
    tokenizer: PreTrainedTokenizerBase
    console: Console

    @property
    def prompts(self) -> list[list[int]]:
        return [encode_example(self.tokenizer, example) for example in self.examples]

    @property
    def expected(self) -> list[str]:
        return [answer_text(self.tokenizer, row) for row in self.rows]

    @property
    def pad(self) -> int:
        return self.tokenizer.pad_token_id or 0

    @property
    def max_tokens(self) -> int:
        """Twice the longest expected answer: a right answer is never cut, and a wrong one ends."""
        return 2 * max(row.learnt for row in self.rows) + 16


def verify(
    config: Config,
    root: Path,
    weights: Path,
    console: Console,
    *,
    run: Path | None = None,
    make: parity.MakeEngine | None = None,
    served: bool = True,
) -> Verdict:
    """Compare weights with what training scored, and write the report into their folder.

    Checks go from cheap to expensive: if the files, the tokenizer or the chat template differ, no model is loaded; if a
    tensor differs from the merge, the engine is not started.

    Args:
        config: `verify` and `serve` are used.
        root: the project's folder.
        weights: the candidate.
        console: where progress is shown.
        run: the run that trained the adapter; the one in `runs/` whose adapter the weights name, where not given.
        make: makes the engine; the configured one by default.
        served: check what the engine answers, too.

    Raises:
        CogpressError: there is nothing to compare with: no weights, no run, no base or no held-out examples.
    """
    base.quiet_libraries()
    config = config.model_copy(update={"serve": serving.with_draft(config.serve, root)})
    case = _case(config, root, weights, run, console)
    checks: list[Check] = []
    beside: forgotten.General | None = None
    metrics: dict[str, Any] = {"bytes": manifest.weights_bytes(weights)}
    pictures: dict[str, Any] = {}
    with step("Files, tokenizer and chat template", console):
        checks += _outside(case)
    if all(check.passed for check in checks):
        if case.scheme == "none":
            with step("Every tensor against the merge", console):
                made = (case.base, case.adapter, case.weights, case.onto)
                checks.append(phases.run("check of the merge", _merged, *made, console=console))
        merged = all(check.passed for check in checks)
        with step("General text and plain instructions, by the base", console):
            record = _before(case)
        with step("Answers of the reference and of the weights, by transformers", console):
            found = _divergence(case, record)
            beside, by_heart = found.beside
            metrics.update(found.to_dict())
            pictures["kl"] = found.values
            checks += _judged(found, case.limits, _cause(checks) or _distribution_cause(case))
            checks += _forgotten(beside, case.limits, metrics)
            checks += _by_heart(by_heart, found.scored, case.limits, metrics)
        if merged and served:
            reference = _reference_answers(case, run or case.adapter.parent, found.reference_scored)
            with step("Answers of the engine", console):
                checks += _served(case, found, metrics, pictures, reference, make)
    verdict = Verdict(
        weights=weights,
        scheme=case.scheme,
        checks=checks,
        metrics=metrics,
        adapter=str(manifest.fingerprint(case.adapter)),
        base=case.adapter_facts["base"],
        examples=len(case.examples),
        engine=config.serve.engine,
        general=beside,
    )
    write(verdict, pictures)
    return verdict


def measures(
    config: Config, root: Path, folders: Sequence[Path], console: Console, *, run: Path, fresh: bool = False
) -> Callable[[str, Path], dict[str, Any]]:
    """A function from a folder of weights to the metrics of its verification.

    Either all folders are verified or, if all were before, none: speeds measured at different hours say more about the
    hours than about the weights.
    """
    known = [manifest.read_verification(folder) for folder in folders]
    again = fresh or any(
        content is None or "score" not in content["metrics"] or manifest.state(folder) == "changed"
        for content, folder in zip(known, folders, strict=True)
    )

    def measure(name: str, folder: Path) -> dict[str, Any]:
        if not again:
            return dict((manifest.read_verification(folder) or {})["metrics"])
        console.print(f"{name}:", style="bold")
        return verify(config, root, folder, console, run=run).metrics

    return measure


def _case(config: Config, root: Path, weights: Path, run: Path | None, console: Console) -> _Case:
    if not (weights / "config.json").is_file() or not any(weights.glob("*.safetensors")):
        raise CogpressError(f"{weights} holds no weights in safetensors. Name a folder of weights.")
    facts = manifest.read(weights) or {}
    adapter_folder = (run or find_run(root, weights, facts)) / "adapter"
    adapter_facts = manifest.read(adapter_folder) if adapter_folder.is_dir() else None
    if adapter_facts is None:
        raise CogpressError(
            f"{adapter_folder} holds no adapter to compare with. Name the run that trained the weights."
        )
    base_folder = fetch.base(adapter_facts["base"]["source"], root / ".cache")
    scheme = (facts.get("compression") or {}).get("scheme", "none")
    merged = (facts.get("merge") or {}).get("onto")
    # Whether a balanced merge keeps the task was measured; the usual one has to be asked for.
    onto: Merge = "balanced" if merged == "balanced" else "dequantized"
    if config.merge == merged == "original":
        onto = "original"
    tokenizer = base.tokenizer(tokenizer_folder(base_folder, adapter_folder))
    prompt = Prompt.model_validate(adapter_facts["prompt"])
    examples = held_out(config.verify, root, adapter_folder.parent, prompt, config.data)
    return _Case(
        config=config,
        weights=weights,
        adapter=adapter_folder,
        adapter_facts=adapter_facts,
        base=base_folder,
        facts=facts,
        scheme=scheme,
        onto=onto,
        limits=limits.of(config.verify, scheme, limits.left_out(adapter_facts["quantization"], onto)),
        examples=examples,
        rows=rows(tokenizer, examples, base.stop_ids(base_folder)),
        trained=rows(tokenizer, _trained(adapter_folder.parent, prompt), base.stop_ids(base_folder)),
        probe=forgotten.probe(
            tokenizer, general.rows(general.pieces(tokenizer, "measure", general.file(config.data, root)))
        ),
        cache=root / ".cache" / "general",
        tokenizer=tokenizer,
        console=console,
    )


def default_weights(root: Path, config: Config, run: Path | None) -> Path:
    """The weights to verify by default: the run's, those in `weights/`, or those of the run with the model's name."""
    if run is None and (root / "weights" / "config.json").is_file():
        return root / "weights"
    return (run or root / "runs" / config.name) / "weights"


def find_run(root: Path, weights: Path, facts: dict[str, Any]) -> Path:
    """The run whose adapter is in the weights: the folder they are in, or the one in `runs/` by their manifest.

    Raises:
        CogpressError: there is none.
    """
    if training.is_run_of(weights.parent, facts) or ("merge" not in facts and (weights.parent / "adapter").is_dir()):
        return weights.parent
    found = training.run_of(facts, root / "runs")
    if found is not None:
        return found
    raise CogpressError(
        f"No run in {root / 'runs'} holds the adapter that {weights} was made with. Name it with --run."
    )


def held_out(settings: Verify, root: Path, run: Path, prompt: Prompt, data: Data | None = None) -> list[Conversation]:
    """The examples to verify with: those of `verify.examples`, read as training's are, or those the run held out.

    Raises:
        CogpressError: there are none, or lines are bad.
    """
    if settings.examples:
        data = data or Data()
        held = read_examples(
            root / settings.examples, prompt=prompt, task=data.task, ignore=data.ignore, rename=data.rename
        )
        if held.problems:
            raise CogpressError(f"verify.examples: {held.problems[0]}. Correct it.")
    elif (run / HELD_OUT).is_file():
        held = read_examples(run / HELD_OUT, prompt=Prompt(thinking=prompt.thinking))
    else:
        raise CogpressError(f"{run} has no {HELD_OUT}. Name held-out examples with verify.examples in model.yaml.")
    found = [example for example in held.conversations if example.messages][: settings.rows]
    if not found:
        raise CogpressError("There are no held-out examples. Name some with verify.examples in model.yaml.")
    return found


def _trained(run: Path, prompt: Prompt) -> list[Conversation]:
    """Some of the examples that a run was trained on; none where it has not kept them."""
    if not (run / TRAINED_ON).is_file():
        return []
    return read_examples(run / TRAINED_ON, prompt=Prompt(thinking=prompt.thinking)).conversations


def scorer(name: str) -> Score:
    """The task's own score: `exact` text, equal `json`, or `module:function` of the user's.

    Raises:
        CogpressError: there is no such function.
    """
    _score(name)
    return partial(_scored, name)  # by name it can be pickled, wherever the function comes from


def _scored(name: str, expected: str, answer: str) -> bool:
    return _score(name)(expected, answer)


@functools.cache
def _score(name: str) -> Score:
    if name == "exact":
        return _same_text
    if name == "json":
        return _same_json
    module, _, function = name.partition(":")
    try:
        found: Score = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise CogpressError(f"verify.score names {name}, which cannot be imported: {error}.") from None
    return found


def _same_text(expected: str, answer: str) -> bool:
    return expected.strip() == answer.strip()


def _same_json(expected: str, answer: str) -> bool:
    try:
        return bool(json.loads(expected) == json.loads(answer))
    except ValueError:
        return False


def _outside(case: _Case) -> list[Check]:
    """What can differ though every weight is right. Takes seconds."""
    checks = []
    try:
        if case.facts:
            manifest.check(case.weights, case.facts)
        tensors.stored(case.weights)
        checks.append(Check("files", "as written" if case.facts else "no manifest to compare with", "as written", True))
    except CogpressError as error:
        checks.append(Check("files", "changed", "as written", False, str(error)))
    candidate = base.tokenizer(case.weights)
    checks.append(_tokenizer(case, candidate))
    different = sum(
        _or_none(candidate, example) != encode_example(case.tokenizer, example) for example in case.examples
    )
    cause = "The chat template differs from the base's, so prompts would not be those of the training."
    if checks[-1].passed:
        checks.append(_counted("chat template", different, case, cause))
    prompt = case.facts.get("prompt")
    if prompt is not None:
        same = prompt == case.adapter_facts["prompt"]
        cause = "The manifest's prompt template or system text is not the one of the training."
        checks.append(Check("prompt", "the training's" if same else "another", "the training's", same, cause))
    return checks


def _or_none(tokenizer: PreTrainedTokenizerBase, example: Conversation) -> list[int] | None:
    try:
        return encode_example(tokenizer, example)
    except CogpressError:
        return None


def _tokenizer(case: _Case, candidate: PreTrainedTokenizerBase) -> Check:
    texts = [text for example in case.examples for text in (example.prompt, example.answer)]
    different = sum(candidate.encode(text) != case.tokenizer.encode(text) for text in texts)
    ends = (
        base.stop_ids(case.weights) != base.stop_ids(case.base) or candidate.eos_token_id != case.tokenizer.eos_token_id
    )
    cause = (
        "The tokens on which an answer ends are not the base's (generation_config.json, tokenizer_config.json)."
        if ends and not different
        else "The tokenizer is not the base's: the same text becomes other tokens than in training."
    )
    return _counted("tokenizer", different + ends, case, cause)


def _counted(name: str, different: int, case: _Case, cause: str) -> Check:
    return Check(name, f"{different} differ" if different else "the base's", "the base's", not different, cause)


def _merged(base_folder: Path, adapter: Path, weights: Path, onto: Merge, *, console: Console) -> Check:
    """Every tensor against the merge of the adapter into the base, recomputed one by one."""
    planned = merge.plan(base_folder, adapter, onto)
    stored = tensors.stored(weights)
    worst, far = 0.0, {}
    outputs = progress_bar(console)(planned.outputs, len(planned.outputs))
    for output in outputs:
        place = stored.pop(output.name, None)
        distance = _distance(place, output, planned)
        worst = max(worst, distance)
        if distance > _ROUNDING:
            far[output.name] = distance
    if stored:
        worst = float("inf")
        far.update(dict.fromkeys(stored, worst))
    cause = _merge_cause(planned, base_folder, weights, far) if far else ""
    return Check("merge", worst, _ROUNDING, not far, cause)


def _distance(place: tensors.Stored | None, output: merge.Output, planned: merge.MergePlan) -> float:
    """|candidate - merge| / |merge| of one tensor, as vectors; infinite where it is missing or of another shape."""
    import torch

    if place is None or place.shape != output.shape:
        return float("inf")
    expected = planned.value(output).float()
    difference = tensors.load(place, output.name).float() - expected
    size = max(float(torch.linalg.vector_norm(expected)), 1e-30)
    layer = output.name.removesuffix(".weight")
    if planned.onto == "balanced" and layer in planned.adapter.quantized:
        # Which part of the quantization's error was kept is not known any more, only that it is a part of it.
        error = planned.error(layer).cpu()
        error = error.T if layer in planned.adapter.transposed else error
        most = _PART * float(torch.linalg.vector_norm(error)) + _ROUNDING * size
        parts = (difference, difference - error)
        return 0.0 if all(float(torch.linalg.vector_norm(part)) <= most for part in parts) else float("inf")
    return float(torch.linalg.vector_norm(difference)) / size


def _merge_cause(planned: merge.MergePlan, base_folder: Path, weights: Path, far: dict[str, float]) -> str:
    """The most likely cause of tensors that are not as merged."""
    quantized = {f"{module}.weight" for module in planned.adapter.quantized}
    if planned.onto == "dequantized" and far.keys() == quantized:
        naive = merge.plan(base_folder, planned.adapter.folder, "original")
        stored = tensors.stored(weights)
        some = [output for output in naive.outputs if output.name in far][::8]
        if all(_distance(stored[output.name], output, naive) <= _ROUNDING for output in some):
            return (
                "The adapter was merged onto the original base, not onto the quantized base that it was trained on. "
                "Merge again with scripts/merge, or set merge: original in model.yaml to allow it."
            )
    name = max(far, key=lambda one: far[one])
    others = f" and {len(far) - 1} more are" if len(far) > 1 else " is"
    return f"{name}{others} not what the merge gives: changed since, or merged from another adapter or base."


def _cause(checks: Sequence[Check]) -> str | None:
    return next((check.cause for check in checks if not check.passed), None)


def _before(case: _Case) -> Path:
    """A record of what the base, before any training, makes of general text and of plain instructions."""
    return forgotten.record(
        partial(distributions.merged_model, case.base),
        case.probe,
        case.tokenizer,
        case.cache / f"{manifest.fingerprint(case.base)}.safetensors",
    )


def _divergence(case: _Case, record: Path) -> Divergence:
    """The weights against what training scored; `beside` the task against the base, and what they know by heart."""
    return distributions.compare(
        partial(distributions.reference_model, case.base, case.adapter),
        {"": partial(distributions.merged_model, case.weights)},
        case.rows,
        case.pad,
        beside=partial(_beside, record, case.probe, case.tokenizer, case.trained, case.rows),
        progress=progress_bar(case.console),
    )[""]


def _beside(
    record: Path,
    probe: forgotten.Probe,
    tokenizer: PreTrainedTokenizerBase,
    trained: list[Row],
    held_out: list[Row],
    model: torch.nn.Module,
) -> tuple[forgotten.General, forgotten.ByHeart | None]:
    found = forgotten.measure(model, probe, forgotten.read(record), tokenizer)
    pad = tokenizer.pad_token_id or 0
    return found, forgotten.by_heart(model, trained, held_out, pad) if trained else None


def _forgotten(found: forgotten.General, limits: Limits, metrics: dict[str, Any]) -> list[Check]:
    """How much worse than the base, before any training, the weights are at what is not of the task."""
    metrics.update(
        general_perplexity=found.perplexity,
        base_general_perplexity=found.base_perplexity,
        general_kl=found.kl,
        instructions_worse=found.worse,
    )
    cause = (
        "The weights forgot much of what the base knows: train with a lower train.learning_rate, fewer steps or a "
        "lower train.rank, or set merge: balanced."
    )
    measured = (
        ("perplexity of general text, times the base's", found.ratio, limits.general_ratio),
        ("KL to the base on general text", found.kl, limits.general_kl),
        ("plain instructions answered worse than by the base", found.worse, limits.instructions),
    )
    checks = [Check(name, value, limit, value <= limit, cause) for name, value, limit in measured]
    if not found.conclusive:
        checks[-1] = replace(checks[-1], passed=True, conclusive=False, cause=_IGNORANT)
    return checks


_IGNORANT = (
    "The base finds general text about as unlikely as chance, so nothing can be concluded from how instructions are "
    "answered. Check that it was trained and that its tokenizer is its own."
)

_LINES, _ANSWERS = "training lines known by heart", "training answers right, beyond held-out ones"

_NOT_KEPT = (
    "The run kept none of its training examples, so nothing can be concluded of what was learnt by heart. Train again "
    "to have it measured."
)

_FEW = 8
"""Held-out rows without which nothing can be said of what was learnt by heart."""


def _by_heart(
    found: forgotten.ByHeart | None,
    scored: Sequence[distributions.Scored],
    limits: Limits,
    metrics: dict[str, Any],
) -> list[Check]:
    """What the weights know by heart of their training, beyond what they know of held-out examples."""
    if found is None:
        return [
            Check(name, "not known", limit, True, _NOT_KEPT, conclusive=False)
            for name, limit in ((_LINES, limits.memorized), (_ANSWERS, limits.overfit))
        ]
    held_out_right = forgotten.mean([all(one.most_likely) for one in scored])
    metrics.update(
        memorized_lines=sum(found.trained), trained_answers_right=found.right, held_out_answers_right=held_out_right
    )
    gap = max(0.0, found.right - held_out_right)
    cause = (
        "The weights know training examples by heart: train with fewer epochs or a lower train.learning_rate, or give "
        "more examples."
    )
    measured = (
        (_LINES, found.share, limits.memorized, len(found.held_out)),
        (_ANSWERS, gap, limits.overfit, len(scored)),
    )
    few = f"Fewer than {_FEW} held-out examples say too little of what was learnt by heart. Hold out more."
    return [
        Check(
            name, value, limit, value <= limit or count < _FEW, few if count < _FEW else cause, conclusive=count >= _FEW
        )
        for name, value, limit, count in measured
    ]


def _distribution_cause(case: _Case) -> str:
    if case.onto == "original":
        return (
            "The merge onto the original weights leaves out what quantization changed in the base, and this adapter "
            "was trained with it. Set merge: dequantized in model.yaml, and merge again with scripts/merge."
        )
    if case.scheme == "none":
        return (
            "The weights answer differently from what training scored, though their tensors agree: another config.json?"
        )
    return (
        f"Quantization to {case.scheme} changes this model too much. Try int8, a smaller group size or more "
        "calibration samples, or accept it with a higher limit under verify in model.yaml."
    )


def _judged(found: Divergence, limits: Limits, cause: str) -> list[Check]:
    ratio = found.perplexity / found.reference_perplexity
    return [
        Check("mean KL", found.mean_kl, limits.mean_kl, found.mean_kl <= limits.mean_kl, cause),
        Check("99th percentile KL", found.p99_kl, limits.p99_kl, found.p99_kl <= limits.p99_kl, cause),
        Check(
            "same top token",
            found.top1_agreement,
            limits.top1_agreement,
            found.top1_agreement >= limits.top1_agreement,
            cause,
            at_least=True,
        ),
        Check("perplexity ratio", ratio, limits.perplexity_ratio, ratio <= limits.perplexity_ratio, cause),
    ]


def _reference_answers(case: _Case, run: Path, scored: Sequence[distributions.Scored]) -> list[str]:
    """The reference's own greedy answers, found once for a run and a prompt.

    Where the reference finds every token of the expected answer the most likely, that answer is its own. Only the
    others are generated.
    """
    prompts, adapter = case.prompts, manifest.fingerprint(case.adapter)
    known = references.kept(run, adapter, prompts, case.max_tokens)
    answers = {at: text for at, text in enumerate(known) if text is not None}
    if len(answers) == len(prompts):
        return list(answers.values())
    ends = stops(case.tokenizer, base.stop_ids(case.base))
    answers |= {
        at: str(case.tokenizer.decode(answer, skip_special_tokens=True)).strip()
        for at, (prompt, row, one) in enumerate(zip(prompts, case.rows, scored, strict=True))
        if at not in answers
        and (answer := parity.expected_answer(prompt, row))
        and answer[-1] in ends
        and all(one.most_likely[-len(answer) :])
    }
    others = [at for at in range(len(prompts)) if at not in answers]
    if others:
        with step(f"Answers of the reference to {len(others)} other examples", case.console):
            load = partial(distributions.reference_model, case.base, case.adapter, generates=True)
            asked = [prompts[at] for at in others]
            given = phases.run(
                "reference", _generated, load, case.tokenizer, asked, case.max_tokens, console=case.console
            )
            answers |= zip(others, given, strict=True)
    found = [answers[at] for at in range(len(prompts))]
    references.keep(run, adapter, prompts, found, case.max_tokens)
    return found


def _generated(
    load: distributions.Load,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    max_tokens: int,
    *,
    console: Console,
) -> list[str]:
    model = load()
    batches = [prompts[at : at + _BATCH] for at in range(0, len(prompts), _BATCH)]
    shown = progress_bar(console)(batches, len(batches))
    return [answer for batch in shown for answer in generate(model, tokenizer, batch, max_tokens)]


_BATCH = 32
"""Prompts that the reference answers at once."""


def _served(
    case: _Case,
    divergence: Divergence,
    metrics: dict[str, Any],
    pictures: dict[str, Any],
    reference: Sequence[str],
    make: parity.MakeEngine | None,
) -> list[Check]:
    score, limits = scorer(case.config.verify.score), case.limits
    log = case.adapter.parent / "verify-engine.log"
    served = parity.serve(case.weights, case.config.serve, case.prompts, case.rows, case.max_tokens, log, make)
    found = parity.compare(
        partial(distributions.merged_model, case.weights),
        case.prompts,
        case.rows,
        served,
        case.pad,
        divergence.scored,
    )
    right = _share(score, case.expected, [answer.text for answer in served.answers])
    reference_right = _share(score, case.expected, reference)
    metrics.update(
        score=right,
        reference_score=reference_right,
        served_agreement=found.agreement,
        served_difference=found.mean_difference,
        served_perplexity=found.served_perplexity,
        stream_tokens_per_second=served.stream_tokens_per_second,
        concurrent_tokens_per_second=served.concurrent_tokens_per_second,
        ready_seconds=served.ready_seconds,
    )
    pictures["parity"] = found.points
    cause = (
        f"The engine ({case.config.serve.engine}) answers differently from transformers with the same weights. Try "
        "other engine options (compiled or eager, dtype, attention) or another version of it."
    )
    checks = _draft(case, served, metrics, log, make)
    agrees = found.agreement >= limits.served_agreement
    near = found.mean_difference <= limits.served_difference
    return [
        *checks,
        Check("served tokens agree", found.agreement, limits.served_agreement, agrees, cause, at_least=True),
        Check("served log-probability difference", found.mean_difference, limits.served_difference, near, cause),
        _score_check(
            right, reference_right, limits.score_loss, _distribution_cause(case) if agrees and near else cause
        ),
    ]


def _score_check(right: float, reference: float, limit: float, cause: str) -> Check:
    """Whether the model scores as the reference does; the same nothing is no proof of it, and nothing is no score."""
    nothing = right == reference == 0
    lower = reference - right
    passed = lower <= limit and (right > 0 or nothing)
    name = "score below the reference"
    return Check(name, lower, limit, passed, _NOTHING if nothing else cause, conclusive=not nothing)


def _draft(
    case: _Case, served: parity.Served, metrics: dict[str, Any], log: Path, make: parity.MakeEngine | None
) -> list[Check]:
    """Whether the engine answers the same without its draft, and how much faster it is with it."""
    serve = case.config.serve
    if serve.engine != "vllm" or serve.speculative == "none":
        return []
    if serve.speculative == "auto" and not draft.path_in(case.weights).is_file():
        return []
    plain = served.undrafted
    if plain is None:
        without = serve.model_copy(update={"speculative": "none"})
        with step("Answers of the engine without a draft", case.console):
            plain = parity.serve(case.weights, without, case.prompts, None, case.max_tokens, log, make)
    changed = parity.changed(served.answers, plain.answers, case.limits.served_difference)
    metrics.update(
        draft_changed=changed,
        draft_speedup=served.stream_tokens_per_second / plain.stream_tokens_per_second,
    )
    cause = "The engine answers differently with the draft. Set serve.speculative: none, and report this."
    same = "changes no answer"
    return [Check("draft", f"changes {changed} answers" if changed else same, same, not changed, cause)]


def _share(score: Score, expected: Sequence[str], answers: Sequence[str]) -> float:
    return sum(score(one, other) for one, other in zip(expected, answers, strict=True)) / len(expected)
