"""Mistakes that no single value shows: combinations that cannot work, and secrets. Found before anything starts."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from alignment.algorithms.advantages import advantages
from alignment.algorithms.decodings import decodings
from alignment.algorithms.state import needs_of
from alignment.critics import critics
from alignment.engines.config import transports
from alignment.recipe_pairs import preference_conflicts, reward_model_conflicts, slow_rewards
from alignment.recipe_tree import Conflict, Node, Place, Problem, dotted, walk
from alignment.recipe_weighting import weighting_conflicts
from alignment.recipe_yaml import SECRET_KEY, SECRET_VALUE

if TYPE_CHECKING:
    from alignment.recipe import OnlineStage, PreferenceStage, Recipe, Stage, ValueStage

    Rollouts = OnlineStage | ValueStage | PreferenceStage


def conflicts(recipe: "Recipe") -> Iterator[Conflict]:
    """Everything in a well-formed recipe that cannot work."""
    yield from _build(recipe)
    yield from _names(recipe)
    yield from slow_rewards(recipe)
    for index, stage in enumerate(recipe.stages):
        place: Place = ("stages", index)
        yield from _engines(stage, place)
        yield from _transport(stage, place)
        if stage.stage == "sft":
            if recipe.data.demonstrations is None:
                yield Conflict(place, "a stage 'sft' needs data.demonstrations", (("data", "demonstrations"),))
        if stage.stage == "preference":
            yield from preference_conflicts(recipe, stage, place)
        if stage.stage == "reward_model":
            yield from reward_model_conflicts(recipe, stage, place)
        if stage.stage != "sft" and stage.stage != "reward_model" and stage.samples:
            yield from _online(recipe, stage, place)
            yield from _values(stage, place)
            yield from _guidance(stage, place)
            yield from _sizes(recipe, stage, place)
            yield from _needs(recipe, stage, place)
            if stage.stage == "online":
                yield from weighting_conflicts(recipe, stage, place)


def secrets(root: Node) -> list[Problem]:
    """Values that look like credentials. Their text is never shown."""
    return [
        Problem(
            node.mark,
            place,
            "looks like a secret, and recipes are copied to run folders and trackers: remove it here and set it in "
            "the environment (HF_TOKEN, WANDB_API_KEY, ...)",
        )
        for place, node in walk(root)
        if isinstance(node.value, str) and node.value and _is_secret(place, node.value)
    ]


def nearest(number: int, candidates: Sequence[int]) -> str:
    """The candidates around ``number``, for an error's remedy."""
    below = [c for c in candidates if c < number][-1:]
    above = [c for c in candidates if c > number][:1]
    return " or ".join(str(c) for c in below + above)


def _is_secret(place: Place, value: str) -> bool:
    named = bool(place) and isinstance(place[-1], str) and SECRET_KEY.search(place[-1]) is not None
    return named or SECRET_VALUE.search(value) is not None


def model_problems(root: Node) -> list[Problem]:
    """Whether ``model`` has exactly one of ``path`` and ``build``; read from the tree, whatever else is wrong in it."""
    model = root.value.get("model")
    if model is None or not isinstance(model.value, dict):
        return []
    given = [key for key in ("path", "build") if key in model.value and model.value[key].value is not None]
    if len(given) == 1:
        return []
    found = "both are given; set one to null" if given else "neither is given"
    message = f"takes one of 'path' (a folder or a hub id) and 'build' (a new model); {found}"
    return [Problem(model.mark, ("model",), message)]


