"""Replicate's hardware: the table, a user's changes, an account's list."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from cogpress.errors import CogpressError
from cogpress.plan import hardware


def test_the_table_is_dated_and_says_that_it_is_unchecked() -> None:
    table = hardware.table()
    assert table.dated.year >= 2026
    assert table.source
    assert not table.checked
    assert "unconfirmed" in str(table.caution())
    assert len({one.sku for one in table.machines}) == len(table.machines)
    for one in table.machines:
        assert one.price_per_second, one.sku
        assert (one.gpus == 0) == (one.gpu_memory_gb == 0), one.sku
        assert one.access is not None, one.sku


def test_a_machine_of_several_gpus_is_like_one_of_one() -> None:
    table = hardware.table()
    one, four = table.machine("gpu-l40s"), table.machine("gpu-l40s-4x")
    assert (four.gpus, four.gpu_memory_gb, four.capability) == (4, one.gpu_memory_gb, one.capability)
    assert four.price_per_second == pytest.approx(4 * (one.price_per_second or 0))
    assert table.machine("gpu-4x-l40s") == four
    assert one.price_per_second == pytest.approx(3.51 / 3600)


def test_host_memory_and_access_are_those_of_each_machine() -> None:
    table = hardware.table()
    found = {one.sku: (one.host_memory_gb, one.access) for one in table.machines}
    assert (found["cpu-small"], found["gpu-h100"]) == ((2, "general"), (72, "general"))
    assert (found["gpu-l40s"], found["gpu-l40s-2x"], found["gpu-l40s-4x"]) == (
        (65, "general"), (144, "general"), (288, "contract"),
    )  # fmt: skip
    assert found["gpu-h100-2x"] == (None, "contract"), "one machine's host memory is not another's"
    assert table.machine("gpu-h100-2x").host_bytes == float("inf")
    assert table.machine("gpu-h100").host_bytes == 72e9


def test_prices_are_changed_by_sku() -> None:
    table = hardware.table(prices={"gpu-t4": 0.5, "gpu-2x-l40s": 0.25})
    assert table.machine("gpu-t4").price_per_second == 0.5
    assert table.machine("gpu-l40s-2x").price_per_second == 0.25
    with pytest.raises(CogpressError, match=r"no hardware 'gpu-x1'.*gpu-h100.*plan\.hardware"):
        hardware.table(prices={"gpu-x1": 1})


def test_a_file_changes_and_adds_machines(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(
        "dated: 2027-01-31\nsource: me\nchecked: true\nmachines:\n"
        "- {sku: gpu-h100, price_per_second: 0.002}\n"
        "- {sku: gpu-b200, name: B200, gpus: 1, gpu_memory_gb: 190, capability: [10, 0], price_per_second: 0.003}\n"
    )
    table = hardware.table(path)
    assert table.caution() is None
    assert (table.dated.year, table.source) == (2027, "me")
    assert table.machine("gpu-h100").price_per_second == 0.002
    assert table.machine("gpu-h100").gpu_memory_gb == 84.9
    assert table.machine("gpu-b200").capability == (10, 0)
    assert table.machine("gpu-t4").price_per_second == 0.000225


def test_a_date_may_be_text(tmp_path: Path) -> None:
    """As it is where vLLM was imported: one of its libraries takes dates out of PyYAML's loader."""
    (tmp_path / "own.yaml").write_text('dated: "2027-01-31"\nmachines: []\n')
    assert str(hardware.table(tmp_path / "own.yaml").dated) == "2027-01-31"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("machines: 3", "no list of machines"),
        ("dated: [", "is not YAML"),
        ("dated: soon\nmachines: []", "no date"),
        ("dated: 2027-01-01\nmachines: [{sku: x, name: X, gpus: -1}]", "x: gpus"),
        ("dated: 2027-01-01\nmachines: [{sku: x, name: X, ram: 1}]", "x: ram"),
        ("dated: 2027-01-01\nmachines: [{sku: x, name: X, access: some}]", "x: access"),
        ("dated: 2027-01-01\nmachines: [{sku: x, name: X, like: y}]", "x is like y"),
    ],
)
def test_a_wrong_file_is_explained(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(CogpressError, match=said):
        hardware.table(tmp_path / "own.yaml")
    with pytest.raises(CogpressError, match="cannot be read"):
        hardware.table(tmp_path / "none.yaml")


class _Replicate(BaseHTTPRequestHandler):
    answer: tuple[int, Any] = (200, [])

    def do_GET(self) -> None:
        known = self.headers["Authorization"] == "Bearer r8_secret" and self.path == "/v1/hardware"
        status, body = self.answer if known else (401, {"detail": "no"})
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def replicate(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Replicate]]:
    server = HTTPServer(("127.0.0.1", 0), _Replicate)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    monkeypatch.setenv("REPLICATE_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("REPLICATE_API_TOKEN", "r8_secret")
    yield _Replicate
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_accounts_list_is_taken(replicate: type[_Replicate], monkeypatch: pytest.MonkeyPatch) -> None:
    skus = ("gpu-2x-l40s", "gpu-t4", "gpu-new")
    replicate.answer = (200, [{"name": sku, "sku": sku} for sku in skus])
    table, note = hardware.current(hardware.table())
    assert note is None
    assert [one.sku for one in table.machines] == ["gpu-t4", "gpu-2x-l40s"]
    assert table.unknown == ("gpu-new",)
    assert table.listed


def test_without_an_account_the_table_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REPLICATE_API_TOKEN", raising=False)
    table, note = hardware.current(hardware.table())
    assert table == hardware.table()
    assert "REPLICATE_API_TOKEN" in str(note)


def test_replicates_faults_are_explained(replicate: type[_Replicate], monkeypatch: pytest.MonkeyPatch) -> None:
    replicate.answer = (503, {})
    table, note = hardware.current(hardware.table())
    assert table == hardware.table()
    assert "answered 503" in str(note)
    replicate.answer = (200, {"detail": "odd"})
    assert "lists no hardware" in str(hardware.current(hardware.table())[1])
    monkeypatch.setenv("REPLICATE_API_TOKEN", "wrong")
    with pytest.raises(CogpressError, match="rejects the token") as error:
        hardware.current(hardware.table())
    assert "wrong" not in str(error.value)
    monkeypatch.setenv("REPLICATE_BASE_URL", "http://example.org")
    assert "is neither https nor this machine" in str(hardware.current(hardware.table())[1])
