"""Replicate's hardware: what each machine has and costs, by a dated table that users can change.

Knows the table and the list that an account sees; leaves what fits where to `plan`.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import httpx
import pydantic
import yaml
from pydantic import Field

from cogpress import source
from cogpress.errors import CogpressError

TABLE = Path(__file__).with_name("hardware.yaml")
"""The table that comes with the kit."""

ADDRESS = "https://api.replicate.com"

TIMEOUT = 10.0
"""Seconds that Replicate has to answer: the plan can do without."""


class Machine(pydantic.BaseModel):
    """One kind of machine.

    Attributes:
        sku: Replicate's name of it.
        name: for people.
        aliases: other names that Replicate has had for it.
        gpus: how many; 0 for none.
        gpu_memory_gb: of each GPU, in 10^9 bytes.
        capability: NVIDIA's compute capability.
        bandwidth_gb_per_second: of each GPU's memory.
        tflops: of each GPU, in 16 bits without sparsity.
        price_per_second: US dollars; None where it is not known.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    sku: Annotated[str, Field(min_length=1)]
    name: str
    aliases: tuple[str, ...] = ()
    gpus: Annotated[int, Field(ge=0, le=64)] = 0
    gpu_memory_gb: Annotated[float, Field(ge=0)] = 0
    capability: tuple[int, int] = (0, 0)
    bandwidth_gb_per_second: Annotated[float, Field(ge=0)] = 0
    tflops: Annotated[float, Field(ge=0)] = 0
    price_per_second: Annotated[float, Field(ge=0)] | None = None

    @property
    def gpu_bytes(self) -> float:
        """Of each GPU's memory."""
        return self.gpu_memory_gb * 1e9

    @property
    def price_per_hour(self) -> float | None:
        """US dollars."""
        return None if self.price_per_second is None else 3600 * self.price_per_second


@dataclass(frozen=True)
class Table:
    """Machines, and how far to trust what they cost.

    Attributes:
        machines: in the table's order.
        dated: when the prices were read.
        source: where they are from.
        checked: whether somebody has compared them with Replicate's page.
        unknown: SKUs that the account has and the table does not.
        listed: whether the machines are those that the account has.
    """

    machines: tuple[Machine, ...]
    dated: datetime.date
    source: str
    checked: bool = False
    unknown: tuple[str, ...] = ()
    listed: bool = False

    def machine(self, sku: str) -> Machine:
        """A machine by its SKU or by another name of it.

        Raises:
            CogpressError: there is none; names those that there are.
        """
        for machine in self.machines:
            if sku in (machine.sku, *machine.aliases):
                return machine
        raise CogpressError(
            f"There is no hardware {sku!r}. There is: {', '.join(one.sku for one in self.machines)}. For others write "
            "a file like cogpress/plan/hardware.yaml and name it in model.yaml, under plan.hardware."
        )

    def caution(self) -> str | None:
        """What to say of the prices; None where they were checked."""
        if self.checked:
            return None
        return (
            f"Prices are of {self.dated:%Y-%m-%d} and unconfirmed: compare them with replicate.com/pricing, and "
            "correct them in model.yaml, under plan.prices."
        )


def table(path: Path | None = None, prices: Mapping[str, float] | None = None) -> Table:
    """The table, with a user's changes.

    Args:
        path: a file of the same form, whose machines change those of the same SKU, option by option, or are added.
        prices: US dollars a second by SKU, over everything else.

    Raises:
        CogpressError: the file can not be read or is not valid, or a price is of no machine.
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
        raise CogpressError(f"{path} can not be read: {error.strerror}. Correct plan.hardware in model.yaml.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CogpressError(f"{path} is not YAML: {' '.join(str(error).split())}. Correct that line.") from None
    rows = data.get("machines") if isinstance(data, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise CogpressError(f"{path} has no list of machines. Write it like cogpress/plan/hardware.yaml.")
    return dict(data)


def _machine(row: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]], path: Path) -> Machine:
    """A row, whose `like` names another one for all that it does not say itself."""
    whole = dict(row)
    if like := whole.pop("like", None):
        if like not in rows or "like" in rows[like]:
            raise CogpressError(f"{path}: {row.get('sku')} is like {like}, which is no machine that is whole itself.")
        whole = {**{name: value for name, value in rows[like].items() if name != "aliases"}, **whole}
    try:
        return Machine.model_validate(whole)
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise CogpressError(f"{path}: {row.get('sku', 'a machine')}: {where}: {problem['msg']}. Correct it.") from None


def _date(given: Any, path: Path) -> datetime.date:
    # Text, too: a library of vLLM's (lm-format-enforcer) takes dates out of PyYAML's loader when it is imported.
    with contextlib.suppress(ValueError):
        return datetime.date.fromisoformat(str(given)[:10])
    raise CogpressError(f"{path} has no date. Write dated: YEAR-MONTH-DAY, the day that its prices were read.")


def account_skus(token: str, address: str | None = None) -> list[str]:
    """The SKUs that an account may use, as Replicate lists them.

    Args:
        token: of the account; never shown.
        address: Replicate's, where it is not the usual one.

    Raises:
        CogpressError: Replicate refuses, can not be reached, or answers something else.
    """
    url = f"{(address or ADDRESS).rstrip('/')}/v1/hardware"
    if not source.allowed(url):
        raise CogpressError("REPLICATE_BASE_URL must be https: a token would be read on its way.")
    try:
        answer = httpx.get(url, headers={"Authorization": f"Bearer {token}"}, timeout=TIMEOUT)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise CogpressError(f"Replicate can not be reached for its hardware ({type(error).__name__}).") from None
    if answer.status_code == 401:
        raise CogpressError("Replicate does not know the token in REPLICATE_API_TOKEN (401). Set it to yours.")
    if answer.status_code != 200:
        raise CogpressError(f"Replicate answers {answer.status_code} to the question for its hardware.")
    try:
        return [str(one["sku"]) for one in answer.json()]
    except (ValueError, KeyError, TypeError):
        raise CogpressError("What answers in Replicate's place lists no hardware. Check REPLICATE_BASE_URL.") from None


def of_account(known: Table, skus: Sequence[str]) -> Table:
    """The table's machines that an account has, and the names of those that the table does not know."""
    machines = tuple(
        one.model_copy(update={"sku": name})
        for one in known.machines
        for name in (one.sku, *one.aliases)
        if name in skus
    )
    names = {one.sku for one in machines}
    return replace(known, machines=machines, unknown=tuple(sku for sku in skus if sku not in names), listed=True)


def current(known: Table) -> tuple[Table, str | None]:
    """The table as the account of REPLICATE_API_TOKEN sees it, and a note where that can not be told.

    Without a token it is the table as it is.

    Raises:
        CogpressError: Replicate does not know the token.
    """
    token = os.environ.get("REPLICATE_API_TOKEN")
    if not token:
        return known, "Set REPLICATE_API_TOKEN to see only the hardware that your account has."
    try:
        return of_account(known, account_skus(token, os.environ.get("REPLICATE_BASE_URL"))), None
    except CogpressError as error:
        if "(401)" in str(error):
            raise
        return known, f"{error} The table's hardware is shown."
