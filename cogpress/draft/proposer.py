"""What vLLM's engine asks for drafts: the table first, then what the prompt says after the last tokens.

The engine's process imports this file by name and checks every token that it proposes, so that no answer changes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cogpress.draft.symbols import Answer
from cogpress.draft.table import Table

OPTION = "cogpress_draft"
"""vLLM's `additional_config` has the table's file under this name."""

MOST = 12
"""Most tokens of a draft."""

_LOADS = ((1, 0.25), (4, 0.4), (16, 0.6), (1 << 30, 0.8))
"""Up to so many requests at once: the least probability that a draft's token is reached, before steps were measured."""

_LOWEST, _HIGHEST = 0.05, 0.95
"""Bounds of the measured one."""

_DECAY, _ENOUGH, _PAUSE = 0.98, 12.0, 5.0
"""Weight of earlier steps in what a step costs, how many are needed, and seconds after which a pause is no step."""

_BEGUN = 0.9
"""Probability that a name that was begun goes on."""

_COPIED = (0.0, 0.0, 0.3, 0.5, 0.7)
"""Probability that text goes on as in the prompt, by the number of last tokens that agree (the last: or more)."""

_MEMORY = 0.75
"""Weight of a request's earlier drafts in its measured share of taken tokens; other requests count less."""

_PROBE, _PROBED = 24, 2
"""Steps between two drafts of a request whose drafts are not taken, and their most tokens."""


