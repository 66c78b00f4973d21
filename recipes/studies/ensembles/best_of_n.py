"""Best-of-n against reward models of the study of ensembles: the gold score of the best of up to 1,024 samples.

``python recipes/studies/ensembles/best_of_n.py`` makes the warm-up for each seed with no and with 25 % flipped labels,
samples from its policy, and writes ``best_of_n.json`` beside this file. It goes on where it was stopped.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from alignment.algorithms.ensembles import combined
from alignment.engines.config import Site, TransformersSamplerConfig
from alignment.engines.reranking import build_sampler
from alignment.environments import SingleTurn
from alignment.evaluation.model import open_checkpoint
from alignment.evaluation.statistics import best_of_n, best_of_n_kl
from alignment.models import stop_ids
from alignment.recipe import Recipe, load
from alignment.reward_scoring import RewardScorer
from alignment.rollouts import Player, play
from alignment.trainer import train
from alignment.types import Group, SamplingParams

HERE = Path(__file__).parent
SIZES = (1, 4, 16, 64, 256, 1024)
MEMBERS = 5
PENALTY = 0.5


def warm_up(flipped: float, seed: int, runs: str) -> tuple[Recipe, Path]:
    """The recipe's stages before RL, trained on pairs of which so many are flipped, and the folder of the run."""
    name = f"best_of_n.{flipped}.{seed}"
    said = {"data.preferences.flipped": flipped, "run.seed": seed, "run.output": runs, "run.name": name}
    recipe = load([HERE / "recipe.yaml"], [f"{key}={json.dumps(value)}" for key, value in said.items()])
    evaluation = recipe.evaluation.model_copy(update={"every": 0})
    recipe = recipe.model_copy(
        update={"stages": recipe.stages[:3], "rewards": recipe.rewards[:1], "evaluation": evaluation}
    )
    result = train(recipe)
    if result["status"] != "complete":
        raise SystemExit(result["exit_code"])
    return recipe, Path(result["folder"])


def sampled(recipe: Recipe, run: Path, prompts: int, samples: int) -> list[Group]:
    """So many completions of each of the first held-out prompts."""
    assert recipe.data.eval is not None
    model = open_checkpoint(str(run))
    sampler = build_sampler(TransformersSamplerConfig(batch_rows=2048), Site(model), None)
    player = Player(sampler, model.tokenizer, SingleTurn(), recipe.data.max_prompt_tokens)
    params = SamplingParams(recipe.evaluation.sampling.max_tokens, stop_ids=stop_ids(model.tokenizer, model.module))
    rows = recipe.data.eval.load(HERE).prompts[:prompts]
    return play(player, rows, range(len(rows)), samples, params, recipe.run.seed, "best_of_n/")


def scores(group: Group, run: Path) -> tuple[dict[str, list[float]], list[float]]:
    """What each proxy, and gold, says of the completions of a prompt."""
    from ensembles_parts import gold  # found once the recipe was loaded

    prompt, written = group.prompt.row["prompt"], [r.text for r in group.rollouts]
    ended = [r.finish_reason == "stop" for r in group.rollouts]
    folders = {f"m{i}": f"members/member_{i}" for i in range(MEMBERS)} | {"large": "large/member_0"}
    found = {
        name: RewardScorer(run / "reward_models" / folder)([prompt] * len(written), written, ended)
        for name, folder in folders.items()
    }
    scores_BM = torch.tensor([found[f"m{i}"] for i in range(MEMBERS)], dtype=torch.float64).T
    for combine in ("mean", "worst", "uncertainty"):
        found[combine] = combined(scores_BM, combine, PENALTY, ddof=0).tolist()
    return found, [gold(prompt, text) for text in written]


def best(proxies: Mapping[str, Sequence[float]], gold: Sequence[float]) -> dict[str, list[float]]:
    """Expected gold of the best of n by each proxy, for each n; ``single`` is the mean over members."""
    found = {name: [best_of_n(proxy, gold, n) for n in SIZES] for name, proxy in proxies.items()}
    members = [found.pop(f"m{i}") for i in range(MEMBERS)]
    return {"single": [fmean(values) for values in zip(*members, strict=True)]} | found


def main(seeds: int, prompts: int, samples: int, runs: str, out: Path) -> None:
    """Writes the table."""
    rows: list[dict[str, Any]] = []
    for flipped in (0.0, 0.25):
        for seed in range(seeds):
            recipe, run = warm_up(flipped, seed, runs)
            found = [best(*scores(group, run)) for group in sampled(recipe, run, prompts, samples)]
            means = {name: [fmean(v) for v in zip(*(f[name] for f in found), strict=True)] for name in found[0]}
            rows.append({"flipped": flipped, "seed": seed} | means)
            sys.stdout.write(f"{json.dumps(rows[-1])}\n")
    about = {"n": SIZES, "kl": [round(best_of_n_kl(n), 4) for n in SIZES], "prompts": prompts, "samples": samples}
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    out.write_text(f'{{\n "about": {json.dumps(about)},\n "rows": [\n  {lines}\n ]\n}}\n', encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--runs", default="runs/studies/ensembles/best_of_n")
    parser.add_argument("--out", type=Path, default=HERE / "best_of_n.json")
    main(**vars(parser.parse_args()))
