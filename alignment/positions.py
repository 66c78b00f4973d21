"""Whether prompts and completions fit the longest sequence of a model: found before the first step, not in it."""

from collections.abc import Mapping
from typing import Any

from alignment.recipe import Recipe, RolloutStage
from alignment.recipe_tree import Place, Problem


def demands(recipe: Recipe) -> dict[str, list[tuple[Place, int]]]:
    """Where the recipe says how long completions may be, and how long, by the section of ``data`` they answer."""
    online = [
        (("stages", index, "sampling", "max_tokens"), stage.sampling.max_tokens)
        for index, stage in enumerate(recipe.stages)
        if isinstance(stage, RolloutStage) and stage.samples
    ]
    evaluation: Place = ("evaluation", "sampling", "max_tokens")
    return {"train": [*online], "eval": [(evaluation, recipe.evaluation.sampling.max_tokens)]}


def max_positions(module: Any) -> int | None:
    """The longest sequence of a model, in tokens; None where it does not say."""
    return getattr(module.config.get_text_config(), "max_position_embeddings", None)


def too_long(recipe: Recipe, positions: int | None, longest: Mapping[str, int]) -> list[Problem]:
    """What does not fit.

    Args:
        recipe: Says how long completions may be.
        positions: The longest sequence of the model; None: any.
        longest: Tokens of the longest prompt, by section of ``data``.

    Returns:
        A problem for each ``max_tokens`` that is too large.
    """
    if positions is None:
        return []
    return [
        problem
        for section, needs in demands(recipe).items()
        for place, room in needs
        if section in longest and longest[section] + room > positions
        for problem in recipe.error(place, _message(section, longest[section], room, positions)).problems
    ]


def _message(section: str, prompt: int, room: int, positions: int) -> str:
    remedies = []
    if prompt < positions:
        remedies.append(f"at most {positions - prompt} would fit")
    if room < positions:
        remedies.append(f"data.max_prompt_tokens: {positions - room} would leave longer prompts out")
    return (
        f"{room} and the longest prompt of data.{section} ({prompt} tokens) together exceed the model's {positions} "
        f"positions; {', or '.join(remedies) or f'take less than {positions}'}"
    )
