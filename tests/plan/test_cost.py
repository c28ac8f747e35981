"""Speed and money, against numbers computed by hand and a simulated queue."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from cogpress.plan import cost
from cogpress.plan.cost import Load, Speed
from cogpress.plan.hardware import Machine
from cogpress.plan.memory import Serving, Training
from tests.standins.architectures import LLAMA3, SMOLLM2

L40S = Machine(
    sku="gpu", name="GPU", gpus=1, gpu_memory_gb=48, capability=(8, 9), bandwidth_gb_per_second=864, tflops=362,
    price_per_second=0.001,
)  # fmt: skip
SPEED = Speed(tokens_per_second=1000, stream_tokens_per_second=50, seconds=4, measured=True)


def test_one_stream_is_bound_by_reading_the_weights() -> None:
    seconds = cost.step_seconds(LLAMA3, Serving(), L40S, 1, 16)
    read = 2 * 8_030_261_248 + 16 * 131_072
    assert seconds == pytest.approx(read / (864e9 * cost.READING) + cost.STEP)


def test_many_streams_are_bound_by_computing() -> None:
    seconds = cost.step_seconds(LLAMA3, Serving(), L40S, 4000, 1)
    assert seconds == pytest.approx(2 * LLAMA3.active * 4000 / (362e12 * cost.COMPUTING) + cost.STEP)


def test_a_measured_speed_wins() -> None:
    load = Load(500, 200, 1)
    estimated = cost.speed(LLAMA3, Serving(), L40S, load)
    measured = cost.speed(LLAMA3, Serving(), L40S, load, 321.0)
    assert not estimated.measured
    assert measured == replace(estimated, tokens_per_second=321.0, measured=True)
    assert estimated.tokens_per_second > estimated.stream_tokens_per_second


def test_training_takes_four_operations_a_weight_and_two_more_with_checkpointing() -> None:
    how = Training(method="nf4", length=1024, checkpointing=False)
    attention = 2 * 1024 * 576 * 30
    assert cost.training_speed(SMOLLM2, how, L40S) == pytest.approx(
        362e12 * cost.LEARNING / (4 * SMOLLM2.active + 2 * attention)
    )
    with_ = cost.training_speed(SMOLLM2, replace(how, checkpointing=True), L40S)
    full = cost.training_speed(SMOLLM2, replace(how, method="full"), L40S)
    assert with_ == full == pytest.approx(cost.training_speed(SMOLLM2, how, L40S) * 2 / 3)


def test_a_million_tokens() -> None:
    assert cost.per_million_tokens(0.001, 1000) == pytest.approx(1.0)


def test_always_on_takes_as_many_instances_as_the_load() -> None:
    assert cost.always_on(Load(1, 100, 1), SPEED, 0.001).instances == 1
    found = cost.always_on(Load(1, 100, 25), SPEED, 0.001)
    assert found.instances == 3
    assert found.per_month == pytest.approx(3 * 0.001 * cost.MONTH)


def test_a_rare_request_always_waits_and_pays_start_work_and_idling() -> None:
    load = Load(1, 1, 1e-6)
    found = cost.serverless(load, SPEED, 0.001, cold_start=120, idle=60, private=True)
    assert found.cold == pytest.approx(1, rel=1e-3)
    assert found.wait == pytest.approx(120, rel=1e-3)
    assert found.instances == pytest.approx(1e-6 * (120 + 4 + 60), rel=1e-3)
    public = cost.serverless(load, SPEED, 0.001, cold_start=120, idle=60, private=False)
    assert public.instances == pytest.approx(1e-6 * 4, rel=1e-3)


def test_a_steady_load_never_stops() -> None:
    for rate in (1.0, 100.0):
        load = Load(1, 9, rate)
        found = cost.serverless(load, SPEED, 0.001, cold_start=120, idle=600, private=True)
        assert found.cold == 0
        assert found.per_month == cost.always_on(load, SPEED, 0.001).per_month


@pytest.mark.parametrize(("gap", "idle"), [(60, 60), (300, 60), (30, 45)])
def test_serverless_agrees_with_a_simulated_queue(gap: float, idle: float) -> None:
    dice, start = random.Random(0), 20.0
    now = online = until = ready = 0.0
    cold, waited, requests = 0, 0.0, 60_000
    for _ in range(requests):
        now += dice.expovariate(1 / gap)
        if now >= until:  # nothing is online any more
            ready = now + start
            began = now
            until = ready + SPEED.seconds + idle
            online += until - began
        wait = max(0.0, ready - now)
        cold += wait > 0
        waited += wait
        end = max(until, now + wait + SPEED.seconds + idle)
        online += end - until
        until = end
    found = cost.serverless(Load(1, 1, 1 / gap), SPEED, 1, cold_start=start, idle=idle, private=True)
    assert found.instances == pytest.approx(online / now, rel=0.06)
    assert found.cold == pytest.approx(cold / requests, rel=0.06)
    assert found.wait == pytest.approx(waited / cold, rel=0.06)
