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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where tests run kernels: on the GPU where there is one, else in the interpreter."""


@dataclass(frozen=True)
class Variant:
    """A kernel as one launch compiles it."""

    kernel: str
    """`module:name` of a function under @triton.jit."""
    signature: Mapping[str, str]
    """The type of every argument that is not constant, as in {"x_ptr": "*bf16", "size": "i32"}."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    aligned: Sequence[str] = ()
    """Arguments that are multiples of 16, of which a launch makes use; pointers to whole tensors are."""
    warps: int = 4


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


def compiled_for_h100(*variants: Variant) -> list[Resources]:
    """Compile kernels for sm_90, in a process of their own. Raises CalledProcessError where one does not compile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        output = subprocess.run(
            [sys.executable, "-m", __name__],
            input=json.dumps([asdict(variant) for variant in variants]),
            env={**environment, "TRITON_CACHE_DIR": folder},
            cwd=Path(__file__).parent.parent.parent,
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        ).stdout
    return [Resources(**found) for found in json.loads(output.splitlines()[-1])]


def _compiled(variant: Variant) -> Resources:
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = variant.kernel.split(":")
    function = getattr(import_module(module), name)
    divisible = {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned}
    constants = {name: tuple(v) if isinstance(v, list) else v for name, v in variant.constants.items()}  # from JSON
    source = ASTSource(function, dict(variant.signature) | dict.fromkeys(constants, "constexpr"), constants, divisible)
    options = {"num_warps": variant.warps}
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(binary.asm["ptx"])
        # As Triton calls it; only its report says what is spilled, as long as no GPU loads the result.
        command = [knobs.nvidia.ptxas.path, "-v", "--regAllocOptLevel=2", "--gpu-name=sm_90a"]
        report = subprocess.run([*command, file, "-o", os.devnull], check=True, capture_output=True, text=True).stderr

    def number(pattern: str) -> int:
        found = re.search(pattern, report)
        assert found is not None, report
        return int(found[1])

    spilled = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
    stack = number(r"(\d+) bytes stack frame")
    return Resources(number(r"Used (\d+) registers"), spilled, stack, binary.metadata.shared)


if __name__ == "__main__":
    print(json.dumps([asdict(_compiled(Variant(**variant))) for variant in json.load(sys.stdin)]))
