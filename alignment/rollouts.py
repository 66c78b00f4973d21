"""Plays episodes: prompts go through an environment and a sampler, and come back as groups of rollouts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from alignment.environments import Environment
from alignment.errors import UserError
from alignment.models import Tokenizer, decode, encode_prompt
from alignment.types import (
    Completion,
    FinishReason,
    Group,
    Prompt,
    Request,
    Rollout,
    Sampler,
    SamplingParams,
    Score,
    keyed_seed,
)


@dataclass(frozen=True)
class Player:
    """What it takes to play an episode. ``check`` is called between completions and may raise to stop early."""

    sampler: Sampler
    tokenizer: Tokenizer
    environment: Environment
    max_prompt_tokens: int
    check: Callable[[], None] = lambda: None


@dataclass
class _Episode:
    """A rollout in the making."""

    id: str
    uid: int
    prompt: Prompt
    prompt_ids: tuple[int, ...]
    state: Any
    seed: int
    params: SamplingParams
    token_ids: list[int] = field(default_factory=list)
    loss_mask: list[bool] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    versions: list[tuple[int, int]] = field(default_factory=list)
    turns: list[tuple[str, int, int]] = field(default_factory=list)
    scores: dict[str, Score] = field(default_factory=dict)
    text: str = ""
    finish_reason: FinishReason = "stop"

    @property
    def room(self) -> int:
        """Tokens that may still be added."""
        return self.params.max_tokens - len(self.token_ids)

    def request(self) -> Request:
        """Asks for the next turn. Each turn has its own random numbers."""
        turn = sum(role == "assistant" for role, _, _ in self.turns)
        params = replace(self.params, max_tokens=self.room)
        return Request(self.id, (*self.prompt_ids, *self.token_ids), params, keyed_seed(self.seed, turn))

    def add(self, role: str, ids: Sequence[int], logp: Sequence[float]) -> None:
        """Appends one turn."""
        start = len(self.token_ids)
        self.token_ids.extend(ids)
        self.loss_mask.extend([role == "assistant"] * len(ids))
        self.logp.extend(logp)
        self.turns.append((role, start, len(self.token_ids)))


def play(
    player: Player, prompts: Sequence[Prompt], uids: Sequence[int], samples: int, params: SamplingParams, seed: int
) -> list[Group]:
    """Plays ``samples`` episodes of each prompt and returns one unscored group per prompt, in the order given.

    The random numbers of an episode depend on ``(seed, uid, sample)`` alone. Turns are sampled in waves: every
    episode that is not done asks for its next turn together with the others.

    Args:
        player: Sampler, tokenizer and environment.
        prompts: What to play.
        uids: One number per prompt, unique in the run.
        samples: Episodes per prompt.
        params: ``max_tokens`` bounds the whole completion, observations included.
        seed: The run's seed.

    Raises:
        UserError: A prompt has more than ``player.max_prompt_tokens`` tokens.
    """
    episodes = {
        episode.id: episode
        for prompt, uid in zip(prompts, uids, strict=True)
        for episode in _start(player, prompt, uid, samples, params, seed)
    }
    waiting = list(episodes.values())
    while waiting:
        unfinished: list[_Episode] = []
        for completion in player.sampler.submit([episode.request() for episode in waiting]):
            player.check()
            episode = episodes[completion.id]
            if not _advance(player, episode, completion):
                unfinished.append(episode)
        waiting = unfinished
    rollouts: dict[int, list[Rollout]] = {uid: [] for uid in uids}
    for episode in episodes.values():
        rollouts[episode.uid].append(_seal(episode, player.sampler.name))
    return [Group(uid, prompt, tuple(rollouts[uid])) for prompt, uid in zip(prompts, uids, strict=True)]


def open_episode(
    environment: Environment, tokenizer: Tokenizer, max_tokens: int, prompt: Prompt
) -> tuple[Any, tuple[int, ...]]:
    """The environment's first state and the tokens of its prompt.

    Raises:
        UserError: There are more than ``max_tokens``, or the model does not know a character.
    """
    state, shown = environment.reset(prompt.row)
    ids = encode_prompt(tokenizer, shown)
    if len(ids) > max_tokens:
        raise UserError(
            f"prompt {prompt.id} has {len(ids)} tokens, more than data.max_prompt_tokens ({max_tokens}); "
            f"raise that number or remove the row"
        )
    return state, ids


def _start(player: Player, prompt: Prompt, uid: int, samples: int, params: SamplingParams, seed: int) -> list[_Episode]:
    """The episodes of one prompt, which share its tokens."""
    state, ids = open_episode(player.environment, player.tokenizer, player.max_prompt_tokens, prompt)
    return [_Episode(f"{uid}.{i}", uid, prompt, ids, state, keyed_seed(seed, uid, i), params) for i in range(samples)]


def _advance(player: Player, episode: _Episode, completion: Completion) -> bool:
    """Takes one sampled turn into the episode and lets the environment answer; True when the episode is done."""
    offset = len(episode.token_ids)
    for version, start in completion.versions:
        if not episode.versions or episode.versions[-1][0] != version:
            episode.versions.append((version, offset + start))
    episode.add("assistant", completion.token_ids, completion.logp)
    episode.finish_reason = completion.finish_reason
    stop_ids = set(episode.params.stop_ids)
    episode.text = decode(player.tokenizer, [t for t in completion.token_ids if t not in stop_ids])
    step = player.environment.step(episode.state, episode.text)
    episode.state = step.state
    episode.scores.update(step.scores)  # a turn that was cut short is judged as it stands, not left unscored
    if step.done or completion.finish_reason != "stop":
        return True
    observation = encode_prompt(player.tokenizer, step.observation)
    if len(observation) >= episode.room:
        episode.finish_reason = "length"
        return True
    episode.add("observation", observation, [0.0] * len(observation))
    return False


def _seal(episode: _Episode, sampler: str) -> Rollout:
    return Rollout(
        id=episode.id,
        prompt_id=episode.prompt.id,
        prompt_ids=episode.prompt_ids,
        token_ids=tuple(episode.token_ids),
        loss_mask=tuple(episode.loss_mask),
        behaviour_logp=tuple(episode.logp),
        text=episode.text,
        finish_reason=episode.finish_reason,
        seed=episode.seed,
        sampler=sampler,
        sampling=episode.params,
        versions=tuple(episode.versions),
        turns=tuple(episode.turns),
        scores=episode.scores,
    )


def demonstration(prompt: Prompt, tokenizer: Tokenizer, eos_id: int, environment: Environment) -> Rollout:
    """The rollout that an expert wrote: the row's ``completion`` and an end-of-sequence token, trained on in full."""
    _, shown = environment.reset(prompt.row)
    token_ids = (*encode_prompt(tokenizer, str(prompt.row["completion"])), eos_id)
    return Rollout(
        id=f"demonstration/{prompt.id}",
        prompt_id=prompt.id,
        prompt_ids=encode_prompt(tokenizer, shown),
        token_ids=token_ids,
        loss_mask=(True,) * len(token_ids),
        behaviour_logp=(0.0,) * len(token_ids),
        text=str(prompt.row["completion"]),
        finish_reason="stop",
        seed=0,
        sampler="demonstration",
        sampling=SamplingParams(max_tokens=len(token_ids)),
        versions=(),
        source="demonstration",
        ratio_base="self",
        turns=(("assistant", 0, len(token_ids)),),
    )


def demonstrations_by_prompt(
    prompts: Sequence[Prompt], tokenizer: Tokenizer, eos_id: int, environment: Environment
) -> Mapping[str, list[Rollout]]:
    """Demonstrations by the :attr:`~alignment.types.Prompt.key` of the prompt that they answer."""
    found: dict[str, list[Rollout]] = {}
    for prompt in prompts:
        found.setdefault(prompt.key, []).append(demonstration(prompt, tokenizer, eos_id, environment))
    return found
