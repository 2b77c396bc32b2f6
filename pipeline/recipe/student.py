"""student."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from .section import Divergence, Mode, Name, Scheduler, Section, Tail


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
