"""An update of weights: bytes per second in memory and through Ray's object store, beside a plain copy, and by size.

The learner is a stand-in with random bfloat16 weights of the shapes of a decoder; the engine takes buckets, counts and
checks them, and throws them away. So what is measured is the update itself, its checksums on both ends included: vLLM's
own loading and ZeRO's gathering come on top.

    python benchmarks/transport.py
"""

import time
from collections.abc import Callable, Iterator, Mapping
from statistics import median
from typing import Any

import harness

import alignment  # noqa: F401 - before torch: it says how threads wait

import torch  # isort: skip
from torch import Tensor

from alignment.engines.object_store import StoreSender, StoreTarget
from alignment.engines.outgoing import buckets
from alignment.engines.ray_sampler import EnginePeer
from alignment.engines.transport import Patience, Tally, update_weights
from alignment.engines.transport_config import ObjectStoreTransportConfig
from alignment.engines.transport_ends import LocalPeer, LocalSender, LocalTarget
from alignment.sampling import Received

MILLIONS = (1, 10, 100, 1000)
QUICK_MILLIONS = (1, 4)
BUCKET_MB = 256.0
ROUNDS = 3


class Weights:
    """Random weights: layers of about 10 M parameters, as a learner gives them."""

    def __init__(self, millions: int) -> None:
        generator = torch.Generator().manual_seed(0)
        layers = max(1, millions // 10)
        rows = millions * 1_000_000 // layers // 1024
        self.tensors = {
            f"layers.{i}.weight": torch.randn(rows, 1024, generator=generator).to(torch.bfloat16) for i in range(layers)
        }

    @property
    def bytes(self) -> int:
        """Of all of them."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def weights(self, bucket_bytes: int, form: str = "merged") -> Iterator[dict[str, Tensor]]:
        """In buckets."""
        return buckets(self.tensors.items(), bucket_bytes)


class Discard:
    """An engine that only counts."""

    def __init__(self) -> None:
        self.version, self.tally = 0, Tally()

    def begin_update(self, version: int) -> None:
        """As an engine's."""
        self.version, self.tally = version, Tally()

    def load(self, bucket: Mapping[str, Tensor]) -> None:
        """As an engine's."""
        self.tally.add(bucket)

    def end_update(self) -> Received:
        """As an engine's."""
        return self.tally.received(self.version)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """As an actor's."""
        return function(self, *args)


def seconds(work: Callable[[], object]) -> float:
    """Median of some rounds."""
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return median(times)


def measure(quick: bool) -> dict[str, Any]:
    """Every size over both ways."""
    import ray

    from alignment.engines.ray_session import connected

    rows: list[dict[str, Any]] = []
    sizes = QUICK_MILLIONS if quick else MILLIONS
    store_mb = 200 + 3 * 2 * max(sizes)
    with connected(None, num_cpus=4, num_gpus=0, object_store_mb=store_mb):
        actor: Any = ray.remote(Discard).options(num_cpus=1).remote()
        peer = EnginePeer(actor, "the engine")
        for millions in sizes:
            learner = Weights(millions)
            gib = learner.bytes / 2**30
            copy = seconds(lambda: [tensor.clone() for tensor in learner.tensors.values()])  # noqa: B023
            checked = seconds(lambda: [Tally().add({name: t}) for name, t in learner.tensors.items()])  # noqa: B023
            ways = {"memory": _memory(learner), "object store": _store(learner, peer)}
            for way, update in ways.items():
                taken = seconds(update)
                rows.append(
                    {
                        "parameters (M)": millions,
                        "way": way,
                        "seconds": taken,
                        "GiB/s": gib / taken,
                        "plain copy GiB/s": gib / copy,
                        "of which one checksum, s": checked,
                    }
                )
    return {
        "title": "Weight updates",
        "settings": {"bucket_mb": BUCKET_MB, "rounds": ROUNDS, "dtype": "bfloat16"},
        "tables": [{"title": "An update to one engine", "rows": rows}],
        "equal": ["The same tensors, threads and run."],
        "not_equal": ["The copy neither checks what it copied nor leaves its process."],
    }


def _memory(learner: Weights) -> Callable[[], object]:
    def update() -> object:
        ends = LocalSender(learner, BUCKET_MB), [LocalTarget(Discard(), "the engine")]
        return update_weights(*ends, 1, Patience("measuring", 600))

    return update


def _store(learner: Weights, peer: EnginePeer) -> Callable[[], object]:
    config = ObjectStoreTransportConfig(bucket_mb=BUCKET_MB)

    def update() -> object:
        sender = StoreSender([LocalPeer(learner, "the learner")], config)
        return update_weights(sender, [StoreTarget(peer, [])], 1, Patience("measuring", 600))

    return update


def main() -> None:
    """The benchmark."""
    args = harness.parser(__doc__ or "").parse_args()
    harness.finish(measure(args.quick), args.json)


if __name__ == "__main__":
    main()
