"""Rewards by a reward model that was trained before, in a process that scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from alignment.errors import UserError
from alignment.registry import option
from alignment.reward_registry import reward_functions, texts
from alignment.score import Score


@reward_functions.register(
    "reward_model",
    source="Training language models to follow instructions with human feedback (arXiv 2203.02155)",
    evidence="end to end",
)
@dataclass(frozen=True)
class RewardModel:
    """What a reward model gives the completion, read after its last token.

    The prompt and the completion are read with the model's own tokenizer and chat template, so the policy may have
    another vocabulary. An ensemble is one such reward for each member, and the weighting ``ensemble`` combines them.

    With ``stage`` alone it is a model that an earlier stage of the same run trains: until that stage is done it does
    not apply, and rollouts count without it.
    """

    path: Annotated[
        str | None,
        option("folder of a reward model, or with stage of the run that has it; a relative one starts at the recipe's"),
    ] = None
    stage: Annotated[str | None, option("name of the stage that trains it; of this run without path")] = None
    member: Annotated[int, option("which of that stage's members", ge=0)] = 0
    device: Annotated[Literal["cpu", "cuda"], option("where it computes, in each process that scores")] = "cpu"
    dtype: Annotated[Literal["float32", "bfloat16"], option("of the model; its head is float32")] = "float32"
    batch_tokens: Annotated[int, option("of a pass, padding included", unit="tokens", ge=1)] = 16384

    def __post_init__(self) -> None:
        if self.path is None and self.stage is None:
            raise UserError("needs 'path', the folder of a reward model, or 'stage', one of this run that trains it")

    @property
    def folder(self) -> Path:
        """Where the model is."""
        place = Path(str(self.path))
        return place if self.stage is None else place / "reward_models" / self.stage / f"member_{self.member}"

    def located(self, beside: Path, run: Path) -> Self:
        """The same with its folder in full. ``beside`` is the recipe's folder, ``run`` the run's."""
        from alignment.recipe_sections import beside_or_here

        if self.path is None:
            return replace(self, path=str(run.resolve()))
        return replace(self, path=str(beside_or_here(self.path, beside) or self.path))

    def missing(self, beside: Path, members: Mapping[str, int]) -> str | None:
        """Why there will be no model. ``members`` says how many each stage of this run trains that is followed by one
        that samples."""
        if self.path is None and self.stage is not None:
            there = ", ".join(members) or "none"
            if self.stage not in members:
                return (
                    f"stage: no stage 'reward_model' before one that samples is called '{self.stage}' (there: {there})"
                )
            if self.member >= members[self.stage]:
                return f"member: stage '{self.stage}' has {members[self.stage]}, numbered from 0"
            return None
        folder = self.located(beside, beside).folder
        if (folder / "value_model.json").is_file():
            return None
        return f"path: {folder} holds no reward model; a stage 'reward_model' writes some, in its run's reward_models"

    def on_gpu(self) -> tuple[Path, str] | None:
        """The model that each scoring process keeps on a GPU, if there it computes, and its type: for the plan."""
        return None if self.device == "cpu" else (self.folder, self.dtype)

    def prepare(self) -> None:
        """Loads the model, if it is there, before anything is timed."""
        if self.folder.is_dir():
            _load(str(self.folder), self.device, self.dtype)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[Score | None]:
        """One reward per completion; None while its stage is not done."""
        if self.stage is not None and not self.folder.is_dir():
            return [None] * len(prompts)
        scorer = _load(str(self.folder), self.device, self.dtype)
        ended = [reason == "stop" for reason in columns.get("finish_reason", ["stop"] * len(prompts))]
        values = scorer(list(prompts), texts(completions), ended, self.batch_tokens)
        return [Score(value) for value in values]


@lru_cache(maxsize=8)
def _load(path: str, device: str, dtype: str) -> Any:
    """The model in ``path``, ready to score."""
    import torch

    from alignment.reward_scoring import RewardScorer

    return RewardScorer(Path(path), device, getattr(torch, dtype))
