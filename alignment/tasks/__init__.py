"""Procedural tasks: problems made by rule, each with its answer. Importing this package registers them all."""

from alignment.tasks import arithmetic, countdown, number_theory, sequences

__all__ = ["arithmetic", "countdown", "number_theory", "sequences"]
