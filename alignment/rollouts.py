"""Plays episodes: prompts go through an environment and a sampler, and come back as groups of rollouts.

Several users share one sampler: training may have groups in flight while an evaluation plays its own. Whoever waits
moves all episodes on, so nobody's turn waits for another's end.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from alignment.environments import Environment
from alignment.errors import UserError
from alignment.models import Tokenizer, decode, encode_prompt
from alignment.sampling import Sampler
from alignment.types import (
    Completion,
    FinishReason,
    Group,
    Prompt,
    Request,
    Rollout,
    SamplingParams,
    Score,
    keyed_seed,
)

WAIT_S = 0.2
"""Longest wait for a completion before whoever waits looks after other things."""


@dataclass(slots=True)
class _Episode:
    """A rollout in the making. Its sequences are tuples, so that what a single turn brought is taken over as it is."""

    id: str
    prompt: Prompt
    prompt_ids: tuple[int, ...]
    state: Any
    seed: int
    params: SamplingParams
    token_ids: tuple[int, ...] = ()
    loss_mask: tuple[bool, ...] = ()
    logp: tuple[float, ...] = ()
    versions: tuple[tuple[int, int], ...] = ()
    turns: tuple[tuple[str, int, int], ...] = ()
    scores: dict[str, Score] = field(default_factory=dict)
    text: str = ""
    finish_reason: FinishReason = "stop"

    @property
    def room(self) -> int:
        """Tokens that may still be added."""
        return self.params.max_tokens - len(self.token_ids)

    def request(self) -> Request:
        """Asks for the next turn. Each turn has its own random numbers."""
        turn = sum([role == "assistant" for role, _, _ in self.turns])
        params = replace(self.params, max_tokens=self.room) if self.token_ids else self.params
        return Request(self.id, self.prompt_ids + self.token_ids, params, keyed_seed(self.seed, turn))

    def add(self, role: str, ids: Sequence[int], logp: Sequence[float]) -> None:
        """Appends one turn."""
        start = len(self.token_ids)
        self.token_ids += tuple(ids)
        self.loss_mask += (role == "assistant",) * len(ids)
        self.logp += tuple(logp)
        self.turns += ((role, start, start + len(ids)),)


@dataclass(frozen=True)
class Player:
    """Plays episodes of one environment. ``check`` is called at each look and may raise to stop early."""

    sampler: Sampler
    tokenizer: Tokenizer
    environment: Environment
    max_prompt_tokens: int
    check: Callable[[], None] = lambda: None
    cue: tuple[int, ...] = ()
    """Tokens behind every prompt: the control token of aligned completions."""
    playing: dict[str, tuple[_Episode, "Playing", "Player"]] = field(default_factory=dict)
    """Every episode that waits for a completion, by the id of its request; shared by all players of the sampler."""
    finished: list["Playing"] = field(default_factory=list)
    """This player's groups that have come to their end since somebody took them out of this list."""

    def start(
        self, prompts: Sequence[Prompt], uids: Sequence[int], params: Sequence[SamplingParams], seed: int, by: str
    ) -> list["Playing"]:
        """Asks for the first turns of as many episodes of each prompt as there are ``params``; waits for none.

        The random numbers of an episode depend on ``(seed, uid, sample)`` alone.

        Args:
            prompts: What to play.
            uids: One number per prompt, unique among those of the same ``by`` that are in flight.
            params: Of each episode; ``max_tokens`` bounds the whole completion, observations included.
            seed: The run's seed.
            by: Who asks: it begins the ids of the requests, ``eval/7.0``; training says nothing, ``7.0``.

        Raises:
            UserError: A prompt has more than ``max_prompt_tokens`` tokens, or cannot be sampled.
        """
        groups = [
            Playing(uid, prompt, _start(self, prompt, f"{by}{uid}", uid, params, seed), len(params))
            for prompt, uid in zip(prompts, uids, strict=True)
        ]
        self.sampler.add([episode.request() for group in groups for episode in group.episodes])
        self.playing.update({episode.id: (episode, group, self) for group in groups for episode in group.episodes})
        return groups

    def tokens_of(self, prompt: Prompt) -> tuple[int, ...]:
        """What the model is shown of a prompt.

        Raises:
            UserError: It has more than ``max_prompt_tokens`` tokens.
        """
        return open_episode(self.environment, self.tokenizer, self.max_prompt_tokens, prompt)[1] + self.cue

    def pump(self, timeout_s: float | None = None) -> None:
        """Takes in what the sampler has finished, as :meth:`Sampler.poll` says, and asks for the turns that follow."""
        completions = self.sampler.poll(timeout_s)
        following: list[Request] = []
        for completion in completions:
            episode, group, player = self.playing[completion.id]
            if not _advance(player, episode, completion):
                following.append(episode.request())
                continue
            del self.playing[completion.id]
            group.left -= 1
            if group.done:
                player.finished.append(group)
        if following:
            self.sampler.add(following)
        self.check()

    def abandon(self, groups: Sequence["Playing"]) -> None:
        """Forgets what is still in flight of these groups."""
        ids = {episode.id for group in groups for episode in group.episodes} & self.playing.keys()
        for id_ in ids:
            del self.playing[id_]
        self.sampler.abort(ids)