class Proposer:
    """vLLM's `custom_class` protocol."""

    def __init__(self, vllm_config: Any) -> None:
        """Reads the table that vLLM's configuration names."""
        from cogpress.draft import file

        self._table = file.read(Path(vllm_config.additional_config[OPTION]))
        self._longest = int(vllm_config.model_config.max_model_len)
        self._requests: list[_Request | None] = []
        self._share = 1.0
        self._steps = StepCost()
        self._seeded: Callable[[], Container[int]] = tuple
        self._failed = False
        self.on = True

    def attach(self, runner: Any) -> None:
        """Leave the requests with a seed of vLLM's model runner without a draft.

        Rejection sampling takes more random numbers the more is drafted, and how much is drafted depends on the load:
        the same seed would give other answers.
        """
        self._seeded = lambda: runner.input_batch.generators  # by row; vLLM makes none where temperature is 0

    def load_model(self, *_: Any, **__: Any) -> None:
        """There is none."""

    def propose(
        self,
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens_no_spec: np.ndarray,
        token_ids_cpu: np.ndarray,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """A draft for each request; empty where none pays.

        Args:
            sampled_token_ids: the tokens of this step, by row; empty during prefill.
            num_tokens_no_spec: length of each row with them, int32.
            token_ids_cpu: prompts and answers so far, int32, shape (rows, longest).
            slot_mappings: not used.
        """
        if self._failed or not self.on:
            return [[] for _ in sampled_token_ids]
        try:
            return self._propose(sampled_token_ids, num_tokens_no_spec, token_ids_cpu)
        except Exception:
            # An exception would end the engine with all its requests; without a draft it only answers more slowly.
            self._failed = True
            logging.getLogger(__name__).exception("The draft failed and is off until the next start.")
            return [[] for _ in sampled_token_ids]

    def _propose(
        self, sampled_token_ids: Sequence[Sequence[int]], num_tokens_no_spec: np.ndarray, token_ids_cpu: np.ndarray
    ) -> list[list[int]]:
        rows = len(sampled_token_ids)
        before = self._requests
        self._requests = [None] * rows
        least = self._steps.least(rows, sum(len(sampled) for sampled in sampled_token_ids))
        drafts: list[list[int]] = []
        seeded = self._seeded()
        for row, sampled in enumerate(sampled_token_ids):
            length = int(num_tokens_no_spec[row])
            if not sampled or length >= self._longest - 1 or row in seeded:
                drafts.append([])
                continue
            ids = token_ids_cpu[row]
            request = before[row] if row < len(before) else None
            if request is None or not request.continues(ids, length, len(sampled)):
                request = next(
                    (one for one in before if one is not None and one.continues(ids, length, len(sampled))), None
                ) or _Request(self._table, ids, length, len(sampled), (1 + self._share) / 2)
            self._requests[row] = request
            if request.take(sampled, length):
                self._share += (request.share - self._share) * (1 - _MEMORY) / 8
            drafts.append(request.draft(least, min(MOST, self._longest - 1 - length)))
        self._steps.begins(rows, sum(map(len, drafts)), complete=all(sampled_token_ids))
        return drafts


class Switch:
    """What vLLM's worker is extended by (`worker_extension_cls`): the engine's process is asked for it by name."""

    model_runner: Any

    def switch_draft(self, on: bool) -> None:
        """Draft from the next step on, or no more."""
        self.model_runner.drafter.on = on


class StepCost:
    """What one more token costs in a step, measured while serving.

    A step takes a + b n seconds for n tokens. On a GPU it is b that hardly counts, on a CPU a. A token pays where the
    probability that it is taken, times what a token is worth (the seconds that one takes now), exceeds b.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._sums: np.ndarray = np.zeros(5)
        """Decaying sums of 1, n, n n, t and n t over steps."""
        self._rate = 0.0
        self._began = 0.0
        self._tokens = 0
        self._rows = 0

    def begins(self, rows: int, drafted: int, *, complete: bool) -> None:
        """A step begins, with a token of each row and those drafted; `complete` if none of them is prefill."""
        self._began, self._rows = self._clock(), rows
        self._tokens = rows + drafted if complete else 0

    def least(self, rows: int, taken: int) -> float:
        """A step ended with so many tokens: the least probability with which a token pays in the next one."""
        before = next(least for load, least in _LOADS if rows <= load)
        seconds = self._clock() - self._began
        if self._tokens and rows == self._rows and 0 < seconds < _PAUSE:
            n, t = float(self._tokens), seconds
            self._sums = _DECAY * self._sums + np.array([1.0, n, n * n, t, n * t])
            rate = taken / seconds
            self._rate = rate if not self._rate else 0.9 * self._rate + 0.1 * rate
        count, n, nn, t, nt = self._sums.tolist()
        spread = nn - n * n / count if count else 0.0
        if count < _ENOUGH or spread < count:
            return before
        slope = (nt - n * t / count) / spread
        return min(_HIGHEST, max(_LOWEST, slope * self._rate))


class _Request:
    """What is known of one request."""

    def __init__(self, table: Table, ids: np.ndarray, length: int, sampled: int, share: float) -> None:
        self._table = table
        start = _answer_start(ids, length, table.tail, length - sampled)
        self._prompt = ids[:start].copy()
        self._words = table.alphabet.words_of(self._prompt)  # type: ignore[arg-type]
        self._answer = Answer(self._prompt.tolist(), table.alphabet)
        for token in ids[start : length - sampled].tolist():
            self._answer.push(token)
        self._length = length - sampled
        self._last = ids[max(0, self._length - 8) : self._length].tolist()
        self._proposed: list[int] = []
        self._hoped = 0.0
        self.share = share
        """How much of what was hoped of its drafts is taken, from 0 to 1."""
        self._idle = 0

    def continues(self, ids: np.ndarray, length: int, sampled: int) -> bool:
        """Whether a row is this request, one step later."""
        at = self._length
        return length - sampled == at and ids[max(0, at - 8) : at].tolist() == self._last

    def take(self, sampled: Sequence[int], length: int) -> bool:
        """The tokens of a step: they end the answer so far, and say how good the last draft was, if there was one."""
        drafted = bool(self._proposed)
        if drafted:
            got = min(1.0, (len(sampled) - 1) / max(self._hoped, 0.5))
            self.share += (got - self.share) * (1 - _MEMORY)
        for token in sampled:
            self._answer.push(token)
        self._last = (self._last + list(sampled))[-8:]
        self._length = length
        return drafted

    def draft(self, least: float, most: int) -> list[int]:
        """The tokens that most likely come next, while all of them together are likely enough."""
        self._proposed, self._hoped = [], 0.0
        trust = min(1.0, 1.5 * self.share)
        self._idle += 1
        if trust < least:
            if self._idle % _PROBE:
                return []
            most = min(most, _PROBED)
        found: list[int] = []
        hoped, reached = 0.0, max(trust, least)
        answer = self._answer.copy()
        while len(found) < most:
            step = self._next(answer, found)
            if step is None or (reached := reached * step[1]) < least:
                break
            for token in step[0][: most - len(found)]:
                found.append(token)
                answer.push(token)
                hoped += reached
            if found[-1] in self._table.ends:
                break
        self._proposed, self._hoped = found, hoped
        return found

    def _next(self, answer: Answer, found: list[int]) -> tuple[tuple[int, ...], float] | None:
        if answer.pending:
            if rest := answer.rest():
                return rest, _BEGUN
            return None
        predicted = self._table.predict(answer.symbols, self._words)
        if predicted is not None and (tokens := answer.meaning(predicted[0])):
            return tokens, predicted[1]
        return self._copied(found)

    def _copied(self, found: list[int]) -> tuple[tuple[int, ...], float] | None:
        """The token that follows the last occurrence of the last tokens in the prompt."""
        last = [*self._last, *found][-8:]
        places = np.flatnonzero(self._prompt[:-1] == last[-1])
        best, length = -1, 0
        for place in places[::-1][:16].tolist():
            size = 1
            while size < len(last) and place >= size and self._prompt[place - size] == last[-1 - size]:
                size += 1
            if size > length:
                best, length = place, size
        share = _COPIED[min(length, len(_COPIED) - 1)]
        return ((int(self._prompt[best + 1]),), share) if share else None


def _answer_start(ids: np.ndarray, length: int, tail: tuple[int, ...], otherwise: int) -> int:
    """Where the answer begins: after the last occurrence of what ends every prompt of the training."""
    if tail:
        for place in np.flatnonzero(ids[:length] == tail[-1])[::-1].tolist():
            if place + 1 >= len(tail) and tuple(ids[place + 1 - len(tail) : place + 1].tolist()) == tail:
                return place + 1
    return otherwise
