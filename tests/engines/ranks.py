"""Processes that compute together over gloo, started once and asked many things: a world of ranks for the tests."""

import gc
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Connection
from typing import Any

import pytest

PATIENCE_S = 240.0
PRELOADED = ["tests.engines.rank_checks", "torch._inductor.lowering", "deepspeed.ops.op_builder.all_ops"]
PRELOADED += ["transformers.models.qwen3.modeling_qwen3", "transformers.models.gpt2.modeling_gpt2"]


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _serve(rank: int, ranks: int, port: int, pipe: Connection, gpu: bool) -> None:
    if not gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # ranks that shared one would be refused by NCCL
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
    import torch

    from alignment.engines.deepspeed_rank import join_ranks

    torch.set_num_threads(1)
    gc.freeze()  # DeepSpeed collects garbage with every engine, and there is much that is none
    join_ranks(rank, ranks, PATIENCE_S)
    while True:
        function, args = pipe.recv()
        try:
            pipe.send((True, function(*args)))
        except Exception as error:  # whatever it is goes to the test that asked
            pipe.send((False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))


class World:
    """``ranks`` processes in a process group of their own, which see no GPU unless asked to."""

    def __init__(self, ranks: int, gpu: bool = False) -> None:
        # CUDA cannot be used in a process that was forked after it was looked for, which importing DeepSpeed does.
        context: Any = multiprocessing.get_context("spawn" if gpu else "forkserver")
        context.set_forkserver_preload(PRELOADED)  # what all of them import is imported once
        pairs, port = [context.Pipe() for _ in range(ranks)], _free_port()
        self.pipes = [ours for ours, _ in pairs]
        self.processes = [
            context.Process(target=_serve, args=(rank, ranks, port, theirs, gpu), daemon=True)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        with pytest.MonkeyPatch.context() as patch:
            if not gpu:
                patch.setenv("CUDA_VISIBLE_DEVICES", "")  # also for the server that they are forked from
            for process in self.processes:
                process.start()

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """``function(*args)`` on every rank: the results in rank order."""
        for pipe in self.pipes:
            pipe.send((function, args))
        answers, deadline = [], time.monotonic() + PATIENCE_S
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(max(0.0, deadline - time.monotonic())):
                self.close()
                pytest.fail(f"rank {rank} gave no answer in {PATIENCE_S} s")
            answers.append(pipe.recv())
        wrong = [f"rank {rank}: {value}" for rank, (well, value) in enumerate(answers) if not well]
        if wrong:
            self.close()  # another rank may still wait for the one that raised
            pytest.fail("\n".join(wrong))
        return [value for _, value in answers]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        world.cache_clear()


@cache
def world(ranks: int, gpu: bool = False) -> World:
    """The world of that size, started when first asked for."""
    return World(ranks, gpu)


@pytest.fixture(scope="module")
def worlds() -> Any:
    """Makes worlds; ends them with the module."""
    made: dict[tuple[int, bool], World] = {}

    def get(ranks: int, gpu: bool = False) -> World:
        made[ranks, gpu] = world(ranks, gpu)
        return made[ranks, gpu]

    yield get
    for each in made.values():
        each.close()