def _build(recipe: "Recipe") -> Iterator[Conflict]:
    build = recipe.model.build
    if build is None:
        return
    place: Place = ("model", "build")
    if len(set(build.alphabet)) < len(build.alphabet):
        twice = sorted({c for c in build.alphabet if build.alphabet.count(c) > 1})
        yield Conflict((*place, "alphabet"), f"each character once; given twice: {' '.join(map(repr, twice))}")
    if build.hidden_size % build.heads or (build.hidden_size // build.heads) % 2:
        near = nearest(
            build.hidden_size, range(2 * build.heads, build.hidden_size + 2 * build.heads + 1, 2 * build.heads)
        )
        message = f"{build.hidden_size} must be an even number for each of {build.heads} heads: {near} would do"
        yield Conflict((*place, "hidden_size"), message, ((*place, "heads"),))
    if build.heads % build.kv_heads:
        fits = [n for n in range(1, build.heads + 1) if build.heads % n == 0]
        message = f"{build.kv_heads} does not divide heads ({build.heads}): {', '.join(map(str, fits))} would do"
        yield Conflict((*place, "kv_heads"), message, ((*place, "heads"),))
    stages = ((i, s) for i, s in enumerate(recipe.stages) if s.stage != "sft" and s.stage != "reward_model")
    online = ((i, s) for i, s in stages if s.samples)
    lengths: dict[Place, int] = {("stages", i, "sampling"): s.sampling.max_tokens for i, s in online}
    if recipe.data.eval is not None:
        lengths["evaluation", "sampling"] = recipe.evaluation.sampling.max_tokens
    where = max(lengths, key=lambda where: lengths[where], default=None)
    need = recipe.data.max_prompt_tokens + (lengths[where] if where else 0)
    if where and build.max_positions < need:
        yield Conflict(
            (*place, "max_positions"),
            f"{build.max_positions} is too short: data.max_prompt_tokens ({recipe.data.max_prompt_tokens}) + "
            f"{dotted(where)}.max_tokens ({lengths[where]}) need at least {need}",
            (("data",), *lengths),
        )


def _names(recipe: "Recipe") -> Iterator[Conflict]:
    """Names that must differ because files, metrics or columns are called by them."""
    named: dict[str, list[tuple[Place, str]]] = {
        "stage": [(("stages", i, "name"), s.name) for i, s in enumerate(recipe.stages)],
        "reward column": [(("rewards", i), r.column) for i, r in enumerate(recipe.rewards)],
        "sink": [(("run", "sinks", i), s.name) for i, s in enumerate(recipe.run.sinks)],
    }
    remedies = {
        "stage": "give each stage a 'name' of its own",
        "reward column": "rename one with 'as' (or 'name', for a function)",
        "sink": "keep one",
    }
    for what, entries in named.items():
        for index, (place, name) in enumerate(entries):
            others = [other for other, taken in entries[:index] if taken == name]
            if others:
                yield Conflict(place, f"there is another {what} '{name}'; {remedies[what]}", (place, others[0]))


def _online(recipe: "Recipe", stage: "Rollouts", place: Place) -> Iterator[Conflict]:
    if recipe.data.train is None:
        yield Conflict(place, f"a stage '{stage.stage}' needs data.train", (("data", "train"),))
    if not recipe.rewards:
        yield Conflict(place, f"a stage '{stage.stage}' needs at least one entry in rewards", (("rewards",),))
    sampling = stage.sampling
    where: Place = (*place, "sampling")
    if sampling.temperature == 0:
        yield Conflict((*where, "temperature"), "0 samples greedily, which gives nothing to learn from; use 1.0")
    for key, off in (("top_p", 1.0), ("top_k", 0)):
        if getattr(sampling, key) != off and not sampling.allow_truncated_sampling:
            message = (
                f"{key} leaves out tokens when sampling that the trained policy has, which biases its gradient: set it "
                f"to {off:g}, or allow_truncated_sampling: true to do it anyway"
            )
            yield Conflict((*where, key), message, ((*where, "allow_truncated_sampling"),))
    shares = getattr(stage.sampler, "needs_module", True)
    if stage.max_staleness and (shares or getattr(stage.cluster, "placement", None) == "colocated"):
        why = "shares its weights with the learner" if shares else "sleeps while the learner works"
        message = f"{stage.max_staleness} is more than this sampler allows (0): it {why}, so rollouts are never stale"
        yield Conflict((*place, "max_staleness"), f"{message}; set it to 0", ((*place, "sampler"), (*place, "cluster")))


def _engines(stage: "Stage", place: Place) -> Iterator[Conflict]:
    """Engines that do not go together, or not into one process."""
    parts = {"sampler": stage.sampler, "learner": stage.learner}
    where = tuple((*place, part) for part in (*parts, "cluster"))
    for part, engine in parts.items():
        why = getattr(engine, "needs_cluster", None)
        if why is not None and not getattr(stage.cluster, "remote", False):
            yield Conflict((*place, part), f"{why}: set cluster to 'ray'", where)
    if getattr(stage.sampler, "needs_module", True) and not getattr(stage.learner, "needs_module", True):
        message = "samples from the weights of a learner in its own process, and this learner is not: use 'vllm'"
        yield Conflict((*place, "sampler"), message, where)
    if not _has_actors(stage):
        return
    if getattr(stage.learner, "needs_module", True) and getattr(stage.cluster, "device", "cpu") != "cpu":
        message = (
            "computes in the process of the run, on the first GPU that it sees, and Ray gives the same one to an "
            "engine: use 'deepspeed', or set cluster.device to 'cpu'"
        )
        yield Conflict((*place, "learner"), message, where)
    if getattr(stage.sampler, "sleep", False) and getattr(stage.cluster, "placement", None) == "separate":
        message = (
            "true gives a GPU's memory to a learner that shares it, and with cluster.placement 'separate' none does: "
            "set it to false, or placement to 'colocated'"
        )
        yield Conflict((*place, "sampler", "sleep"), message, where)


def _has_actors(stage: "Stage") -> bool:
    """Whether engines that sample are processes of their own."""
    return getattr(stage.cluster, "remote", False) and hasattr(stage.sampler, "engines")


def _transport(stage: "Stage", place: Place) -> Iterator[Conflict]:
    """A transport that cannot carry weights between this learner and this sampler; none is one that can."""
    if stage.transport is None:
        return
    name, actors = transports.name_of(stage.transport), _has_actors(stage)
    shares = getattr(stage.sampler, "needs_module", True)
    on_gpus = actors and getattr(stage.cluster, "device", None) != "cpu"
    placement = getattr(stage.cluster, "placement", None)
    suits = {
        "shared": (shares, "a sampler that samples from the learner's own weights ('transformers')"),
        "memory": (
            not shares and not actors and getattr(stage.learner, "needs_module", True),
            "learner and sampler in one process, each with its own weights ('torch', 'vllm', cluster 'local')",
        ),
        "object_store": (actors, "engines on a cluster (sampler 'vllm', cluster 'ray')"),
        "nccl": (
            on_gpus and placement == "separate",
            "engines on GPUs other than the learner's (sampler 'vllm', cluster 'ray', placement 'separate')",
        ),
        "ipc": (
            on_gpus and placement == "colocated",
            "engines on the learner's GPUs (sampler 'vllm', cluster 'ray', placement 'colocated')",
        ),
    }
    fits, needed = suits.get(name, (True, ""))
    if not fits:
        where = tuple((*place, part) for part in ("transport", "sampler", "learner", "cluster"))
        yield Conflict((*place, "transport"), f"'{name}' needs {needed}; leave it out for the one that suits", where)


def _sizes(recipe: "Recipe", stage: "Rollouts", place: Place) -> Iterator[Conflict]:
    prompts, minibatches = stage.prompts_per_step, stage.credited.minibatches
    if prompts % minibatches:
        divisors = [n for n in range(1, prompts + 1) if prompts % n == 0]
        low = prompts // minibatches * minibatches
        multiples = [n for n in (low, low + minibatches) if n]
        yield Conflict(
            (*place, "algorithm", "minibatches"),
            f"{minibatches} does not divide prompts_per_step ({prompts}); minibatches {nearest(minibatches, divisors)} "
            f"would do, or prompts_per_step {' or '.join(map(str, multiples))}",
            ((*place, "prompts_per_step"),),
        )
    budget = getattr(stage.learner, "micro_batch_tokens", None)
    prompt, completion = recipe.data.max_prompt_tokens, stage.sampling.max_tokens
    if budget is not None and budget < prompt + completion:
        yield Conflict(
            (*place, "learner", "micro_batch_tokens"),
            f"{budget} does not hold the longest row: data.max_prompt_tokens ({prompt}) + sampling.max_tokens "
            f"({completion}) need at least {prompt + completion}",
            (("data", "max_prompt_tokens"), (*place, "sampling"), (*place, "learner")),
        )
    parts = {("algorithm", "advantage"): stage.credited.advantage}
    parts |= {("curricula", i): c for i, c in enumerate(stage.curricula)}
    guidance = getattr(stage, "guidance", None)
    found = guidance.rollouts if guidance is not None and guidance.use == "demonstrations" else 0
    for where, part in parts.items():
        least = getattr(part, "min_group_size", 1)
        if stage.group_size - found < least:
            but = f", of which guidance takes {found} from the policy," if found else ""
            yield Conflict(
                (*place, "group_size"),
                f"{stage.group_size}{but} is too small: {'.'.join(map(str, where))} compares the completions of a "
                f"prompt with each other and needs at least {least + found}",
                ((*place, *where[:2]), *([(*place, "guidance")] if found else [])),
            )


def _values(stage: "Rollouts", place: Place) -> Iterator[Conflict]:
    """Value models that have nothing to learn from, or nothing to be."""
    field = "value_model" if stage.stage == "value" else "critic"
    kind = None if stage.values is None else critics.name_of(stage.values)
    here: Place = (*place, field)
    if kind == "read_out":
        yield Conflict(here, "'read_out' is a view of a critic, for prompt_value: use 'model' or 'head'")
    if kind == "head" and stage.stage == "value":
        yield Conflict(here, "'head' learns in the steps of the policy, which rests in a stage 'value': use 'model'")
    if kind == "model" and stage.stage == "online" and getattr(stage.values, "head", None) == "vocabulary":
        message = "'vocabulary' has no value of a prompt's end, which advantages need: use 'state'"
        yield Conflict((*here, "head"), message)
    if stage.resting_steps >= stage.steps:
        message = f"{stage.resting_steps} leaves the policy none of the stage's {stage.steps} steps: take fewer"
        yield Conflict((*here, "pretraining_steps"), message, ((*place, "steps"),))
    if stage.values is not None and not hasattr(stage.credited.advantage, "returns"):
        makers = ", ".join(entry.name for entry in advantages if hasattr(entry.cls, "returns"))
        message = f"has nothing to learn from, since the advantage makes no returns: take algorithm.advantage {makers}"
        yield Conflict(here, f"{message}, or leave the critic out", ((*place, "algorithm"),))
    asked = stage.prompt_value
    if asked is not None and critics.name_of(asked) == "head":
        yield Conflict((*place, "prompt_value"), "'head' learns with the policy: use 'model' or 'read_out'")
    if asked is not None and critics.name_of(asked) == "read_out" and kind not in ("model", "head"):
        message = "'read_out' reads the critic, and this stage has none: give it a critic, or use 'model'"
        yield Conflict((*place, "prompt_value"), message, (here,))
    elif asked is not None and critics.name_of(asked) == "read_out" and stage.streams:
        message = "'read_out' is one number, and this critic has a value for each reward component: use 'model'"
        yield Conflict((*place, "prompt_value"), message, ((*place, "algorithm", "weighting"),))
    if getattr(asked, "head", "state") == "vocabulary":
        yield Conflict((*place, "prompt_value", "head"), "'vocabulary' has no value of a prompt's end: use 'state'")


def _guidance(stage: "Rollouts", place: Place) -> Iterator[Conflict]:
    """Steered rollouts that nothing can make, or that would be trained on as if they were the policy's own."""
    guidance = getattr(stage, "guidance", None)
    if guidance is None:
        return
    here: Place = (*place, "guidance")
    if decodings.name_of(guidance.decoding) != "value_augmented":
        message = "must be 'value_augmented', whose rollouts carry the log-probabilities that they were drawn with"
        yield Conflict((*here, "decoding"), message)
    if guidance.rollouts >= stage.group_size:
        message = f"{guidance.rollouts} leaves none of the {stage.group_size} rollouts of a group to the policy"
        yield Conflict(
            (*here, "rollouts"), f"{message}: take at most {stage.group_size - 1}", ((*place, "group_size"),)
        )
    if guidance.use == "mixed_group" and stage.credited.correction is None:
        message = "'mixed_group' trains on rollouts that the policy did not sample, which needs importance weights"
        where = (*place, "algorithm", "correction")
        yield Conflict((*here, "use"), f"{message}: set algorithm.correction to 'tis'", (where,))


def _needs(recipe: "Recipe", stage: "Rollouts", place: Place) -> Iterator[Conflict]:
    """What components ask for and nothing in the recipe provides. A reference can always be made."""
    parts = {("algorithm", *_parts(name)): c for name, c in stage.credited.components().items()}
    provided = {"values"} if stage.values is not None else set[str]()
    provided |= {"role:prompt_value"} if stage.prompt_value is not None else set()
    parts |= {("curricula", i): c for i, c in enumerate(stage.curricula)}
    for where, part in parts.items():
        here: Place = (*place, *where)
        for need in set(needs_of(part)) - provided:
            if need == "values":
                others = [entry.name for entry in advantages if not _asks_values(entry.cls)]
                hint = f" (without a critic: {', '.join(others)})" if where[-1] == "advantage" else ""
                message = f"needs values, which a critic makes: give the stage one, such as critic: model{hint}"
                yield Conflict(here, message, (here, (*place, "critic")))
            elif need == "role:prompt_value":
                message = "needs a model that predicts what comes of prompts: give the stage one, prompt_value: model"
                yield Conflict(here, message, (here, (*place, "prompt_value")))
            elif need.startswith("role:"):
                message = f"needs the model role '{need[5:]}', which nothing in this recipe provides"
                yield Conflict(here, message, (here,))
            elif need == "evaluation" and (recipe.data.eval is None or not recipe.evaluation.every):
                message = "learns from evaluations during the stage: give data.eval and an evaluation.every above 0"
                yield Conflict(here, message, (here, ("data", "eval"), ("evaluation", "every")))
            elif need == "demonstrations" and recipe.data.demonstrations is None:
                yield Conflict(here, "needs data.demonstrations", (here, ("data", "demonstrations")))


def _parts(name: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.isdecimal() else part for part in name.split("."))


def _asks_values(cls: type[Any]) -> bool:
    """Whether a component says of itself, whatever its options, that it needs values."""
    needs = getattr(cls, "needs", ())
    return isinstance(needs, tuple) and "values" in needs
