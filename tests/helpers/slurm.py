"""A real Slurm on this machine: one node, its own configuration, started and stopped by the tests that need it."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol")
ARRAY_LIMIT = 5  # small, so that a test reaches it


def missing() -> str | None:
    """Why Slurm cannot be started here, None if it can."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"Slurm is not installed ({', '.join(absent)}): apt-get install slurmctld slurmd slurm-client munge"
    return None if os.geteuid() == 0 else "only root can start Slurm's daemons"


def wait_until(condition: Callable[[], object], what: str, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.1)


class Slurm:
    """`with Slurm() as slurm`: the daemons run, and the commands of this process talk to them.

    Several nodes are so many slurmd, each of which believes to be on a host of its own: Debian's takes its node's name from
    the host's, which a UTS namespace gives it, and a mount namespace the /etc/hosts in which jobs find all of them.
    """

    def __init__(self, nodes: int = 1) -> None:
        self._nodes = nodes

    def __enter__(self) -> Slurm:
        # Not in pytest's own directory: munge asks for one that every user may enter.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.folder.chmod(0o755)
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._before = os.environ.get("SLURM_CONF")
        os.environ["SLURM_CONF"] = str(self.folder / "slurm.conf")
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        host, folder = socket.gethostname().split(".")[0], self.folder
        names = [host] if self._nodes == 1 else [f"node{number}" for number in range(self._nodes)]
        lines = "\n".join(
            f"            NodeName={name} NodeAddr=127.0.0.1 Port={_free_port()} CPUs=8 State=UNKNOWN" for name in names
        )
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        (folder / "slurm.conf").write_text(
            f"""
            ClusterName=test
            SlurmctldHost={host}(127.0.0.1)
            SlurmctldPort={_free_port()}
            SlurmUser=root
            AuthType=auth/munge
            CryptoType=crypto/munge
            # A requeued job waits for its old credential to expire, two minutes unless told otherwise.
            AuthInfo=socket={folder}/munge.socket,cred_expire=5
            ProctrackType=proctrack/linuxproc
            TaskPlugin=task/none
            SelectType=select/cons_tres
            SelectTypeParameters=CR_CPU
            ReturnToService=2
            MpiDefault=none
            KillWait=5
            MaxArraySize={ARRAY_LIMIT}
            SchedulerParameters=sched_interval=1,batch_sched_delay=1
            StateSaveLocation={folder}/state
            SlurmdSpoolDir={folder}/spool/%n
            SlurmctldPidFile={folder}/slurmctld.pid
            SlurmdPidFile={folder}/slurmd-%n.pid
            SlurmctldLogFile={folder}/slurmctld.log
            SlurmdLogFile={folder}/slurmd-%n.log
            SlurmdParameters=config_overrides
{lines}
            PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
            """
        )
        paths = {
            "key-file": "munge.key",
            "socket": "munge.socket",
            "pid-file": "munged.pid",
            "seed-file": "munged.seed",
        }
        self._daemon("munged", "--foreground", *(f"--{name}={folder / file}" for name, file in paths.items()))
        wait_until((folder / "munge.socket").exists, "munged", 20)
        self._daemon("slurmctld", "-D", "-c")
        if self._nodes == 1:
            self._daemon("slurmd", "-D")
        else:
            (folder / "hosts").write_text(f"127.0.0.1 localhost {host} {' '.join(names)}\n")
            for name in names:
                (folder / "spool" / name).mkdir()
                inside = f"hostname {name} && mount --bind {folder}/hosts /etc/hosts && exec slurmd -D"
                self._daemon("unshare", "--uts", "--mount", "sh", "-c", inside)
        wait_until(lambda: self.query("sinfo", "--noheader", "--format=%t").split() == ["idle"], "idle nodes", 60)

    def _daemon(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.out").open("ab") as log:
            self._processes.append(subprocess.Popen(command, stdout=log, stderr=log))

    def query(self, *command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout

    def queued(self) -> list[str]:
        """Jobs and array tasks that run or wait."""
        return self.query("squeue", "--noheader", "--array", "--format=%i").split()

    def wait_for_all(self, seconds: float = 900) -> None:
        wait_until(lambda: not self.queued(), "the queue to empty", seconds)

    def __exit__(self, *_: object) -> None:
        if self.queued():
            subprocess.run(["scancel", "--user=root"], check=False)
            wait_until(lambda: not self.queued(), "cancelled jobs to end", 30)
        for process in reversed(self._processes):
            process.terminate()
            process.wait(20)
        if self._before is None:
            del os.environ["SLURM_CONF"]
        else:
            os.environ["SLURM_CONF"] = self._before
        shutil.rmtree(self.folder, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
