"""From a project to a model on Replicate that people use: pushed to a test model, tried there, and only then for real.

Knows how the parts are put together; `steps` has their order.
"""

from __future__ import annotations

from rich.console import Console

from cogpress.config import Config
from cogpress.push import dry, orders, summary
from cogpress.push.orders import Order, order
from cogpress.push.steps import Push, Shipped
from cogpress.replicate import api
from cogpress.replicate.api import Replicate

__all__ = ["Order", "Shipped", "order", "run", "show"]


def run(wanted: Order, settings: Config, console: Console) -> Shipped:
    """Push, and print how to use what was pushed.

    Raises:
        CogpressError: a step fails; run again, it goes on there.
    """
    asked = api.connect()
    try:
        shipped = Push(wanted, settings, asked, console).run()
    finally:
        asked.close()
    summary.show(shipped, wanted.destination, orders.example(settings), asked.base, console)
    return shipped


def show(wanted: Order, settings: Config, console: Console) -> None:
    """Print what `run` would do; nothing is run or asked.

    Raises:
        CogpressError: as `run`, before its first step.
    """
    dry.show(Push(wanted, settings, Replicate("none"), console), console)
