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


def in_order(study: Study, tasks: Sequence[Task], workers: int) -> Iterator[Done]:
    """The rows of all ``tasks`` and their seconds, as they are finished.

    Raises:
        Interrupted: A stop was asked for; runs that were under way are saved and go on next time.
    """
    if workers > 1 and len(tasks) > 1:
        yield from _in_processes(study, list(tasks), min(workers, len(tasks)))
        return
    for task in tasks:
        with _one_thread():
            row, seconds = one(study.read.path, study.folder, study.quick, task)
        yield task, row, seconds


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _in_processes(study: Study, tasks: list[Task], count: int) -> Iterator[Done]:
    context, waiting = get_context("spawn"), list(reversed(tasks))
    pipes: dict[Any, tuple[Any, Task]] = {}
    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=False)
            process.start()
            theirs.close()
            _hand(study, ours, waiting.pop(), process, pipes)
        while pipes:
            for pipe in connection.wait(list(pipes)):
                process, task = pipes.pop(pipe)
                yield _taken(pipe, task)
                if waiting:
                    _hand(study, pipe, waiting.pop(), process, pipes)
                else:
                    pipe.close()
    finally:
        for process, _ in pipes.values():
            process.terminate()  # a run that is under way is saved
        for pipe, (process, _) in pipes.items():
            while _drained(pipe):
                pass
            process.join()


def _hand(study: Study, pipe: Any, task: Task, process: Any, pipes: dict[Any, tuple[Any, Task]]) -> None:
    pipe.send((study.read.path, study.folder, study.quick, task))
    pipes[pipe] = (process, task)


def _taken(pipe: Any, task: Task) -> Done:
    try:
        kind, value = pipe.recv()
    except EOFError:
        raise UserError(f"the process of {task.run} died; the same command goes on from there") from None
    if kind == "stopped":
        raise Interrupted(value)
    if kind == "error":
        raise value
    return task, *value


def _drained(pipe: Any) -> bool:
    try:
        pipe.recv()
    except EOFError:
        return False
    return True


def _serve(pipe: Any) -> None:
    """Runs what comes through the pipe until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a run has handlers of its own; the parent ends one that waits
    torch.set_num_threads(1)
    while True:
        try:
            work = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(("done", one(*work)))
        except Interrupted as stop:
            pipe.send(("stopped", stop.exit_code))
            return
        except UserError as error:
            pipe.send(("error", UserError(str(error))))
            return
