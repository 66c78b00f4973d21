"""What runs inside a vLLM worker: it takes new weights in buckets, between two steps of its engine.

vLLM mixes :class:`WeightReceiver` into its worker class, by name, so that ``collective_rpc`` can call it; under tensor
parallelism there is one in each process, and each keeps its share of what all of them receive.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from alignment.engines.checksum import MODULUS, checksum
from alignment.engines.transport import Tally
from alignment.sampling import Received


class WeightReceiver:
    """Mixed into vLLM's worker, which has ``model_runner`` and ``vllm_config``."""

    model_runner: Any
    vllm_config: Any
    _update: "_Update | None" = None
    _verified: frozenset[tuple[str, tuple[int, ...]]] = frozenset()
    """Names and shapes of an update that is known to fill the whole model."""
    _in_use: tuple[int, int] | None = None
    """Checksums of the weights in use, as they came and as they were kept."""

    def begin_weights(self) -> None:
        """Takes the layers apart; no step may run before :meth:`end_weights`."""
        self.drop_weights()
        with self._configured():
            self._update = _Update(self.model_runner, self._verified)

    def drop_weights(self) -> None:
        """Gives up an update half way: the weights are then a mixture."""
        if self._update is not None:
            with self._configured():
                self._update.close()
        self._update = None

    def load_bucket(self, bucket: Mapping[str, Tensor]) -> None:
        """Loads tensors by their names in transformers. They must stay as they are until :meth:`end_weights`.

        Raises:
            ValueError: The model has no such weights, or one came twice.
        """
        assert self._update is not None, "begin_weights comes first"
        with self._configured():
            self._update.load(bucket)

    def end_weights(self, version: int) -> Received:
        """Puts the layers together; what arrived.

        Raises:
            ValueError: Parts of the model got no weights.
        """
        assert self._update is not None, "begin_weights comes first"
        update, self._update = self._update, None
        with self._configured():
            received = update.finish(version)
        self._verified = frozenset(received.shapes.items())
        before, self._in_use = self._in_use, (received.checksum, update.kept)
        return with_news(received, before, self._in_use, update.dtype)

    def _configured(self) -> AbstractContextManager[None]:
        """Parts of vLLM ask for the configuration while weights are loaded."""
        from vllm.config import set_current_vllm_config

        return set_current_vllm_config(self.vllm_config)


def with_news(received: Received, before: tuple[int, int] | None, now: tuple[int, int], dtype: torch.dtype) -> Received:
    """``received``, which says so when the weights are new as they came and not as they are kept.

    Args:
        received: What arrived.
        before: Checksums of the last update as it came and as it is kept; None for the first.
        now: Of this one.
        dtype: In which they are kept.
    """
    same = before is not None and before[0] != now[0] and before[1] == now[1]
    return replace(received, unchanged_in=str(dtype)) if same else received


class _Update:
    """One update, from taking the layers apart to putting them together."""

    def __init__(self, runner: Any, verified: frozenset[tuple[str, tuple[int, ...]]]) -> None:
        from vllm.model_executor.model_loader.reload.layerwise import initialize_layerwise_reload

        self.runner, self.model, self.verified = runner, runner.get_model(), verified
        self.dtype = runner.model_config.dtype
        # As the loader names them: layers under LoRA hide the one they wrap.
        self.expected = {name.replace(".base_layer.", ".") for name, _ in self.model.named_parameters()}
        self.filled: set[str] = set()
        self.refused: list[str] = []
        self.tally, self.kept = Tally(), 0
        initialize_layerwise_reload(self.model)

    def load(self, bucket: Mapping[str, Tensor]) -> None:
        before = self.tally.checksum
        self.tally.add(bucket)
        kept = self.tally.checksum - before
        if any(tensor.dtype != self.dtype for tensor in bucket.values()):
            kept = checksum({name: t.to(self.dtype) for name, t in bucket.items()})
        self.kept = (self.kept + kept) % MODULUS
        if {(name, tuple(tensor.shape)) for name, tensor in bucket.items()} <= self.verified:
            self.filled |= self.model.load_weights(bucket.items())
            return
        # One by one: that is how to learn whether the model took a name.
        for name, tensor in bucket.items():
            try:
                taken = self.model.load_weights([(name, tensor)])
            except (ValueError, KeyError, AttributeError, AssertionError, RuntimeError):  # as the architecture has it
                taken = set()
            self.filled |= taken
            if not taken:
                self.refused.append(f"{name} {list(tensor.shape)}")

    def finish(self, version: int) -> Received:
        incomplete = self.incomplete()
        self.close()
        problems = (
            ("has no place of this shape for", self.refused),
            ("got no weights for", sorted(self.expected - self.filled)),
            ("got a part only of", incomplete),
        )
        if said := [f"{what} {_listed(names)}" for what, names in problems if names]:
            raise ValueError(f"vLLM's {type(self.model).__name__} {'; '.join(said)}")
        self.runner.reset_lora_state()
        return self.tally.received(version)

    def incomplete(self) -> list[str]:
        """Layers of which some rows came and others did not, such as a query projection without its keys."""
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        found = []
        for name, layer in self.model.named_modules():
            info = get_layerwise_info(layer)
            if not info.can_load():
                continue
            total = info.load_numel_total
            assert total is not None, "a layer that can load knows how much"
            if isinstance(layer, VocabParallelEmbedding):  # rows that only fill up are not sent
                total = layer.shard_indices.num_org_elements * layer.embedding_dim
            if 0 < info.load_numel < total:
                found.append(name)
        return found

    def close(self) -> None:
        """Puts the layers together, whatever came."""
        from vllm.model_executor.model_loader.reload.layerwise import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.runner.model_config)
        _repack_tied_heads(self.model)


def _repack_tied_heads(model: nn.Module) -> None:
    """Renews the copy, packed for a CPU's kernels, of heads that share the embedding's weights and so got none."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    layers = [layer for layer in model.modules() if isinstance(layer, VocabParallelEmbedding)]
    embeddings = {id(layer.weight) for layer in layers if not isinstance(layer, ParallelLMHead)}
    for layer in layers:
        if isinstance(layer, ParallelLMHead) and id(layer.weight) in embeddings:
            layer.quant_method.process_weights_after_loading(layer)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
