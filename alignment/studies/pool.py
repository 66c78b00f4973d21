"""Runs of a study one after the other in this process, or several at a time in processes of their own.

Each uses one thread of torch, so that its numbers do not depend on how many there are.
"""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import connection, get_context
from typing import Any

import torch

from alignment.errors import UserError
from alignment.studies.design import Study, Task
from alignment.studies.running import Interrupted, one

Done = tuple[Task, dict[str, Any], float]


class Pool:
    """Where runs of ``study`` are computed, ``workers`` at a time; with one worker, in this process.

    Leaving the context ends the processes; a run that is under way in one is saved and goes on next time.
    """

    def __init__(self, study: Study, workers: int) -> None:
        self.study, self.workers = study, workers
        self._resting: list[Any] = []
        self._busy: dict[Any, Task] = {}
        self._processes: dict[Any, Any] = {}

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        for pipe, process in self._processes.items():
            if pipe in self._busy:
                process.terminate()
            else:
                pipe.close()
        for pipe in self._busy:
            while _received(pipe) is not None:
                pass
        for process in self._processes.values():
            process.join()

    def done(self, tasks: Sequence[Task]) -> Iterator[Done]:
        """The rows of all ``tasks`` and their seconds, as they are finished.

        Raises:
            Interrupted: A stop was asked for.
            UserError: A run failed for a reason that the user can mend, or its process died.
        """
        if self.workers == 1:
            for task in tasks:
                with one_thread():
                    row, seconds = one(self.study.read.path, self.study.folder, self.study.quick, task)
                yield task, row, seconds
            return
        waiting = list(reversed(tasks))
        while waiting or self._busy:
            while waiting and len(self._busy) < self.workers:
                self._hand(waiting.pop())
            for pipe in connection.wait(list(self._busy)):
                found, task = _received(pipe), self._busy.pop(pipe)
                self._resting.append(pipe)
                yield task, *_unpacked(found, task)

    def _hand(self, task: Task) -> None:
        pipe = self._resting.pop() if self._resting else self._started()
        self._busy[pipe] = task  # first, so that a stop from here on ends its process
        pipe.send((self.study.read.path, self.study.folder, self.study.quick, task))

    def _started(self) -> Any:
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        self._processes[ours] = context.Process(target=_serve, args=(theirs,))
        self._processes[ours].start()
        theirs.close()
        return ours


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread of torch inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _received(pipe: Any) -> Any:
    """What comes next, or None when the other end is closed."""
    try:
        return pipe.recv()
    except (EOFError, ConnectionResetError):
        return None


def _unpacked(found: Any, task: Task) -> tuple[dict[str, Any], float]:
    match found:
        case None:
            raise UserError(f"the process of run {task.run} died; the same command goes on from there")
        case Interrupted() | UserError():
            raise found
        case _:
            return found


def _serve(pipe: Any) -> None:
    """Runs what comes through the pipe until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a run has handlers of its own; the parent ends one that waits
    with one_thread():
        while (work := _received(pipe)) is not None:
            try:
                pipe.send(one(*work))
            except Interrupted as stop:
                pipe.send(stop)
                return
            except UserError as error:
                pipe.send(UserError(str(error)))  # subclasses are made of more than their text
                return
