"""The rewards that come with the project. Importing this package registers them all; recipes name them."""

from rewards.countdown import Countdown
from rewards.form import Format
from rewards.judge import Judge
from rewards.length import Length, Overlong, RelativeLength
from rewards.matching import ExactMatch, NumericMatch
from rewards.mathematics import Math
from rewards.reasoning_gym import ReasoningGym
from rewards.repetition import Repetition
from rewards.reward_model import RewardModel

__all__ = [
    "Countdown",
    "ExactMatch",
    "Format",
    "Judge",
    "Length",
    "Math",
    "NumericMatch",
    "Overlong",
    "ReasoningGym",
    "RelativeLength",
    "Repetition",
    "RewardModel",
]
