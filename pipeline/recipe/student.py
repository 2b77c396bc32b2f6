"""Recipe keys of a student: where it starts, what it learns from, and how it is trained."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from .choices import Divergence, Mode, Scheduler, Tail
from .section import Name, Section, Seed

PLACEMENT_KEYS = (
    "device",
    "dtype",
    "save_steps",
    "log_steps",
    "eval_steps",
    "loader_workers",
    "local_store",
    "local_bytes",
    "report_to",
)
"""Keys of a student that say where it is trained and what is logged, not what it learns."""
_NEUTRAL_KEYS = {*PLACEMENT_KEYS, "parallel", "trust_remote_code"} - {"dtype", "eval_steps"}
"""Keys that do not change a student's weights, but for the rounding of sums in another order."""

TRUST_REMOTE_CODE = (
    "run the Python code that the model brings, where transformers has none for it. Such code can do what its user can: "
    "read it first"
)


class Schedule(Section):
    """A loss weight that changes over training, as a table: `{ shape = "linear", start = 1.0, end = 0.1 }`."""

    shape: Literal["linear", "wsd"] = Field(
        description="form of the schedule. `linear`: from start to end; `wsd`: warm-up, stable, decay"
    )
    start: float = Field(0.0, ge=0.0, description="weight at the first step")
    peak: float = Field(1.0, ge=0.0, description="weight between warm-up and decay of `wsd`")
    end: float = Field(0.0, ge=0.0, description="weight at the last step")
    warmup: float = Field(0.1, ge=0.0, lt=1.0, description="share of the steps from start to peak, of `wsd`")
    decay: float = Field(0.2, ge=0.0, lt=1.0, description="share of the steps from peak to end, of `wsd`")

    @model_validator(mode="after")
    def _fits(self) -> Schedule:
        if self.warmup + self.decay > 1.0:
            raise ValueError("warmup and decay are together longer than the training")
        return self

    def __call__(self, progress: float) -> float:
        """The weight at `progress` in [0, 1], the completed share of the training.

        "linear" interpolates from `start` to `end`. "wsd", warm-up-stable-decay, rises from `start` to `peak` over the
        first `warmup` share, stays there, and moves to `end` over the last `decay` share (for learning rates Hu et al.
        2024, arXiv 2404.06395, section 4; for the weight of a distillation loss Peng et al. 2024, arXiv 2410.16215).
        """
        if self.shape == "linear":
            return self.start + (self.end - self.start) * progress
        if progress < self.warmup:
            return self.start + (self.peak - self.start) * progress / self.warmup
        if progress > 1 - self.decay:
            return self.end + (self.peak - self.end) * (1 - progress) / self.decay
        return self.peak


# Discriminated by the type of the value, so that an error is about the form that the user chose.
Weight = Annotated[
    Annotated[float, Field(ge=0.0), Tag("float")] | Annotated[Schedule, Tag("Schedule")],
    Discriminator(lambda value: "Schedule" if isinstance(value, (dict, Schedule)) else "float"),
]


