"""Recipes: one TOML file describes a whole run, from corpus to report.

A recipe is read, checked and resolved here, and nowhere else: unknown keys are errors that name the nearest valid key,
`[train]` is merged into every `[students.NAME]`, and values given on the command line replace those of the file. The
resolved recipe is saved beside the outputs and is itself a valid recipe.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, field_serializer, field_validator, model_validator

from ..base.errors import RecipeError
from ..base.places import place
from .choices import (
    DEFAULT_K,
    DEFAULT_K_OF_BUCKETS,
    DEFAULT_KNOTS,
    DEFAULT_TAIL_RANK,
    DEFAULT_TAIL_STEP,
    MAX_DRAWS,
    Profile,
    SupportName,
    Tail,
    parse_signal,
)
from .cluster import ClusterConfig
from .paths import RunPaths
from .section import Name, Section, Seed
from .student import TRUST_REMOTE_CODE, StudentConfig, TeacherTraining, seeded_name


class TeacherConfig(Section):
    """The model whose distribution is cached."""

    model: Name = Field(
        description="directory, hub name, GGUF file, or `package:NAME/FILE` inside a Python package. A directory with an "
        "adapter (LoRA) is merged with its base"
    )
    revision: str | None = Field(None, description="hub revision. A commit hash makes the run repeatable")
    trust_remote_code: bool = Field(False, description=TRUST_REMOTE_CODE)
    device: str = Field(
        "auto", description="`auto`, `cpu`, `cuda` or `cuda:N`. `auto` prints its choice with the reason"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="precision of weights and forward pass. `auto`: bfloat16 where the hardware computes it, else float32",
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"] = Field(
        "auto",
        description="attention kernel. `auto`: the architecture's own in transformers, and on a GPU torch's flash "
        "attention where that gives the same; document boundaries are checked",
    )
    parallel: Literal["none", "layers", "tensor"] = Field(
        "none",
        description="how a teacher too large for one device is spread. `layers`: over the devices of one process; "
        "`tensor`: over the processes of torchrun",
    )
    batch_rows: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="rows per forward pass. `auto`: on a GPU rows of 32,768 tokens, or as many as its free memory holds; "
        "elsewhere 8",
    )
    training: TeacherTraining | None = Field(None, description="how `logit-cache teach` trains this teacher")


_TEMPLATE_OPTIONS = {
    *(
        "add_generation_prompt",
        "continue_final_message",
        "conversation",
        "max_length",
        "messages",
        "padding",
        "return_dict",
    ),
    *(
        "return_assistant_tokens_mask",
        "return_tensors",
        "sanitize_control_tokens",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
    ),
    *("chat_template", "truncation"),
}
"""Arguments of `apply_chat_template` that are no variables of the template."""


class CorpusConfig(Section):
    """Where the text comes from and how it is cut into rows."""

    source: str | list[str] = Field(
        description="files, directories, globs or fsspec URLs, or one hub name. Files in .gz, .bz2, .xz and .zst are "
        "unpacked; `zip://**::FILE` and `tar://**::FILE` read inside archives; of a directory the files of one format are "
        'read, and `prepare` names the others; a hub name needs `format = "hub"`'
    )
    format: Literal["auto", "text", "jsonl", "csv", "parquet", "arrow", "hub"] = Field(
        "auto",
        description="format of the source. `auto` goes by the file name; `jsonl` has a record in each line, or one list of "
        "records; `arrow` also reads a directory of `datasets.save_to_disk`",
    )
    text_column: str = Field("text", description="column with the text, in all formats but `text`")
    messages_column: str | None = Field(
        None,
        description="column with conversations, instead of text. Each is a list of {role, content} or {from, value}; the "
        "tokenizer's chat template renders it",
    )
    tools_column: str = Field(
        "tools", description="column beside `messages_column` with the tools of a conversation, if any"
    )
    roles: dict[str, str] = Field(
        {},
        description="names of roles in the conversations, and what the template calls them. `gpt`, `model`, `human` and "
        "their like are known",
    )
    template_arguments: dict[str, Any] = Field(
        {}, description="variables of the chat template, such as `enable_thinking = false`"
    )
    loss_on: Literal["assistant", "all"] = Field("assistant", description="turns of a conversation that have targets")
    ids_column: str | None = Field(None, description="column with token ids, instead of text")
    mask_column: str | None = Field(
        None, description="column beside `ids_column`: 1 where the token is a target, else 0"
    )
    hub_config: str | None = Field(None, description="configuration of a hub data set")
    hub_revision: str | None = Field(
        None, description="revision of a hub data set. A commit hash makes the run repeatable"
    )
    hub_split: str = Field("train", description="split of a hub data set, or of a directory of `save_to_disk`")
    document_separator: str | None = Field(
        None, description="string that separates documents in a text file. By default a file is one document"
    )
    objective: Literal["causal", "masked"] = Field(
        "causal",
        description="what targets predict. `causal`: the next token; `masked`: the hidden tokens of a BERT, with the masks "
        "drawn once by `prepare`",
    )
    mask_fraction: float = Field(0.15, gt=0.0, le=1.0, description="share of the tokens that `masked` hides")
    mask_draws: int = Field(1, ge=1, description="rows per piece of text under `masked`, each with its own masks")
    row_length: int = Field(512, ge=2, description="tokens per row")
    row_bos: Literal["auto", "always", "never"] = Field(
        "auto",
        description="whether rows that continue a document begin with a BOS. Nothing is predicted from it. `auto`: where "
        "the tokenizer puts one in front of a text, or the chat template in front of the conversation; `always`: every "
        "document and every row begins with one; `never`: rows begin with the next token. `plan` and `cache` measure what "
        "the teacher does better with",
    )
    long_documents: Literal["whole", "cut", "drop"] = Field(
        "whole",
        description="what becomes of a document or conversation longer than a row. `whole`: documents follow each other end "
        "to end and go on in the next row; `cut`: each lies in one row, what is longer loses its end; `drop`: likewise, "
        "what is longer is left out. With the last two the rests of rows are padded",
    )
    special_tokens_in_text: Literal["text", "control"] = Field(
        "text",
        description="what the name of a special token inside a text is. `text`: the characters that it is written with; "
        "`control`: the token itself, for text in which a chat template was applied already",
    )
    max_rows: int | None = Field(None, ge=1, description="most training rows. By default the whole source")
    heldout_fraction: float = Field(0.05, ge=0.0, lt=1.0, description="share of the documents that is held out")
    max_heldout_rows: int | None = Field(
        None, ge=1, description="most held-out rows. By default in proportion to the training rows"
    )

    @model_validator(mode="after")
    def _one_content(self) -> CorpusConfig:
        if self.messages_column is not None and self.ids_column is not None:
            raise ValueError("messages_column and ids_column exclude each other")
        if taken := sorted(_TEMPLATE_OPTIONS & set(self.template_arguments)):
            raise ValueError(f"template_arguments are variables of the template: {taken[0]!r} is set by `prepare`")
        if self.mask_column is not None and self.ids_column is None:
            raise ValueError("mask_column goes with ids_column: text has no tokens yet to be masked")
        if self.format == "text" and self.content_columns() != [self.text_column]:
            raise ValueError("format = 'text' has no columns: use jsonl, parquet, arrow or hub")
        if self.objective == "masked" and (self.messages_column is not None or self.mask_column is not None):
            raise ValueError("objective = 'masked' chooses itself what is learned: no messages_column or mask_column")
        if self.objective == "masked" and (self.row_bos != "auto" or self.long_documents != "whole"):
            raise ValueError(
                "objective = 'masked' frames every piece of a document by itself: leave out row_bos and long_documents"
            )
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

    def optional_columns(self) -> list[str]:
        """The columns that are read of a record that has them."""
        return [self.tools_column] if self.messages_column is not None and self.tools_column else []


class CacheConfig(Section):
    """What is kept of the teacher at every position."""

    support: SupportName = Field(
        "topk",
        description="rule that chooses the tokens kept at a position. `topk`: the k most probable; `topp`: the fewest with "
        "mass p, at most k; `threshold`: every token with probability tau or more, and samples of the others; `sampled`: "
        "random draws only",
    )
    k: int | None = Field(
        None,
        ge=1,
        description="tokens per position: exactly (`topk`) or at most (`topp`). By default 64, and 16 of `topk` where tails "
        "have a shape",
    )
    p: float = Field(0.98, gt=0.0, le=1.0, description="probability mass that `topp` keeps")
    tau: float = Field(
        0.05, ge=1 / MAX_DRAWS, le=1.0, description="least probability of a token that `threshold` keeps exactly"
    )
    draws: int = Field(50, ge=1, le=MAX_DRAWS, description="random draws per position of `sampled`")
    tail_rank: int | None = Field(
        None,
        ge=0,
        description="coordinates that tell the shape of a position's tail. 0: none, the tail is a bucket; more: students "
        "see where the tail's mass lies, at about one bit a coordinate. At most the teacher's hidden size. By default 32, "
        "and 0 of `sampled`, which has no head beside which a tail could have a shape",
    )
    tail_step: float = Field(
        DEFAULT_TAIL_STEP,
        gt=0.0,
        description="step to which coordinates are rounded. Rounding costs tail_rank · tail_step² / 24 nats of KL",
    )
    label_log_probs: StrictBool = Field(
        True,
        description="keep the teacher's log-probability of every label. For the tail in the loss, the teacher's loss by row "
        "and `max_teacher_loss`; takes 0.4 bytes per position (`fast`: 1)",
    )
    profile: Profile = Field("compact", description="stored form. `compact`: fewest bytes; `fast`: fastest reading")
    targets_on: Literal["real", "masked"] = Field(
        "real",
        description="positions of masked rows that have targets. `real`: all but padding; `masked`: the hidden ones",
    )
    signals: list[str] = Field(
        [],
        description="teacher outputs kept beside the targets. `hidden.N`, `attention.N` and `qk.N`, N a layer, each "
        "with `:int8` (default), `:float16` or, for hidden states, `:direction`",
    )
    heldout_k: int = Field(512, ge=1, description="tokens per held-out position, where students are measured")
    knots: list[float] = Field(
        list(DEFAULT_KNOTS),
        validate_default=True,
        description="inverse temperatures at which the tail mass is kept. 1 is always added; T < 1 needs a knot at 1/T or "
        "above; `[1.0]` serves T = 1 only and takes a third off `threshold` and `sampled`",
    )
    shard_rows: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto",
        description="rows per shard, the unit of commit and resume. `auto`: shards of about 256 MB; of a corpus that would "
        "have fewer than 256 of them, 1/256 of its rows, but 131,072 positions at least",
    )
    location: Name | None = Field(
        None, description="directory or fsspec URL of the caches. By default `run_dir`, which itself must be local"
    )

    @property
    def head_tokens(self) -> int:
        """`k` or its default."""
        default = DEFAULT_K if self.support == "topk" and self.rank else DEFAULT_K_OF_BUCKETS
        return default if self.k is None else self.k

    @property
    def rank(self) -> int:
        """`tail_rank` or its default."""
        default = 0 if self.support == "sampled" else DEFAULT_TAIL_RANK
        return default if self.tail_rank is None else self.tail_rank

    @model_validator(mode="after")
    def _shape_beside_a_head(self) -> CacheConfig:
        if self.support == "sampled" and self.rank:
            raise ValueError(
                "tail_rank: support 'sampled' has no head beside which a tail could have a shape: set it to 0"
            )
        return self

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


class EvaluationConfig(Section):
    """How students are measured."""

    batch_rows: int = Field(8, ge=1, description="rows per forward pass")


def _check_names(kind: str, names: Iterable[str]) -> None:
    for name in names:
        if not name.replace("-", "").replace("_", "").isalnum():
            raise ValueError(f"{kind} name {name!r} must be letters, digits, '-' and '_': it names a directory")


class StudyConfig(Section):
    """Which targets `logit-cache study` compares; the student is `[students.student]`."""

    caches: dict[str, CacheConfig] = Field(
        default_factory=dict, description="caches to compare: name -> the keys of `[cache]` in which it differs"
    )
    temperatures: list[float] = Field([1.0, 2.0], min_length=1, description="softmax temperatures of KD")
    seeds: list[Seed] = Field([0, 1, 2], min_length=1, description="seeds of every variant, one student each")
    only_at: dict[str, list[float]] = Field({}, description="caches that serve some of the temperatures only")
    tails: list[Tail] = Field(
        ["bucket", "label", "renormalize", "renormalize_teacher"],
        description="tails in the loss. Of caches of the top tokens without a shape; others have one treatment of their own",
    )
    longer_labels: float = Field(
        1.0, ge=1.0, description="times the steps of one more student of the labels alone. 1: without it"
    )
    warm: list[str] = Field(
        [], description="caches with a warm start too. Their students then start from that of the labels alone"
    )
    warm_tails: list[Tail] = Field(
        ["bucket", "renormalize", "renormalize_teacher"],
        description="tails in the loss from there",
    )
    results: str | None = Field(
        None, description="directory of the results, a small file for each run. By default run_dir/results"
    )

    @field_validator("caches")
    @classmethod
    def _plain(cls, caches: dict[str, CacheConfig]) -> dict[str, CacheConfig]:
        _check_names("cache", caches)
        return caches

    @model_validator(mode="after")
    def _known(self) -> StudyConfig:
        for key, names in (("only_at", list(self.only_at)), ("warm", self.warm)):
            for name in names:
                if name not in self.caches:
                    raise ValueError(f"{key} names {name!r}, which is not among the caches")
        return self

    @field_serializer("caches")
    def _as_given(self, caches: dict[str, CacheConfig]) -> dict[str, dict[str, Any]]:
        return {name: cache.model_dump(exclude_unset=True) for name, cache in caches.items()}


class ReportConfig(Section):
    """What the report's page shows."""

    title: str = Field("Distillation from cached teacher logits", description="title of the page")
    row: int | None = Field(
        None, ge=0, description="held-out row whose candidates are drawn. By default the middle one"
    )
    position: int | None = Field(None, ge=0, description="position in that row. By default one of median entropy")
    prompt: str | None = Field(None, min_length=1, description="text that the teacher continues in stage one")


