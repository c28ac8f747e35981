"""Speed and cost of training and serving on a machine: rooflines, queues and Replicate's billing, as pure arithmetic.

Measured speeds take precedence over those estimated here, whose efficiencies are assumptions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cogpress.plan.architecture import Architecture
from cogpress.plan.hardware import Machine
from cogpress.plan.memory import Serving, Training, cache_of_sequence, serving_weights

READING = 0.6
"""Share of a GPU's memory bandwidth that decoding reaches. Assumed."""

COMPUTING = 0.45
"""Share of a GPU's arithmetic throughput that prefill reaches. Assumed."""

LEARNING = 0.3
"""Share of a GPU's arithmetic throughput that training reaches. Assumed; each pass dequantizes a quantized base."""

SHARING = 0.8
"""Efficiency of tensor parallelism over several GPUs. Assumed."""

STEP = 0.002
"""Overhead of each decoding step in seconds: kernel launches, sampling, scheduling. Assumed."""

MONTH = 365.25 / 12 * 24 * 3600
"""In seconds."""


@dataclass(frozen=True)
class Load:
    """Tokens of each request, and requests per second, which arrive independently of one another."""

    input_tokens: int
    output_tokens: int
    per_second: float


@dataclass(frozen=True)
class Speed:
    """How fast a machine answers.

    Attributes:
        tokens_per_second: output of all sequences together, at full concurrency.
        stream_tokens_per_second: output of a single sequence.
        seconds: duration of a single request.
        measured: whether `tokens_per_second` was measured.
    """

    tokens_per_second: float
    stream_tokens_per_second: float
    seconds: float
    measured: bool


def step_seconds(model: Architecture, how: Serving, machine: Machine, sequences: int, context: int) -> float:
    """Duration of one decoding step: the longer of reading memory and computing (the roofline, Williams et al. 2009).

    A step reads all weights once (of the experts, those that its sequences use) and each sequence's cache; it computes
    two operations per weight and sequence (Kaplan et al. 2020, section 2.1).
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
    """A machine's speed for requests of a load's lengths.

    At full concurrency the other sequences wait while a prompt is computed; chunked prefill spreads that wait but does
    not avoid it.

    Args:
        measured: measured output tokens per second of all sequences together.
    """
    together = machine.gpus * (SHARING if machine.gpus > 1 else 1)
    prompt = 2 * model.active * load.input_tokens / (machine.tflops * 1e12 * COMPUTING * together)
    halfway = load.input_tokens + load.output_tokens // 2
    alone = step_seconds(model, how, machine, 1, halfway)
    full = step_seconds(model, how, machine, how.concurrency, halfway)
    estimated = how.concurrency * load.output_tokens / (how.concurrency * prompt + load.output_tokens * full)
    return Speed(
        tokens_per_second=measured or estimated,
        stream_tokens_per_second=1 / alone,
        seconds=prompt + load.output_tokens * alone,
        measured=measured is not None,
    )


def per_million_tokens(price_per_second: float, tokens_per_second: float) -> float:
    """US dollars per million output tokens of a machine that is never idle."""
    return price_per_second / tokens_per_second * 1e6


def training_speed(model: Architecture, how: Training, machine: Machine) -> float:
    """Tokens per second on one GPU.

    Two operations per weight and token in the forward pass, two for the gradients of activations, two for those of
    weights that are trained (Kaplan et al. 2020, section 2.1), and two for recomputed activations. Attention adds two
    products of length x width per layer each time, over the half of the length that a token sees on average.
    """
    times = 2 + (1 if how.method == "full" else 0) + (1 if how.checkpointing else 0)
    attention = 2 * 2 * how.length / 2 * model.heads * model.head_width * model.layers
    operations = times * (2 * model.active + attention)
    return machine.tflops * 1e12 * LEARNING / operations


@dataclass(frozen=True)
class Running:
    """The cost of a load, serverless or always on.

    Attributes:
        instances: paid instances on average.
        per_month: in US dollars.
        cold: share of requests that wait for a cold start.
        wait: seconds that such a request waits on average.
    """

    instances: float
    per_month: float
    cold: float
    wait: float


def always_on(load: Load, speed: Speed, price_per_second: float) -> Running:
    """As many instances as the load needs, always online (a deployment's minimum)."""
    instances = max(1, math.ceil(load.per_second * load.output_tokens / speed.tokens_per_second))
    return Running(instances, instances * price_per_second * MONTH, 0.0, 0.0)


def serverless(
    load: Load, speed: Speed, price_per_second: float, *, cold_start: float, idle: float, private: bool
) -> Running:
    """Instances that start on a request and stop after some time without one.

    For a private model all time online is paid: starting, idle and active; for a public one, active time only.

    Requests arrive at rate r and take s seconds, many at once: an M/G/∞ queue, whose busy periods last
    (e^(rs) - 1) / r on average and whose idle periods 1/r. An instance outlives an idle period with probability
    1 - e^(-r·idle) and pays (1 - e^(-r·idle)) / r of it. Between two starts there are e^(r·idle) busy periods on
    average, and one more 1/r during which nothing is online. Every request that arrives during a start waits: the first
    for all of it, the others for half on average.

    Args:
        cold_start: seconds from a request that finds nothing online until the model is ready.
        idle: seconds without a request after which an instance stops.
        private: whether the model is private.
    """
    steady = always_on(load, speed, price_per_second)
    rate, seconds = load.per_second, speed.seconds
    # With several instances, or if an idle period of that length practically never comes, nothing ever stops.
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
