"""What a sampler must know of a decoding before it loads the models that steer: checked at once, fit to travel."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from alignment.algorithms.decodings import Decoding, Emulated, Plain, ValueAugmented
from alignment.engines.config import Site
from alignment.engines.value_model import load_value_model, locate_value_model, read_shape
from alignment.errors import UserError
from alignment.models import Model, Tokenizer, load_model
from alignment.types import Request

if TYPE_CHECKING:
    from alignment.engines.guide import Steering


@dataclass(frozen=True)
class SteeringPlan:
    """What a sampler needs to know before models are loaded; small, and as JSON fit to travel to another process."""

    name: str
    """Of the decoding."""
    folders: tuple[str, ...]
    models: int
    """Numbers of a request's ``tilt``."""
    longest: int | None
    """Tokens of a row that all models can take."""
    dtype: str
    top_k: int = 0
    centre: bool = True
    top_p: float = 1.0

    @classmethod
    def of(cls, site: Site) -> "Self | None":
        """For the decoding of ``site``; None where nothing is steered.

        Raises:
            UserError: A model is missing or of another kind, or has another vocabulary than the policy.
        """
        decoding = site.decoding
        if decoding is None or isinstance(decoding, Plain):
            return None
        if not isinstance(decoding, ValueAugmented | Emulated):
            raise UserError(
                f"decoding {type(decoding).__name__} does not steer logits; alignment.engines.reranking.build_sampler"
                " builds samplers that choose among samples"
            )
        folders = locate_models(decoding)
        for folder in folders:
            check_vocabulary(site.model, folder)
        longest = min((n for n in map(positions_of, folders) if n is not None), default=None)
        about: dict[str, Any] = {"longest": longest, "dtype": decoding.dtype, "models": len(decoding.tilt)}
        paths = tuple(map(str, folders))
        if isinstance(decoding, Emulated):
            return cls("emulated", paths, top_p=decoding.top_p, **about)
        for folder in folders:
            _check_shape(folder, decoding.top_k)
        return cls("value_augmented", paths, top_k=decoding.top_k, centre=decoding.centre, **about)

    def load(self, device: torch.device | str) -> "Callable[[], Steering]":
        """Loads the models; what comes back makes a steering over them, with caches of its own."""
        from alignment.engines.guide import Emulator, Guide
        from alignment.recipe_sections import ModelConfig

        dtype = getattr(torch, self.dtype)
        if self.name == "emulated":
            named = [ModelConfig.model_validate({"path": f, "dtype": self.dtype}) for f in self.folders]
            policies = [load_model(config, 0).module.to(device).eval() for config in named]
            return lambda: Emulator(policies, self.top_p)
        models = [load_value_model(Path(f), dtype).to(device=device, dtype=dtype) for f in self.folders]
        return lambda: Guide(models, self.top_k, self.centre)

    def check(self, request: Request) -> None:
        """Refuses a request that cannot be steered so.

        Raises:
            UserError: It is too long for a model beside the policy.
        """
        length = len(request.prompt_ids) + request.params.max_tokens
        if any(request.params.tilt) and self.longest is not None and length > self.longest:
            raise UserError(
                f"request {request.id!r}: {length} tokens, prompt and completion, exceed the {self.longest} positions"
                f" of a model that the decoding {self.name} asks"
            )

    def to_json(self) -> dict[str, Any]:
        """JSON values; :meth:`from_json` is the inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """What :meth:`to_json` described."""
        return cls(**{**data, "folders": tuple(data["folders"])})


def check_vocabulary(model: Model, folder: Path) -> None:
    """Refuses a model in ``folder`` whose tokenizer has other tokens, or other numbers for them, than the policy's.

    Raises:
        UserError: They differ; the message names both.
    """
    from transformers import AutoTokenizer

    try:
        other: Tokenizer = AutoTokenizer.from_pretrained(folder)  # pyright: ignore[reportAssignmentType]
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: its tokenizer cannot be read: {error}") from error
    compare_vocabularies(model, other, str(folder))


def compare_vocabularies(model: Model, other: Tokenizer, name: str) -> None:
    """Refuses a tokenizer, that of the model ``name``, with other tokens or numbers for them than the policy's.

    Raises:
        UserError: They differ; the message names both.
    """
    own, there = model.tokenizer.get_vocab(), other.get_vocab()
    if own == there:
        return
    token = min(t for t in own.keys() | there.keys() if own.get(t) != there.get(t))
    raise UserError(
        f"{name} and the policy {model.name} have different vocabularies: {len(there)} and {len(own)} tokens, and"
        f" {token!r} is number {there.get(token)} and {own.get(token)}; use a model with the policy's tokenizer"
    )


def locate_models(decoding: Decoding) -> list[Path]:
    """The folders of a decoding's models, in the order of its addresses.

    Raises:
        UserError: One of them is missing, or is none of the kind.
    """
    if not isinstance(decoding, Emulated):
        return [locate_value_model(address) for address in decoding.addresses]
    folders = [Path(address).expanduser() for address in decoding.addresses]
    for folder in folders:
        if not (folder / "config.json").is_file():
            raise UserError(f"decoding: {folder} is no model folder: it has no config.json")
    return [folder.resolve() for folder in folders]


def _check_shape(folder: Path, top_k: int) -> None:
    shape = read_shape(folder)
    if shape.streams:
        raise UserError(
            f"{folder} has {shape.streams} values per state, one for each reward; decoding needs models of one value"
        )
    if not top_k and shape.kind == "state":
        raise UserError(f"decoding.top_k is 0, all tokens, which needs a vocabulary-wide head; {folder} has none")


def positions_of(folder: Path) -> int | None:
    """Tokens of the longest row that a saved model can take; None where it does not say.

    Raises:
        UserError: The folder has no configuration that can be read.
    """
    from transformers import AutoConfig

    try:
        config: Any = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: its configuration cannot be read: {error}") from error
    return getattr(config.get_text_config(), "max_position_embeddings", None)
