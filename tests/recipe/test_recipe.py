"""Recipes: what is accepted, what is merged and overridden, and one clear line for everything else."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from logit_cache.base.errors import RecipeError
from logit_cache.recipe.choices import DEFAULT_TAIL_RANK
from logit_cache.recipe.loading import load_recipe, resolved_toml, save_resolved
from logit_cache.recipe.schema import Recipe

BASE = """
run_dir = "runs/x"

[teacher]
model = "some/teacher"

[corpus]
source = "text/*.txt"
"""
STUDENT = "\n[students.one]\nlayers = 4\n"


def load(tmp_path: Path, text: str, *overrides: str) -> Recipe:
    file = tmp_path / "recipe.toml"
    file.write_text(text, encoding="utf-8")
    return load_recipe(file, list(overrides))


def complaint(tmp_path: Path, text: str, *overrides: str) -> str:
    """The one line with which a recipe is refused."""
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, text, *overrides)
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    assert caught.value.exit_code == 2
    return message


def test_defaults(tmp_path: Path) -> None:
    recipe = load(tmp_path, BASE + STUDENT)
    assert recipe.seed == 0
    assert (recipe.cache.support, recipe.cache.head_tokens, recipe.cache.rank) == ("topk", 16, 32)
    assert recipe.cache.knots == [0.25, 0.5, 0.75, 0.875, 1.0]
    student = recipe.students["one"]
    assert (student.mode, student.temperature, student.tail) == ("cached", 1.0, None)
    assert recipe.paths.cache == Path("runs/x/cache") and recipe.paths.heldout == Path("runs/x/heldout")
    assert recipe.paths.student("one").folder == Path("runs/x/students/one")


@pytest.mark.parametrize(
    ("addition", "expected"),
    [
        ("[cache]\nkk = 3\n", "unknown key 'cache.kk': did you mean 'k'?"),
        ("[cache]\nknot = [0.5]\n", "unknown key 'cache.knot': did you mean 'knots'?"),
        ("[cach]\nk = 3\n", "unknown key 'cach': did you mean 'cache'?"),
        ("[trian]\nsteps = 3\n", "unknown key 'trian': did you mean 'train'?"),
        ("[evaluation]\nbatch_row = 3\n", "unknown key 'evaluation.batch_row': did you mean 'batch_rows'?"),
        ("[report]\ntitel = 'x'\n", "unknown key 'report.titel': did you mean 'title'?"),
        (
            STUDENT + "temprature = 2.0\n",
            "unknown key 'students.one.temprature': did you mean 'temperature'?",
        ),
        ("[train]\nlearning_rat = 1.0\n", "unknown key 'train.learning_rat': did you mean 'learning_rate'?"),
        (
            "[cache]\nzzzzzz = 3\n",
            "unknown key 'cache.zzzzzz': valid keys are support, k, p, tau, draws, tail_rank, tail_step, label_log_probs, profile, targets_on, signals, heldout_k, knots, shard_rows, location",
        ),
    ],
)
def test_unknown_keys_name_the_nearest(tmp_path: Path, addition: str, expected: str) -> None:
    assert complaint(tmp_path, BASE + addition).endswith(expected)


def test_unknown_keys_of_sections_that_exist(tmp_path: Path) -> None:
    assert "'teacher.modle': did you mean 'model'?" in complaint(tmp_path, BASE, "teacher.modle=3")
    assert "'corpus.row_len': did you mean 'row_length'?" in complaint(tmp_path, BASE, "corpus.row_len=3")


def test_a_key_of_another_section_is_named_with_its_section(tmp_path: Path) -> None:
    for override, hint in {
        "row_length=8": "'corpus.row_length' or 'train.row_length'?",
        "steps=8": "'train.steps'?",
        "cache.heldout_fraction=0.1": "'corpus.heldout_fraction'?",
        "students.one.knots=[0.5]": "'cache.knots'?",
    }.items():
        said = complaint(tmp_path, BASE + STUDENT, override)
        assert said.endswith(f"unknown key {override.partition('=')[0]!r}: did you mean {hint}")
    assert "corpus is a table, [corpus], not 3" in complaint(tmp_path, BASE, "corpus=3")


def test_unknown_keys_of_schedules_and_caches_of_a_study(tmp_path: Path) -> None:
    schedule = "students.one.kd_weight={shape = 'linear', begin = 1.0}"
    assert "'students.one.kd_weight.begin': did you mean 'end'?" in complaint(tmp_path, BASE + STUDENT, schedule)
    assert "'study.caches.a.kk': did you mean 'k'?" in complaint(tmp_path, BASE, "study.caches.a={kk = 3}")
    assert "valid keys are support, k" in complaint(tmp_path, BASE, "study.caches.a={zzzzz = 3}")


def test_a_home_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    changes = ("run_dir=~/runs", "teacher.model=~/teacher", "cache.location=~/caches", "students.one.model=~/start")
    recipe = load(tmp_path, BASE + "[students.one]\n", *changes)
    assert recipe.run_dir == Path("/home/me/runs") and recipe.paths.cache == Path("/home/me/caches/cache")
    assert recipe.teacher.model == "/home/me/teacher" and recipe.students["one"].model == "/home/me/start"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (BASE.replace('run_dir = "runs/x"', ""), "run_dir is missing"),
        (BASE.replace('model = "some/teacher"', ""), "teacher.model is missing"),
        (BASE.replace('source = "text/*.txt"', ""), "corpus.source is missing"),
        ('run_dir = "x"\n[teacher]\nmodel = "m"\n', "corpus is missing"),
    ],
)
def test_missing_keys_are_named(tmp_path: Path, text: str, expected: str) -> None:
    assert complaint(tmp_path, text).endswith(expected)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("cache.k=many", "cache.k"),
        ("cache.k=0", "cache.k"),
        ("cache.k=1.5", "cache.k"),
        ("cache.k=[1]", "cache.k"),
        ("cache.knots=0.5", "cache.knots"),
        ('cache.knots=["a"]', "cache.knots"),
        ("cache.support=all", "cache.support"),
        ("corpus.row_length=1", "corpus.row_length"),
        ("corpus.max_rows=0", "corpus.max_rows"),
        ("corpus.heldout_fraction=1.0", "corpus.heldout_fraction"),
        ("corpus.heldout_fraction=-0.1", "corpus.heldout_fraction"),
        ("corpus.source=3", "corpus.source"),
        ("corpus.format=doc", "corpus.format"),
        ("teacher.dtype=int8", "teacher.dtype"),
        ("teacher=3", "teacher"),
        ("seed=-1", "seed"),
        ("seed=4294967296", "seed"),
        ("study.seeds=[4294967296]", "study.seeds.0"),
        ("students.one.scheduler=cosin", "students.one.scheduler"),
        ("students.one.scheduler=cosine_with_min_lr", "students.one.scheduler"),
        ("students.one.tail=tale", "students.one.tail"),
        ("students.one.mode=offline", "students.one.mode"),
        ("students.one.steps=0", "students.one.steps"),
        ("students.one.temperature=warm", "students.one.temperature"),
        ("students.one.layers=all", "students.one.layers:"),
        ("students.one.kd_weight=-1", "students.one.kd_weight:"),
        ("students.one.kd_weight={shape = 'linear', start = -1.0}", "students.one.kd_weight.start:"),
        (
            "students.one.kd_weight={shape = 'wsd', warmup = 0.9, decay = 0.9}",
            "students.one.kd_weight: warmup and decay",
        ),
        ("study.caches.a={k = 0}", "study.caches.a.k:"),
    ],
)
def test_wrong_values_name_their_key(tmp_path: Path, override: str, key: str) -> None:
    assert f"recipe.toml: {key}" in complaint(tmp_path, BASE + STUDENT, override)


@pytest.mark.parametrize("temperature", ["0", "0.0", "-1", "-0.5", "nan", "inf", "-inf"])
@pytest.mark.parametrize("section", ["train", "students.one"])
def test_temperatures_must_be_positive_numbers(tmp_path: Path, temperature: str, section: str) -> None:
    assert "temperature" in complaint(tmp_path, BASE + STUDENT, f"{section}.temperature={temperature}")


def test_a_flag_is_not_a_number(tmp_path: Path) -> None:
    """`k = true` is a slip; taking it for k = 1 would cost a whole cache."""
    assert "cache.k" in complaint(tmp_path, BASE, "cache.k=true")


def test_a_number_is_not_a_flag(tmp_path: Path) -> None:
    assert "cache.label_log_probs" in complaint(tmp_path, BASE, "cache.label_log_probs=1")
    assert load(tmp_path, BASE, "cache.label_log_probs=false").cache.label_log_probs is False


@pytest.mark.parametrize(
    ("given", "resolved"),
    [
        ("[0.5]", [0.5, 1.0]),
        ("[2.0, 0.5, 0.5, 1.0]", [0.5, 1.0, 2.0]),
        ("[]", [1.0]),
        ("[1]", [1.0]),
        ("[16.0]", [1.0, 16.0]),
    ],
)
def test_knots_are_sorted_and_hold_one(tmp_path: Path, given: str, resolved: list[float]) -> None:
    assert load(tmp_path, BASE, f"cache.knots={given}").cache.knots == resolved


@pytest.mark.parametrize("knots", ["[0.0]", "[-0.5, 1.0]", "[17.0]", "[nan]", "[inf]"])
def test_impossible_knots_are_refused(tmp_path: Path, knots: str) -> None:
    assert "cache.knots" in complaint(tmp_path, BASE, f"cache.knots={knots}")


def test_a_tail_has_a_shape_beside_a_head(tmp_path: Path) -> None:
    sampled = 'cache.support="sampled"'
    assert load(tmp_path, BASE).cache.rank == DEFAULT_TAIL_RANK
    assert load(tmp_path, BASE, "cache.tail_rank=5").cache.rank == 5
    assert load(tmp_path, BASE, sampled).cache.rank == 0
    assert load(tmp_path, BASE, sampled, "cache.tail_rank=0").cache.rank == 0
    assert "cache: tail_rank: support 'sampled' has no head" in complaint(tmp_path, BASE, sampled, "cache.tail_rank=4")
    for override in ("cache.tail_rank=-1", "cache.tail_step=0.0", "cache.tail_rank=1.5"):
        assert override.partition("=")[0] in complaint(tmp_path, BASE, override)


def test_train_is_merged_into_every_student(tmp_path: Path) -> None:
    text = BASE + "[train]\nlayers = 6\nsteps = 7\ntemperature = 2.0\n[students.a]\n[students.b]\nsteps = 9\n"
    recipe = load(tmp_path, text)
    assert list(recipe.students) == ["a", "b"]
    assert [s.steps for s in recipe.students.values()] == [7, 9]
    assert [s.temperature for s in recipe.students.values()] == [2.0, 2.0]
    assert [s.layers for s in recipe.students.values()] == [6, 6]
    # Also what [train] gets from the command line; a student's own value still wins.
    recipe = load(tmp_path, text, "train.steps=11")
    assert [s.steps for s in recipe.students.values()] == [11, 9]


def test_a_students_own_start_replaces_the_common_one(tmp_path: Path) -> None:
    text = (
        BASE
        + "[train]\nlayers = 6\n[students.a]\nmodel = 'some/student'\n[students.b]\n[students.c.architecture]\nx = 1\n"
    )
    students = load(tmp_path, text).students
    assert (students["a"].layers, students["a"].model) == (None, "some/student")
    assert (students["b"].layers, students["b"].model) == (6, None)
    assert (students["c"].layers, students["c"].architecture) == (None, {"x": 1})


def test_seeds_make_a_student_each(tmp_path: Path) -> None:
    text = BASE + (
        "[train]\nseeds = [2, 7]\n[students.first]\nlayers = 4\n"
        '[students.second]\nmodel = "x/first-seed{seed}/final"\n[students.third]\nlayers = 4\nseeds = [5]\n'
    )
    recipe = load(tmp_path, text)
    assert list(recipe.students) == ["first-seed2", "first-seed7", "second-seed2", "second-seed7", "third"]
    assert [recipe.student_seed(name) for name in recipe.students] == [2, 7, 2, 7, 5]
    assert recipe.students["second-seed7"].model == "x/first-seed7/final"
    again = tmp_path / "again.toml"
    save_resolved(recipe, again)
    assert load_recipe(again) == recipe, "what is resolved is not taken apart again"
    assert load(tmp_path, BASE + STUDENT, "seed=3").student_seed("one") == 3


def test_seeds_that_cannot_be(tmp_path: Path) -> None:
    assert "there are two students 'one-seed4'" in complaint(tmp_path, BASE + STUDENT, "students.one.seeds=[4, 4]")
    taken = "[students.one-seed1]\nlayers = 2\n"
    assert "'one-seed1'" in complaint(tmp_path, BASE + STUDENT + taken, "students.one.seeds=[0, 1]")
    assert "students.one.seeds" in complaint(tmp_path, BASE + STUDENT, "students.one.seeds=[]")
    assert "students.one.seeds" in complaint(tmp_path, BASE + STUDENT, "students.one.seeds=3")
    assert "seeds.0" in complaint(tmp_path, BASE + STUDENT, 'students.one.seeds=["a", "b"]')


def test_exactly_one_start(tmp_path: Path) -> None:
    none = complaint(tmp_path, BASE + "[students.a]\nsteps = 3\n")
    assert "students.a" in none and "exactly one of layers, model, architecture (given: none)" in none
    both = complaint(tmp_path, BASE + "[students.a]\nlayers = 3\nmodel = 'x'\n")
    assert "given: layers, model" in both


def test_layers_by_number_or_by_list(tmp_path: Path) -> None:
    assert load(tmp_path, BASE + STUDENT, "students.one.layers=[0, 2, 5]").students["one"].layers == [0, 2, 5]
    assert load(tmp_path, BASE + STUDENT, "students.one.layers=3").students["one"].layers == 3


def test_something_must_be_learned(tmp_path: Path) -> None:
    message = complaint(tmp_path, BASE + STUDENT + "kd_weight = 0\nce_weight = 0.0\n")
    assert "nothing to learn" in message


@pytest.mark.parametrize("text", ["train = 3\n" + BASE, "students = 3\n" + BASE, 'students = ["a"]\n' + BASE])
def test_train_and_students_must_be_tables(tmp_path: Path, text: str) -> None:
    assert "must be tables" in complaint(tmp_path, text)


def test_a_student_must_be_a_table(tmp_path: Path) -> None:
    assert "students.one must be a table" in complaint(tmp_path, BASE, "students.one=3")


@pytest.mark.parametrize("name", ["a", "A-1", "kd_T2", "7"])
def test_student_names(tmp_path: Path, name: str) -> None:
    assert name in load(tmp_path, BASE + f"[students.{name}]\nlayers = 1\n").students


@pytest.mark.parametrize("name", ["a/b", "..", "a b", "", ".", "-", "a.b", "../x"])
def test_student_names_that_are_no_directory_names(tmp_path: Path, name: str) -> None:
    assert "student name" in complaint(tmp_path, BASE + f'[students."{name}"]\nlayers = 1\n')


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("corpus.max_rows=20", 20),
        ("corpus.source=a/*.txt", "a/*.txt"),
        ('corpus.source="a b.txt"', "a b.txt"),
        ('corpus.source=["a", "b"]', ["a", "b"]),
        ("corpus.heldout_fraction=0.25", 0.25),
        ("corpus.heldout_fraction=0", 0.0),
        ('corpus.document_separator="\\n\\n"', "\n\n"),
        ("corpus.source=tar://x/*.txt::a=b.tar.gz", "tar://x/*.txt::a=b.tar.gz"),
        (" corpus.max_rows = 20", 20),
    ],
)
def test_overrides_have_the_types_of_toml(tmp_path: Path, override: str, value: object) -> None:
    recipe = load(tmp_path, BASE, override)
    key = override.partition("=")[0].strip().removeprefix("corpus.")
    assert getattr(recipe.corpus, key) == value
    assert type(getattr(recipe.corpus, key)) is type(value)


def test_overrides_nest_and_the_last_one_wins(tmp_path: Path) -> None:
    recipe = load(
        tmp_path, BASE, "students.new.layers=2", "students.new.steps=5", "students.new.steps=6", "run_dir=/tmp/a b"
    )
    assert recipe.students["new"].steps == 6 and recipe.students["new"].layers == 2
    assert recipe.run_dir == Path("/tmp/a b")
    deep = load(tmp_path, BASE, "students.x.architecture.rope.theta=3.5", "students.x.architecture.model_type=llama")
    assert deep.students["x"].architecture == {"rope": {"theta": 3.5}, "model_type": "llama"}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("cache.k", "write section.key=value"),
        ("=3", "write section.key=value"),
        ("", "write section.key=value"),
        ("teacher.model.name=3", "model is a value, not a table"),
        ("cache.kk=3", "did you mean 'k'?"),
    ],
)
def test_bad_overrides(tmp_path: Path, override: str, expected: str) -> None:
    assert expected in complaint(tmp_path, BASE, override)


FULL = (
    BASE
    + """
