"""The doctor: what a sound installation is told, and that each fault is found."""

import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement

from nashswarm import cli, kernels
from nashswarm.experiment import doctor
from nashswarm.kernels import native


def test_unmet_requirement_is_told() -> None:
    assert doctor.unmet(Requirement("torch>=2")) is None
    assert "does not fit >=999" in str(doctor.unmet(Requirement("torch>=999")))
    assert doctor.unmet(Requirement("no-such-package")) == "no-such-package is not installed"


def test_required_of_an_extra_are_its_own() -> None:
    own, served = (  # an installation in place has the metadata of the day of its installation
        {one.name for one in doctor.required(extra)} for extra in ("", "serve")
    )
    assert "torch" in own and {"fastapi", "uvicorn"} <= served and not served & own


def test_products_of_the_kernels_agree_and_wrong_ones_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "agree with float64" in doctor.products()
    right = kernels.matmul
    monkeypatch.setattr(kernels, "matmul", lambda *arguments: 1.001 * right(*arguments))
    assert doctor.tried("products", doctor.products).state == doctor.BAD
    with pytest.raises(ValueError, match=r"a product with tiles is off by 1\.0e-03; set NASHSWARM_KERNEL=torch"):
        doctor.products()


def test_kernels_that_were_not_built_are_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: "the C++ library was not built")
    finding = doctor.kernel()
    assert finding.state == doctor.NOTE and finding.text == "torch, slow: the C++ library was not built"


def test_more_threads_than_cores_are_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4096)
    assert doctor.threads().state == doctor.NOTE


def test_caches_tell_their_size(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "absent"))
    (tmp_path / "moments.safetensors").write_bytes(bytes(3_000_000))
    own, hub = doctor.caches(tmp_path)
    assert f"nashswarm: {tmp_path}, 3 MB" in own.text and "0 MB" in hub.text
    assert own.state == hub.state == doctor.GOOD


@pytest.mark.parametrize("state, status", [(doctor.GOOD, 0), (doctor.NOTE, 0), (doctor.BAD, 1)])
def test_command_doctor_returns_1_for_a_failed_check_alone(
    state: str, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def findings(_: Any) -> Iterator[doctor.Finding]:
        yield doctor.Finding("kernels", state, "portable")

    monkeypatch.setattr(doctor, "examine", findings)
    assert cli.main(["doctor"]) == status
    told = capsys.readouterr()
    assert "portable" in told.out and ("1 check failed" in told.err) == bool(status)


@pytest.mark.slow
def test_command_doctor_here_finds_nothing_wrong(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--cache", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    for name in ("versions", "kernels", "threads", "extras", "caches", "products", "round trip"):
        assert f"\n{name}" in f"\n{told}", told
    assert told.endswith("nashswarm works here\n")
