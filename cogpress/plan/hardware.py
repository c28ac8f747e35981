"""Replicate's hardware: what each machine has and costs, from a dated table that users can change."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import Field

from cogpress.errors import CogpressError
from cogpress.replicate import routes
from cogpress.replicate.api import RefusedError, Replicate, credentials

TABLE = Path(__file__).with_name("hardware.yaml")
"""The table that comes with cogpress."""


class Machine(pydantic.BaseModel):
    """One kind of machine.

    Attributes:
        sku: Replicate's name for it.
        name: its display name.
        aliases: other names that Replicate has used for it.
        gpus: number of GPUs.
        gpu_memory_gb: memory of each GPU, in 10^9 bytes.
        host_memory_gb: memory of the machine beside its GPUs, in 10^9 bytes; None if unknown.
        access: who may use it: every account, or those whose contract has it; None if unknown.
        capability: NVIDIA's compute capability.
        bandwidth_gb_per_second: memory bandwidth of each GPU.
        tflops: 16-bit throughput of each GPU, without sparsity.
        price_per_second: in US dollars; None if unknown.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    sku: Annotated[str, Field(min_length=1)]
    name: str
    aliases: tuple[str, ...] = ()
    gpus: Annotated[int, Field(ge=0, le=64)] = 0
    gpu_memory_gb: Annotated[float, Field(ge=0)] = 0
    host_memory_gb: Annotated[float, Field(ge=0)] | None = None
    access: Literal["general", "contract"] | None = None
    capability: tuple[int, int] = (0, 0)
    bandwidth_gb_per_second: Annotated[float, Field(ge=0)] = 0
    tflops: Annotated[float, Field(ge=0)] = 0
    price_per_second: Annotated[float, Field(ge=0)] | None = None

    @property
    def gpu_bytes(self) -> float:
        """Memory of each GPU, in bytes."""
        return self.gpu_memory_gb * 1e9

    @property
    def host_bytes(self) -> float:
        """Memory of the machine beside its GPUs, in bytes; without bound if unknown."""
        return float("inf") if self.host_memory_gb is None else self.host_memory_gb * 1e9


@dataclass(frozen=True)
class Table:
    """Machines, and where what is said of them is from.

    Attributes:
        machines: in the table's order.
        dated: the day on which prices, host memory and access were read.
        source: where they were read.
        checked: whether someone compared them with Replicate's pricing page.
        unknown: SKUs that the account has and the table lacks.
        listed: whether the machines are those of the account.
    """

    machines: tuple[Machine, ...]
    dated: datetime.date
    source: str
    checked: bool = False
    unknown: tuple[str, ...] = ()
    listed: bool = False

    def machine(self, sku: str) -> Machine:
        """A machine by its SKU or an alias.

        Raises:
            CogpressError: there is no such machine.
        """
        for machine in self.machines:
            if sku in (machine.sku, *machine.aliases):
                return machine
        raise CogpressError(
            f"There is no hardware {sku!r}. Choose one of {', '.join(one.sku for one in self.machines)}, or describe "
            "it in a file like cogpress/plan/hardware.yaml, named in model.yaml under plan.hardware."
        )

    def caution(self) -> str | None:
        """A warning about the prices; None if they were checked."""
        if self.checked:
            return None
        return (
            f"Prices, host memory and access are from {self.dated:%Y-%m-%d} and unconfirmed: compare them with "
            "replicate.com/pricing, and correct them in model.yaml under plan.prices or plan.hardware."
        )


