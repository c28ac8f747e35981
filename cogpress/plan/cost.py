"""Speed and money: how fast a machine trains and answers, and what that costs. Pure arithmetic.

Knows rooflines, queues and how Replicate bills; leaves what fits to `memory` and prices to `hardware`. Speeds that were
measured always win over those reckoned here, whose efficiencies are assumed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cogpress.plan.architecture import Architecture
from cogpress.plan.hardware import Machine
from cogpress.plan.memory import Serving, Training, cache_of_sequence, serving_weights

READING = 0.6
"""Share of a GPU's bandwidth that decoding reaches. Assumed."""

COMPUTING = 0.45
"""Share of a GPU's arithmetic that a prompt's pass reaches. Assumed."""

LEARNING = 0.3
"""Share of a GPU's arithmetic that training reaches. Assumed; quantized bases are dequantized in each pass."""

SHARING = 0.8
"""What several GPUs that share a model keep of their common speed. Assumed."""

STEP = 0.002
"""Seconds of each decoding step that no arithmetic explains: launches, sampling, scheduling. Assumed."""

MONTH = 365.25 / 12 * 24 * 3600
"""Seconds."""


@dataclass(frozen=True)
class Load:
    """What is asked: tokens of each request, and requests a second, arriving independently of one another."""

    input_tokens: int
    output_tokens: int
    per_second: float


@dataclass(frozen=True)
class Speed:
    """How fast a machine answers.

    Attributes:
        tokens_per_second: output of all sequences together, at the full concurrency.
        stream_tokens_per_second: of one sequence alone.
        seconds: of one request alone.
        measured: whether the first is a measurement.
    """

    tokens_per_second: float
    stream_tokens_per_second: float
    seconds: float
    measured: bool


def step_seconds(model: Architecture, how: Serving, machine: Machine, sequences: int, context: int) -> float:
    """Of one decoding step: what it reads or what it computes, whichever takes longer (Williams et al. 2009).

    A step reads all weights once, of experts at most all that its sequences use, and each sequence's cache; it computes
    two operations a weight and sequence (Kaplan et al. 2020, section 2.1).
    """
    together = machine.gpus * (SHARING if machine.gpus > 1 else 1)
    weights = serving_weights(model, how.scheme)
    used = 1 - (1 - model.expert_share) ** sequences
    weights *= 1 - (1 - used) * model.experts / model.parameters
    read = weights + sequences * cache_of_sequence(model, context, how.cache_bytes)
    reading = read / (machine.bandwidth_gb_per_second * 1e9 * READING * together)
    computing = 2 * model.active * sequences / (machine.tflops * 1e12 * COMPUTING * together)
    return max(reading, computing) + STEP


def speed(model: Architecture, how: Serving, machine: Machine, load: Load, measured: float | None = None) -> Speed:
    """A machine's speed at a load's lengths.

    At the full concurrency each sequence's prompt is computed while the others wait, which chunked prefill spreads but
    does not avoid.

    Args:
        measured: output tokens a second of all sequences together, where somebody measured them.
    """
    together = machine.gpus * (SHARING if machine.gpus > 1 else 1)
    prompt = 2 * model.active * load.input_tokens / (machine.tflops * 1e12 * COMPUTING * together)
    halfway = load.input_tokens + load.output_tokens // 2
    alone = step_seconds(model, how, machine, 1, halfway)
    full = step_seconds(model, how, machine, how.concurrency, halfway)
    reckoned = how.concurrency * load.output_tokens / (how.concurrency * prompt + load.output_tokens * full)
    return Speed(
        tokens_per_second=measured or reckoned,
        stream_tokens_per_second=1 / alone,
        seconds=prompt + load.output_tokens * alone,
        measured=measured is not None,
    )


def per_million_tokens(price_per_second: float, tokens_per_second: float) -> float:
    """US dollars for a million output tokens of a machine that is never idle."""
    return price_per_second / tokens_per_second * 1e6


def training_speed(model: Architecture, how: Training, machine: Machine) -> float:
    """Tokens a second on one GPU.

    Two operations a weight and token forward, two for the gradients of activations, two for those of weights where
    these are trained (Kaplan et al. 2020, section 2.1), and two for activations that are computed again. Attention adds
    two products of length x width a layer each time, over the half of the length that a token sees on average.
    """
    times = 2 + (1 if how.method == "full" else 0) + (1 if how.checkpointing else 0)
    attention = 2 * 2 * how.length / 2 * model.heads * model.head_width * model.layers
    operations = times * (2 * model.active + attention)
    return machine.tflops * 1e12 * LEARNING / operations


@dataclass(frozen=True)
class Running:
    """What a load costs in one of two ways.

    Attributes:
        instances: online on average.
        per_month: US dollars.
        cold: share of the requests that wait for a start.
        wait: seconds that such a request waits on average.
    """

    instances: float
    per_month: float
    cold: float
    wait: float


def always_on(load: Load, speed: Speed, price_per_second: float) -> Running:
    """As many instances as the load needs, never stopped (a deployment's minimum)."""
    instances = max(1, math.ceil(load.per_second * load.output_tokens / speed.tokens_per_second))
    return Running(instances, instances * price_per_second * MONTH, 0.0, 0.0)


def serverless(
    load: Load, speed: Speed, price_per_second: float, *, cold_start: float, idle: float, private: bool
) -> Running:
    """Instances that start when a request comes and stop when none has come for some time.

    Of a private model all time online is paid: starting, idle and active; of a public one active time alone.

    Requests arrive at a rate r and take s seconds, many at once: a queue M/G/∞, whose busy periods last
    (e^(rs) - 1) / r on average and whose idle ones 1/r. An instance outlives an idle period with probability
    1 - e^(-r·idle) and pays (1 - e^(-r·idle)) / r of it. From one start to the next there are e^(r·idle) busy periods
    on average, and one more 1/r that nothing is online. Everybody who comes during a start waits: the first all of it,
    the others half on average.

    Args:
        cold_start: seconds from a request that finds nothing online to the model being ready.
        idle: seconds without a request after which an instance stops.
        private: whose model it is.
    """
    steady = always_on(load, speed, price_per_second)
    rate, seconds = load.per_second, speed.seconds
    # Where the load needs several instances, or an idle period of that length never comes, nothing ever stops.
    if steady.instances > 1 or rate * (seconds + idle) > 500:
        paid = steady.instances if private else rate * load.output_tokens / speed.tokens_per_second
        return Running(paid, paid * price_per_second * MONTH, 0.0, 0.0)
    periods = math.exp(rate * idle)
    busy = (math.exp(rate * seconds) - 1) / rate
    idling = (1 - math.exp(-rate * idle)) / rate
    online = cold_start + periods * (busy + idling)
    cycle = online + 1 / rate
    waiting = 1 + rate * cold_start
    paid = online / cycle if private else periods * busy / cycle
    return Running(
        instances=paid,
        per_month=paid * price_per_second * MONTH,
        cold=waiting / (rate * cycle),
        wait=(cold_start + rate * cold_start * cold_start / 2) / waiting,
    )
