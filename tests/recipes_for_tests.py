"""A valid recipe and helpers that change it and read what is wrong with it."""

from pathlib import Path

from alignment.recipe import load
from alignment.recipe_tree import RecipeError

BASE = """\
run: {name: base, seed: 0}
model:
  build: {alphabet: "0123456789+=", hidden_size: 32, layers: 2, heads: 2, kv_heads: 2, max_positions: 64}
data:
  train: {name: procedural, task: {name: arithmetic, sizes: [9]}, split: train}
  demonstrations: {name: procedural, task: {name: arithmetic, sizes: [9]}, split: demonstrations}
  eval: {name: procedural, task: {name: arithmetic, sizes: [9]}, split: eval}
  max_prompt_tokens: 8
rewards:
  - {name: exact_match, weight: 1.0}
stages:
  - {stage: sft, name: warmup, steps: 3, batch_size: 8}
  - stage: online
    name: rl
    steps: 4
    prompts_per_step: 8
    group_size: 4
    sampling: {max_tokens: 4}
    curricula: [uniform, difficulty_filter]
    algorithm:
      advantage: grpo
      policy_loss:
        name: clip
        clip_high: 0.28
    learner: {name: torch, lr: 1e-3}
"""


def write(folder: Path, text: str = BASE, name: str = "base.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def problems(*paths: Path, overrides: tuple[str, ...] = ()) -> list[str]:
    """What is wrong with a recipe, one text for each mistake, files by their bare names; nothing if it is fine."""
    try:
        load(list(paths), list(overrides))
    except RecipeError as error:
        return [str(problem).replace(f"{paths[0].parent}/", "") for problem in error.problems]
    return []


def only(*paths: Path, overrides: tuple[str, ...] = ()) -> str:
    """The one thing that is wrong."""
    found = problems(*paths, overrides=overrides)
    assert len(found) == 1, found
    return found[0]
