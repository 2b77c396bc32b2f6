"""Hidden states, attention scores, queries and keys: taken as the model computes them, stored, and read back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from logit_cache import LogitCache, ShorterRows
from logit_cache.base.errors import RecipeError
from logit_cache.distill.matching import attention_loss, cosine_loss, hidden_loss
from logit_cache.models.rows import body_hidden
from logit_cache.models.taps import Tap, attention_scores, visible_pairs
from logit_cache.recipe.choices import parse_signal
from logit_cache.recipe.loading import load_recipe
from logit_cache.stages.app import main
from logit_cache.store.signals import Signal, signals_of
from torch import nn

from tests.helpers.shards import flip_bit, shard_arrays, shard_file
from tests.helpers.tiny import make_recipe
from tests.models.test_models import ARCHITECTURES, MASKED, build, build_masked

NAMES = ["hidden.0", "hidden.2", "hidden.4", "attention.1", "qk.3"]


def anything(kind: str) -> nn.Module:
    return build_masked(kind) if kind in MASKED else build(kind)


@pytest.mark.parametrize("kind", [*ARCHITECTURES, *MASKED])
def test_signals_are_what_transformers_itself_gives(kind: str) -> None:
    model = anything(kind)
    ids, segments = torch.randint(3, 120, (2, 16)), torch.tensor([[0] * 16, [0] * 6 + [1] * 10])
    tap = Tap(NAMES)
    with torch.no_grad():
        assert torch.equal(tap.hidden(model, ids, segments), body_hidden(model, ids, segments)), (
            "watching changes nothing"
        )
        model.set_attn_implementation("eager")
        options = {} if kind in MASKED else {"use_cache": False}
        own = model(ids[:1], output_hidden_states=True, output_attentions=True, **options)
    for layer in (0, 2, 4):
        torch.testing.assert_close(tap.values[f"hidden.{layer}"][:1], own.hidden_states[layer], atol=1e-4, rtol=1e-4)
    scores = tap.values["attention.1"][0].transpose(0, 1)  # [H, L, L]
    # What the softmax of the visible scores gives is what the model attends to; Gemma 2 soft-caps at 50 first.
    window = model.config.get_text_config().to_dict().get("sliding_window")
    types = getattr(model.config, "layer_types", None)
    seen = visible_pairs(segments[:1], causal=kind not in MASKED)[0]
    if types is not None and types[1] == "sliding_attention":
        seen = seen & seen.new_ones(16, 16).triu(1 - window)
    assert (scores[:, ~seen] == 0).all()
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    torch.testing.assert_close(weights, own.attentions[1][0], atol=1e-3, rtol=0)


@pytest.mark.slow
def test_layers_are_watched_in_a_compiled_model_too() -> None:
    ids, segments = torch.randint(3, 120, (2, 16)), torch.tensor([[0] * 16, [0] * 6 + [1] * 10])
    model = build("llama")
    plain, compiled = Tap(NAMES), Tap(NAMES)
    plain.hidden(model, ids, segments)
    model.base_model.compile(backend="eager")
    body_hidden(model, ids, segments)  # compiled first without anyone watching
    compiled.hidden(model, ids, segments)
    weights = list(model.parameters())
    gradients = []
    for tap in (plain, compiled):
        loss = torch.stack([tap.values[name].square().mean() for name in NAMES]).sum()
        gradients.append(torch.autograd.grad(loss, weights, allow_unused=True))
    for name in NAMES:
        torch.testing.assert_close(compiled.values[name], plain.values[name])
    torch.testing.assert_close(*gradients)


def test_scores_do_not_cross_documents() -> None:
    model = build("llama")
    ids, segments = torch.randint(3, 120, (1, 16)), torch.tensor([[0] * 6 + [1] * 10])
    tap = Tap(["attention.1", "qk.1"])
    with torch.no_grad():
        tap.hidden(model, ids, segments)
    scores = tap.values["attention.1"]
    assert (scores[0, 6:, :, :6] == 0).all() and (scores[0, 8, :, 6:9] != 0).all()
    pairs = visible_pairs(segments, causal=True)
    assert torch.equal(attention_scores(tap.values["qk.1"], 4, pairs), scores), "queries and keys give the same scores"


def test_codecs_round_to_their_steps() -> None:
    torch.manual_seed(0)
    values = torch.randn(2, 5, 64, dtype=torch.float64) * torch.logspace(-3, 3, 5).reshape(1, 5, 1)
    values[1, 3] = 0
    for codec in ("int8", "float16", "direction"):
        signal = Signal("hidden.1", codec, (64,))
        arrays = signal.encode(values)
        assert {name: array.dtype.newbyteorder("=").str for name, array in arrays.items()} == {
            name: kind.replace("|", "|") for name, kind in signal.layout().items()
        }
        decoded = signal.decode(
            {name: [row for row in array.reshape(2, -1)] for name, array in arrays.items()}, 5
        ).double()
        peak = values.abs().amax(-1, keepdim=True)
        if codec == "int8":
            # Half a step, and the step itself is rounded to float16 (2^-11 relative, 2^-25 absolute below its normals).
            bound = peak / 127 / 2 + peak * 2**-11 + 127 * 2**-25
        elif codec == "float16":
            bound = values.abs() * 2**-11 + 2**-25
        else:
            decoded, bound = decoded * peak / 127, peak / 127 / 2 + 1e-6
        assert ((decoded - values).abs() <= bound).all(), codec
        assert (decoded[1, 3] == 0).all()


def test_what_int8_costs_the_losses() -> None:
    """The rounding of a uniform step s adds s^2 / 12 to a squared difference, and its share of a cosine."""
    torch.manual_seed(0)
    teacher, student = torch.randn(4, 64, 256), torch.randn(4, 64, 256)
    student = teacher + 0.3 * student
    mask = torch.ones(4, 64, dtype=torch.bool)
    for codec in ("int8", "direction"):
        signal = Signal("hidden.1", codec, (256,))
        rows = {name: [row for row in array.reshape(4, -1)] for name, array in signal.encode(teacher).items()}
        stored = signal.decode(rows, 64)
        exact = cosine_loss(student.double(), teacher.double(), mask)
        # The rounding noise is independent of both vectors: it lowers the cosine by half its relative square.
        relative = ((teacher.abs().amax(-1) / 127) ** 2 / 12 / teacher.square().mean(-1)).mean()
        error = cosine_loss(student.double(), stored.double(), mask) - exact
        # That part of the noise which lies along the student averages out over 256 positions of 256 components.
        spread = 3 * float((exact * 2 * relative).sqrt()) / (256 * 256) ** 0.5
        assert float(error) == pytest.approx(float((1 - exact) * relative / 2), abs=spread)
        assert abs(float(error)) < 2e-5
        if codec == "int8":
            exact = hidden_loss(student.double(), teacher.double(), mask)
            error = hidden_loss(student.double(), stored.double(), mask) - exact
            noise = float(((teacher.abs().amax(-1) / 127) ** 2 / 12).mean())
            # Its mean is the noise's power; the cross term with the difference averages out over 65,536 components.
            spread = 3 * 2 * (float(exact) * noise / teacher.numel()) ** 0.5
            assert float(error) == pytest.approx(noise, abs=spread + 0.02 * noise)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("signals")
    recipe = make_recipe(
        folder, cache__signals=["hidden.0:float16", "hidden.2", "attention.0", "qk.1:float16"], cache__profile="compact"
    )
    assert main(["prepare", str(recipe)]) == 0 and main(["cache", str(recipe)]) == 0
    return folder


def test_signals_come_back_with_their_rows(run: Path) -> None:
    from transformers import AutoModelForCausalLM

    cache = LogitCache(run / "run/cache")
    rows = [7, 0, 23]
    batch = cache.batch(rows)
    model = AutoModelForCausalLM.from_pretrained(run / "teacher").eval()
    tap = Tap(list(cache.signals))
    with torch.no_grad():
        tap.hidden(model, batch["input_ids"], batch["segment_ids"])
    for name, signal in cache.signals.items():
        exact, stored = tap.values[name], batch[name]
        assert stored.shape == exact.shape == (3, 16, *signal.shape)
        step = exact.abs().amax(-1, keepdim=True) / 127 if signal.codec == "int8" else exact.abs() * 2**-9
        assert ((stored - exact).abs() <= step * 0.51 + 1e-5).all(), name
    one = cache[7]
    assert torch.equal(one["hidden.2"], batch["hidden.2"][0])
    group = shard_arrays(shard_file(run / "run/cache", 1))
    assert torch.from_numpy(group["hidden.0"][3]).equal(one["hidden.0"].half()), (
        "row 7 is the fourth of the second shard"
    )


def test_bytes_are_known_beforehand(run: Path) -> None:
    cache = LogitCache(run / "run/cache")
    group = shard_arrays(shard_file(run / "run/cache", 0))
    for name, signal in cache.signals.items():
        stored = sum(array.nbytes for key, array in group.items() if key in signal.layout())
        assert stored == 4 * 16 * signal.bytes_per_position, name


def test_signals_belong_to_the_identity(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    identity = LogitCache(run / "run/cache").manifest.identity
    assert [signal["name"] for signal in identity["signals"][1:]] == ["hidden.0", "hidden.2", "attention.0", "qk.1"]
    code = main(["cache", str(run / "recipe.toml"), "--set", 'cache.signals=["hidden.2"]'])
    assert code == 4 and "signals is" in capsys.readouterr().err
    assert LogitCache(run / "run/heldout").signals == {}, "students are measured by their targets"


def test_a_damaged_signal_is_noticed(run: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(run / "run/cache", tmp_path / "cache")
    flip_bit(shard_file(tmp_path / "cache", 0), "hidden.2")
    assert main(["verify", str(tmp_path / "cache")]) == 4
    assert main(["verify", str(run / "run/cache")]) == 0


def test_shorter_rows_cut_both_ends_of_attention(run: Path) -> None:
    cache = LogitCache(run / "run/cache")
    short = ShorterRows(cache, 6)
    piece = next(i for i in range(len(short)) if short._starts[i] > 0)
    row, start = int(short._rows[piece]), int(short._starts[piece])
    whole = cache[row]["attention.0"]
    assert torch.equal(short[piece]["attention.0"], whole[start : start + 6, :, start : start + 6])


def test_unusable_signals_are_refused(run: Path) -> None:
    assert parse_signal("hidden.6") == ("hidden.6", "int8")
    for wrong in ("hidden", "hidden.x", "logits.3", "hidden.3:int4", "attention.1:direction", "hidden.01"):
        with pytest.raises(ValueError, match="signal"):
            parse_signal(wrong)
    with pytest.raises(RecipeError, match="named twice"):
        load_recipe(run / "recipe.toml", ['cache.signals=["hidden.1", "hidden.1:float16"]'])
    config = build("llama").config
    with pytest.raises(RecipeError, match=r"attention.0 to attention.3"):
        signals_of(["attention.4"], config, 16)
    assert signals_of(["hidden.4"], config, 16)[0].shape == (32,)


def test_a_student_needs_its_signals_in_the_cache(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", str(run / "recipe.toml"), "--set", "train.cosine_weight=1.0", "--set"]
    assert main([*command, "train.cosine_layers=[[1, 1]]"]) == 2
    assert "does not hold hidden.1" in capsys.readouterr().err
    assert main([*command, "train.cosine_layers=[[2, 2]]"]) == 2
    assert "has no layer 2" in capsys.readouterr().err
    assert main(["train", str(run / "recipe.toml"), "--set", "train.cosine_weight=1.0"]) == 2
    assert "go together" in capsys.readouterr().err


def test_a_resumed_student_keeps_its_projection(run: Path) -> None:
    """Stopped half-way and continued, it ends as one that was never stopped."""
    shape = {
        "model_type": "llama",
        "vocab_size": 300,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
    }
    shape |= {"num_attention_heads": 2, "eos_token_id": 0, "bos_token_id": "none"}
    shape.pop("bos_token_id")
    inline = "{" + ", ".join(f"{key} = {json.dumps(value)}" for key, value in shape.items()) + "}"
    settings = [
        "train.hidden_weight=1.0",
        "train.hidden_layers=[[1, 2]]",
        "train.attention_weight=0.1",
        "train.attention_layers=[[0, 1]]",
        "train.kd_weight=0.0",
        "train.ce_weight=0.0",
    ]
    overrides = [part for setting in settings for part in ("--set", setting)]

    def train(name: str) -> int:
        start = ["--set", f"students.{name}.architecture={inline}", "--student", name]
        return main(["train", str(run / "recipe.toml"), *start, *overrides])

    assert train("whole") == 0
    assert train("halved") == 0
    folder = run / "run/students/halved"
    import shutil

    shutil.rmtree(folder / "final")
    shutil.rmtree(folder / "checkpoints/checkpoint-6")
    assert (folder / "checkpoints/checkpoint-4").is_dir()
    assert train("halved") == 0
    weights = [(run / f"run/students/{name}/final/model.safetensors").read_bytes() for name in ("whole", "halved")]
    assert weights[0] == weights[1]


def test_losses_of_attention_take_maps_or_queries_and_keys() -> None:
    torch.manual_seed(0)
    segments = torch.tensor([[0, 0, 0, 1, 1, -1]])
    pairs = visible_pairs(segments, causal=False)
    assert pairs.sum() == 9 + 4
    student, teacher = torch.randn(2, 1, 6, 3, 6)
    expected = sum(
        float((student[0, q, h, k] - teacher[0, q, h, k]) ** 2)
        for q in range(6)
        for k in range(6)
        for h in range(3)
        if pairs[0, q, k]
    ) / (3 * 13)
    assert float(attention_loss(student, teacher, pairs)) == pytest.approx(expected, rel=1e-6)
