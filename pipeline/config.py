"""Recipes: one TOML file describes a whole run, from corpus to report.

A recipe is read, checked and resolved here, and nowhere else: unknown keys are errors that name the nearest valid key,
`[train]` is merged into every `[students.NAME]`, and values given on the command line replace those of the file. The
resolved recipe is saved beside the outputs and is itself a valid recipe.
"""

from __future__ import annotations

import difflib
import json
import os.path
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tomli_w
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)

from pipeline.durable import write_bytes
from pipeline.errors import RecipeError
from pipeline.storage import Place, place

Tail = Literal["bucket", "renormalize", "drop", "uniform", "label"]
Mode = Literal["cached", "ce", "online"]
Name = Annotated[str, AfterValidator(os.path.expanduser)]  # of a directory, or of something else
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # as NumPy takes it
Scheduler = Literal[  # those of transformers that need no arguments of their own
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
]
WHERE = ("device", "dtype", "save_steps", "log_steps", "loader_workers", "report_to")
"""Keys of a student that say where it is trained and how often it tells, not what it learns."""
SIGNAL_CODECS = ("int8", "float16", "direction")
Divergence = Literal[
    "kl",
    "soft_cross_entropy",
    "reverse_kl",
    "jensen_shannon",
    "skew_kl",
    "skew_reverse_kl",
    "total_variation",
    "tail_aware_kl",
]


def parse_signal(text: str) -> tuple[str, str]:
    """ "hidden.6" or "hidden.6:float16" -> name and codec, int8 by default. Raises ValueError for anything else."""
    name, _, codec = text.partition(":")
    kind = re.fullmatch(r"(hidden|attention|qk)\.(0|[1-9]\d*)", name)
    if kind is None:
        raise ValueError(f"signal {text!r}: write hidden.N, attention.N or qk.N, N the number of a layer")
    codec = codec or "int8"
    if codec not in SIGNAL_CODECS or (codec == "direction" and kind[1] != "hidden"):
        raise ValueError(f"signal {text!r}: write :int8 or :float16 behind it, or :direction behind a hidden state")
    return name, codec


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_flags(cls, value: Any) -> Any:
        """TOML tells true from 1; no key of a recipe is a flag, and a flag must not become a number."""
        if isinstance(value, bool):
            raise ValueError("true and false are not values of this key")
        return value


class TeacherConfig(Section):
    """The model whose distribution is cached."""

    model: Name = Field(description="directory, hub name, GGUF file, or package:NAME/FILE inside an installed package")
    revision: str | None = Field(None, description="hub revision; a commit hash makes the run repeatable")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"] = "auto"
    parallel: Literal["none", "layers", "tensor"] = Field(
        "none", description="too big for one device: layers over the devices of a process, or tensors over processes"
    )
    batch_rows: int = Field(8, ge=1, description="rows per forward pass")
    training: TeacherTraining | None = Field(None, description="how `teach` makes the teacher, where there is none")


