"""What a recipe says of Ray. Light: Ray is imported when a cluster is opened."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from alignment.engines.config import Site, clusters
from alignment.registry import option

if TYPE_CHECKING:
    from alignment.engines.ray_cluster import RayCluster


@clusters.register("ray", source="this project", evidence="end to end")
@dataclass(frozen=True)
class RayClusterConfig:
    """Learner ranks and engines are Ray actors, on this machine or on many.

    Without an address a private cluster starts with the run, listens on the loopback interface alone, asks for a token
    that nobody else can read, and ends with the run. An existing cluster has to ask for a token, too: set
    ``RAY_AUTH_TOKEN_PATH`` or ``RAY_AUTH_TOKEN`` to it.
    """

    remote: ClassVar[bool] = True

    address: Annotated[str | None, option("of an existing cluster: auto, or host:port; null starts a private one")] = (
        None
    )
    placement: Annotated[
        Literal["separate", "colocated"], option("whether engines have devices of their own or share the learner's")
    ] = "separate"
    device: Annotated[
        Literal["auto", "gpu", "cpu"], option("what a rank or an engine runs on; auto: GPUs where the cluster has any")
    ] = "auto"
    cpus_per_process: Annotated[
        float, option("cores that Ray sets aside for each rank and each engine; a private cluster has enough", gt=0)
    ] = 1.0
    threads: Annotated[
        int | None, option("threads of each process; null: the machine's cores divided among those on it", ge=1)
    ] = None
    start_timeout_s: Annotated[float, option("for actors to be placed and ready", unit="s", gt=0)] = 900.0
    object_store_mb: Annotated[
        int | None, option("shared memory of a private cluster; null: what Ray chooses", unit="MiB", ge=80)
    ] = None
    environment: Annotated[
        Mapping[str, str], option("variables of every rank and engine, such as NCCL_SOCKET_IFNAME; no secrets")
    ] = field(default_factory=dict)

    def open(self, stage: Any, site: Site) -> AbstractContextManager["RayCluster"]:
        """Room for the ranks and engines of ``stage``, which is given back on leaving.

        Raises:
            UserError: The cluster cannot be reached or is too small; the message says what is needed and what is there.
        """
        from alignment.engines.ray_open import open_cluster

        return open_cluster(self, stage, site)
