"""What training on one task after another does to the earlier ones.

``accuracy[i][j]`` is the accuracy on task j after training on task i; what lies above the diagonal may be missing.
"""

from collections.abc import Sequence

Matrix = Sequence[Sequence[float]]


def average_accuracy(accuracy: Matrix) -> float:
    """``mean_j A[T][j]``: over all tasks, after the last was trained on."""
    return sum(accuracy[-1]) / len(accuracy[-1])


def forgetting_measure(accuracy: Matrix) -> float:
    """``mean over j < T of A[T][j] - A[j][j]``: below 0, earlier tasks got worse.

    As in work that follows "Reinforcement Fine-Tuning Naturally Mitigates Forgetting in Continual Post-Training"
    (arXiv 2507.05386). Some papers take ``max_i A[i][j] - A[T][j]``, with the opposite sign.
    """
    earlier = range(len(accuracy) - 1)
    assert len(earlier) > 0, "forgetting takes at least two tasks"
    return sum(accuracy[-1][j] - accuracy[j][j] for j in earlier) / len(earlier)
