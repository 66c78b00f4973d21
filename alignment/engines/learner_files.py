"""What a learner writes to a checkpoint and reads back, wherever its weights are."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.adapters import mark_merged, merged_names

if TYPE_CHECKING:
    from alignment.engines.policy_learner import PolicyLearner


def save_learner(learner: "PolicyLearner", folder: Path) -> None:
    """As :meth:`alignment.engines.policy_learner.PolicyLearner.save`."""
    folder.mkdir(parents=True, exist_ok=True)
    backend = learner.backend
    backend.write(folder / "policy.safetensors")
    if learner.reference is not None:
        backend.write(folder / "reference.safetensors", learner.reference)
    record: dict[str, Any] = {"frozen": backend.frozen(), "reference": learner.reference is not None}
    record["merged"] = sorted(merged_names(learner.module))
    record["slots"] = {name: slot.save(folder / f"slot-{name}") for name, slot in learner.slots.items()}
    record["roles"] = {}
    for name, role in learner.roles.items():
        role.backend.write(folder / f"role-{name}.safetensors", head=role is learner.roles.head)
        counts = None if role.slot is None else role.slot.save(folder / f"role-{name}-slot")
        record["roles"][name] = {"slot": counts, "merged": sorted(merged_names(role.backend.module))}
    if backend.share.rank == 0:
        (folder / "learner.json").write_text(json.dumps(record, indent=1))


def restore_learner(learner: "PolicyLearner", folder: Path, main_slot: str) -> None:
    """As :meth:`alignment.engines.policy_learner.PolicyLearner.restore`."""
    record, backend = json.loads((folder / "learner.json").read_text()), learner.backend
    if record.get("merged"):
        mark_merged(learner.module, record["merged"])
    if record["frozen"] != backend.frozen():
        raise ValueError(f"{folder} belongs to another base model: the weights that are not trained differ")
    if record["roles"].keys() != learner.roles.keys():
        raise ValueError(f"{folder} has roles {sorted(record['roles'])} and this learner {sorted(learner.roles)}")
    backend.read(folder / "policy.safetensors")
    learner.reference = backend.read_kept(folder / "reference.safetensors") if record["reference"] else None
    learner.slots = {main_slot: backend.slot(learner.total_updates)}
    for name, counts in record["slots"].items():
        learner.slot(name).restore(folder / f"slot-{name}", counts)
    for name, role in learner.roles.items():
        mark_merged(role.backend.module, record["roles"][name]["merged"])
        role.backend.read(folder / f"role-{name}.safetensors", head=role is learner.roles.head)
        if role.slot is not None:
            role.slot.restore(folder / f"role-{name}-slot", record["roles"][name]["slot"])
