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
from logit_cache.lab.gpu_check import FIGURES, SECTIONS
from logit_cache.stages.app import main

from tests.conftest import REPOSITORY

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


def test_a_section_by_itself_and_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A loss that the device computes wrongly ends in exit code 4, and the figures of other sections stay empty."""
    file = tmp_path / "gpu.json"
    assert main(["gpu-check", "--only", "losses", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert list(result["sections"]) == ["losses"]
    assert all(figure["value"] is None for figure in result["figures"].values())
    monkeypatch.setattr("logit_cache.lab.gpu_check_correct._LOSS_ERROR", {torch.float32: 0.0})
    assert main(["gpu-check", "--only", "losses"]) == 4
    assert "not right on this device: losses: bucket, T = 1 float32" in capsys.readouterr().err
    assert main(["gpu-check", "--only", "kernels"]) == 2
    assert "--only 'kernels': one of machine, supports" in capsys.readouterr().err


def test_the_script_needs_no_installed_package_of_this_project(tmp_path: Path) -> None:
    """It runs the checkout that it lies in, from any directory."""
    variables = {**os.environ, "PYTHON": sys.executable, "WHEELS": str(tmp_path / "none"), "PYTHONPATH": ""}
    script = [str(REPOSITORY / "stages/gpu_check.sh"), "--only", "machine", "--json", "gpu.json"]
    subprocess.run(script, env=variables, cwd=tmp_path, check=True, capture_output=True)
    assert set(json.loads((tmp_path / "gpu.json").read_text())["sections"]) == {"machine"}
