"""The reward that both sides of `grpo_vs_trl.py` use. It stands alone: scoring workers and TRL import it by name."""


def parity(completion_ids: list[list[int]], parity: list[int], **_: object) -> list[float]:
    """Share of a completion's tokens whose id is odd (parity 1) or even (0): hardly two rewards are equal."""
    return [sum(i % 2 == p for i in ids) / len(ids) for ids, p in zip(completion_ids, parity, strict=True)]