class StudentConfig(Section):
    """One student: where it starts, what it learns from, and for how long.

    Exactly one start must be given: `layers`, `model` or `architecture`. `[train]` has the same keys; they are the
    defaults of every student.
    """

    layers: int | list[int] | None = Field(
        None,
        description="start from teacher layers: these, or so many. A number takes first, last and evenly spaced layers between",
    )
    model: Name | None = Field(None, description="start from a model: a directory or hub name")
    architecture: dict[str, Any] | None = Field(
        None, description="start from random weights of this transformers configuration"
    )
    trust_remote_code: bool = Field(False, description=TRUST_REMOTE_CODE)

    token_types: Literal["keep", "drop"] = Field(
        "keep", description="token types of a BERT's layers. `drop` makes a DistilBERT, which has none"
    )
    lora: dict[str, Any] | None = Field(
        None,
        description="train peft LoRA adapters only. Keys of its LoraConfig, such as "
        '`{ r = 16, target_modules = "all-linear" }`',
    )

    mode: Mode = Field(
        "cached",
        description="source of the targets. `cached`: the cache; `ce`: the labels only; `online`: the teacher beside the "
        "student",
    )
    temperature: float = Field(1.0, gt=0.0, description="softmax temperature T of teacher and student")
    kd_weight: Weight = Field(1.0, description="weight of T² KL in the loss. A number, or a schedule (below)")
    ce_weight: Weight = Field(0.1, description="weight of the labels' cross-entropy. A number, or a schedule (below)")
    tail: Tail | None = Field(
        None,
        description="treatment of the tail in the loss. `shape`: its mass in the shape that the cache has; `bucket`: its mass "
        "as one outcome; `renormalize`: both softmaxes over the kept tokens; `renormalize_teacher`: the teacher's over the "
        "kept tokens, the student's over all; `drop`: left out of the sum; `uniform`: its mass spread evenly; `label`: its "
        "mass to the label. By default `shape` where the cache has one, else `bucket`",
    )
    divergence: Divergence = Field(
        "kl", description="divergence of student and teacher. All but `kl` need the tail as `shape` or `bucket`"
    )
    alpha: float | None = Field(
        None,
        description="parameter of the divergence. By default that of its paper: 0.5 (`jensen_shannon`), 0.1 (both skews), "
        "2 (`tail_aware_kl`)",
    )

    cosine_weight: float = Field(0.0, ge=0.0, description="weight of 1 - cos of hidden states")
    cosine_layers: list[tuple[int, int]] = Field([], description="[student, teacher] layers of the cosine loss")
    hidden_weight: float = Field(0.0, ge=0.0, description="weight of the squared error of hidden states")
    hidden_layers: list[tuple[int, int]] = Field(
        [], description="[student, teacher] layers of that loss. One learned projection maps the student's width"
    )
    attention_weight: float = Field(0.0, ge=0.0, description="weight of the squared error of attention scores")
    attention_layers: list[tuple[int, int]] = Field(
        [], description="[student, teacher] layers of that loss. The cache needs their `attention.N` or `qk.N`"
    )

    caches: dict[Name, float] | None = Field(
        None,
        description="mixture of caches, path -> weight, instead of the run's own. All have samples, or none has",
    )
    teachers: list[Name] | None = Field(
        None, description="caches of the same rows by several teachers, averaged at T = 1"
    )
    row_length: int | None = Field(None, ge=2, description="tokens per row, where less than cached")
    max_teacher_loss: float | None = Field(
        None,
        gt=0.0,
        description="leave out rows on which the teacher's own loss, in nats per label, is above this. By default none. "
        "The caches need `label_log_probs`",
    )
    max_rows: int | None = Field(None, ge=1, description="number of rows, chosen by the seed. By default all")

    window: int | None = Field(
        None,
        ge=1,
        description="shards whose rows are shuffled together, window after window. By default 64 for caches on an object "
        "store; elsewhere all rows are shuffled together",
    )

    seeds: list[Seed] | None = Field(
        None,
        min_length=1,
        description="seeds to train with. Each of several makes a student of its own, NAME-seed0 and so on, and stands for "
        "`{seed}` in its `model`; `compare` puts them together. By default once, with that of the recipe",
    )
    steps: int = Field(200, ge=1, description="optimizer steps")
    epochs: float | None = Field(None, gt=0.0, description="passes over the rows, instead of steps")
    batch_rows: int = Field(8, ge=1, description="rows per process and forward pass")
    accumulate: int = Field(
        1,
        ge=1,
        description="forward passes per step. A step is batch_rows x accumulate rows on any number of processes",
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp", description="student under torchrun. `ddp`: copied to every process; `fsdp`: sharded (FSDP2)"
    )
    learning_rate: float = Field(5e-4, gt=0.0, description="peak learning rate of AdamW")
    scheduler: Scheduler = Field("cosine", description="learning-rate schedule, as in transformers' Trainer")
    warmup_steps: int = Field(20, ge=0, description="warm-up steps of the learning rate")
    weight_decay: float = Field(0.01, ge=0.0, description="weight decay of AdamW")
    max_grad_norm: float = Field(1.0, ge=0.0, description="gradient clipping, as in Trainer")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="precision of the forward pass. Weights stay float32"
    )
    device: str = Field("auto", description="`auto`, `cpu`, `cuda` or `cuda:N`")
    save_steps: int = Field(
        100, ge=1, description="steps between checkpoints. A training that is told to stop saves one more"
    )
    eval_steps: int | None = Field(
        None, ge=1, description="steps between evaluations on the held-out rows. By default none"
    )
    keep_best: Literal["loss", "kd", "ce", "agreement"] | None = Field(
        None,
        description="measure of the evaluation whose student is published: `loss`, `kd`, `ce` or `agreement`. By default "
        "the student of the last step. Every evaluation then saves a checkpoint",
    )
    log_steps: int = Field(10, ge=1, description="steps between log lines")
    loader_workers: int | None = Field(
        None,
        ge=0,
        description="processes that read rows ahead. By default 2 on a GPU or for a cache on an object store, else 0",
    )
    local_store: str | None = Field(
        None,
        description="directory for copies of the shards that are read next, of caches on an object store. By default "
        "`$LOGIT_CACHE_HOME/shards`",
    )
    local_bytes: int | None = Field(
        None, ge=0, description="the most that it takes. By default 64 GiB, and 0 copies nothing"
    )
    report_to: list[str] | None = Field(
        None, description="experiment trackers, as in Trainer. By default TensorBoard where it is installed"
    )

    @property
    def needs_own_cache(self) -> bool:
        """Whether its rows come from the run's own cache."""
        return self.caches is None and self.teachers is None

    @property
    def step_rows(self) -> int:
        """Rows of an optimizer step, over all processes."""
        return self.batch_rows * self.accumulate

    @model_validator(mode="after")
    def _one_start(self) -> StudentConfig:
        given = [name for name in ("layers", "model", "architecture") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of layers, model, architecture (given: {', '.join(given) or 'none'})")
        matched = ("cosine", "hidden", "attention")
        if all(getattr(self, f"{name}_weight") == 0.0 for name in ("kd", "ce", *matched)):
            raise ValueError(
                "every loss weight is 0, there is nothing to learn: set kd_weight, ce_weight or another weight"
            )
        for name in matched:
            if (getattr(self, f"{name}_weight") > 0) != bool(getattr(self, f"{name}_layers")):
                raise ValueError(f"{name}_weight and {name}_layers go together")
        if self.mode == "online" and any(getattr(self, f"{name}_weight") for name in matched):
            raise ValueError("mode = 'online' learns from the teacher's distribution only: signals come from a cache")
        if self.divergence != "kl" and self.tail not in (None, "shape", "bucket"):
            raise ValueError(f"divergence = {self.divergence!r} takes the tail as 'shape' or 'bucket': leave tail out")
        if self.keep_best is not None and self.eval_steps is None:
            raise ValueError("keep_best needs eval_steps: it compares evaluations on the held-out rows")
        if self.caches is not None and self.teachers is not None:
            raise ValueError("caches (a mixture) and teachers (an average) exclude each other")
        return self


def seeded_name(name: str, seed: int) -> str:
    """What a student is called that is one of several seeds."""
    return f"{name}-seed{seed}"


def deciding_settings(config: dict[str, Any]) -> dict[str, Any]:
    """What decides the weights of a student, of its settings as JSON, by the names of their keys.

    The rows of a step count, and not how they are divided into batches; the seed is recorded beside them. Settings of an earlier version may lack keys,
    which then have their defaults.
    """
    full = {**StudentConfig.model_construct().model_dump(mode="json"), **config}
    left_out = {*_NEUTRAL_KEYS, "seeds", "batch_rows", "accumulate"}
    if full["epochs"] is not None:
        left_out.add("steps")
    if full["keep_best"] is None:
        left_out.add("eval_steps")
    kept = {key: value for key, value in full.items() if key not in left_out}
    return {**kept, "batch_rows x accumulate": full["batch_rows"] * full["accumulate"]}


class TeacherTraining(StudentConfig):
    """How `logit-cache teach` trains a teacher on the labels of the text, where there is none."""

    mode: Literal["ce"] = Field("ce", description="source of the targets: the labels")
    vocabulary: int | None = Field(
        None, ge=300, description="tokens of a byte-level BPE that is trained on the text, for a fresh architecture"
    )

    @model_validator(mode="after")
    def _a_tokenizer(self) -> TeacherTraining:
        if self.layers is not None:
            raise ValueError("a teacher starts from model or architecture")
        if self.max_teacher_loss is not None:
            raise ValueError("max_teacher_loss is for students: a teacher learns from text alone")
        if self.eval_steps is not None:
            raise ValueError("eval_steps is for students: held-out rows exist once the teacher does")
        if self.seeds is not None:
            raise ValueError("seeds is for students: a teacher is trained once, with the seed of the recipe")
        if (self.vocabulary is None) != (self.architecture is None):
            raise ValueError("a fresh architecture needs a vocabulary, and a model brings its own")
        return self