def table(path: Path | None = None, prices: Mapping[str, float] | None = None) -> Table:
    """The table, with a user's changes.

    Args:
        path: a file of the same form, whose machines override those of the same SKU, field by field, or are added.
        prices: US dollars per second by SKU; they override everything else.

    Raises:
        CogpressError: the file cannot be read or is invalid, or a price names no machine.
    """
    raw = _raw(TABLE)
    rows = {str(row.get("sku")): row for row in raw["machines"]}
    if path is not None:
        own = _raw(path)
        for row in own["machines"]:
            sku = str(row.get("sku"))
            rows[sku] = {**rows.get(sku, {}), **row}
        raw = {**raw, **{name: value for name, value in own.items() if name != "machines"}}
    place = path or TABLE
    found = Table(
        tuple(_machine(row, rows, place) for row in rows.values()),
        _date(raw.get("dated"), place),
        str(raw.get("source", "")).strip(),
        raw.get("checked") is True,
    )
    changed = {found.machine(sku).sku: price for sku, price in (prices or {}).items()}
    machines = (
        one.model_copy(update={"price_per_second": changed[one.sku]}) if one.sku in changed else one
        for one in found.machines
    )
    return replace(found, machines=tuple(machines))


def _raw(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CogpressError(f"{path} cannot be read: {error.strerror}. Correct plan.hardware in model.yaml.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CogpressError(f"{path} is not YAML: {' '.join(str(error).split())}. Correct that line.") from None
    rows = data.get("machines") if isinstance(data, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise CogpressError(f"{path} has no list of machines. Write it like cogpress/plan/hardware.yaml.")
    return dict(data)


def _machine(row: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]], path: Path) -> Machine:
    """A row; fields that it lacks come from the row that its `like` names, but those of one machine alone."""
    whole = dict(row)
    if like := whole.pop("like", None):
        if like not in rows or "like" in rows[like]:
            raise CogpressError(f"{path}: {row.get('sku')} is like {like}, which is no complete machine. Correct it.")
        own = ("aliases", "host_memory_gb", "access")
        whole = {**{name: value for name, value in rows[like].items() if name not in own}, **whole}
    try:
        return Machine.model_validate(whole)
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise CogpressError(f"{path}: {row.get('sku', 'a machine')}: {where}: {problem['msg']}. Correct it.") from None


def _date(given: Any, path: Path) -> datetime.date:
    # Text too, because a dependency of vLLM (lm-format-enforcer) removes dates from PyYAML's loader on import.
    with contextlib.suppress(ValueError):
        return datetime.date.fromisoformat(str(given)[:10])
    raise CogpressError(f"{path} has no date. Add dated: YEAR-MONTH-DAY, the day on which its prices were read.")


def account_skus() -> list[str]:
    """The SKUs that Replicate lists for the account of REPLICATE_API_TOKEN.

    Raises:
        CogpressError: Replicate refuses, cannot be reached, or does not answer with a list of hardware.
    """
    replicate = Replicate(*credentials(), tries=1)
    try:
        return [str(one["sku"]) for one in replicate.ask(routes.hardware())]
    except (KeyError, TypeError):
        raise CogpressError(f"{replicate.name} lists no hardware. Check REPLICATE_BASE_URL.") from None
    finally:
        replicate.close()


def of_account(known: Table, skus: Sequence[str]) -> Table:
    """The table, reduced to an account's machines, with the SKUs that it lacks in `unknown`."""
    machines = tuple(
        one.model_copy(update={"sku": name})
        for one in known.machines
        for name in (one.sku, *one.aliases)
        if name in skus
    )
    names = {one.sku for one in machines}
    return replace(known, machines=machines, unknown=tuple(sku for sku in skus if sku not in names), listed=True)


def current(known: Table) -> tuple[Table, str | None]:
    """The table as the account of REPLICATE_API_TOKEN sees it; otherwise the whole table, with a note that says why.

    Raises:
        CogpressError: Replicate rejects the token.
    """
    if not os.environ.get("REPLICATE_API_TOKEN"):
        return known, "Set REPLICATE_API_TOKEN to see only the hardware that your account has."
    try:
        return of_account(known, account_skus()), None
    except CogpressError as error:
        if isinstance(error, RefusedError) and error.status == 401:
            raise
        return known, f"{error} The table's hardware is shown."
