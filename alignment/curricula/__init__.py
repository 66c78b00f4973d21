"""Curricula: which prompts are sampled, which groups are trained on, which are trained on again.

A recipe lists curricula and they compose (:mod:`alignment.curricula.composition`); what one is stands in
:mod:`alignment.curricula.contract`.
"""

from alignment.curricula.composition import keeps, places, refill_bound, replays, select_prompts, with_selector
from alignment.curricula.contract import Curriculum, curricula
from alignment.curricula.filters import DifficultyFilter
from alignment.curricula.uniform import Uniform

__all__ = [
    "Curriculum",
    "DifficultyFilter",
    "Uniform",
    "curricula",
    "keeps",
    "places",
    "refill_bound",
    "replays",
    "select_prompts",
    "with_selector",
]
