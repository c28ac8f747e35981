"""Speculation changes the speed of an answer, not the answer."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from bench.speculative import SIDES, _counted
from cogpress import config
from cogpress.draft import file as draft
from cogpress.engines import vllm
from cogpress.errors import CogpressError
from cogpress.remake import draft_of
from cogpress.serve import model as serving
from cogpress.weights import manifest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def drafted_weights(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained weights with the draft that a training of theirs leaves."""
    weights = tmp_path_factory.mktemp("drafted") / "weights"
    shutil.copytree(trained_run / "weights", weights, copy_function=os.link)
    made = draft_of(ROOT, weights, trained_run, trained_run / "data" / "train.jsonl", Console(quiet=True))
    assert made == draft.path_in(weights)
    facts = manifest.read(weights)
    assert facts is not None
    manifest.check(weights, facts)
    assert "draft/table.safetensors" in facts["files"]
    return weights


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.parametrize("side", ["n-gram", "table"])
def test_greedy_answers_are_those_without_it(
    side: str,
    trained_weights: Path,
    drafted_weights: Path,
    answered: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = answered[:12]
    asked = [json.dumps(row["prompt"]) for row in rows]
    weights = drafted_weights if side == "table" else trained_weights
    settings = config.load(ROOT / "model.yaml")
    serve = settings.serve.model_copy(update={"speculative": SIDES[side]})
    chosen = vllm.options
    monkeypatch.setattr(vllm, "options", lambda *given: chosen(*given) | {"disable_log_stats": False})  # it counts

    async def ask() -> tuple[list[str], dict[str, Any], str, dict[str, Counter[str]]]:
        settings_with = settings.model_copy(update={"serve": serve})
        server = serving.ServedModel(str(weights), settings_with, ROOT, concurrency=16)
        metrics: dict[str, Any] = {}

        async def answer(**inputs: Any) -> str:
            chunks = await server.answer({"max_tokens": 160, **inputs}, metrics.__setitem__)
            return "".join([chunk async for chunk in chunks])

        async def counted(**inputs: Any) -> tuple[str, Counter[str]]:
            """An answer, and what vLLM counts for it: it has counted a step when the next request is answered."""
            await answer(prompt="x", max_tokens=1)
            before = _counted()
            text = await answer(**inputs)
            await answer(prompt="x", max_tokens=1)
            return text, _counted() - before

        try:
            texts = await asyncio.gather(*(answer(fields=fields) for fields in asked))
            drafted = {}
            alone = {}
            alone["plain"], drafted["plain"] = await counted(fields=asked[0])
            alone["logprobs"] = await answer(fields=asked[0], logprobs=2)
            assert len(metrics["logprobs"]) == metrics["output_token_count"]
            assert all(one["logprob"] == one["top"][0]["logprob"] for one in metrics["logprobs"])
            alone["schema"] = await answer(fields=asked[0], json_schema='{"type": "object"}')
            alone["penalty"] = await answer(fields=asked[0], frequency_penalty=0.01, presence_penalty=0.01)
            alone["cold"] = await answer(fields=asked[0], temperature=0.01, top_k=5, top_p=0.9)
            _, drafted["seed"] = await counted(fields=asked[0], temperature=0.5, seed=1)
            with pytest.raises(CogpressError, match="not yet supported with speculative decoding") as refused:
                await answer(prompt="x", logit_bias='{"yes": 5}')
            assert await server.engine.drafting(False) is (side == "table")
            alone["switched off"], drafted["switched off"] = await counted(fields=asked[0])
            return texts, alone, str(refused.value), drafted
        finally:
            server.engine.shutdown()

    texts, alone, refused, drafted = asyncio.run(ask())
    assert texts == [row["answer"] for row in rows]
    assert set(alone.values()) == {rows[0]["answer"]}
    assert refused.startswith("This cannot be used: ")
    assert refused.endswith("Leave it out, or set serve.speculative: none.")
    if side == "table":
        taken = sum(count for name, count in drafted["plain"].items() if name.isdecimal())
        assert 20 < taken <= drafted["plain"]["drafted"]
        assert not drafted["seed"], "its random numbers would depend on the draft, and the draft depends on the load"
        assert not drafted["switched off"]


@pytest.fixture
def cpu_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM in this process, as its workers prepare it on a CPU."""
    if torch.cuda.is_available():
        pytest.skip("kernels of a CPU")
    for name, value in vllm.environment(config.Serve(), cuda=False).items():
        monkeypatch.setenv(name, value)  # vLLM reads it when it is imported
    from vllm.platforms import current_platform

    current_platform.register_triton_kernel_overrides()


def drafted(drafts: list[list[int]]) -> Any:
    """vLLM's metadata of a step with these drafts; each request's logits follow one another, the bonus token's last."""
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

    facts = SpecDecodeMetadata.make_dummy(drafts, torch.device("cpu"))
    ends = torch.tensor([len(one) + 1 for one in drafts]).cumsum(0)
    facts.bonus_logits_indices = (ends - 1).to(torch.int32)
    facts.target_logits_indices = torch.tensor(sorted({*range(int(ends[-1]))} - {*(ends - 1).tolist()})).to(torch.int32)
    return facts


def sampling(requests: int, **options: Any) -> Any:
    """vLLM's metadata of requests that ask for nothing but these; `top_k` and `top_p` are for each."""
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.metadata import SamplingMetadata

    for name, dtype in (("top_k", torch.int32), ("top_p", torch.float32)):
        if options.get(name) is not None:
            options[name] = torch.full((requests,), options[name], dtype=dtype)
    ones = torch.ones(requests)
    sampled = options.get("temperature") is not None
    usual: dict[str, Any] = {
        "temperature": None, "all_greedy": not sampled, "all_random": sampled, "top_p": None, "top_k": None,
        "generators": {}, "max_num_logprobs": None, "no_penalties": True, "prompt_token_ids": None,
        "frequency_penalties": 0 * ones, "presence_penalties": 0 * ones, "repetition_penalties": ones,
        "output_token_ids": [[] for _ in range(requests)], "allowed_token_ids_mask": None, "bad_words_token_ids": {},
        "logitsprocs": LogitsProcessors(),
    }  # fmt: skip
    return SamplingMetadata(**usual | options)


@pytest.mark.slow
def test_greedy_drafts_are_checked_as_vllm_checks_them(cpu_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.sample import rejection_sampler as rejection
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.logits_processor.builtin import MinTokensLogitsProcessor
    from vllm.v1.sample.sampler import Sampler

    assert "target_logits.argmax" in inspect.getsource(rejection.rejection_sample), "else ours can go"
    own = rejection.RejectionSampler.forward
    torch.manual_seed(0)
    logits = torch.randn(38, 50).to(torch.bfloat16)
    best = logits.float().argmax(-1).tolist()
    drafts = [best[0:3], [best[4], 0, 0], [], [49], best[11:23], *([one] for one in best[24:38:2])]
    wanted = own(check := rejection.RejectionSampler(Sampler()), drafted(drafts), None, logits, sampling(len(drafts)))
    monkeypatch.setattr(rejection.RejectionSampler, "forward", vllm.checked(lambda *_: "vLLM's own"))
    found = check(drafted(drafts), None, logits.clone(), sampling(len(drafts)))
    assert torch.equal(found.sampled_token_ids, wanted.sampled_token_ids)
    assert (found.sampled_token_ids >= 0).sum() > len(drafts) + 20, "many are taken"
    for more in ({"max_num_logprobs": 0}, {"no_penalties": False}, {"temperature": torch.ones(len(drafts))}):
        assert check(drafted(drafts), None, logits.clone(), sampling(len(drafts), **more)) == "vLLM's own"
    waiting = MinTokensLogitsProcessor(SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=16)), "cpu", False)
    waiting.min_toks[0] = (3, [], {0})
    asked = sampling(len(drafts), logitsprocs=LogitsProcessors([waiting]))
    assert check(drafted(drafts), None, logits.clone(), asked) == "vLLM's own"


