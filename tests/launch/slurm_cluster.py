"""A real Slurm of two nodes on this machine, for tests.

The controller and each node have network, mount, PID and host-name namespaces of their own, joined by a bridge. Of the
disk they can write nothing but one shared folder; ``/tmp``, the home, ``/run`` and ``/dev/shm`` are private to each.
Nothing of the machine itself is changed: no interface, no file outside the folder that was given.
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

NEEDED = ("slurmctld", "slurmd", "munged", "srun", "sbatch", "scontrol", "squeue", "scancel", "sinfo") + (
    "ip",
    "unshare",
    "nsenter",
)
PACKAGES = "slurm-wlm munge iproute2"
STATE = "/run/align"  # in the private /run of each
INIT = (
    "import signal\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)  # reaps whatever is orphaned here\n"
    "print('ready', flush=True)\nwhile True: signal.pause()"
)
ROOT = Path(__file__).parents[2]
HIDDEN = f"/tmp /var/tmp /run /dev/shm {Path.home()}"
ISOLATE = f"""# The first argument is the shared folder, the others are shown, but cannot be written.
set -eu
mount --make-rprivate /
mount -t tmpfs tmpfs /mnt
at=0
for folder in "$@"; do at=$((at + 1)); mkdir /mnt/$at; mount --bind "$folder" /mnt/$at; done
for folder in {HIDDEN}; do mount -t tmpfs -o mode=1777 tmpfs "$folder"; done
chmod 700 "$HOME"
at=0
for folder in "$@"; do
  at=$((at + 1)); mkdir -p "$folder"; mount --move /mnt/$at "$folder"
  [ $at = 1 ] || mount -o remount,bind,ro "$folder"
done
umount /mnt
mkdir -p {STATE}/state {STATE}/spool
cd {STATE}
printf '%s' "$MUNGE_KEY" > munge.key
chmod 400 munge.key
chmod 755 {STATE} /run
printf '%s\\n' "$HOSTS" > hosts
mount --bind hosts /etc/hosts
printf '%s\\n' "$CONFIGURATION" > slurm.conf
hostname "$NAME"
ip link set lo up
mount -o remount,bind,ro /
"""
CONFIGURATION = f"""
ClusterName=align
SlurmctldHost=controller
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={STATE}/munge.socket,cred_expire=5
StateSaveLocation={STATE}/state
SlurmdSpoolDir={STATE}/spool
SlurmctldPidFile={STATE}/slurmctld.pid
SlurmdPidFile={STATE}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,batch_sched_delay=0
MpiDefault=none
KillWait=10
ReturnToService=2
NodeName=n1 NodeAddr=10.77.0.11 CPUs=4
NodeName=n2 NodeAddr=10.77.0.12 CPUs=4
PartitionName=batch Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""
ADDRESSES = {"controller": "10.77.0.1", "n1": "10.77.0.11", "n2": "10.77.0.12"}


