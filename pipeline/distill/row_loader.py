"""The DataLoader of a training or an evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, Sampler
from transformers import TrainingArguments

from .stopping import outlive_signals


def row_loader(
    rows: Any, batches: Sampler[list[int]], collate: Callable[[Any], Any], args: TrainingArguments
) -> DataLoader[Any]:
    """The batches of this process, on the CPU: `StudentLoss.on_device` reads them before they go to its device.

    `batches` has divided the rows among the processes.
    """
    workers = args.dataloader_num_workers
    loader: DataLoader[Any] = DataLoader(
        rows,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        multiprocessing_context=args.dataloader_multiprocessing_context if workers else None,
        in_order=args.dataloader_in_order,
        worker_init_fn=outlive_signals,
        # Its own, so that an evaluation draws nothing from the training's random numbers.
        generator=torch.Generator(),
    )
    prepared: DataLoader[Any] = prepare_data_loader(
        loader, args.device, num_processes=1, process_index=0, put_on_device=False
    )
    return prepared
