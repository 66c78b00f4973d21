"""What all arms of a seed share: the frozen policy, the gold reward, prompts, labelled completions.

Suffixes beside the legend of :mod:`alignment.types`: N completions, L tokens of a completion, D hidden features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from alignment.algorithms.objective import Objective
from alignment.batching import collate
from alignment.engines.config import TransformersSamplerConfig
from alignment.engines.learner_config import TorchLearnerConfig
from alignment.engines.torch_learner import TorchLearner
from alignment.engines.transformers_sampler import TransformersSampler
from alignment.models import Model, load_model
from alignment.score import Score
from alignment.types import Batch, Completion, Group, Prompt, Request, Rollout, SamplingParams, keyed_seed
from studies.values.settings import VOCABULARY, Settings, built

SAMPLER = TransformersSamplerConfig(batch_rows=2048)


@dataclass(frozen=True)
class Gold:
    """A dense reward: each token is worth something, and so is each pair of neighbours, the prompt's end included.

    ``R = (sum_t (u[y_t] + a[y_{t-1}] . b[y_t]) - mean) / sd`` with random u, a, b; mean and sd are those under the
    frozen policy.
    """

    token_V: Tensor
    left_VD: Tensor
    right_VD: Tensor
    mean: float = 0.0
    sd: float = 1.0

    def __call__(self, before_N: Tensor, ids_NL: Tensor) -> Tensor:
        """``[N]`` float32 rewards of completions whose prompts end in ``before_N``."""
        previous_NL = torch.cat([before_N[:, None], ids_NL[:, :-1]], 1)
        pairs_NL = (self.left_VD[previous_NL] * self.right_VD[ids_NL]).sum(-1)
        return ((self.token_V[ids_NL] + pairs_NL).sum(1) - self.mean) / self.sd


@dataclass(frozen=True)
class World:
    """The shared start of a seed."""

    seed: int
    settings: Settings
    policy: Model
    """Frozen: arms that train one take a copy."""
    gold: Gold
    chain_VV: Tensor
    """Probabilities of the next token of text."""
    labelled: Batch
    """Completions of the frozen policy with their gold reward: what values are learnt from."""

    def prompts(self, count: int, purpose: str) -> list[tuple[int, ...]]:
        """Different ones for different purposes."""
        g = torch.Generator().manual_seed(keyed_seed(self.seed, "prompts", purpose))
        return [tuple(row) for row in _text(self.chain_VV, count, self.settings.prompt_tokens, g).tolist()]

    def sample(
        self, module: nn.Module, prompts: Sequence[tuple[int, ...]], each: int, purpose: str
    ) -> tuple[Tensor, Tensor]:
        """``[len(prompts), each, L]`` completions by ``module`` and their gold rewards."""
        done = drawn(TransformersSampler(module, SAMPLER), self.requests(prompts, each, purpose))
        return self.scored(prompts, done)

    def requests(
        self, prompts: Sequence[tuple[int, ...]], each: int, purpose: str, tilt: tuple[float, ...] = ()
    ) -> list[Request]:
        """``each`` requests of each prompt, for completions that end where the study's do."""
        whole = self.settings.prompt_tokens + self.settings.completion_tokens
        return [
            Request(
                f"{i}:{j}",
                prompt,
                SamplingParams(whole - len(prompt), tilt=tilt),
                keyed_seed(self.seed, purpose, i, j),
            )
            for i, prompt in enumerate(prompts)
            for j in range(each)
        ]

    def scored(self, prompts: Sequence[tuple[int, ...]], done: Sequence[Completion]) -> tuple[Tensor, Tensor]:
        """Completions in the order of their requests as tensors, and their rewards."""
        ids_PNL = torch.tensor([c.token_ids for c in done]).unflatten(0, (len(prompts), -1))
        before_PN = torch.tensor([prompt[-1] for prompt in prompts])[:, None].expand(ids_PNL.shape[:2])
        return ids_PNL, self.gold(before_PN.flatten(), ids_PNL.flatten(0, 1)).view(ids_PNL.shape[:2])

    def batch(self, module: nn.Module, prompts: Sequence[tuple[int, ...]], each: int, purpose: str) -> Batch:
        """Labelled completions as a learner takes them."""
        requests = self.requests(prompts, each, purpose)
        done = drawn(TransformersSampler(module, SAMPLER), requests)
        _, reward_PN = self.scored(prompts, done)
        rewards = reward_PN.flatten().tolist()
        rollouts = [_rollout(r, c, reward) for r, c, reward in zip(requests, done, rewards, strict=True)]
        groups = [Group(i, Prompt(str(i), {}), tuple(rollouts[i * each : (i + 1) * each])) for i in range(len(prompts))]
        return collate(groups, 0, ["gold"], [1.0], seed=self.seed)


