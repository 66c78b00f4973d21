"""Whether there is what a stage's options name: columns of rows, and weights of the model. Looked for before the first
stage, so that a mistake does not end a run after hours."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from alignment.errors import UserError
from alignment.recipe import OnlineStage, Recipe, RolloutStage
from alignment.recipe_tree import Problem
from alignment.types import Prompt

if TYPE_CHECKING:
    from torch import nn


def unfit_prompts(recipe: Recipe, prompts: Sequence[Prompt]) -> list[Problem]:
    """What curricula cannot do with the prompts to train on, each at its line."""
    problems: list[Problem] = []
    for index, stage in enumerate(recipe.stages):
        for curriculum in stage.curricula if isinstance(stage, RolloutStage) and stage.samples else ():
            try:
                getattr(curriculum, "fits", lambda prompts: None)(prompts)
            except UserError as error:
                problems += recipe.error(("stages", index, "curricula"), str(error)).problems
    return problems


def unknown_layers(recipe: Recipe, module: "nn.Module") -> list[Problem]:
    """Weightings that look at weights of which the model trains none.

    Nothing is said of adapters that ``module`` does not have, being the shapes of a model that other processes train.
    """
    trained = [name for name, p in module.named_parameters() if p.requires_grad]
    if recipe.model.lora is not None and not any("lora_" in name for name in trained):
        return []
    problems: list[Problem] = []
    for index, stage in enumerate(recipe.stages):
        layers = getattr(stage.credited.weighting, "layers", None) if isinstance(stage, OnlineStage) else None
        if isinstance(layers, str) and not any(re.search(layers, name) for name in trained):
            message = f"no trained weight has a name with {layers!r} in it; names are like {', '.join(trained[:3])}"
            problems += recipe.error(("stages", index, "algorithm", "weighting", "layers"), message).problems
    return problems
