"""Folders of models that a recipe names. Looked for when it is checked and before it trains, not when it is read: a
finished run can be exported where they are no longer there."""

from alignment.data.hub import names_folder
from alignment.errors import UserError
from alignment.recipe import Recipe, RewardModelStage, RolloutStage
from alignment.recipe_sections import folder_beside
from alignment.recipe_tree import Place, Problem


def missing_folders(recipe: Recipe, first_stage: int = 0) -> list[Problem]:
    """Those of the model and of stages from ``first_stage`` on that are not there, each at its line."""
    path = recipe.model.path
    wanted: list[tuple[Place, str]] = [(("model", "path"), path)] if path and names_folder(path) else []
    for index, stage in enumerate(recipe.stages[first_stage:], first_stage):
        if isinstance(stage, RolloutStage | RewardModelStage):
            wanted += [(("stages", index, *place), folder) for place, folder in stage.folders()]
    problems: list[Problem] = []
    for place, folder in wanted:
        try:
            folder_beside(folder, recipe.folder)
        except UserError as error:
            problems += recipe.error(place, str(error)).problems
    last = max((i for i, stage in enumerate(recipe.stages) if stage.samples), default=-1)
    members = {s.name: s.members for s in recipe.stages[: last + 1] if isinstance(s, RewardModelStage)}
    for index, spec in enumerate(recipe.reward_specs):
        ask = getattr(spec.function, "missing", None)
        if ask is not None and (why := ask(recipe.folder, members)):
            problems += recipe.error(("rewards", index), why).problems
    return problems