class CorpusConfig(Section):
    """Where the text comes from and how it is cut into rows."""

    source: str | list[str] = Field(description="files, globs or fsspec URLs (or one hub name with format = 'hub')")
    format: Literal["auto", "text", "jsonl", "parquet", "hub"] = "auto"
    text_column: str = "text"
    messages_column: str | None = Field(None, description="conversations instead of text, as lists of {role, content}")
    loss_on: Literal["assistant", "all"] = Field("assistant", description="which words of conversations are learned")
    ids_column: str | None = Field(None, description="ready token ids instead of text")
    mask_column: str | None = Field(None, description="beside ids_column: 1 for tokens to be learned, 0 for others")
    hub_config: str | None = None
    hub_split: str = "train"
    document_separator: str | None = Field(None, description="cut text files into documents at this string")
    objective: Literal["causal", "masked"] = Field("causal", description="predict the next token, or hidden ones")
    mask_fraction: float = Field(0.15, gt=0.0, le=1.0, description="share of the tokens that masked hides")
    mask_draws: int = Field(1, ge=1, description="rows made of the same text, each with its own masks")
    row_length: int = Field(512, ge=2, description="tokens per row")
    max_rows: int | None = Field(None, ge=1, description="stop after this many training rows")
    heldout_fraction: float = Field(0.05, ge=0.0, lt=1.0, description="share of the documents that is held out")
    max_heldout_rows: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _one_content(self) -> CorpusConfig:
        if self.messages_column is not None and self.ids_column is not None:
            raise ValueError("messages_column and ids_column exclude each other")
        if self.mask_column is not None and self.ids_column is None:
            raise ValueError("mask_column goes with ids_column: text has no tokens yet to be masked")
        if self.format == "text" and self.content_columns() != [self.text_column]:
            raise ValueError("format = 'text' has no columns: use jsonl, parquet or hub")
        if self.objective == "masked" and (self.messages_column is not None or self.mask_column is not None):
            raise ValueError("objective = 'masked' chooses itself what is learned: no messages_column or mask_column")
        if self.objective == "masked" and self.row_length < 8:
            raise ValueError(
                "objective = 'masked' frames every piece of text with two tokens: row_length must be at least 8"
            )
        return self

    def content_columns(self) -> list[str]:
        """The columns that are read of a record."""
        if self.messages_column is not None:
            return [self.messages_column]
        if self.ids_column is not None:
            return [self.ids_column, *([self.mask_column] if self.mask_column is not None else [])]
        return [self.text_column]


class CacheConfig(Section):
    """What is kept of the teacher at every position."""

    support: Literal["topk", "topp", "threshold", "sampled"] = Field(
        "topk",
        description="topk: the k most probable; topp: the fewest that hold mass p, at most k; threshold: all of probability tau "
        "and samples of the others; sampled: random draws",
    )
    k: int = Field(64, ge=1, description="candidates kept per position (topk), or at most (topp)")
    p: float = Field(0.98, gt=0.0, le=1.0, description="mass that topp keeps")
    tau: float = Field(0.05, ge=1 / 4096, le=1.0, description="probability from which threshold keeps a token exactly")
    draws: int = Field(50, ge=1, le=4096, description="random draws per position of sampled")
    profile: Literal["compact", "fast"] = Field(
        "compact", description="compact: fewest bytes; fast: read at memory speed"
    )
    targets_on: Literal["real", "masked"] = Field(
        "real", description="masked rows: targets at every token that is not padding, or at hidden ones only"
    )
    signals: list[str] = Field(
        [], description="kept beside the targets: hidden.N, attention.N, qk.N, with :int8, :float16 or :direction"
    )
    heldout_k: int = Field(512, ge=1, description="candidates kept per held-out position, where students are measured")
    knots: list[float] = Field(
        [0.25, 0.5, 0.75, 0.875],
        validate_default=True,
        description="inverse temperatures at which the tail mass is kept",
    )
    shard_rows: int = Field(128, ge=1, description="rows per shard, the unit that is committed and resumed")
    location: Name | None = Field(
        None, description="directory or fsspec URL in which the caches cache/ and heldout/ lie; by default run_dir"
    )

    @field_validator("signals")
    @classmethod
    def _known(cls, signals: list[str]) -> list[str]:
        names = [":".join(parse_signal(signal)) for signal in signals]
        if len({name.partition(":")[0] for name in names}) < len(names):
            raise ValueError("a signal is named twice")
        return names

    @field_validator("knots")
    @classmethod
    def _positive(cls, knots: list[float]) -> list[float]:
        if any(not 0.0 < knot <= 16.0 for knot in knots):
            raise ValueError("every knot must be an inverse temperature above 0 and at most 16")
        return sorted({*knots, 1.0})