@dataclass(slots=True)
class Playing:
    """A group whose episodes are being played."""

    uid: int
    prompt: Prompt
    episodes: list[_Episode]
    left: int
    """Episodes that have not come to their end."""

    @property
    def done(self) -> bool:
        """Whether every episode has come to its end."""
        return self.left == 0

    def seal(self, sampler: str) -> Group:
        """The unscored group, once it is done."""
        return Group(self.uid, self.prompt, tuple(_seal(episode, sampler) for episode in self.episodes))


def play(
    player: Player,
    prompts: Sequence[Prompt],
    uids: Sequence[int],
    samples: int,
    params: SamplingParams,
    seed: int,
    by: str = "",
) -> list[Group]:
    """Plays ``samples`` episodes of each prompt and returns one unscored group per prompt, in the order given.

    Errors are those of :meth:`Player.start`, arguments too, with ``params`` for each of the ``samples``. What others
    have in flight goes on meanwhile.
    """
    groups = player.start(prompts, uids, [params] * samples, seed, by)
    waited_for = deque(groups)
    try:
        while waited_for:
            if waited_for[0].done:
                waited_for.popleft()
            else:
                player.pump(WAIT_S)
    except BaseException:
        player.abandon(groups)
        raise
    player.finished.clear()
    return [group.seal(player.sampler.name) for group in groups]


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


def _start(
    player: Player, prompt: Prompt, name: str, uid: int, params: Sequence[SamplingParams], seed: int
) -> list[_Episode]:
    """The episodes of one prompt, which share its tokens."""
    state, ids = open_episode(player.environment, player.tokenizer, player.max_prompt_tokens, prompt)
    ids += player.cue
    return [_Episode(f"{name}.{i}", prompt, ids, state, keyed_seed(seed, uid, i), p) for i, p in enumerate(params)]


def _advance(player: Player, episode: _Episode, completion: Completion) -> bool:
    """Takes one sampled turn into the episode and lets the environment answer; True when the episode is done."""
    ids, stop_ids = completion.token_ids, episode.params.stop_ids
    episode.versions = _joined(episode.versions, completion.versions, len(episode.token_ids))
    episode.add("assistant", ids, completion.logp)
    episode.finish_reason = completion.finish_reason
    stopped = bool(ids) and ids[-1] in stop_ids
    episode.text = decode(player.tokenizer, ids[:-1] if stopped else ids)
    step = player.environment.step(episode.state, episode.text)
    episode.state = step.state
    if step.scores:
        episode.scores.update(step.scores)  # a turn that was cut short is judged as it stands, not left unscored
    if step.done or completion.finish_reason != "stop":
        return True
    observation = encode_prompt(player.tokenizer, step.observation)
    if len(observation) >= episode.room:
        episode.finish_reason = "length"
        return True
    episode.add("observation", observation, [0.0] * len(observation))
    return False


def _joined(
    earlier: tuple[tuple[int, int], ...], more: tuple[tuple[int, int], ...], offset: int
) -> tuple[tuple[int, int], ...]:
    """Runs of policy versions with those of one more turn, which begins at token ``offset``."""
    if not earlier:
        return more
    shifted = tuple((version, offset + start) for version, start in more)
    return earlier + (shifted[1:] if shifted and shifted[0][0] == earlier[-1][0] else shifted)


def _seal(episode: _Episode, sampler: str) -> Rollout:
    return Rollout(
        id=episode.id,
        prompt_id=episode.prompt.id,
        prompt_ids=episode.prompt_ids,
        token_ids=episode.token_ids,
        loss_mask=episode.loss_mask,
        behaviour_logp=episode.logp,
        text=episode.text,
        finish_reason=episode.finish_reason,
        seed=episode.seed,
        sampler=sampler,
        sampling=episode.params,
        versions=episode.versions,
        source="steered" if any(episode.params.tilt) else "policy",
        turns=episode.turns,
        scores=episode.scores,
    )
