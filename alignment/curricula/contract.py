"""What a curriculum is.

Each does at least one of four things:

``select(state, prompts, n, context) -> (chosen, state)``
    Chooses ``n`` of ``prompts``. The first selector sees the whole data set, each later one what the one before chose.
    One with ``draws = True`` keeps count of the data set, so it must be the first. One with ``candidates(n)`` says how
    many it wants to choose ``n`` from, so it stands behind another.
``admits(state, prompt, context) -> bool``
    Whether a prompt may be sampled. The first selector is asked for another one in place of each that may not, so
    wherever in a list it stands, the selectors behind the first choose among admitted prompts only.
``keep(state, group) -> bool``
    Whether a scored group is trained on; ``max_refills`` bounds how much is sampled in place of those that are not.
``replay(state, need, context) -> groups``
    At most ``need`` groups of earlier batches, when a batch is still short.

``fits(prompts)``, optional, raises UserError where one that selects cannot work on a data set. It is asked when a
recipe is checked and before the first stage.

State is explicit, as for every component: ``init() -> state`` and ``observe(state, signals) -> state``, where the
signals hold *all* sampled groups, kept or not. Optional: ``metrics(state)``, numbers to log; ``keeps_rate(rate)``,
whether ``keep`` lets a group with this share of correct rollouts pass, for advice on what goes with a filter.
"""

from typing import Protocol, runtime_checkable

from alignment.registry import Registry


@runtime_checkable
class Curriculum(Protocol):
    """Anything with ``select``, ``admits``, ``keep`` or ``replay``; the registry asks for one of them."""


curricula: Registry[Curriculum] = Registry(
    "curricula", Curriculum, "Which prompts and groups are trained on", any_of=("select", "admits", "keep", "replay")
)
