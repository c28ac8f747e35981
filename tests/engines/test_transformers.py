"""The reference engine's sampling, without a model."""

from __future__ import annotations

import pytest
import torch

from cogpress.engines import transformers
from cogpress.engines.base import Sampling
from cogpress.errors import CogpressError

LOGITS = [2.0, 1.0, 4.0, 3.0, 0.0]
PROMPT, GENERATED = [0, 1], [2, 2, 3]
END = 3


def scores(sampling: Sampling) -> list[float]:
    processors = transformers._processors(PROMPT, sampling, None, [END])
    found: list[float] = processors(torch.tensor([PROMPT + GENERATED]), torch.tensor([LOGITS]))[0].tolist()
    return found


OUT = -float("inf")


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), LOGITS),
        (Sampling(logit_bias={4: 7.5, 0: -1.0}), [1, 1, 4, 3, 7.5]),
        (Sampling(presence_penalty=1.5), [2, 1, 2.5, 1.5, 0]),
        (Sampling(frequency_penalty=0.5), [2, 1, 3, 2.5, 0]),
        (Sampling(repetition_penalty=2), [1, 0.5, 2, 1.5, 0]),
        (Sampling(min_tokens=4), [2, 1, 4, OUT, 0]),
        (Sampling(min_tokens=3), LOGITS),
        (Sampling(temperature=2), [1, 0.5, 2, 1.5, 0]),
        (Sampling(temperature=5e-324), [200, 100, 400, 300, 0]),
        (Sampling(temperature=1, top_k=2), [OUT, OUT, 4, 3, OUT]),
        (Sampling(temperature=1, top_p=0.5), [OUT, OUT, 4, OUT, OUT]),
        (Sampling(temperature=1, min_p=0.1), [2, OUT, 4, 3, OUT]),
        # Greedy decoding ignores what only shapes sampling.
        (Sampling(top_k=1, top_p=0.1, min_p=0.9), LOGITS),
        # Bias first, then penalties, then temperature.
        (Sampling(logit_bias={2: 2.0}, repetition_penalty=2, presence_penalty=1, temperature=0.5), [2, 1, 4, 1, 0]),
    ],
)
def test_scores_by_hand(sampling: Sampling, expected: list[float]) -> None:
    assert scores(sampling) == pytest.approx(expected)


def request(sampling: Sampling) -> transformers._Request:
    processors = transformers._processors(PROMPT, sampling, None, [END])
    return transformers._Request(PROMPT, sampling, None, processors, None, transformers._generator(sampling))


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_grammar_that_leads_nowhere_ends_the_answer(temperature: float) -> None:
    with pytest.raises(CogpressError, match="gave up this answer before its end"):
        transformers._choose(torch.tensor([OUT] * 5), request(Sampling(temperature=temperature)))


def test_a_seed_decides_the_token() -> None:
    def chosen(seed: int) -> list[int]:
        made = request(Sampling(temperature=1, seed=seed))
        return [transformers._choose(torch.tensor(LOGITS), made) for _ in range(20)]

    assert chosen(1) == chosen(1) != chosen(2)
