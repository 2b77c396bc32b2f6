"""Commands in processes that start at once: one process imports everything, and forks for each.

Speaks JSON lines: in {"command": [...], "output": FILE, "trace": FILE, "fail": [number, errno] or null, "under": DIR,
"processes": how many, as torchrun starts them, "module": whose main runs the command},
out {"pid": ...}; in an empty line, out {"code": exit code, or minus the signal, "calls": how many calls could have failed}.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import socket
import sys
from importlib import import_module
from pathlib import Path
from typing import Any


def prepare(teacher_dir: str) -> None:
    """All that stage one and two import, what is made on first use, and the teacher."""
    import torch
    from numba.core.registry import cpu_target

    for module in (
        "logit_cache.capture.stage_one",
        "logit_cache.assess.evaluation",
        "logit_cache.distill.stage_two",
        "logit_cache.stages.app",
        "torch.utils.tensorboard",
    ):
        import_module(module)
    cpu_target.typing_context.refresh()
    cpu_target.target_context.refresh()
    from logit_cache.models import loading, teacher
    from logit_cache.recipe.schema import TeacherConfig

    torch.set_num_threads(1)
    load, load_tokenizer = teacher.load_teacher, loading.load_tokenizer
    config = TeacherConfig(model=teacher_dir, device="cpu", dtype="float32")
    loaded, tokenizer = load(teacher_dir, config), load_tokenizer(teacher_dir)
    loaded.model(torch.ones(1, 4, dtype=torch.long))

    def cached(source: str, *rest: Any) -> Any:
        return loaded if source == teacher_dir else load(source, *rest)

    for user in list(sys.modules.values()):
        if getattr(user, "load_teacher", None) is load:
            user.load_teacher = cached  # type: ignore[attr-defined]
    loading.load_tokenizer = lambda source, *rest: tokenizer if source == teacher_dir else load_tokenizer(source, *rest)


def start_ranks(count: int) -> None:
    """Fork as many processes as torchrun would start, with its environment; returns in each of them.

    The process that called it waits for them and ends with the first exit code that is not 0, all others killed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids = []
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            os.environ.update({name: str(value) for name, value in place.items()})
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            return
        pids.append(pid)
    code = 0
    while pids:
        pid, status = os.wait()
        pids.remove(pid)
        if status and not code:
            code = os.waitstatus_to_exitcode(status)
            for other in pids:
                os.kill(other, signal.SIGKILL)
    os._exit(code)


def child(request: dict[str, Any], calls: int) -> None:
    """Run one command; never returns."""
    from logit_cache.capture import shard_pass

    os.setsid()
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if "processes" in request:
        start_ranks(request["processes"])
    run = shard_pass._run_shard

    def traced(*arguments: Any, **named: Any) -> Any:
        _, corpus, _, shard, *_ = arguments
        with Path(request["trace"]).open("a") as file:
            file.write(f"{corpus.path.parent.name} {shard}\n")
        return run(*arguments, **named)

    shard_pass._run_shard = traced
    shim = ctypes.CDLL(None)
    if "under" in request:
        number, code = request["fail"] or (0, 0)
        shim.fault_arm(number, code, request["under"].encode())
    try:
        code = import_module(request.get("module", "logit_cache.stages.app")).main(request["command"])
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    if "under" in request:
        os.write(calls, str(shim.fault_calls()).encode())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def serve() -> None:
    prepare(sys.argv[1])
    # What is there now stays: a child that collects garbage need not look at it, and so copies none of its pages.
    gc.collect()
    gc.freeze()
    print("ready", flush=True)
    while line := sys.stdin.readline():
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            child(json.loads(line), writer)
        os.close(writer)
        print(json.dumps({"pid": pid}), flush=True)
        # Not buried before the answer is out: until then nobody else gets its number, which the test may still kill.
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        calls = os.read(reader, 100)
        os.close(reader)
        code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        sys.stdin.readline()
        os.waitpid(pid, 0)
        print(json.dumps({"code": code, "calls": int(calls or 0)}), flush=True)


if __name__ == "__main__":
    serve()