def unavailable() -> str | None:
    """Why there can be no such cluster here, or None."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs root on Linux, for namespaces"
    missing = [name for name in NEEDED if shutil.which(name) is None]
    return f"needs {', '.join(missing)}: apt-get install {PACKAGES}" if missing else None


@dataclass
class Machine:
    """A set of namespaces, held open by their first process."""

    name: str
    holder: subprocess.Popen
    pid: int
    """Of the first process in them, as seen from outside."""
    daemons: list[subprocess.Popen] = field(default_factory=list)

    def command(self, *command: str | Path, cwd: str | Path = "/") -> list[str]:
        """``command`` run inside."""
        enter = ["nsenter", f"--target={self.pid}", "--mount", "--net", "--uts", "--pid", "--"]
        return [*enter, "sh", "-c", 'cd "$1" && shift && exec "$@"', "sh", str(cwd), *map(str, command)]

    def processes(self) -> list[str]:
        """Command lines of what lives inside, by way of its own ``/proc``; zombies do not live."""
        found = []
        for entry in Path(f"/proc/{self.pid}/root/proc").glob("[0-9]*"):
            try:
                command = entry.joinpath("cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if command:
                found.append(command)
        return found

    def path(self, inside: str) -> Path:
        """A path in its mount namespace, as seen from outside."""
        return Path(f"/proc/{self.pid}/root{inside}")


class SlurmCluster:
    """Two nodes and a controller, until :meth:`close`."""

    def __init__(self, shared: Path, environment: Mapping[str, str] = {}) -> None:
        self.shared = shared
        own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}  # of a live cluster
        self.environment = {**own, "SLURM_CONF": f"{STATE}/slurm.conf", **environment}
        self.machines: dict[str, Machine] = {}
        key = secrets.token_hex(64)
        try:
            for name in ADDRESSES:
                self.machines[name] = self._machine(name, key)
            self._connect()
            self._start()
        except BaseException:
            self.close()
            raise

    def run(
        self, *command: str | Path, on: str = "controller", timeout_s: float = 60, check: bool = True
    ) -> subprocess.CompletedProcess:
        """Runs a command inside, in the shared folder."""
        done = subprocess.run(
            self.machines[on].command(*command, cwd=self.shared),
            env=self.environment,
            text=True,
            capture_output=True,
            timeout=timeout_s,
        )
        assert not check or done.returncode == 0, f"{command} on {on}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def job(self, job_id: int) -> dict[str, str]:
        """What the controller knows of a job, such as JobState, ExitCode and Restarts."""
        text = self.run("scontrol", "--oneliner", "show", "job", str(job_id)).stdout
        return dict(part.split("=", 1) for part in text.split() if "=" in part)

    def wait_job(self, job_id: int, states: Sequence[str], timeout_s: float = 120) -> dict[str, str]:
        """The job once it is in one of ``states``."""
        deadline = time.monotonic() + timeout_s
        while (job := self.job(job_id))["JobState"] not in states:
            assert time.monotonic() < deadline, f"job {job_id} is {job['JobState']}, not {states}:\n{self.logs()}"
            time.sleep(0.25)
        return job

    def logs(self) -> str:
        """The end of what daemons and jobs wrote."""
        paths = [
            m.path(f"{STATE}/{name}.log") for m in self.machines.values() for name in ("munged", "slurmctld", "slurmd")
        ]
        paths += sorted(self.shared.rglob("*.log"))
        return "\n".join(
            f"--- {path}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-40:])
            for path in paths
            if path.exists()
        )

    def close(self) -> None:
        """Ends everything: the first process of a PID namespace takes all others with it."""
        for machine in self.machines.values():
            machine.holder.kill()
            machine.holder.wait()
            for daemon in machine.daemons:
                daemon.wait()

    def _machine(self, name: str, key: str) -> Machine:
        unshare = ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child=KILL"]
        holder = subprocess.Popen([*unshare, sys.executable, "-S", "-c", INIT], stdout=subprocess.PIPE, text=True)
        assert holder.stdout is not None and holder.stdout.readline() == "ready\n", f"no namespaces for {name}"
        machine = Machine(name, holder, int(Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text()))
        self.machines[name] = machine
        hosts = "127.0.0.1 localhost\n" + "\n".join(f"{address} {host}" for host, address in ADDRESSES.items())
        given = {"MUNGE_KEY": key, "HOSTS": hosts, "NAME": name}
        shown = dict.fromkeys([self.shared, Path(sys.base_prefix), Path(sys.prefix), ROOT])
        subprocess.run(
            machine.command("sh", "-c", ISOLATE, "sh", *shown),
            env={**os.environ, **given, "CONFIGURATION": CONFIGURATION},
            check=True,
        )
        return machine

    def _connect(self) -> None:
        """A bridge in the controller's network, and a cable from it to each node."""
        controller = self.machines["controller"]
        self.run("ip", "link", "add", "bridge", "type", "bridge")
        self.run("ip", "address", "add", f"{ADDRESSES['controller']}/24", "dev", "bridge")
        self.run("ip", "link", "set", "bridge", "up")
        for name in ("n1", "n2"):
            pid = str(self.machines[name].pid)
            # From outside the PID namespace, where the number means something, but in the controller's network.
            subprocess.run(
                ["nsenter", f"--target={controller.pid}", "--net", "ip", "link", "add", name, "type", "veth"]
                + ["peer", "name", "eth0", "netns", pid],
                check=True,
            )
            self.run("ip", "link", "set", name, "master", "bridge", "up")
            self.run("ip", "address", "add", f"{ADDRESSES[name]}/24", "dev", "eth0", on=name)
            self.run("ip", "link", "set", "eth0", "up", on=name)

    def _start(self) -> None:
        for machine in self.machines.values():
            socket = f"--socket={STATE}/munge.socket"
            rest = [f"--{what}={STATE}/munge.{what.split('-')[0]}" for what in ("key-file", "pid-file", "log-file")]
            self._daemon(machine, "munged", "--foreground", socket, *rest, f"--seed-file={STATE}/munge.seed")
            wait_for(machine.path(f"{STATE}/munge.socket").exists, lambda: f"munged\n{self.logs()}")
        self._daemon(self.machines["controller"], "slurmctld", "-D")
        for name in ("n1", "n2"):
            self._daemon(self.machines[name], "slurmd", "-D", "-N", name)
        wait_for(
            lambda: self.run("sinfo", "--noheader", "--format=%D %t", check=False).stdout.split() == ["2", "idle"],
            lambda: f"two idle nodes; {self.run('sinfo', check=False).stdout}{self.logs()}",
            60,
        )

    def _daemon(self, machine: Machine, program: str, *options: str) -> None:
        # The log is opened inside: the descriptor must belong to the machine's own mount.
        command = machine.command("sh", "-c", f'exec "$0" "$@" >{STATE}/{program}.log 2>&1', program, *options)
        machine.daemons.append(
            subprocess.Popen(command, env=self.environment, stdin=subprocess.DEVNULL, start_new_session=True)
        )


def wait_for(condition, what, timeout_s: float = 20) -> None:
    """Returns once ``condition()`` holds; past the deadline, an error that says ``what`` was waited for."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what() if callable(what) else what}"
        time.sleep(0.1)


def kill(process: subprocess.Popen, signum: int = signal.SIGKILL) -> None:
    """Signals one process that this test started."""
    if process.poll() is None:
        process.send_signal(signum)
