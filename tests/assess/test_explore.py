"""The explorer's page in a real browser: its numbers are the library's, its text is text, keys and slider work."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from logit_cache.assess.beside import named_models
from logit_cache.assess.chosen_rows import chosen_rows
from logit_cache.assess.explore import explore_rows
from logit_cache.assess.explore_page import explorer_page
from logit_cache.base.errors import RecipeError
from logit_cache.models.rows import row_logits
from logit_cache.stages.app import main
from logit_cache.store.reader import LogitCache
from logit_cache.targets.supports import Support
from transformers import AutoModelForCausalLM

from tests.helpers.browser import READY, open_browser, open_page
from tests.helpers.imports import REPOSITORY
from tests.helpers.synthetic import make_cache, word_tokenizer
from tests.helpers.tiny import make_recipe, make_teacher

pytestmark = pytest.mark.slow
VOCAB = 300
KNOTS = (0.25, 0.5, 0.75, 0.875, 1.0, 1 / 0.7)
TEMPERATURES = (0.7, 1.0, 1.3, 2.0, 6.0, 8.0)
ROWS = [0, 2, 5]
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)><!--"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as found:
        yield found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two models of random weights, the second with fewer tokens than the cache."""
    folder = tmp_path_factory.mktemp("models")
    made = [
        make_teacher(folder / name, seed=seed, words=words) for name, seed, words in (("one", 1, 300), ("two", 2, 296))
    ]
    return {path.name: AutoModelForCausalLM.from_pretrained(path) for path in made}


def some_cache(folder: Path, kind: str) -> LogitCache:
    """`shape`: more of the head than a page lists, and a shape; `bucket`: a whole small head and no shape; `once`: T = 1
    only; `counts`: heads of several sizes; `samples`: a head and samples of the tail."""
    settings: dict[str, Any] = {
        "shape": {"k": 24, "tail_rank": 4},
        "bucket": {"k": 6, "label_log_probs": False},
        "once": {"k": 8, "knots": (1.0,)},
        "counts": {"support": Support("topp", k=40, p=0.9)},
        "samples": {"support": Support("threshold", tau=0.05)},
    }[kind]
    settings = {"knots": KNOTS, "tokenizer": word_tokenizer(VOCAB), **settings}
    return make_cache(folder / kind, rows=6, length=24, vocab_size=VOCAB, **settings)


def write_page(folder: Path, cache: LogitCache, rows: list[int], models: dict[str, Any] | None = None) -> Path:
    file = folder / "page.html"
    file.write_text(explorer_page(explore_rows(cache, rows, models)), encoding="utf-8")
    return file


NUMBERS = """(root, temperature) => {
  const numbers = root.explorer.numbers;
  numbers.setTemperature(temperature);
  return Array.from({length: numbers.count}, (_, i) => ({
    ids: numbers.entries(i).map((e) => numbers.text(e)), kinds: numbers.entries(i).map((e) => numbers.kind(e)),
    p: numbers.probabilities(i), tail: numbers.tailMass(i), label: numbers.label(i), loss: numbers.loss(i), rank: numbers.rank(i),
  }));
}"""


