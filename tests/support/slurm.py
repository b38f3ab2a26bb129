"""A real Slurm on this machine for the tests: munge, slurmctld and two nodes, all under one folder; ended by pid."""

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import psutil

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
HOSTS = Path("/etc/hosts")
NODES = ("node1", "node2")

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
ReturnToService=2
SwitchType=switch/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdParameters=config_overrides
SlurmdTimeout=10
JobRequeue=0
KillWait=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=batch_sched_delay=0,sched_interval=5,sched_min_interval=0,bf_interval=5
AccountingStorageType=accounting_storage/none
PartitionName=debug Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 MaxTime=60
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why Slurm cannot be run here, after trying to install it; None when it can."""
    if os.geteuid() != 0:
        return "a Slurm of the tests needs root"
    if not all(map(shutil.which, ("slurmctld", "slurmd", "sbatch", "munged"))):
        if shutil.which("apt-get") is None:
            return "Slurm is not installed, and there is no apt-get to install it"
        apt = ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-q"]
        subprocess.run([*apt, "update"], capture_output=True, stdin=subprocess.DEVNULL)
        install = [*apt, "install", "-y", "--no-install-recommends", *PACKAGES]
        done = subprocess.run(install, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            return f"Slurm cannot be installed: {done.stderr.strip().splitlines()[-1]}"
    return None


class Slurm:
    """Within its context `SLURM_CONF` names a cluster of two nodes with four cores and two (false) GPUs each."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.unshared = folder, folder / "unshared"
        self.names = f"127.0.0.1 {' '.join(NODES)} # {folder}"  # MASTER_ADDR is a node's name
        self.daemons: dict[str, psutil.Popen] = {}

    def __enter__(self) -> "Slurm":
        try:
            self._start_all()
        except BaseException:
            self._end_all()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.command("scancel", "--user=root")
            _wait_for(lambda: not self.command("squeue", "-h"), 60)
        finally:
            self._end_all()

    def _start_all(self) -> None:
        for name in ("state", "unshared", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True)
        host = socket.gethostname().split(".")[0]
        lines, gres = [CONFIG.format(folder=self.folder, host=host, port=_free_port())], []
        for node in NODES:
            for i in range(2):
                device = self.folder / f"{node}-gpu{i}"
                subprocess.run(["mknod", str(device), "c", "1", "3"], check=True)
                gres.append(f"NodeName={node} Name=gpu File={device}")
            lines.append(f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={_free_port()} CPUs=4 "
                         "RealMemory=16000 Gres=gpu:2")  # fmt: skip
        (self.folder / "slurm.conf").write_text("\n".join(lines) + "\n")
        (self.folder / "gres.conf").write_text("\n".join(gres) + "\n")
        os.environ["SLURM_CONF"] = str(self.folder / "slurm.conf")
        HOSTS.write_text(f"{HOSTS.read_text().rstrip()}\n{self.names}\n")
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        munge = ["munged", "--force", "--foreground", "--key-file", str(key), "--socket"]
        munge += [str(self.folder / "munge.socket"), "--pid-file", str(self.folder / "munged.pid")]
        munge += ["--seed-file", str(self.folder / "munge.seed"), "--log-file", str(self.folder / "munged.log")]
        self._start("munged", munge)
        _wait_for((self.folder / "munge.socket").exists, 10)
        self._start("slurmctld", ["slurmctld", "-D", "-c"])
        for node in NODES:
            self.start_node(node)
        _wait_for(lambda: all(self.node_state(node) == "IDLE" for node in NODES), 30)

    def _end_all(self) -> None:
        for name in reversed(self.daemons):
            self._end(name)
        HOSTS.write_text(HOSTS.read_text().replace(f"{self.names}\n", ""))
        del os.environ["SLURM_CONF"]

    def _start(self, name: str, command: list[str]) -> None:
        with (self.folder / f"{name}.out").open("ab") as out:
            self.daemons[name] = psutil.Popen(command, stdout=out, stderr=out, start_new_session=True)

    def _end(self, name: str) -> None:
        daemon = self.daemons[name]
        daemon.terminate()
        try:
            daemon.wait(20)
        except psutil.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def command(self, *words: str) -> str:
        """What one of Slurm's commands prints."""
        return subprocess.run(words, capture_output=True, text=True, timeout=60).stdout.strip()

    def show(self, kind: str, name: str) -> dict[str, str]:
        """`scontrol show job` or `node`, by its names."""
        words = self.command("scontrol", "-o", "show", kind, name).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def node_state(self, node: str) -> str:
        return self.show("node", node).get("State", "")

    def start_node(self, node: str) -> None:
        """Switches a node on. To node2 the folder `unshared` is another one."""
        daemon = ["slurmd", "-D", "-N", node]
        if node == "node2":
            mount = f"mount -t tmpfs tmpfs {self.unshared} && exec {' '.join(daemon)}"
            daemon = ["unshare", "--mount", "sh", "-c", mount]
        self._start(node, daemon)

    def kill_node(self, node: str) -> None:
        """Switches a node off: its daemon and all that it started are gone at once."""
        # A job's own daemon leaves slurmd's session, but says in its environment or arguments whose it is.
        victims = [self.daemons[node]]
        for process in psutil.process_iter():
            try:
                if process.name().startswith("slurmstepd") and self._node_of(process) == node:
                    victims += [process, *process.children(recursive=True)]
            except psutil.Error:
                continue
        for victim in victims:
            try:
                victim.kill()
            except psutil.NoSuchProcess:
                continue
        self.daemons[node].wait()

    @staticmethod
    def _node_of(process: psutil.Process) -> str | None:
        names = [child.environ().get("SLURMD_NODENAME") for child in process.children()]
        return next((name for name in names if name), None)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _wait_for(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, condition
        time.sleep(0.1)
