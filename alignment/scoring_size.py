"""What reward models take of a GPU where rewards are scored: an estimate for the plan, made without the models."""

from pathlib import Path

from alignment.architectures import Shape
from alignment.model_size import CONTEXT
from alignment.recipe import Recipe, RewardModelStage
from alignment.recipe_sections import ModelConfig


def scoring_bytes(recipe: Recipe, stage: int, policy: Shape) -> int:
    """What all scoring processes keep on their GPU while the stage of this number runs, in bytes: each a context and
    its own copy of every model that ``on_gpu`` of a reward names and that is there by then.

    A model whose ``config.json`` is not at hand counts as large as the policy.
    """
    folder = recipe.run.folder.resolve()
    made = {
        folder / "reward_models" / s.name: (i, s.model)
        for i, s in enumerate(recipe.stages) if isinstance(s, RewardModelStage)
    }  # fmt: skip
    models: dict[tuple[Path, str], int] = {}
    for spec in recipe.reward_specs:
        ask = getattr(spec.located(recipe.folder, recipe.run.folder).function, "on_gpu", None)
        if ask is None or (named := ask()) is None:
            continue
        place, dtype = named
        number, own = made.get(place.parent, (-1, ModelConfig(path=str(place))))
        if number < stage:
            shape = (Shape.of(own) if own else None) or policy
            models[named] = shape.parameters * (2 if dtype == "bfloat16" else 4)
    return recipe.scoring.workers * (CONTEXT + sum(models.values())) if models else 0