@pytest.mark.parametrize("kind", ["shape", "bucket", "once", "counts", "samples"])
def test_its_numbers_are_the_librarys(kind: str, tmp_path: Path, browser: Any, models: dict[str, Any]) -> None:
    cache = some_cache(tmp_path, kind)
    batch = cache.batch(ROWS)
    targets, mask = batch["targets"].flatten(), batch["targets"].mask.flatten()
    targets, labels = targets[mask], batch["labels"].flatten()[mask]
    with torch.inference_mode():
        logits = [row_logits(model, batch).flatten(0, 1)[mask].double() for model in models.values()]
    names = [f"w{token}" for token in range(VOCAB - 1)] + ["<eos>"]
    with open_page(browser, write_page(tmp_path, cache, ROWS, models)) as page:
        root = page.wait_for_selector(READY)
        for temperature in (1.0,) if kind == "once" else TEMPERATURES:
            found = root.evaluate(NUMBERS, temperature)
            log_p, log_tail = targets.at_temperature(temperature)
            normaliser = targets.normaliser(temperature)
            whole = targets.dense(temperature) if kind == "shape" else None
            weights = targets.weights if kind == "samples" else None
            students = [(x / temperature).softmax(-1) for x in logits]
            assert len(found) == len(labels) > 40
            worst, kinds = 0.0, set()
            for i, position in enumerate(found):
                ids = [names.index(text.strip()) for text in position["ids"]]
                assert len(ids) == len(set(ids)) and ids[position["label"]] == int(labels[i])
                head = dict(zip(targets.token_ids[i].tolist(), log_p[i].exp().tolist(), strict=True))
                listed = sorted((p for token, p in head.items() if token in ids), reverse=True)
                if weights is None:
                    assert listed[:16] == sorted((p for p in head.values() if p > 0), reverse=True)[:16]
                worst = max(worst, abs(position["tail"] - float(log_tail[i].exp())))
                for place, token in enumerate(ids):
                    kinds.add(position["kinds"][place])
                    expected = None
                    if token in head and head[token] > 0:
                        expected = head[token]
                    elif token == int(labels[i]) and targets.label_log_probs is not None:
                        expected = float((targets.label_log_probs[i] / temperature - normaliser[i]).exp())
                    elif weights is not None and temperature == 1 and (targets.token_ids[i] == token).any():
                        expected = float(weights[i][targets.token_ids[i] == token])
                    elif whole is not None:
                        expected = float(whole[i, token])
                    shown = position["p"][0][place]
                    assert (shown is None) == (expected is None) or shown != shown
                    if expected is not None:
                        worst = max(worst, abs(shown - expected))
                    for student, p in zip(students, position["p"][1:], strict=True):
                        if token < student.shape[-1]:
                            worst = max(worst, abs(p[place] - float(student[i, token])))
            assert worst < 1e-3, temperature
            assert (
                kinds
                == {
                    "shape": {1, 2, 3},
                    "bucket": {0, 1},
                    "once": {0, 1, 2},
                    "counts": {0, 1, 2},
                    "samples": {0, 1, 2, 4},
                }[kind]
            )
        if targets.label_log_probs is not None:
            losses = torch.tensor([position["loss"] for position in found])
            torch.testing.assert_close(losses, -targets.label_log_probs, atol=2e-3, rtol=0)


@pytest.mark.parametrize("kind", ["bucket", "samples"])
def test_divergence_without_a_shape_takes_the_tail_as_one_token(
    kind: str, tmp_path: Path, browser: Any, models: dict[str, Any]
) -> None:
    cache = some_cache(tmp_path, kind)
    batch = cache.batch(ROWS)
    mask = batch["targets"].mask.flatten()
    targets = batch["targets"].flatten()[mask]
    log_p, log_tail = targets.at_temperature(1.0)
    with torch.inference_mode():
        q = row_logits(models["one"], batch).flatten(0, 1)[mask].double().softmax(-1)
    q_head = torch.where(targets.head_mask, q.gather(-1, targets.token_ids.clamp(min=0)), 1.0)
    in_head = torch.where(targets.head_mask, log_p.exp() * (log_p - q_head.log()), 0.0).sum(-1)
    q_tail = 1 - torch.where(targets.head_mask, q_head, 0.0).sum(-1)
    expected = in_head + torch.where(log_tail.isneginf(), 0.0, log_tail.exp() * (log_tail - q_tail.log()))
    with open_page(browser, write_page(tmp_path, cache, ROWS, models)) as page:
        found = page.wait_for_selector(READY).evaluate("root => Array.from(root.explorer.numbers.arrays['0.kl'])")
    torch.testing.assert_close(torch.tensor(found).double(), expected.double(), atol=2e-3, rtol=1e-3)


def test_masked_rows_have_the_hidden_token_in_its_place(tmp_path: Path, browser: Any) -> None:
    recipe = make_recipe(tmp_path, corpus__objective="masked")
    for stage in ("prepare", "cache"):
        assert main([stage, str(recipe)]) == 0
    cache = LogitCache(tmp_path / "run/cache")
    file = write_page(tmp_path, cache, [0, 1])
    batch = cache.batch([0, 1])
    row, position = (int(x) for x in (batch["labels"] >= 0).nonzero()[0])
    label = f"w{int(batch['labels'][row, position]) - 4}"
    with open_page(browser, file, f"#row={row}&pos={position}") as page:
        page.wait_for_selector(READY)
        assert page.locator('.x-token[aria-selected="true"]').inner_text().strip() == label
        assert label in page.locator(".x-panel tr.x-true").inner_text()


