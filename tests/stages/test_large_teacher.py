"""A teacher that is too big for one device: its layers spread over devices, its tensors over processes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from logit_cache import LogitCache
from logit_cache.base.errors import RecipeError
from logit_cache.models.output_layer import OutputLayer
from logit_cache.models.placement import Placement, has_local_weights, input_device
from logit_cache.models.probe import check_model
from logit_cache.models.rows import body_hidden
from logit_cache.models.teacher import Teacher, load_teacher
from logit_cache.recipe.loading import load_recipe
from logit_cache.stages.app import main
from logit_cache.store.levels import LEVEL_GROWTH, LEVEL_STEP
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.conftest import files_of
from tests.helpers.tiny import make_recipe
from tests.stages.test_processes import TORCHRUN, launch


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("large")
    # The fast profile learns no codebook and keeps ids in rank order: roundings stay where they are.
    shape = {"cache__tail_rank": 4, "cache__tail_step": 0.01}
    file = str(make_recipe(folder, teacher__device="auto", cache__profile="fast", **shape))
    assert main(["prepare", file]) == 0
    assert main(["cache", file]) == 0
    return file


def other(recipe: str, folder: Path, parallel: str) -> list[str]:
    for side in ("cache", "heldout"):
        shutil.copytree(Path(recipe).parent / "run" / side / "corpus", folder / side / "corpus")
    return [recipe, "--set", f"run_dir={folder}", "--set", f"teacher.parallel={parallel}"]


def test_layers_over_devices(recipe: str, tmp_path: Path) -> None:
    """On one device there is nothing to spread, and the bytes are the same."""
    assert main(["cache", *other(recipe, tmp_path / "run", "layers")]) == 0
    for side in ("cache", "heldout", "students/student/start"):
        assert files_of(tmp_path / "run" / side) == files_of(Path(recipe).parent / "run" / side)


def test_layers_that_wait_on_disk(recipe: str, tmp_path: Path) -> None:
    """Weights that are fetched when their layer runs: body and output layer as if they were all here."""
    source = load_recipe(recipe).teacher.model
    whole = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "disk"}
    spread = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, device_map=places, offload_folder=str(tmp_path)
    ).eval()
    assert has_local_weights(whole) and not has_local_weights(spread)
    assert input_device(spread) == torch.device("cpu")
    check_model(spread)
    ids = torch.arange(40).reshape(2, 20)
    segments = (torch.arange(20) > 7).long().expand(2, -1)
    with torch.inference_mode():
        logits = [OutputLayer.of(model).logits(body_hidden(model, ids, segments)) for model in (whole, spread)]
    assert torch.equal(*logits)
    placement = Placement(torch.device("cpu"), torch.float32, "sdpa", "")
    teacher = Teacher(spread, OutputLayer.of(spread), placement, {}, source)
    assert torch.equal(teacher.whole_output_layer().weight, whole.lm_head.weight)


@pytest.mark.slow
def test_tensors_over_processes(recipe: str, tmp_path: Path) -> None:
    """Two processes share one teacher, and one of them writes. Sums are cut in two, so logits differ by roundings."""
    arguments = other(recipe, tmp_path / "run", "tensor")
    shown = launch(TORCHRUN, 2, "cache", *arguments)
    assert shown.count("10 shards written") == 1
    one, two = (LogitCache(folder / "cache") for folder in (Path(recipe).parent / "run", tmp_path / "run"))
    bases = [cache.manifest.codec.coordinates.basis.digest for cache in (one, two)]  # type: ignore[union-attr]
    texts = [json.dumps({**cache.manifest.to_json(), "identity_digest": ""}) for cache in (one, two)]
    assert texts[0] == texts[1].replace(bases[1], bases[0])
    rows = np.arange(len(one))
    targets, shared = one.batch(rows)["targets"], two.batch(rows)["targets"]
    mask = targets.mask
    same = targets.token_ids[mask] == shared.token_ids[mask]
    # An entry on the edge of two levels may fall on either side.
    assert float(same.float().mean()) > 0.999
    apart = (targets.log_probs[mask] - shared.log_probs[mask]).abs()[same]
    lowest = float((targets.log_probs[mask][:, :1] - targets.log_probs[mask]).max())
    assert float(apart.max()) < LEVEL_STEP + LEVEL_GROWTH * lowest + 1e-3
    assert float((apart > 1e-3).float().mean()) < 1e-3
    # The fit has roundings of its own; a basis of another output layer would have nothing in common.
    apart = (targets.dense(2.0) - shared.dense(2.0))[mask].abs().sum(-1) / 2
    assert float(apart.mean()) < 0.01
    assert one.teacher_loss == pytest.approx(two.teacher_loss, rel=1e-5)
    start = "students/student/start/model.safetensors"
    weights, expected = (load_file(folder / start) for folder in (tmp_path / "run", Path(recipe).parent / "run"))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    facts = [
        json.loads((folder / "teacher.json").read_text()) for folder in (tmp_path / "run", Path(recipe).parent / "run")
    ]
    assert [fact["parameters"] for fact in facts] == [facts[1]["parameters"]] * 2


def test_what_does_not_go_together_is_refused(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = other(recipe, tmp_path / "run", "tensor")
    assert main(["cache", *arguments]) == 2
    assert "torchrun" in capsys.readouterr().err
    assert main(["cache", *arguments, "--set", "teacher.device=cpu"]) == 2
    assert "teacher.device = 'auto'" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = load_recipe(recipe, ["teacher.parallel=layers"]).teacher
    with pytest.raises(RecipeError, match="without torchrun"):
        load_teacher(config.model, config)
