"""Shared libraries of the system: which are missing, and what is said of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pydantic_core
import pytest

from cogpress.errors import CogpressError
from cogpress.setup import libraries


def test_what_the_loader_does_not_find_is_absent() -> None:
    assert libraries.absent(["libc.so.6", "libno-such.so.9"]) == ["libno-such.so.9"]


def test_nothing_missing_is_nothing_said() -> None:
    libraries.check([])


def test_the_package_that_brings_a_library_is_named() -> None:
    with pytest.raises(CogpressError) as error:
        libraries.check(["libnuma.so.1", "libgomp.so.1"])
    text = str(error.value)
    assert text.startswith("This system lacks libnuma.so.1, libgomp.so.1, which torch or vLLM needs.")
    assert "apt-get install libnuma1 libgomp1;" in text
    assert "dnf install numactl-libs libgomp)" in text


def test_an_unknown_library_is_named_all_the_same() -> None:
    with pytest.raises(CogpressError, match=r"lacks libodd\.so\.3, .* Install it, then run again"):
        libraries.check(["libodd.so.3"])


@pytest.fixture
def site_packages(tmp_path: Path) -> Path:
    """Where vLLM has a library that asks for `libnop_s.so.1`."""
    extension = Path(str(pydantic_core._pydantic_core.__file__)).read_bytes()
    assert b"libgcc_s.so.1\0" in extension
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "_C.abi3.so").write_bytes(extension.replace(b"libgcc_s.so.1\0", b"libnop_s.so.1\0"))
    return tmp_path


def test_what_an_installed_library_asks_for_is_missed(site_packages: Path) -> None:
    assert libraries.needed(site_packages) == ["libnop_s.so.1"]


def test_what_another_wheel_brings_is_not(site_packages: Path) -> None:
    (site_packages / "other.libs").mkdir()
    (site_packages / "other.libs" / "libnop_s.so.1").touch()
    assert libraries.needed(site_packages) == []


def test_nothing_installed_needs_nothing(tmp_path: Path) -> None:
    assert libraries.needed(tmp_path) == []


def test_this_environment_has_what_it_needs() -> None:
    found = [Path(path) for path in sys.path if (Path(path) / "torch").is_dir()]
    assert found
    assert libraries.needed(found[0]) == []
