"""The connection of this process to a Ray cluster: a private one, started and ended here, or an existing one."""

import contextlib
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.errors import UserError

END_TIMEOUT_S = 10.0
"""How long processes of a private cluster may take to end before they are killed."""
LONGEST_FOLDER = 40
"""Characters. Ray puts sockets into its folder, and their whole path may have about 100."""


@dataclass(frozen=True)
class Session:
    """Where this process is connected to."""

    address: str
    folder: Path
    """Of this machine's part of the cluster; its ``logs`` hold what the actors here printed."""
    token_file: Path | None
    """Of a private cluster; whoever may read it may do anything there."""
    private: bool

    @property
    def loopback(self) -> bool:
        """Whether all of it is on this machine and cannot be reached from another."""
        return self.address.startswith("127.")


_current: list[Session] = []
"""The session that this process opened, if any: Ray allows one connection."""


@contextlib.contextmanager
def connected(
    address: str | None, num_cpus: float, num_gpus: int | None, object_store_mb: int | None
) -> Iterator[Session]:
    """Connects this process for as long as the context lasts. A connection that it has already is used as it is.

    Args:
        address: Of an existing cluster; None starts a private one.
        num_cpus: Cores that a private cluster hands out. Only a count: processes share the cores that there are.
        num_gpus: GPUs of a private cluster; None: all that can be seen.
        object_store_mb: Shared memory of a private cluster, in MiB; None: Ray's choice.

    Raises:
        UserError: The cluster cannot be reached or does not accept the token, or a private one does not start.
    """
    if _current:
        if address not in (None, "auto", _current[-1].address):
            raise UserError(f"this process is connected to Ray at {_current[-1].address}; it cannot join {address} too")
        yield _current[-1]
        return
    if (found := _inherited()) is not None:
        yield found
        return
    opened = _private(num_cpus, num_gpus, object_store_mb) if address is None else _existing(address)
    with opened as session:
        _current.append(session)
        try:
            yield session
        finally:
            _current.pop()


def _inherited() -> Session | None:
    """The connection that the program which runs us has made itself."""
    import ray
    from ray._private import worker

    if not ray.is_initialized():
        return None
    node: Any = worker._global_node
    folder = Path(node.get_session_dir_path())
    return Session(ray.get_runtime_context().gcs_address, folder, None, private=False)


@contextlib.contextmanager
def _private(num_cpus: float, num_gpus: int | None, object_store_mb: int | None) -> Iterator[Session]:
    base = tempfile.gettempdir()
    folder = Path(tempfile.mkdtemp(prefix="align-ray-", dir=base if len(base) <= LONGEST_FOLDER else "/tmp"))
    token_file = folder / "token"
    with open(token_file, "x", encoding="ascii", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
        file.write(secrets.token_hex(32))
    changes = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_AUTH_TOKEN": None,  # would win over the path
        "RAY_USAGE_STATS_ENABLED": "0",
        # The one way to tell Ray that a cluster is of this machine alone: then it listens on the loopback interface.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_ADDRESS": None,
    }
    try:
        with _environment(changes):
            options = {"num_cpus": num_cpus, "num_gpus": num_gpus, "include_dashboard": False, "_temp_dir": str(folder)}
            if object_store_mb is not None:
                options["object_store_memory"] = object_store_mb * 2**20
            # Otherwise Ray would start as many idle workers as it has cores to hand out.
            options["_system_config"] = {"prestart_worker_first_driver": False, "enable_worker_prestart": False}
            started: list[tuple[int, str]] = []
            try:
                with _joined("local", **options) as (address, session_folder):
                    try:
                        yield Session(address, session_folder, token_file, private=True)
                    finally:
                        started = _descendants(os.getpid(), str(folder))
            finally:
                _end(started)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _existing(address: str) -> Iterator[Session]:
    mode = os.environ.get("RAY_AUTH_MODE", "token").lower()
    default = Path.home() / ".ray" / "auth_token"
    given = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ or default.exists()
    if mode != "token" or not given:
        why = f"RAY_AUTH_MODE is {mode}" if mode != "token" else "no token is set"
        raise UserError(
            f"cluster.address {address}: {why}, and whoever reaches a Ray cluster without one may run anything on"
            " it. Start the cluster with RAY_AUTH_MODE=token, and set RAY_AUTH_TOKEN_PATH (a file) or RAY_AUTH_TOKEN to"
            " its token here"
        )
    with _environment({"RAY_AUTH_MODE": "token"}), _joined(address) as (found, folder):
        yield Session(found, folder, None, private=False)


