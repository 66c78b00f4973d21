"""A vLLM engine in a process of its own, on a GPU of our choice, without a cluster."""

import multiprocessing
import os
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from torch import nn

from alignment.engines.config import Site
from alignment.engines.vllm_config import VllmSamplerConfig
from alignment.engines.vllm_engine import VllmEngine
from alignment.engines.vllm_spec import EngineSpec
from alignment.models import Model
from alignment.types import Completion, Request

T = TypeVar("T")


def site_of(module: nn.Module, row_tokens: int) -> Site:
    """A site without a tokenizer, which no engine needs."""
    tokenizer: Any = None
    return Site(Model(module, tokenizer, "measured"), row_tokens)


class EnginePeer:
    """A peer over a pipe; the engine is built at the first call.

    Args:
        module: Gives the engine its shape.
        gpu: As ``CUDA_VISIBLE_DEVICES`` counts here.
        name: For messages.
        row_tokens: Longest row.
        options: Of the vLLM sampler.
    """

    def __init__(self, module: nn.Module, gpu: int, name: str, row_tokens: int = 96, **options: Any) -> None:
        config = VllmSamplerConfig(**options)
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else [str(i) for i in range(gpu + 1)]
        self.process = context.Process(target=_serve, args=(theirs, devices[gpu]), daemon=True)
        self.process.start()
        theirs.close()  # so that the death of the other process is the end of the pipe
        self.name, self.pool = name, ThreadPoolExecutor(1)
        self.pipe.send(EngineSpec.of(site_of(module, row_tokens), config))

    def call(self, function: Callable[..., T], *args: Any) -> Future[T]:
        """``function(engine, *args)`` there."""
        return self.pool.submit(self._ask, function, *args)

    def _ask(self, function: Callable[..., T], *args: Any) -> T:
        self.pipe.send((function, args))
        well, value = self.pipe.recv()
        if not well:
            raise RuntimeError(value)
        return value

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.join()
        self.pool.shutdown(wait=False, cancel_futures=True)


class Apart:
    """A sampler, as far as a transport is concerned."""

    name = "vllm"

    def __init__(self, *peers: EnginePeer) -> None:
        self.engines = list(peers)

    losses = 0

    def peers(self) -> list[EnginePeer]:
        """One per engine."""
        return list(self.engines)

    def watch(self) -> None:
        """None is replaced here."""

    def idle(self) -> None:
        """Nothing to do."""

    def updated(self, version: int, buckets: Sequence[Any] = (), again: Any = None) -> None:
        """They have the weights; none starts later."""

    def close(self) -> None:
        """Ends their processes."""
        for peer in self.engines:
            peer.close()


def _serve(pipe: Connection, gpu: str) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # before anything here asks CUDA how many there are
    spec = pipe.recv()
    engine: VllmEngine | None = None
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            engine = engine or VllmEngine(spec)
            pipe.send((True, function(engine, *args)))
        except Exception as error:  # whatever it is goes to whoever asked
            pipe.send((False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))


def sampled(engine: VllmEngine, requests: list[Request]) -> dict[str, Completion]:
    """Completions by id."""
    engine.add(requests)
    found: dict[str, Completion] = {}
    while engine.pending:
        found |= {completion.id: completion for completion in engine.step()}
    return found


def digests(engine: VllmEngine) -> dict[str, str]:
    """Checksums of the weights that the first worker computes with, by vLLM's names."""
    return engine.entrance.engine.collective_rpc("compute_weight_checksums")[0]


def dies(engine: VllmEngine) -> None:
    """Ends the process at once."""
    os._exit(9)
