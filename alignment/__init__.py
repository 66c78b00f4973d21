"""Align language models and train them to reason with reinforcement learning.

``alignment.train(recipe, sinks=[...])`` is the public door; the ``align`` command is the same door in a shell.
"""

import os
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignment.trainer import train

__all__ = ["__version__", "train"]

# Threads that spin while they wait slow each other down when other programs use the cores, too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

try:
    __version__ = version("alignment-rl")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    """Imports the trainer, and with it torch and transformers, only when it is asked for."""
    if name == "train":
        from alignment.trainer import train

        return train
    raise AttributeError(f"module 'alignment' has no attribute {name!r}")
