"""Log-probabilities and entropies over a large vocabulary, forward and backward: memory and time.

Ours (`alignment.engines.logprobs` with the default chunk) against the plain way: all logits in one tensor, then
`log_softmax`, the entropy out of it, and autograd. The output layer has the shape of Qwen2.5-0.5B's. Every run is a
fresh process; memory is its peak beyond what model and hidden states took, so the gradients of both are in it.

    python benchmarks/logprobs.py                  # the plain way takes about 13 GB
    python benchmarks/logprobs.py --tokens 1024 --precision float32 bfloat16
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import harness

import alignment  # noqa: F401 - before torch: it says how threads wait

import torch  # isort: skip
from torch import Tensor, nn

from alignment.engines.learner_config import TorchLearnerConfig
from alignment.engines.logprobs import LogProbs
from alignment.types import Batch

VOCABULARY, HIDDEN, TOKENS = 151_936, 896, 4096
ROW_TOKENS = 128
WAYS = ("plain", "ours")
ENTROPIES = ("value", "gradient")
MEMORY_GOAL, TIME_GOAL = 0.1, 1.0


class States(nn.Module):
    """A body whose hidden states are given."""

    def __init__(self, hidden_BTH: Tensor) -> None:
        super().__init__()
        self.hidden_BTH = nn.Parameter(hidden_BTH)

    def forward(self, input_ids: Tensor, **_: object) -> Any:
        """The hidden states of as many rows and positions as there are tokens."""
        return SimpleNamespace(last_hidden_state=self.hidden_BTH[: input_ids.shape[0], : input_ids.shape[1]])


class Model(nn.Module):
    """An output layer on given hidden states, with the interface of a causal language model of transformers."""

    def __init__(self, vocabulary: int, hidden_BTH: Tensor) -> None:
        super().__init__()
        self.base_model = States(hidden_BTH)
        self.lm_head = nn.Linear(hidden_BTH.shape[-1], vocabulary, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        """The output layer."""
        return self.lm_head

    def forward(self, input_ids: Tensor, **_: object) -> Any:
        """Logits of every token."""
        return SimpleNamespace(logits=self.lm_head(self.base_model(input_ids).last_hidden_state))


def work(vocabulary: int, hidden: int, tokens: int) -> tuple[Model, Batch]:
    """The model, and a batch in which ``tokens`` tokens are trained on."""
    torch.manual_seed(0)
    rows, width = max(1, tokens // ROW_TOKENS), min(tokens, ROW_TOKENS) + 1
    ids_BT = torch.randint(0, vocabulary, (rows, width))
    mask_BT = torch.ones(rows, width, dtype=torch.bool)
    mask_BT[:, 0] = False
    numbers = dict.fromkeys(("group_B", "source_B", "ratio_base_B", "key_B"), torch.zeros(rows, dtype=torch.int64))
    flags = dict.fromkeys(("scored_B", "truncated_B"), torch.zeros(rows, dtype=torch.bool))
    batch = Batch(
        ids_BT=ids_BT,
        loss_mask_BT=mask_BT,
        length_B=torch.full((rows,), width),
        temperature_B=torch.ones(rows),
        behaviour_logp_BT=torch.zeros(rows, width),
        rewards_BK=torch.zeros(rows, 1),
        weights_K=torch.ones(1),
        **numbers,
        **flags,
    )
    return Model(vocabulary, torch.randn(rows, width - 1, hidden)), batch


def plain(model: Model, batch: Batch, entropy: str, autocast: bool) -> tuple[Tensor, Tensor]:
    """By the definitions, all at once."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits_NV = model(batch.ids_BT[:, :-1]).logits[batch.loss_mask_BT[:, 1:]]
    log_p_NV = logits_NV.float().log_softmax(-1)
    logp_N = log_p_NV.gather(-1, batch.ids_BT[batch.loss_mask_BT][:, None])[:, 0]
    with torch.set_grad_enabled(entropy == "gradient"):
        return logp_N, -(log_p_NV.exp() * log_p_NV).sum(-1)


def ours(model: Model, batch: Batch, entropy: str, autocast: bool) -> tuple[Tensor, Tensor]:
    """As the learner does it."""
    found = LogProbs(model, TorchLearnerConfig().logits_chunk_mb, autocast)(batch, entropy)  # pyright: ignore[reportArgumentType]
    assert found[1] is not None
    return found[0][batch.loss_mask_BT], found[1][batch.loss_mask_BT]