@contextlib.contextmanager
def _joined(address: str, **options: Any) -> Iterator[tuple[str, Path]]:
    """Joins the cluster; gives its address and the session's folder. Signal handlers stay as they were."""
    import ray
    from ray.exceptions import RayError

    # Ray takes SIGTERM for itself: the run would die in the middle of a step instead of saving it.
    with _signals_kept():
        try:
            context: Any = ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
        except (RayError, ConnectionError, RuntimeError, ValueError, OSError) as error:
            ray.shutdown()
            what = "a private Ray cluster did not start" if address == "local" else f"no Ray cluster at {address}"
            raise UserError(f"{what}: {error}") from error
    try:
        yield context.address_info["gcs_address"], Path(context.address_info["session_dir"])
    finally:
        with _signals_kept():
            ray.shutdown(wait_for_processes=True)


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            if handler is not None:
                signal.signal(number, handler)


@contextlib.contextmanager
def _environment(changes: Mapping[str, str | None]) -> Iterator[None]:
    """Sets variables that Ray reads, also where it has read them already, and puts them back."""
    before = {name: os.environ.get(name) for name in (*changes, "RAY_ENABLE_UV_RUN_RUNTIME_ENV")}
    # Started by `uv run`, Ray would upload the working directory to all processes and make environments of it.
    _set({**changes, "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"})
    try:
        yield
    finally:
        _set(before)


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    from ray import _raylet
    from ray._private import ray_constants

    compiled: Any = _raylet
    # Two constants are read when Ray is imported, the mode and the token when it is first used.
    off = ("0", "false")
    ray_constants.ENABLE_RAY_CLUSTER = (
        os.environ.get("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "1").lower() not in off and sys.platform == "linux"
    )
    ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = (
        os.environ.get("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "1").lower() not in off
    )
    compiled.Config.initialize("")
    compiled.AuthenticationTokenLoader.instance().reset_cache()


def _end(processes: Sequence[tuple[int, str]]) -> None:
    """Waits until processes of the private cluster are gone; kills those that stay. Ray waits only for its services."""
    deadline = time.monotonic() + END_TIMEOUT_S
    while left := [
        pid for pid, started in processes if (now := _stat(pid)) and now[2] == started and now[0] not in "ZX"
    ]:
        if time.monotonic() > deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return
        time.sleep(0.02)


def _descendants(root: int, marker: str) -> list[tuple[int, str]]:
    """Processes that ``root`` started, directly or not, whose command or environment names ``marker``.

    Returns:
        Their numbers and when they started, which tells them from later ones of the same number.
    """
    pids = [int(entry.name) for entry in Path("/proc").glob("[0-9]*")] if sys.platform == "linux" else []
    stats = {pid: stat for pid in pids if (stat := _stat(pid))}
    found = {root}
    while more := {pid for pid, (_, parent, _) in stats.items() if parent in found} - found:
        found |= more
    return [(pid, stats[pid][2]) for pid in sorted(found - {root}) if _mentions(pid, marker)]


def _mentions(pid: int, marker: str) -> bool:
    for name in ("cmdline", "environ"):
        with contextlib.suppress(OSError):
            if marker.encode() in Path(f"/proc/{pid}/{name}").read_bytes():
                return True
    return False


def _stat(pid: int) -> tuple[str, int, str] | None:
    """State, parent and time of start of a process; None if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return fields[0], int(fields[1]), fields[19]
