"""Plain gradient steps on a cache, run in several processes by test_processes; process 0 leaves the weights in files."""

from __future__ import annotations

from pathlib import Path

import torch
from logit_cache import DistillationTrainer, LogitCache
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments


def main(command: list[str]) -> int:
    """`command`: the cache, the folder to write, rows a process and pass, passes a step, "ddp" or "fsdp"."""
    cache_dir, folder, rows, accumulate, parallel = command
    for tied in (True, False):
        cache = LogitCache(cache_dir)
        torch.manual_seed(1)
        shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=cache.vocab_size, tie_word_embeddings=tied, **shape))
        args = TrainingArguments(
            output_dir=f"{folder}/checkpoints",
            max_steps=3,
            per_device_train_batch_size=int(rows),
            gradient_accumulation_steps=int(accumulate),
            # A step of size 1 along the gradient itself: what differs in the gradient differs in the weights.
            optim="sgd",
            learning_rate=1.0,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            seed=3,
            fsdp=parallel == "fsdp",
            fsdp_config={"version": 2} if parallel == "fsdp" else None,
            ddp_find_unused_parameters=False,
        )
        trainer = DistillationTrainer(model, args, cache, temperature=2.0)
        trainer.train()
        sharded = any(isinstance(p, DTensor) for p in trainer.model_wrapped.parameters())
        assert sharded == (parallel == "fsdp"), "accelerate left FSDP out"
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        if args.process_index == 0:
            Path(folder).mkdir(exist_ok=True)
            save_file({name: tensor.clone() for name, tensor in weights.items()}, f"{folder}/tied-{tied}.safetensors")
    return 0
