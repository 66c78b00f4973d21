"""On a GPU: the DeepSpeed learner at a large vocabulary, vLLM beside it, weight updates, and sleep and wake.

A model of Qwen3-0.6B's shape with random weights. Each line is a fresh process; peak memory is PyTorch's own, of one
update or one generation. MFU counts what the model must compute, not what checkpointing computes again, against the
rate of a large bfloat16 matrix product on the same card just before. Weight updates are measured with their checks, so
a line holds the gathering, the checksums at both ends and vLLM's loading, beside a plain copy of as many bytes on the
card. NCCL needs a second GPU.

    python benchmarks/gpu.py                    # "skipped: needs a CUDA device" without one
    python benchmarks/gpu.py --only sync sleep
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from typing import Any

import harness

import alignment  # noqa: F401 - before torch: it says how threads wait

import torch  # isort: skip

import gpu_engine
import gpu_work
from gpu_work import Shape, Stopwatch

TITLE = "On a GPU: learner, vLLM, weight updates, sleep and wake"
WHY_SKIPPED = "needs a CUDA device"
PARTS = ("learner", "sampler", "sync", "sleep")
GIB = 1 << 30
TINY = Shape(layers=2)
ENGINE: dict[str, Any] = {"gpu_memory_utilization": 0.5, "max_num_seqs": 256, "dtype": "bfloat16"}


def learner(quick: bool, kind: str, offload: str) -> dict[str, float]:
    """One update by a learner: seconds, tokens per second, MFU, memory."""
    shape, rows, times = (TINY, 2, 2) if quick else (Shape(), 8, 4)
    rate = gpu_work.matrix_rate()
    options: dict[str, Any] = {"gradient_checkpointing": True, "micro_batch_tokens": 2 * gpu_work.ROW_TOKENS}
    if kind == "torch":
        from alignment.engines.learner_config import TorchLearnerConfig
        from alignment.engines.torch_learner import TorchLearner

        made: Any = TorchLearner(shape.build(torch.float32), TorchLearnerConfig(autocast="bfloat16", **options), 99, 0)
    else:
        from alignment.engines.deepspeed_config import DeepSpeedLearnerConfig
        from alignment.engines.deepspeed_rank import DeepSpeedRank, join_ranks

        os.environ |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "0",
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
        }
        os.environ["MASTER_PORT"] = str(_free_port())
        join_ranks(0, 1, 600.0)
        config = DeepSpeedLearnerConfig(zero_stage=3, dtype="bfloat16", offload=offload, **options)  # pyright: ignore[reportArgumentType]
        made = DeepSpeedRank(shape.build(torch.bfloat16), config, 99, 0)
    held = torch.cuda.memory_allocated()
    batch, watch = gpu_work.long_batch(rows), Stopwatch()
    made.update(batch, gpu_work.objective())
    torch.cuda.reset_peak_memory_stats()
    for step in range(times):
        with watch:
            made.update(replace(batch, step=step), gpu_work.objective())
    tokens = rows * gpu_work.ROW_TOKENS / watch.best
    return {
        "update s": watch.best,
        "tokens/s": tokens,
        "MFU": tokens * shape.training_flop(gpu_work.ROW_TOKENS) / rate,
        "matrix TFLOP/s": rate / 1e12,
        "held GiB": held / GIB,
        "peak GiB": torch.cuda.max_memory_allocated() / GIB,
    }


def sampler(quick: bool) -> dict[str, float]:
    """Generation by vLLM: tokens per second."""
    from alignment.engines.vllm_config import VllmSamplerConfig
    from alignment.engines.vllm_engine import VllmEngine
    from alignment.engines.vllm_spec import EngineSpec
    from alignment.types import Request, SamplingParams

    shape, count, length = (TINY, 8, 32) if quick else (Shape(), 256, 1024)
    module = shape.build(torch.bfloat16)
    engine = VllmEngine(EngineSpec.of(gpu_engine.site_of(module, 2048), VllmSamplerConfig(**ENGINE)))
    with closing(engine):
        _publish_all(engine, module, 0)
        watch = Stopwatch()
        for turn in range(2):
            params = SamplingParams(length, temperature=1.0)
            prompts = [tuple(range(i % 50 + 1, i % 50 + 129)) for i in range(count)]
            requests = [Request(f"{turn}.{i}", p, params, 1000 * turn + i) for i, p in enumerate(prompts)]
            with watch:
                found = gpu_engine.sampled(engine, requests)
        return {"rows": count, "tokens each": length, "s": watch.best, "tokens/s": count * length / watch.best} | {
            "finished": len(found)
        }


def sync(quick: bool, kind: str) -> dict[str, float]:
    """One weight update by a transport, of all weights."""
    from alignment.engines.learner_config import TorchLearnerConfig
    from alignment.engines.torch_learner import TorchLearner
    from alignment.engines.transport_config import IpcTransportConfig, MemoryTransportConfig, NcclTransportConfig
    from alignment.engines.vllm_config import VllmSamplerConfig
    from alignment.engines.vllm_sampler import VllmSampler

    shape = TINY if quick else Shape()
    copy = gpu_work.copy_rate()
    module = shape.build(torch.bfloat16)
    configs = {"memory": MemoryTransportConfig, "ipc": IpcTransportConfig, "nccl": NcclTransportConfig}
    engine_site = gpu_engine.site_of(shape.build(torch.bfloat16, "meta"), 2048)
    if kind == "memory":
        there: Any = VllmSampler(engine_site, VllmSamplerConfig(**ENGINE))
    else:
        there = gpu_engine.Apart(gpu_engine.EnginePeer(module, 1 if kind == "nccl" else 0, "engine", 2048, **ENGINE))
    with closing(there):
        made = TorchLearner(module, TorchLearnerConfig(device="cuda"), 1, 0)
        transport = configs[kind]().build(made, there)
        transport.publish(0)  # builds the engine, makes the group
        watch = Stopwatch()
        for version in range(1, 4 if quick else 8):
            with watch:
                metrics = transport.publish(version)
    sent = metrics["publish_bytes"]
    return {
        "GiB": sent / GIB,
        "buckets": metrics["publish_buckets"],
        "s": watch.best,
        "GiB/s": sent / GIB / watch.best,
        "copy GiB/s": copy / GIB,
        "share of a copy": sent / watch.best / copy,
    }


def sleep(quick: bool) -> dict[str, float]:
    """One turn of a GPU that vLLM and a learner share: each step's seconds, and the memory that sleeping gives."""
    from alignment.engines.vllm_config import VllmSamplerConfig
    from alignment.engines.vllm_sampler import VllmSampler

    shape = TINY if quick else Shape()
    module = shape.build(torch.bfloat16, "cuda")
    with closing(VllmSampler(gpu_engine.site_of(module, 2048), VllmSamplerConfig(sleep=True, **ENGINE))) as there:
        _publish_all(there, module, 0)
        steps: dict[str, Stopwatch] = {}
        given = 0
        for version in range(1, 4):
            awake = torch.cuda.mem_get_info()[0]
            turn: list[tuple[str, Callable[[], Any]]] = [
                ("sleep", there.sleep),
                ("wake weights", lambda: there.wake("weights")),
                ("update", lambda v=version: _publish_all(there, module, v)),
                ("wake cache", lambda: there.wake("cache")),
            ]
            for name, call in turn:
                with steps.setdefault(name, Stopwatch()):
                    call()
                given = max(given, torch.cuda.mem_get_info()[0] - awake)
    return {f"{name} s": watch.best for name, watch in steps.items()} | {"given back GiB": given / GIB}