[cache]
knots = [2.0, 0.5]
[train]
layers = 3
learning_rate = 1e-3
[students.a]
temperature = 2
[students.b]
architecture = { model_type = "llama", hidden_size = 32, rope = { theta = 1e4 } }
[students.c]
layers = [0, 1, 4]
report_to = ["tensorboard"]
[study.caches]
few = { k = 8 }
"""
)


@pytest.mark.parametrize("text", [BASE, BASE + STUDENT, FULL])
def test_the_resolved_recipe_is_a_recipe_with_the_same_content(tmp_path: Path, text: str) -> None:
    recipe = load(tmp_path, text, "corpus.document_separator=---", 'corpus.source=["ä.txt", "b\\"c.txt"]', "seed=5")
    save_resolved(recipe, tmp_path / "deep" / "resolved.toml")
    again = load_recipe(tmp_path / "deep" / "resolved.toml")
    assert again == recipe
    assert resolved_toml(again) == resolved_toml(recipe)
    table = tomllib.loads(resolved_toml(recipe))
    assert table["study"]["caches"] in ({}, {"few": {"k": 8}}), "what is not given is left to [cache]"
    assert "train" not in table and table["seed"] == 5 and table["cache"]["shard_rows"] == "auto"


@pytest.mark.parametrize("content", [b"run_dir = ", b"a = 1\na = 2\n", b"\xff\xfe", b"[teacher\n"])
def test_a_file_that_is_no_toml(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "recipe.toml"
    file.write_bytes(content)
    with pytest.raises(RecipeError, match=r"recipe\.toml: not valid TOML") as caught:
        load_recipe(file)
    assert len(str(caught.value).splitlines()) == 1


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no recipe file '.*absent\.toml'"):
        load_recipe(tmp_path / "absent.toml")