def test_entropy_and_divergence_are_those_of_the_distributions(
    tmp_path: Path, browser: Any, models: dict[str, Any]
) -> None:
    cache = some_cache(tmp_path, "shape")
    batch = cache.batch(ROWS)
    mask = batch["targets"].mask.flatten()
    targets = batch["targets"].flatten()[mask]
    p = targets.dense(1.0).double()
    with torch.inference_mode():
        log_q = {name: row_logits(m, batch).flatten(0, 1)[mask].double().log_softmax(-1) for name, m in models.items()}
    kl = (torch.special.xlogy(p, p) - p * log_q["one"]).sum(-1)
    q_one, q_two = log_q["one"].exp(), torch.nn.functional.pad(log_q["two"].exp(), (0, 4))
    with open_page(browser, write_page(tmp_path, cache, ROWS, models)) as page:
        root = page.wait_for_selector(READY)
        arrays = root.evaluate("""root => Object.fromEntries(["0.kl", "difference", "entropy"].map(
            (name) => [name, Array.from(root.explorer.numbers.arrays[name])]))""")
        assert root.evaluate("root => root.explorer.measures.length") == 9
    torch.testing.assert_close(torch.tensor(arrays["0.kl"]).double(), kl, atol=2e-3, rtol=1e-3)
    expected = 0.5 * (q_one - q_two).abs().sum(-1)
    torch.testing.assert_close(torch.tensor(arrays["difference"]).double(), expected, atol=1e-3, rtol=0)
    # Of the tail curve, whose slope at its knots is that of the teacher: the shape is another estimate.
    entropy = -torch.special.xlogy(p, p).sum(-1)
    assert (torch.tensor(arrays["entropy"]).double() - entropy).abs().mean() < 0.5


def test_keys_slider_and_links(tmp_path: Path, browser: Any, models: dict[str, Any]) -> None:
    file = write_page(tmp_path, some_cache(tmp_path, "shape"), ROWS, models)
    with open_page(browser, file, "#row=2&pos=7", viewport={"width": 1400, "height": 900}) as page:
        page.wait_for_selector(READY)
        chosen = page.locator('.x-token[aria-selected="true"]')
        panel = page.locator(".x-panel")
        assert chosen.get_attribute("data-position") == "7" and "row 2" in panel.inner_text()
        page.locator(".x-sort").select_option("")  # by number: 0, 2, 5
        chosen.focus()
        for key, position in (("ArrowRight", "8"), ("ArrowLeft", "7"), ("End", "23"), ("Home", "0")):
            page.keyboard.press(key)
            assert chosen.get_attribute("data-position") == position, key
            assert page.evaluate("document.activeElement.dataset.position") == position
        page.keyboard.press("ArrowDown")
        assert int(chosen.get_attribute("data-position")) > 0
        page.keyboard.press("ArrowUp")
        assert chosen.get_attribute("data-position") == "0"
        page.keyboard.press("PageDown")
        assert page.evaluate("location.hash") == "#row=5&pos=0"
        page.keyboard.press("ArrowRight")
        assert "pos=1" in page.evaluate("location.hash")
        page.locator(".x-text .x-token:not(.x-none)").nth(2).click()
        before = panel.inner_text()
        page.locator(".x-slider").focus()
        for _ in range(4):
            page.keyboard.press("ArrowUp")
        assert float(page.locator(".x-temperature").inner_text()) > 1 and panel.inner_text() != before
        page.keyboard.press("End")
        assert page.locator(".x-temperature").inner_text() == "8"
        page.keyboard.press("Home")
        assert (
            page.locator(".x-temperature").inner_text() == "0.7"
            and "cache.knots" in page.locator(".x-limit").inner_text()
        )
        page.locator(".x-text .x-token").nth(3).hover()
        assert "token 3 of" in panel.inner_text()
        page.locator(".x-list button").nth(1).click()
        assert page.locator('.x-list button[aria-current="true"]').count() == 1
        for measure in page.locator(".x-measure option").all():
            page.locator(".x-measure").select_option(measure.get_attribute("value"))
            assert page.locator(".x-text .x-token:not(.x-none)").count() > 5, measure.inner_text()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_phone_shows_it_without_scrolling_sideways(
    theme: str, tmp_path: Path, browser: Any, models: dict[str, Any]
) -> None:
    file = write_page(tmp_path, some_cache(tmp_path, "shape"), ROWS, models)
    with open_page(browser, file, viewport={"width": 360, "height": 740}, color_scheme=theme) as page:
        page.wait_for_selector(READY)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        ground = page.evaluate("getComputedStyle(document.querySelector('.explorer')).backgroundColor")
        assert (ground == "rgb(255, 255, 255)") == (theme == "light")
        page.locator(".x-theme").select_option("dark" if theme == "light" else "light")
        assert page.evaluate("getComputedStyle(document.querySelector('.explorer')).backgroundColor") != ground


