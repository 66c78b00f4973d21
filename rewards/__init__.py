"""The rewards that come with the project. Importing this package registers them all; recipes name them."""

from rewards.form import Format
from rewards.length import Length, Overlong, RelativeLength
from rewards.matching import ExactMatch, NumericMatch
from rewards.repetition import Repetition

__all__ = ["ExactMatch", "Format", "Length", "NumericMatch", "Overlong", "RelativeLength", "Repetition"]
