"""The vLLM sampler in this process: one engine, stepped by whoever waits for completions."""

import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from alignment.engines.config import Site
from alignment.engines.vllm_adapter import base_weights
from alignment.engines.vllm_config import VllmSamplerConfig
from alignment.engines.vllm_engine import VllmEngine
from alignment.engines.vllm_spec import EngineSpec
from alignment.errors import UserError
from alignment.sampling import Received
from alignment.types import Completion, Request


class VllmSampler:
    """Samples with one vLLM engine of this process. It has no weights before the first update.

    Args:
        site: The model, for its shape, and the longest row.
        config: Options.

    Raises:
        UserError: Several engines are asked for, vLLM is not installed, or it cannot run this model.
    """

    name = "vllm"

    def __init__(self, site: Site, config: VllmSamplerConfig) -> None:
        if config.engines > 1:
            raise UserError(
                f"sampler.engines is {config.engines}, but without a cluster there is one, in this process: set"
                " cluster: ray, or engines: 1"
            )
        module: Any = site.model.module
        base = base_weights(module) if config.lora == "adapter" and hasattr(module, "get_base_model") else None
        self.engine = VllmEngine(EngineSpec.of(site, config), base)
        self.sleeps = config.sleep

    @property
    def version(self) -> int | None:
        """Of the policy that samples now."""
        return self.engine.version

    def add(self, requests: Sequence[Request]) -> None:
        """Takes requests, whose ids differ from all that are pending.

        Raises:
            UserError: One of them cannot be sampled; then none was taken.
        """
        self.engine.add(requests)

    def poll(self, timeout_s: float | None = None) -> list[Completion]:
        """Steps the engine until something finishes or the time is over; empty when nothing is pending.

        Raises:
            FloatingPointError: The model's logits are not finite.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while self.engine.pending or self.engine.finished:
            finished = self.engine.step()
            if finished or (deadline is not None and time.monotonic() >= deadline):
                return finished
        return []

    def abort(self, ids: Collection[str]) -> None:
        """Forgets requests: no completion comes for them. Unknown ids are ignored."""
        self.engine.abort(ids)

    def begin_update(self, version: int) -> None:
        """What :meth:`load` brings next is policy ``version``."""
        self.engine.begin_update(version)

    def load(self, bucket: Mapping[str, Tensor]) -> None:
        """Some of the weights, by their names in transformers."""
        self.engine.load(bucket)

    def end_update(self) -> Received:
        """The new weights are in use, and nothing computed with the old ones is used again."""
        return self.engine.end_update()

    def sleep(self) -> None:
        """Gives up the memory of the GPU."""
        self.engine.sleep()

    def wake(self, what: Literal["weights", "cache"]) -> None:
        """Takes it again, for the weights first."""
        self.engine.wake(what)

    def close(self) -> None:
        """Gives everything back; may be called twice."""
        self.engine.close()