def _publish_all(receiver: Any, module: torch.nn.Module, version: int) -> None:
    receiver.begin_update(version)
    named = dict(module.named_parameters())
    receiver.load({name: named[name].detach() for name in named})
    receiver.end_update()


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def apart(part: str, quick: bool, *options: str) -> dict[str, Any]:
    """One line, measured in a fresh process; what went wrong instead, where it did."""
    command = [sys.executable, __file__, "--arm", json.dumps([part, quick, *options])]
    start = time.perf_counter()
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    harness.console.print(f"{' '.join((part, *options))}: {time.perf_counter() - start:.0f} s")
    if done.returncode:
        harness.console.print(done.stdout + done.stderr, markup=False)
        sys.exit(f"{part} {options} failed with exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(parts: list[str], quick: bool) -> list[dict[str, Any]]:
    """Tables of the parts."""
    tables = []
    if "learner" in parts:
        ways = [("deepspeed", "none"), ("deepspeed", "optimizer"), ("deepspeed", "parameters"), ("torch", "none")]
        rows = [{"learner": kind, "offload": off, **apart("learner", quick, kind, off)} for kind, off in ways]
        tables.append(
            {"title": "An update of rows of 4,096 tokens (ZeRO-3 in bfloat16; torch under autocast)", "rows": rows}
        )
    if "sampler" in parts:
        tables.append({"title": "Generation by vLLM in bfloat16", "rows": [apart("sampler", quick)]})
    if "sync" in parts:
        kinds = ["memory", "ipc", *(["nccl"] if torch.cuda.device_count() > 1 else [])]
        rows = [{"transport": kind, **apart("sync", quick, kind)} for kind in kinds]
        tables.append({"title": "A weight update of all weights in bfloat16", "rows": rows})
    if "sleep" in parts:
        tables.append({"title": "A turn of a shared GPU", "rows": [apart("sleep", quick)]})
    return tables


def main() -> None:
    """Measures, or says why not."""
    parser = harness.parser(__doc__ or "")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--arm", help="for the benchmark's own use")
    args = parser.parse_args()
    if args.arm:
        part, quick, *options = json.loads(args.arm)
        sys.stdout.write(
            "\n"
            + json.dumps({"learner": learner, "sampler": sampler, "sync": sync, "sleep": sleep}[part](quick, *options))
            + "\n"
        )
        return
    if not torch.cuda.is_available():
        harness.console.print(f"skipped: {WHY_SKIPPED}")
        harness.finish({"title": TITLE, "skipped": WHY_SKIPPED, "tables": []}, args.json)
        return
    unlike = [] if torch.cuda.device_count() > 1 else ["NCCL was not measured: it needs a second GPU."]
    tables = measure(args.only, args.quick)
    settings = asdict(TINY if args.quick else Shape())
    harness.finish({"title": TITLE, "settings": settings, "tables": tables, "not_equal": unlike}, args.json)


if __name__ == "__main__":
    main()
