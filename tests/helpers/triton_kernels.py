"""Triton kernels without a GPU: Triton's interpreter runs them (tests/conftest.py asks for it before anything imports
triton), and the compiler, in a process without the interpreter, says what they take of an H100.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where tests run kernels: on the GPU where there is one, else in the interpreter."""


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes of an H100."""

    registers: int
    """Per thread; 65,536 a multiprocessor."""
    spilled_bytes: int
    """Per thread: loads and stores of what did not fit into registers."""
    stack_bytes: int
    shared_bytes: int
    """Per program; 227 KiB a multiprocessor."""
    warps: int
    """Per program."""
    loads: dict[str, int]
    """Instructions that load from memory, by their type and how many."""


def compiled_for_h100(launch: Callable[..., object], *cases: tuple[Any, ...]) -> list[Resources]:
    """What each call `launch(*case)` would launch, compiled for sm_90 in a process of its own, and not run.

    The call is that of a GPU: types, alignments and constants are those which Triton finds in its arguments, tensors of
    the CPU. `launch` is a function of a module, a case is JSON. Raises CalledProcessError where one does not compile.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        output = subprocess.run(
            [sys.executable, "-m", __name__],
            input=json.dumps([launch.__module__, launch.__qualname__, cases]),
            env={**environment, "TRITON_CACHE_DIR": folder},
            cwd=Path(__file__).parent.parent.parent,
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        ).stdout
    return [Resources(**found) for found in json.loads(output.splitlines()[-1])]


class _H100:
    """A driver of Triton for a GPU that is not here."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _compiled(launch: Callable[..., object], case: list[Any]) -> Resources:
    from triton.runtime.jit import JITFunction

    kernels: list[Any] = []

    def compile_alone(function: Any, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: kernels.append(function.run(*args, grid=grid, warmup=True, **kwargs))

    usual, JITFunction.__getitem__ = JITFunction.__getitem__, compile_alone
    try:
        launch(*case)
    finally:
        JITFunction.__getitem__ = usual
    (kernel,) = kernels
    return _resources(kernel)


def _resources(kernel: Any) -> Resources:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(kernel.asm["ptx"])
        # As Triton calls it; only its report says what is spilled, as long as no GPU loads the result.
        command = [knobs.nvidia.ptxas.path, "-v", "--regAllocOptLevel=2", "--gpu-name=sm_90a"]
        report = subprocess.run([*command, file, "-o", os.devnull], check=True, capture_output=True, text=True).stderr

    def number(pattern: str) -> int:
        found = re.search(pattern, report)
        assert found is not None, report
        return int(found[1])

    loads = re.findall(r"ld\.global\.(\S+)", kernel.asm["ptx"])
    return Resources(
        registers=number(r"Used (\d+) registers"),
        spilled_bytes=number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        stack_bytes=number(r"(\d+) bytes stack frame"),
        shared_bytes=kernel.metadata.shared,
        warps=kernel.metadata.num_warps,
        loads={kind: loads.count(kind) for kind in loads},
    )


def _main() -> None:
    from triton.runtime import driver

    driver.set_active(_H100())
    module, name, cases = json.load(sys.stdin)
    launch = getattr(import_module(module), name)
    print(json.dumps([asdict(_compiled(launch, case)) for case in cases]))


if __name__ == "__main__":
    _main()