class Schedule(Section):
    """A loss weight that changes over training: linear from start to end, or warm-up, stable, decay."""

    shape: Literal["linear", "wsd"]
    start: float = Field(0.0, ge=0.0)
    peak: float = Field(1.0, ge=0.0, description="wsd: between warm-up and decay")
    end: float = Field(0.0, ge=0.0)
    warmup: float = Field(0.1, ge=0.0, lt=1.0, description="wsd: share of the steps from start to peak")
    decay: float = Field(0.2, ge=0.0, lt=1.0, description="wsd: share of the steps from peak to end")

    @model_validator(mode="after")
    def _fits(self) -> Schedule:
        if self.warmup + self.decay > 1.0:
            raise ValueError("warmup and decay are together longer than the training")
        return self


# Told apart by what is given, so that what is wrong is said of that.
Weight = Annotated[
    Annotated[float, Field(ge=0.0), Tag("float")] | Annotated[Schedule, Tag("Schedule")],
    Discriminator(lambda value: "Schedule" if isinstance(value, (dict, Schedule)) else "float"),
]


class StudentConfig(Section):
    """One student: where it starts, what it learns from, and for how long. Exactly one start must be given."""

    layers: int | list[int] | None = Field(None, description="start: copied from these (or so many) teacher layers")
    model: Name | None = Field(None, description="start: a directory or hub name")
    architecture: dict[str, Any] | None = Field(None, description="start: a fresh transformers configuration")

    token_types: Literal["keep", "drop"] = Field(
        "keep", description="of a BERT's layers: drop makes a DistilBERT, which has none"
    )
    lora: dict[str, Any] | None = Field(
        None, description="train peft LoRA adapters only; the settings of its LoraConfig"
    )

    mode: Mode = Field("cached", description="cached: KD + CE from the cache; ce: labels only; online: teacher beside")
    temperature: float = Field(1.0, gt=0.0)
    kd_weight: Weight = 1.0
    ce_weight: Weight = 0.1
    tail: Tail = "bucket"
    divergence: Divergence = "kl"
    alpha: float | None = Field(None, description="the divergence's parameter, by default that of its paper")

    cosine_weight: float = Field(0.0, ge=0.0, description="of 1 - cos between hidden states")
    cosine_layers: list[tuple[int, int]] = Field([], description="[student, teacher] hidden states, each in the cache")
    hidden_weight: float = Field(0.0, ge=0.0, description="of the squared difference between hidden states")
    hidden_layers: list[tuple[int, int]] = Field([], description="[student, teacher], through one learned projection")
    attention_weight: float = Field(0.0, ge=0.0, description="of the squared difference between attention scores")
    attention_layers: list[tuple[int, int]] = Field([], description="[student, teacher]; attention or qk in the cache")

    caches: dict[str, float] | None = Field(None, description="mixture of caches with these weights, not the run's own")
    teachers: list[str] | None = Field(None, description="caches of the same rows whose probabilities are averaged")
    row_length: int | None = Field(None, ge=2, description="train on shorter rows than were cached")
    max_rows: int | None = Field(None, ge=1, description="train on so many rows, chosen by the seed")

    steps: int = Field(200, ge=1, description="optimizer steps")
    epochs: float | None = Field(None, gt=0.0, description="passes over the rows, instead of steps")
    batch_rows: int = Field(8, ge=1, description="rows that a process takes at once")
    accumulate: int = Field(1, ge=1, description="a step sees batch_rows x accumulate rows, on any number of processes")
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp", description="under torchrun: weights copied (ddp) or sharded (fsdp)"
    )
    learning_rate: float = Field(5e-4, gt=0.0)
    scheduler: Scheduler = "cosine"
    warmup_steps: int = Field(20, ge=0)
    weight_decay: float = Field(0.01, ge=0.0)
    max_grad_norm: float = Field(1.0, ge=0.0)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    save_steps: int = Field(100, ge=1)
    log_steps: int = Field(10, ge=1)
    loader_workers: int | None = Field(
        None,
        ge=0,
        description="processes that read rows ahead; by default 2 on a GPU or for a cache on an object store, else 0",
    )
    report_to: list[str] | None = Field(None, description="as in Trainer; by default tensorboard where it is installed")

    @model_validator(mode="after")
    def _one_start(self) -> StudentConfig:
        given = [name for name in ("layers", "model", "architecture") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of layers, model, architecture (given: {', '.join(given) or 'none'})")
        matched = ("cosine", "hidden", "attention")
        if all(getattr(self, f"{name}_weight") == 0.0 for name in ("kd", "ce", *matched)):
            raise ValueError("kd_weight, ce_weight and all others are 0: there is nothing to learn")
        for name in matched:
            if (getattr(self, f"{name}_weight") > 0) != bool(getattr(self, f"{name}_layers")):
                raise ValueError(f"{name}_weight and {name}_layers go together")
        if self.mode == "online" and any(getattr(self, f"{name}_weight") for name in matched):
            raise ValueError("mode = 'online' learns from the teacher's distribution only: signals come from a cache")
        if self.divergence != "kl" and self.tail != "bucket":
            raise ValueError(f"divergence = {self.divergence!r} takes the tail as a bucket: leave tail at 'bucket'")
        if self.caches is not None and self.teachers is not None:
            raise ValueError("caches (a mixture) and teachers (an average) exclude each other")
        return self


class TeacherTraining(StudentConfig):
    """A teacher that is trained on the text: what a student's settings say, and where its tokenizer comes from."""

    mode: Literal["ce"] = "ce"
    vocabulary: int | None = Field(None, ge=300, description="train a byte-level BPE of so many tokens on the text")

    @model_validator(mode="after")
    def _a_tokenizer(self) -> TeacherTraining:
        if self.layers is not None:
            raise ValueError("a teacher starts from model or architecture")
        if (self.vocabulary is None) != (self.architecture is None):
            raise ValueError("a fresh architecture needs a vocabulary, and a model brings its own")
        return self


class EvaluationConfig(Section):
    batch_rows: int = Field(8, ge=1)


class StudyConfig(Section):
    """Which targets `logit-cache study` compares; the student is the recipe's [students.student]."""

    caches: dict[str, CacheConfig] = Field(
        default_factory=dict, description="name -> the keys of [cache] in which this one differs"
    )
    temperatures: list[float] = Field([1.0, 2.0], min_length=1, description="of KD")
    seeds: list[Seed] = Field([0, 1, 2], min_length=1, description="runs of every variant")
    gradient_rows: int = Field(4, ge=1, description="rows of the batch whose gradient is compared")

    @field_validator("caches")
    @classmethod
    def _plain(cls, caches: dict[str, CacheConfig]) -> dict[str, CacheConfig]:
        for name in caches:
            if not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(f"cache name {name!r} must be letters, digits, '-' and '_': it names a directory")
        return caches

    @field_serializer("caches")
    def _as_given(self, caches: dict[str, CacheConfig]) -> dict[str, dict[str, Any]]:
        return {name: cache.model_dump(exclude_unset=True) for name, cache in caches.items()}


class ReportConfig(Section):
    title: str = "Distillation from cached teacher logits"
    row: int | None = Field(
        None, ge=0, description="held-out row whose candidates are drawn; by default one in the middle"
    )
    position: int | None = Field(None, ge=0, description="position in that row; by default one of middling entropy")
    prompt: str | None = Field(None, min_length=1, description="a text that stage one has the teacher continue")


class JobConfig(Section):
    """What a Slurm job asks for; what is not given is left to the cluster's own defaults."""

    partition: str | None = Field(None, description="Slurm partition")
    account: str | None = Field(None, description="Slurm account")
    time: str | None = Field(None, description="time limit as Slurm writes it; a job that reaches it is requeued")
    memory: str | None = Field(None, description="memory per node, for example 64G")
    cpus: int | None = Field(None, ge=1, description="cores per node")
    gpus: int | None = Field(None, ge=0, description="GPUs per node")
    processes: int | None = Field(None, ge=1, description="processes per node; by default one per GPU")
    sbatch: list[str] | None = Field(None, description="further sbatch options, for example ['--qos=high']")

    @field_validator("partition", "account", "time", "memory")
    @classmethod
    def _one_word(cls, value: str | None) -> str | None:
        if value is not None and (not value or any(c.isspace() for c in value)):
            raise ValueError("must be one word: it becomes an sbatch option")
        return value

    @field_validator("time")
    @classmethod
    def _slurm_time(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}", value):
            raise ValueError("write minutes, HH:MM:SS or D-HH:MM:SS")
        return value

    @field_validator("sbatch")
    @classmethod
    def _options(cls, lines: list[str] | None) -> list[str] | None:
        if any(not line.startswith("-") or "\n" in line for line in lines or []):
            raise ValueError("every entry must be one sbatch option, such as '--qos=high'")
        return lines


class TrainJobConfig(JobConfig):
    nodes: int = Field(1, ge=1, description="nodes of one training job")


class ClusterConfig(JobConfig):
    """How `logit-cache submit` cuts a run into Slurm jobs. Its own keys hold for every job."""

    tasks: int = Field(1, ge=1, description="tasks that share the shards, an array job")
    max_parallel: int | None = Field(None, ge=1, description="tasks that run at the same time at most")
    setup: list[str] = Field(default_factory=list, description="shell lines before each command, such as module loads")
    python: str | None = Field(None, description="interpreter of the jobs; by default the one that submits")
    finalise: JobConfig = Field(JobConfig(), description="replaces keys for the job after the array")  # type: ignore[call-arg]
    train: TrainJobConfig = Field(TrainJobConfig(), description="replaces keys for the training jobs")  # type: ignore[call-arg]


class Recipe(Section):
    """A whole run."""

    run_dir: Path
    seed: Seed = 0
    teacher: TeacherConfig
    corpus: CorpusConfig
    cache: CacheConfig = CacheConfig()  # type: ignore[call-arg]
    students: dict[str, StudentConfig] = Field(default_factory=dict)
    evaluation: EvaluationConfig = EvaluationConfig()  # type: ignore[call-arg]
    report: ReportConfig = ReportConfig()  # type: ignore[call-arg]
    study: StudyConfig = StudyConfig()  # type: ignore[call-arg]
    cluster: ClusterConfig = ClusterConfig()  # type: ignore[call-arg]

    @field_validator("students")
    @classmethod
    def _plain_names(cls, students: dict[str, StudentConfig]) -> dict[str, StudentConfig]:
        for name in students:
            if not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(f"student name {name!r} must be letters, digits, '-' and '_': it names a directory")
        return students

    @field_validator("run_dir")
    @classmethod
    def _is_local(cls, run_dir: Path) -> Path:
        if re.match(r"[a-z0-9+]+:/", str(run_dir)):
            raise ValueError(
                "must be a local directory (checkpoints and reports are files): set cache.location to a URL"
            )
        return run_dir.expanduser()

    @property
    def cache_dir(self) -> Place:
        return place(self.cache.location or self.run_dir) / "cache"

    @property
    def heldout_dir(self) -> Place:
        return place(self.cache.location or self.run_dir) / "heldout"

    @property
    def teacher_dir(self) -> Path:
        """Where a teacher that arrives in another format (GGUF) is kept as safetensors."""
        return self.run_dir / "teacher"

    @property
    def slurm_dir(self) -> Path:
        """The batch scripts of `submit`, the recipe that they run, and their logs."""
        return self.run_dir / "slurm"

    def student_dir(self, name: str) -> Path:
        return self.run_dir / "students" / name


TeacherConfig.model_rebuild()
Recipe.model_rebuild()


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read, override and check a recipe.

    `path` is a TOML file, or the bare name of a recipe that ships with the project (`demo`). `overrides` are
    `section.key=value` strings; values are TOML, and what is not valid TOML is taken as a string.

    Raises RecipeError with one line that names the key and the way out.
    """
    file = find_recipe(path)
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file}: not valid TOML: {error}") from error
    for override in overrides or []:
        _apply_override(table, override)
    defaults = table.pop("train", {})
    students = table.get("students", {})
    if not isinstance(defaults, dict) or not isinstance(students, dict):
        raise RecipeError(f"{file}: [train] and [students.NAME] must be tables")
    unknown = [key for key in defaults if key not in StudentConfig.model_fields]
    if unknown:
        raise RecipeError(f"{file}: {_unknown_key(('train', unknown[0]), StudentConfig)}")
    for name, student in students.items():
        if not isinstance(student, dict):
            raise RecipeError(f"{file}: students.{name} must be a table, [students.{name}]")
        starts = ("layers", "model", "architecture")
        # A student that names its own start replaces the common one instead of adding a second.
        own_start = any(key in student for key in starts)
        common = {key: value for key, value in defaults.items() if not (own_start and key in starts)}
        students[name] = {**common, **student}
    try:
        return Recipe.model_validate(table)
    except ValidationError as error:
        raise RecipeError(f"{file}: {_first_problem(error)}") from error


def find_recipe(path: str | Path) -> Path:
    """Return the file of a recipe given by path or, for those that ship with the project, by bare name."""
    file = Path(path)
    if file.is_file():
        return file
    shipped_dir = Path(__file__).parent.parent / "stages" / "recipes"
    shipped = shipped_dir / f"{path}.toml"
    if shipped.is_file():
        return shipped
    names = ", ".join(sorted(p.stem for p in shipped_dir.glob("*.toml")))
    raise RecipeError(f"no recipe file {str(path)!r}, and no shipped recipe of that name (there are: {names})")


def save_resolved(recipe: Recipe, path: Path) -> None:
    """Write the recipe with every default and override filled in, as TOML."""
    write_bytes(path, resolved_toml(recipe).encode())


def resolved_toml(recipe: Recipe) -> str:
    """The resolved recipe as TOML text, itself a valid recipe."""
    return tomli_w.dumps(json.loads(recipe.model_dump_json(exclude_none=True)))


def _apply_override(table: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"--set {override!r}: write section.key=value, for example --set students.student.steps=50")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, last = key.strip().split(".")
    node = table
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise RecipeError(f"--set {override!r}: {parent} is a value, not a table")
    node[last] = value


_KINDS = ("int", "float", "str", "list[int]", "list[str]", "Schedule")


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    # Of a value that may be of several kinds, the location ends in the kind.
    location = tuple(part for part in problem["loc"] if part not in _KINDS)
    name = ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        return _unknown_key(location, _section_at(location[:-1]))
    if problem["type"] == "missing":
        return f"{name} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    given = problem.get("input")
    shown = f" (given: {given!r})" if isinstance(given, (str, int, float, bool, list)) else ""
    return f"{name or 'recipe'}: {message}{shown}"


def _section_at(location: tuple[str | int, ...]) -> type[BaseModel]:
    """The section that a location leads to; names of students and caches are passed over."""
    section: type[BaseModel] = Recipe
    for part in location:
        field = section.model_fields.get(str(part))
        section = (None if field is None else _section_in(field.annotation)) or section
    return section


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section_in(part)) is not None), None)


def _unknown_key(location: tuple[str | int, ...], section: type[BaseModel]) -> str:
    valid = [*section.model_fields, *(["train"] if section is Recipe else [])]
    name = ".".join(str(part) for part in location)
    nearest = difflib.get_close_matches(str(location[-1]), valid, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"valid keys are {', '.join(valid)}"
    return f"unknown key {name!r}: {hint}"
