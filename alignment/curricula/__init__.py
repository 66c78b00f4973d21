"""Curricula: which prompts are sampled, which groups are trained on, which are trained on again.

A recipe lists curricula and they compose (:mod:`alignment.curricula.composition`); what one is stands in
:mod:`alignment.curricula.contract`.
"""

from alignment.curricula.composition import keeps, places, refill_bound, replays, select_prompts, with_selector
from alignment.curricula.contract import Curriculum, curricula
from alignment.curricula.filters import DifficultyFilter
from alignment.curricula.instance_filter import InstanceFilter
from alignment.curricula.level_schedule import LevelSchedule
from alignment.curricula.pairs import PAIRS, Pair, pair, remarks
from alignment.curricula.prompt_curriculum import PromptCurriculum
from alignment.curricula.sample_buffer import SampleBuffer
from alignment.curricula.self_evolving import SelfEvolving
from alignment.curricula.shuffled import Shuffled
from alignment.curricula.thompson import Thompson
from alignment.curricula.uniform import Uniform

__all__ = [
    "Curriculum",
    "DifficultyFilter",
    "PAIRS",
    "InstanceFilter",
    "LevelSchedule",
    "Pair",
    "PromptCurriculum",
    "SampleBuffer",
    "SelfEvolving",
    "Shuffled",
    "Thompson",
    "Uniform",
    "curricula",
    "keeps",
    "pair",
    "places",
    "refill_bound",
    "remarks",
    "replays",
    "select_prompts",
    "with_selector",
]