def make_world(seed: int, settings: Settings) -> World:
    """Trains the frozen policy, draws the gold reward, labels completions."""
    g = torch.Generator().manual_seed(keyed_seed(seed, "world"))
    chain_VV = (1.2 * torch.randn(VOCABULARY, 8, generator=g) @ torch.randn(8, VOCABULARY, generator=g)).softmax(-1)
    policy = load_model(built(settings.policy_size), keyed_seed(seed, "policy"))
    _train_on_text(policy.module, chain_VV, seed, settings, g)
    token_V = torch.randn(VOCABULARY, generator=g)
    left_VD, right_VD = (torch.randn(VOCABULARY, 4, generator=g) * 4**-0.25 for _ in range(2))
    raw = Gold(token_V, left_VD * settings.gold_pairs, right_VD)
    world = World(seed, settings, policy, raw, chain_VV, labelled=_EMPTY)
    _, reward = world.sample(policy.module, world.prompts(min(1024, settings.labels // 4), "scale"), 4, "scale")
    world = replace(world, gold=replace(raw, mean=float(reward.mean()), sd=float(reward.std())))
    labelled = world.batch(policy.module, world.prompts(settings.labels // 4, "labels"), 4, "labels")
    return replace(world, labelled=labelled)


def learner_of(
    module: nn.Module, lr: float, updates: int, seed: int, roles: Mapping[str, Any] | None = None, **options: Any
) -> TorchLearner:
    """The project's own learner on the CPU; the weights of now are its reference."""
    config = TorchLearnerConfig(lr=lr, device="cpu", micro_batch_tokens=65536, **options)
    return TorchLearner(module, config, updates, seed, reference=True, roles=roles)


def drawn(sampler: TransformersSampler, requests: Sequence[Request]) -> list[Completion]:
    """The completions of ``requests``, in their order."""
    sampler.add(requests)
    done: dict[str, Completion] = {}
    while len(done) < len(requests):
        done |= {c.id: c for c in sampler.poll()}
    return [done[r.id] for r in requests]


def _train_on_text(module: nn.Module, chain_VV: Tensor, seed: int, settings: Settings, g: torch.Generator) -> None:
    learner = learner_of(module, 5e-3, settings.text_steps, seed, schedule="linear", warmup_steps=10)
    objective = Objective.supervised()
    for step in range(settings.text_steps):
        ids_BT = _text(chain_VV, 64, settings.prompt_tokens + settings.completion_tokens, g)
        learner.update(replace(_plain(ids_BT), step=step), objective)


def _text(chain_VV: Tensor, rows: int, length: int, g: torch.Generator) -> Tensor:
    ids_BT = torch.randint(0, VOCABULARY, (rows, length), generator=g)
    for t in range(1, length):
        ids_BT[:, t] = torch.multinomial(chain_VV[ids_BT[:, t - 1]], 1, generator=g)[:, 0]
    return ids_BT


def _plain(ids_BT: Tensor) -> Batch:
    rows, width = ids_BT.shape
    mask_BT = (torch.arange(width) > 0).expand(rows, width)
    zeros_B, ones_B = torch.zeros(rows), torch.ones(rows)
    return Batch(
        ids_BT=ids_BT,
        loss_mask_BT=mask_BT,
        length_B=torch.full((rows,), width),
        group_B=torch.arange(rows),
        source_B=zeros_B.to(torch.int8),
        ratio_base_B=zeros_B.to(torch.int8),
        temperature_B=ones_B,
        behaviour_logp_BT=torch.zeros(rows, width),
        rewards_BK=torch.zeros(rows, 0),
        weights_K=torch.zeros(0),
        scored_B=ones_B.bool(),
        truncated_B=ones_B.bool(),
        key_B=torch.arange(rows),
    )


def _rollout(request: Request, completion: Completion, reward: float) -> Rollout:
    tokens = completion.token_ids
    return Rollout(
        id=request.id,
        prompt_id=request.id.partition(":")[0],
        prompt_ids=request.prompt_ids,
        token_ids=tokens,
        loss_mask=(True,) * len(tokens),
        behaviour_logp=completion.logp,
        text="",
        finish_reason=completion.finish_reason,
        seed=request.seed,
        sampler="transformers",
        sampling=request.params,
        versions=completion.versions,
        scores={"gold": Score(reward, "ok")},
        reward=reward,
    )


_EMPTY: Any = None
