"""What a recipe says of control tokens that cannot work."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from alignment.recipe_tree import Conflict, Place

if TYPE_CHECKING:
    from alignment.recipe import Recipe


def control_conflicts(recipe: "Recipe") -> Iterator[Conflict]:
    """Conditional training without tokens, tokens that are one, and samplers that would not leave them out."""
    control, here = recipe.model.control, ("model", "control")
    if control is not None and control.aligned == control.misaligned:
        yield Conflict((*here, "misaligned"), f"is {control.aligned!r} like 'aligned'; the two must differ", (here,))
    for index, stage in enumerate(recipe.stages):
        place: Place = ("stages", index)
        sampling = getattr(stage, "sampling", None) if stage.samples else None
        if control is None:
            if getattr(stage, "conditional", None) is not None:
                message = "needs control tokens, which every process has to know: add model.control: {}"
                yield Conflict((*place, "conditional"), message, (here,))
            continue
        if (sampling is not None or recipe.data.eval is not None) and not getattr(stage.sampler, "bans", False):
            message = "cannot leave out model.control's tokens when it samples: use 'transformers' or 'vllm'"
            yield Conflict((*place, "sampler"), message, (here, ("data", "eval")))
        if sampling is not None and not sampling.allow_truncated_sampling:
            message = (
                "model.control's tokens are never sampled, and the trained policy has them, which biases its gradient "
                "a little: set allow_truncated_sampling: true to do it anyway"
            )
            yield Conflict((*place, "sampling"), message, (here,))
