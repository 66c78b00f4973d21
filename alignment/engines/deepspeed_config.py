"""What a recipe says of the DeepSpeed learner. Light: DeepSpeed is imported where its ranks live."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from alignment.engines.config import Site
from alignment.engines.learner_config import LearnerOptions, learners
from alignment.errors import UserError
from alignment.registry import option

if TYPE_CHECKING:
    from alignment.engines.deepspeed_learner import DeepSpeedLearner


@learners.register("deepspeed", source="this project, over DeepSpeed's ZeRO (arXiv 1910.02054)", evidence="end to end")
@dataclass(frozen=True)
class DeepSpeedLearnerConfig(LearnerOptions):
    """Several processes, each with a part of the rows and of the optimizer's memory: DeepSpeed, AdamW.

    The result is that of the torch learner, whatever the number of ranks and the stage: losses are divided by counts
    of the whole mini-batch before rows are shared out. On a GPU each rank has one.
    """

    needs_module: ClassVar[bool] = False
    needs_cluster: ClassVar[str] = "its ranks are processes of their own"

    ranks: Annotated[int, option("processes that share a batch", ge=1)] = 1
    zero_stage: Annotated[
        Literal[0, 1, 2, 3],
        option("what is kept in parts: 0 nothing, 1 the optimizer's moments, 2 also gradients, 3 also weights"),
    ] = 2
    dtype: Annotated[
        Literal["float32", "bfloat16"],
        option("of weights and arithmetic, whatever model.dtype says; bfloat16 has float32 master weights"),
    ] = "float32"
    offload: Annotated[
        Literal["none", "optimizer", "parameters"],
        option("what waits in the host's memory: the optimizer (stages 1-3), or weights as well (stage 3)"),
    ] = "none"
    timeout_s: Annotated[
        float, option("longest wait for the ranks to finish one call, or for each other", unit="s", gt=0)
    ] = 1800.0

    def __post_init__(self) -> None:
        if self.dtype == "bfloat16" and self.zero_stage == 0:
            raise UserError(
                "zero_stage 0 has no float32 master weights to go with bfloat16; take 1 (the same on one rank, and less"
                " memory on several), or dtype float32"
            )
        if self.offload == "optimizer" and self.zero_stage == 0:
            raise UserError("offload 'optimizer' needs zero_stage 1, 2 or 3")
        if self.offload == "parameters" and self.zero_stage != 3:
            raise UserError("offload 'parameters' needs zero_stage 3, which keeps weights in parts")

    def build(
        self,
        site: Site,
        total_updates: int,
        seed: int,
        reference: bool = False,
        roles: Mapping[str, Any] | None = None,
    ) -> "DeepSpeedLearner":
        """The learner of ``site.model`` for ``total_updates`` updates, in processes that ``site.cluster`` places.

        Raises:
            UserError: There is no cluster to place them in.
        """
        from alignment.engines.deepspeed_learner import DeepSpeedLearner

        return DeepSpeedLearner(site, self, total_updates, seed, reference, roles)
