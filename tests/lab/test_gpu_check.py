"""The check of a GPU as a dry run: every section's code runs here, and says that its figures mean nothing."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from logit_cache.lab.gpu_check import FIGURES, SECTIONS, check_gpu
from logit_cache.lab.gpu_check_correct import check_losses
from logit_cache.lab.gpu_check_inputs import DRY
from logit_cache.stages.app import main

from tests.conftest import REPOSITORY
from tests.helpers.pieces import Pieces

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="a dry run is what happens without a GPU"),
]


def test_the_dry_run_runs_every_section(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "gpu.json"
    assert main(["gpu-check", "--json", str(file)]) == 0
    shown = capsys.readouterr()
    assert "DRY RUN" in shown.out + shown.err
    result = json.loads(file.read_text())
    assert result["dry_run"] is True
    assert result["versions"]["torch"] == torch.__version__
    assert set(result["sections"]) == set(SECTIONS)
    assert not [name for name, found in result["sections"].items() if "error" in found]
    assert set(result["figures"]) == {figure.name for figure in FIGURES}
    for name, figure in result["figures"].items():
        assert figure["value"] is not None, name
        assert math.isfinite(figure["value"]), name
    supports = result["sections"]["supports"]
    assert {"topk float32", "topp bfloat16", "threshold float16", "sampled bfloat16"} <= set(supports)
    step = result["sections"]["step-1B"]
    assert {"shape", "bucket", "ce", "hf"} <= set(step["tokens_per_second"])
    assert step["kernels"]["launches"] > 100
    assert step["kernels"]["longest"]


def test_a_section_by_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The figures of other sections stay empty."""
    file = tmp_path / "gpu.json"
    assert main(["gpu-check", "--only", "losses", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert list(result["sections"]) == ["losses"]
    assert all(figure["value"] is None for figure in result["figures"].values())
    assert main(["gpu-check", "--only", "kernels"]) == 2
    assert "--only 'kernels': one of machine, supports" in capsys.readouterr().err


def test_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that the device computes wrongly."""
    monkeypatch.setattr("logit_cache.lab.gpu_check_correct._LOSS_ERROR", {torch.float32: 0.0})
    found = check_losses(DRY, torch.device("cpu"))
    assert found["bucket, T = 1 float32"]["right"] is False


def test_a_section_that_fails_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither an error, nor a crash, nor one that does not end: the next one has a process of its own, all are in the
    result, and what is wrong ends in exit code 4."""
    monkeypatch.setattr("logit_cache.lab.gpu_check._sections_in", Pieces)
    sections = ["machine", "supports", "losses", "reduction", "stage-one-1B"]
    result = check_gpu(tmp_path, sections)
    found = result["sections"]
    assert found["supports"]["error"] == "ValueError: as the driver says:"
    assert found["losses"]["error"] == "its process ended with exit code 7"
    assert found["reduction"]["process"] == found["stage-one-1B"]["process"] != found["machine"]["process"]
    names = ["supports: ValueError", "losses: its process", "reduction: part"]
    assert all(one.startswith(name) for one, name in zip(result["wrong"], names, strict=True))
    assert result["figures"]["host waits per batch of stage one"]["value"] is None
    file = tmp_path / "gpu.json"
    arguments = [part for name in sections for part in ("--only", name)]
    assert main(["gpu-check", *arguments, "--json", str(file)]) == 4
    assert "not right on this device: supports: ValueError" in capsys.readouterr().err
    assert set(json.loads(file.read_text())["sections"]) == set(sections)


def test_the_whole_check_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logit_cache.lab.gpu_check._sections_in", Pieces)
    found = check_gpu(tmp_path, ["step-1B", "stage-one-135M"], limit=1.0)["sections"]
    assert [one["error"] for one in found.values()] == ["no end after 1 s", "not begun: out of time"]


def test_the_script_needs_no_installed_package_of_this_project(tmp_path: Path) -> None:
    """It runs the checkout that it lies in, from any directory."""
    variables = {**os.environ, "PYTHON": sys.executable, "WHEELS": str(tmp_path / "none"), "PYTHONPATH": ""}
    script = [str(REPOSITORY / "stages/gpu_check.sh"), "--only", "machine", "--json", "gpu.json"]
    subprocess.run(script, env=variables, cwd=tmp_path, check=True, capture_output=True)
    assert set(json.loads((tmp_path / "gpu.json").read_text())["sections"]) == {"machine"}
