"""A student before its training: first weights, adapters, tokenizer."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor

from ..base.durable import read_json
from ..base.errors import IncompleteError, MismatchError, RecipeError, first_line
from ..corpus.tokenizer import tokenizer_digest
from ..models.loading import auto_class, load_tokenizer, load_weights, one_line_errors
from ..models.packing import is_masked
from ..recipe.paths import StudentPaths
from ..recipe.student import StudentConfig
from ..store.row_source import RowSource


def build_student(
    config: StudentConfig, paths: StudentPaths, seed: int, objective: str = "causal", *, new_head: bool = False
) -> Any:
    """A student's first weights: layers exported by stage one, a fresh architecture, or a model by path or hub name.

    float32, whatever precision training computes in. `new_head`: a model may lack its head, which is then random. Raises IncompleteError where stage one has not exported the
    layers, RecipeError as `load_weights` does.
    """
    torch.manual_seed(seed)
    trust = config.trust_remote_code
    if config.architecture is not None:
        fresh = architecture_config(config.architecture)
        with one_line_errors("architecture"):
            return auto_class(objective, fresh).from_config(fresh, dtype=torch.float32, trust_remote_code=trust)
    source = str(paths.start) if config.layers is not None else str(config.model)
    if config.layers is not None:
        exported = read_json(paths.start_record, f"delete {paths.start} and run `logit-cache cache` again") or {}
        if exported.get("layers") != config.layers or exported.get("token_types", "keep") != config.token_types:
            raise IncompleteError(
                f"{paths.start}: no first weights of the teacher's layers ({config.layers}): run `logit-cache cache` on the "
                "teacher's machine, which exports them"
            )
    return load_weights(source, objective, trust_remote_code=trust, new_head=new_head, dtype=torch.float32)


def architecture_config(architecture: dict[str, Any]) -> Any:
    """The transformers configuration of a recipe's `architecture`. Raises RecipeError for an unknown model_type."""
    from transformers import AutoConfig

    settings = dict(architecture)
    with one_line_errors("architecture"):
        return AutoConfig.for_model(settings.pop("model_type"), **settings)


def shared_parameters(model: Any) -> list[str]:
    """Names of the parameters, other than the embeddings, that several modules share: FSDP treats each name as its
    own."""
    names: dict[Tensor, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    names.pop(model.get_input_embeddings().weight, None)
    return [name for several in names.values() if len(several) > 1 for name in several]


def add_adapters(model: Any, settings: dict[str, Any], name: str) -> Any:
    """The model with LoRA adapters, its own weights frozen (Hu et al. 2021, arXiv 2106.09685).

    Raises RecipeError where peft is not installed or refuses the settings of student `name`, and for adapters that
    cannot be merged into the weights at the end.
    """
    try:
        from peft import LoraConfig, get_peft_model
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper
    except ImportError as error:
        raise RecipeError(f"students.{name}.lora needs peft: pip install 'logit-cache[lora]'") from error
    tied = _tied_modules(model)
    try:
        # peft has no task type for masked models; its plain wrapper serves them.
        task = {} if is_masked(model) else {"task_type": "CAUSAL_LM"}
        with warnings.catch_warnings(action="ignore"):  # of what is refused below
            adapted = get_peft_model(model, LoraConfig(**{**task, **settings}))
        for layer, module in model.named_modules():
            if not isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
                continue
            if layer in tied:
                raise RecipeError(
                    f"students.{name}.lora: {layer} shares its weights with {', '.join(tied[layer])}, and what it learns would "
                    "be merged into both: leave it out of the adapted layers"
                )
            if isinstance(module, BaseTunerLayer):
                copy.deepcopy(module).merge()
    except (TypeError, ValueError, RuntimeError) as error:  # what peft refuses, or cannot merge
        raise RecipeError(f"students.{name}.lora: {first_line(error)}") from error
    return adapted


def _tied_modules(model: Any) -> dict[str, list[str]]:
    """Module -> the other modules that share a parameter with it, by name."""
    owners: dict[Tensor, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter, []).append(name.rpartition(".")[0])
    return {
        one: [other for other in names if other != one] for names in owners.values() if len(names) > 1 for one in names
    }


def student_tokenizer(config: StudentConfig, cache: RowSource) -> Any:
    """The tokenizer that is saved with the student: the cache's own.

    Raises MismatchError for a student with another tokenizer, in which cached token ids mean other text.
    """
    if config.model is not None:
        own = tokenizer_digest(load_tokenizer(config.model, trust_remote_code=config.trust_remote_code))
        expected = cache.tokenizer_digest
        if own != expected:
            raise MismatchError(
                f"student {config.model!r} has another tokenizer (digest {own[:16]}) than the cache (digest "
                f"{expected[:16]}): cached token ids would mean other text; start from a model with the teacher's tokenizer"
            )
    return load_tokenizer(str(cache.tokenizer_dir), trust_remote_code=config.trust_remote_code)
