"""A Slurm cluster of two nodes on this machine, thrown away at the end: munge, slurmctld, two slurmd, in one folder.

Each node has two CPUs and two GPUs that exist in Slurm's books only. Needs Debian's munge, slurmctld, slurmd and
slurm-client (or the same programs from elsewhere), and no rights but those of the user who calls it.
`python -m tests.cluster.cluster FOLDER` starts one and prints what to type; Ctrl-C stops it.
"""

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "squeue", "sinfo")
NODES = ("node1", "node2")
# Debian keeps daemons where users do not look.
SEARCH = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])

CONFIGURATION = """\
ClusterName=throwaway
SlurmctldHost={host}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
CryptoType=crypto/munge
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
StateSaveLocation={folder}/state
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdSpoolDir={folder}/spool-%n
# What the machine has is not looked at: both nodes are the same one.
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
JobRequeue=1
# A lost node is noticed soon; otherwise what Slurm does by default.
SlurmdTimeout=15
KillWait=30
MinJobAge=300
GresTypes=gpu
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=16000 Gres=gpu:2
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=16000 Gres=gpu:2
PartitionName=main Nodes=ALL Default=YES MaxTime=UNLIMITED DefaultTime=60 State=UP
"""


def missing_programs() -> list[str]:
    """Return which programs of Slurm and munge this machine lacks."""
    return [program for program in PROGRAMS if shutil.which(program, path=SEARCH) is None]


class Cluster:
    """Daemons, their files below `folder`, and the environment in which Slurm's commands find them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        }
        self._daemons: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> "Cluster":
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)  # munge refuses a socket where others may write
        host, user = socket.gethostname().split(".")[0], getpass.getuser()
        (self.folder / "slurm.conf").write_text(
            CONFIGURATION.format(folder=self.folder, host=host, user=user, ports=free_ports(3), nodes=NODES)
        )
        for name in ("bin", "state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir(exist_ok=True)
        # The plugin's job step takes all SLURM_* away from srun, SLURM_CONF too; clusters have theirs in /etc/slurm.
        srun = self.folder / "bin/srun"
        conf = self.environment["SLURM_CONF"]
        srun.write_text(f'#!/bin/sh\nSLURM_CONF={conf} exec {shutil.which("srun")} "$@"\n')
        srun.chmod(0o755)
        # Two GPUs a node: any file will do for a device that nobody opens.
        for device in ("gpu0", "gpu1"):
            (self.folder / device).touch()
        (self.folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={self.folder}/gpu[0-1]\n")
        (self.folder / "munge.key").write_bytes(os.urandom(1024))
        (self.folder / "munge.key").chmod(0o400)
        try:
            self._start_munge()
            self._start("slurmctld", "-D")
            for node in NODES:
                self.start_node(node)
            self._wait_until_idle()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(subprocess.SubprocessError, TimeoutError):
            self.run("scancel", "--user", getpass.getuser())
            _wait(lambda: not self.jobs("RUNNING", "COMPLETING"), "jobs do not end")
        for process in (process for node in NODES for process in _processes_of(node, self.folder)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        for daemon in reversed(list(self._daemons.values())):
            daemon.terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def run(self, *command: str, check: bool = True, **options: object) -> str:
        """Run one of Slurm's commands and return what it says."""
        options = {"capture_output": True, "text": True, "timeout": 60, "env": self.environment, **options}
        return subprocess.run(command, check=check, **options).stdout

    def jobs(self, folder: Path, *states: str) -> dict[str, str]:
        """Return the jobs submitted in a folder, in one of `states` (without: all that Slurm remembers).

        Job number -> comment, which names rule and entry.
        """
        chosen = ["--states", ",".join(states) or "all"]
        lines = self.run("squeue", "--noheader", "--format", "%i|%Z|%k", *chosen).splitlines()
        found = (line.split("|", 2) for line in lines)
        return {number: comment for number, where, comment in found if where == str(folder)}

    def job(self, number: str) -> dict[str, str]:
        """Return what Slurm knows of a job."""
        words = self.run("scontrol", "show", "job", number, "--oneliner").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def start_node(self, node: str) -> None:
        """Start the daemon of a node."""
        self._start("slurmd", "-D", "-N", node, name=node)

    def lose_node(self, node: str) -> None:
        """Kill a node's daemon and all that its jobs started, as a power cut would."""
        daemon = self._daemons.pop(node)
        daemon.kill()
        daemon.wait()
        for process in _processes_of(node, self.folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def _start(self, program: str, *options: str, name: str | None = None) -> None:
        path = shutil.which(program, path=SEARCH)
        assert path is not None
        with open(self.folder / f"{name or program}.out", "ab") as out:
            # A session of its own: Ctrl-C in the terminal ends the test, which then ends the daemons.
            self._daemons[name or program] = subprocess.Popen(
                [path, *options], env=self.environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                start_new_session=True,
            )  # fmt: skip

    def _start_munge(self) -> None:
        files = {
            "socket": "munge.socket",
            "key-file": "munge.key",
            "log-file": "munge.log",
            "pid-file": "munge.pid",
            "seed-file": "munge.seed",
        }
        options = [f"--{option}={self.folder / file}" for option, file in files.items()]
        # --force: the folders above may be anybody's, as /tmp is.
        self._start("munged", "--foreground", "--force", *options)
        _wait(lambda: (self.folder / "munge.socket").exists(), "munge has no socket")

    def _wait_until_idle(self) -> None:
        def idle() -> bool:
            with contextlib.suppress(subprocess.CalledProcessError):
                return self.run("sinfo", "--noheader", "--Node", "--format", "%T").split() == ["idle"] * len(NODES)
            return False

        _wait(idle, f"the nodes are not idle: see the logs in {self.folder}")


def free_ports(count: int) -> list[int]:
    """Return ports that nothing listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in sockets]


def _processes_of(node: str, folder: Path) -> list[int]:
    """Return the processes of a node's job steps, those that would report their end to the controller first."""
    tasks, parents = [], set()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            environment = (entry / "environ").read_bytes()
            if f"SLURMD_NODENAME={node}\0".encode() in environment and str(folder).encode() in environment:
                tasks.append(int(entry.name))
                parents.add(int((entry / "stat").read_text().rpartition(")")[2].split()[1]))
    reporters = [parent for parent in parents if Path(f"/proc/{parent}/comm").read_text().startswith("slurmstepd")]
    return reporters + tasks


def _wait(condition, message: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(message)
        time.sleep(0.1)


if __name__ == "__main__":
    if missing := missing_programs():
        sys.exit(f"this machine lacks {', '.join(missing)}: install munge, slurmctld, slurmd and slurm-client")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    with Cluster(Path(sys.argv[1]).absolute()) as cluster, contextlib.suppress(KeyboardInterrupt):
        print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']}", flush=True)
        signal.pause()