@pytest.mark.slow
@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (3, None), (None, 0.8)])
def test_samples_are_distributed_as_without_it(
    top_k: int | None, top_p: float | None, cpu_kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's rejection sampler with certain drafts, as ours are: 24,000 requests whose drafts are right and wrong."""
    from vllm.v1.sample import rejection_sampler as rejection
    from vllm.v1.sample.sampler import Sampler

    monkeypatch.setattr(rejection, "expand_batch_to_tokens", vllm.expanded)
    torch.manual_seed(0)
    words, requests, temperature = 6, 24_000, 0.7
    logits = torch.randn(2, words)
    wanted = (logits / temperature).softmax(-1)
    ordered, order = wanted.sort(descending=True)
    kept = torch.ones_like(ordered, dtype=torch.bool)
    if top_k is not None:
        kept[:, top_k:] = False
    if top_p is not None:
        kept = ordered.cumsum(-1) - ordered < top_p
    wanted = torch.zeros_like(wanted).scatter(1, order, ordered * kept)
    wanted /= wanted.sum(-1, keepdim=True)

    drafts = [[at % words] for at in range(requests)]
    asked = sampling(requests, temperature=torch.full((requests,), temperature), top_k=top_k, top_p=top_p)
    found = rejection.RejectionSampler(Sampler())(
        drafted(drafts), None, logits.repeat(requests, 1), asked
    ).sampled_token_ids
    first, second = found.T
    taken = first == torch.tensor(drafts)[:, 0]
    assert (second[~taken] == -1).all()
    for tokens, probabilities in ((first, wanted[0]), (second[taken], wanted[1])):
        shares = torch.bincount(tokens, minlength=words) / len(tokens)
        assert (shares - probabilities).abs().max() < 0.03, "five standard deviations of the fewer, which are seeded"