def arm(way: str, entropy: str, precision: str, sizes: tuple[int, int, int]) -> dict[str, float]:
    """One forward and backward pass in this process."""
    model, batch = work(*sizes)
    compute = {"plain": plain, "ours": ours}[way]
    before = _resident_mb()
    start = time.perf_counter()
    logp_N, entropy_N = compute(model, batch, entropy, precision == "bfloat16")
    loss = logp_N.mean() - (0.01 * entropy_N.mean() if entropy == "gradient" else 0.0)
    loss.backward()
    seconds = time.perf_counter() - start
    assert model.lm_head.weight.grad is not None
    means = {"logp": logp_N.mean(), "entropy": entropy_N.mean(), "gradient": model.lm_head.weight.grad.norm()}
    found = {name: float(value.detach()) for name, value in means.items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return {"seconds": seconds, "peak_mb": peak - before, **found}


def _resident_mb() -> float:
    """Memory that the process holds now; where the system does not say, its peak so far."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    found = [int(line.split()[1]) / 2**10 for line in lines if line.startswith("VmRSS")]
    return found[0] if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _free_mb() -> float:
    """Memory that the machine can give."""
    info = Path("/proc/meminfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    found = [int(line.split()[1]) / 2**10 for line in lines if line.startswith("MemAvailable")]
    return found[0] if found else float("inf")


def measure(sizes: tuple[int, int, int], precision: str, repeats: int) -> list[dict[str, Any]]:
    """Rows of the table: the best of ``repeats`` fresh processes for each way, which take turns."""
    rows = []
    for entropy in ENTROPIES:
        found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for number in range(repeats):
            for way in WAYS if number % 2 == 0 else reversed(WAYS):
                command = [sys.executable, __file__, "--arm", way, entropy, precision, *map(str, sizes)]
                found[way].append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
        best = {way: min(runs, key=lambda run: run["seconds"]) for way, runs in found.items()}
        for name in ("logp", "entropy", "gradient"):
            apart = abs(best["ours"][name] / best["plain"][name] - 1)
            assert apart < (1e-4 if precision == "float32" else 2e-2), f"{name} differs by {apart:.1e} of itself"
        for way in WAYS:
            run = best[way]
            named = {"entropy": entropy, "precision": precision, "way": way}
            rows.append({**named, "peak MB": round(run["peak_mb"]), "seconds": run["seconds"]})
    return rows


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours beside the plain way, row by row."""
    made = []
    for theirs, own in zip(rows[::2], rows[1::2], strict=True):
        case = f"{own['precision']}, entropy as {own['entropy']}"
        for what, goal, key in (("memory", MEMORY_GOAL, "peak MB"), ("time", TIME_GOAL, "seconds")):
            share = own[key] / theirs[key]
            measured = f"{share:.3f}"
            made.append({"what": f"{what}, {case}", "goal": f"{goal}", "measured": measured, "met": share <= goal})
    return made


def main() -> None:
    """Runs the benchmark, or one arm of it."""
    parser = harness.parser(__doc__ or "")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="that are trained on")
    parser.add_argument("--precision", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    parser.add_argument("--repeats", type=int, default=2, help="processes for each way; the quickest counts")
    parser.add_argument("--arm", nargs=6, metavar="X", help="one run in this process, for the benchmark's own use")
    args = parser.parse_args()
    if args.arm:
        way, entropy, precision, *sizes = args.arm
        print(json.dumps(arm(way, entropy, precision, tuple(map(int, sizes)))))  # pyright: ignore[reportArgumentType]
        return
    sizes = (1000, 64, 256) if args.quick else (VOCABULARY, HIDDEN, args.tokens)
    needed_mb = 6 * 4 * sizes[0] * sizes[2] / 2**20
    if needed_mb > _free_mb():
        raise SystemExit(f"the plain way needs {needed_mb:,.0f} MB and {_free_mb():,.0f} are free; lower --tokens")
    rows = [row for p in args.precision for row in measure(sizes, p, 1 if args.quick else args.repeats)]
    settings = dict(zip(("vocabulary", "hidden size", "tokens"), sizes, strict=True))
    settings |= {"logits_chunk_mb": TorchLearnerConfig().logits_chunk_mb}
    harness.finish(
        {
            "title": "Log-probabilities and entropies over a large vocabulary",
            "settings": settings,
            "tables": [{"title": "Forward and backward; memory beyond model and hidden states", "rows": rows}],
            "equal": ["Weights, hidden states, tokens, loss, threads; what comes out agrees."],
            "not_equal": ["The plain way computes logits once, ours twice."],
            "goals": [] if args.quick else goals(rows),
        },
        args.json,
    )


if __name__ == "__main__":
    main()