class Recipe(Section):
    """A whole run."""

    run_dir: Path = Field(description="local directory of everything that the run writes")
    seed: Seed = Field(0, description="seed of held-out split, draws, data order and fresh weights")
    teacher: TeacherConfig = Field(description="the model whose distribution is cached")
    corpus: CorpusConfig = Field(description="source of the text, and how it is cut into rows")
    cache: CacheConfig = Field(CacheConfig(), description="what is kept at every position")
    students: dict[str, StudentConfig] = Field(default_factory=dict, description="students by name")
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="how students are measured")
    report: ReportConfig = Field(ReportConfig(), description="what the report's page shows")
    study: StudyConfig = Field(StudyConfig(), description="what `logit-cache study` compares")
    cluster: ClusterConfig = Field(ClusterConfig(), description="what Slurm jobs ask for")

    @field_validator("students")
    @classmethod
    def _plain_names(cls, students: dict[str, StudentConfig]) -> dict[str, StudentConfig]:
        _check_names("student", students)
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
    def paths(self) -> RunPaths:
        """Where the files of the run lie."""
        return RunPaths(self.run_dir, place(self.cache.location or self.run_dir))

    def student(self, name: str) -> StudentConfig:
        """The settings of a student; one of teacher layers runs the code that the teacher brings where the teacher does."""
        config = self.students[name]
        if config.layers is None or not self.teacher.trust_remote_code:
            return config
        return config.model_copy(update={"trust_remote_code": True})

    def student_seed(self, name: str) -> int:
        """The seed of a student: its own, by default the recipe's."""
        seeds = self.students[name].seeds
        return self.seed if seeds is None else seeds[0]

    def students_of(self, name: str) -> dict[int, str]:
        """The students that `[students.NAME]` became, by their seeds."""
        seeds = {student: self.student_seed(student) for student in self.students}
        return {seed: student for student, seed in seeds.items() if student in (name, seeded_name(name, seed))}

    def chosen_students(self, names: Sequence[str] | None) -> list[str]:
        """The named students, by default all. Raises RecipeError for an unknown name."""
        unknown = [name for name in names or [] if name not in self.students]
        if unknown:
            known = ", ".join(self.students) or "none"
            raise RecipeError(f"no student {unknown[0]!r} in the recipe (there are: {known})")
        return list(names or self.students)