def test_text_of_a_corpus_never_becomes_markup(tmp_path: Path, browser: Any) -> None:
    tokenizer = word_tokenizer()
    tokens = {token: number for token, number in tokenizer.get_vocab().items() if number > 3}
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    names = [HOSTILE, "<b>bold</b>", "&lt;\u202e", "]]>{{1}}"]
    backend = Tokenizer(WordLevel({**tokens, **{name: n for n, name in enumerate(names)}}, unk_token=HOSTILE))
    hostile = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    cache = make_cache(tmp_path / "cache", rows=4, length=64, tokenizer=hostile)
    file = write_page(tmp_path, cache, [0, 1, 2, 3])
    assert HOSTILE not in file.read_text(encoding="utf-8")
    with open_page(browser, file, expected="Content Security Policy") as page:
        page.wait_for_selector(READY)
        text = page.locator(".x-text").inner_text()
        assert HOSTILE in text and "<b>bold</b>" in text and "⟨U+202E⟩" in text
        assert page.locator("img, b:has-text('bold')").count() == 0 and page.locator("script").count() == 3
        # What the policy is for: a script that got into the page all the same does not run.
        page.evaluate("""() => {
            const script = document.createElement("script");
            script.textContent = "window.ran = 1";
            document.body.append(script);
        }""")
        assert page.evaluate("window.ran") is None


def test_size(tmp_path: Path, models: dict[str, Any]) -> None:
    """50 rows of 512 positions with a student stay under 10 MB."""
    cache = make_cache(tmp_path / "c", rows=3, length=512, vocab_size=VOCAB, k=16, knots=KNOTS, tail_rank=4)
    page = write_page(tmp_path, cache, [0, 1, 2], {"one": models["one"]})
    assert page.stat().st_size * 50 / 3 < 10e6


def test_colours_leave_the_text_readable() -> None:
    """Contrast of the text with every step of both scales, and steps that grey shows in their order (WCAG 2.2)."""
    style = (REPOSITORY / "pipeline/assess/explorer.css").read_text(encoding="utf-8")
    palettes = [
        dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block)) for block in re.findall(r"\{([^{}]*--s8[^{}]*)\}", style)
    ]
    palettes = [palette for palette in palettes if "ink" in palette]
    assert len(palettes) == 3 and palettes[1] == palettes[2]

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a: str, b: str) -> float:
        low, high = sorted((luminance(a), luminance(b)))
        return (high + 0.05) / (low + 0.05)

    for palette in palettes:
        steps = [palette[f"s{step}"] for step in range(9)]
        for ground in (*steps, palette["ground"], palette["raised"]):
            assert contrast(palette["ink"], ground) >= 4.5, ground
        for ground in (palette["ground"], palette["raised"]):
            assert contrast(palette["soft"], ground) >= 4.5
            assert all(contrast(palette[f"model{number}"], ground) >= 3 for number in range(4))
        order = [luminance(step) for step in steps]
        assert order in (sorted(order), sorted(order, reverse=True))


def test_rows_by_name(tmp_path: Path) -> None:
    cache = some_cache(tmp_path, "shape")
    assert chosen_rows(cache, "4,0-2,1") == [4, 0, 1, 2]
    assert chosen_rows(cache, "spread:3") == [0, 2, 5]
    worst = chosen_rows(cache, "worst:2")
    assert worst == cache.teacher_losses().argsort()[::-1][:2].tolist()
    for text in ("6", "1-9", "x", "spread:0", "3-1", ""):
        with pytest.raises(RecipeError, match="--rows"):
            chosen_rows(cache, text)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], browser: Any) -> None:
    """A run's students by the run, one by its folder, and a model that is another's."""
    recipe = make_recipe(tmp_path, students={"student": {}, "control": {"mode": "ce"}}, train__steps=1)
    for stage in ("prepare", "cache", "train"):
        assert main([stage, str(recipe)]) == 0
    run, page_file = tmp_path / "run", tmp_path / "page.html"
    assert list(named_models([str(run), str(run / "students/student")])) == ["control", "student", "student (2)"]
    assert main(["explore", str(run / "heldout"), str(run), "--rows", "0-1", "--output", str(page_file)]) == 0
    assert "page.html, 2 rows" in capsys.readouterr().out
    with open_page(browser, page_file) as page:
        page.wait_for_selector(READY)
        assert page.locator(".x-panel th").all_inner_texts() == ["candidate", "teacher", "control", "student"]
    other = make_teacher(tmp_path / "other", words=200)
    assert main(["explore", str(run / "heldout"), str(other), "--output", str(page_file)]) == 4
    assert "tokenizer" in capsys.readouterr().err
    assert main(["explore", str(run / "heldout"), "--rows", "99", "--output", str(page_file)]) == 2
