"""What a recipe says of the vLLM sampler. Light: vLLM is imported when an engine is built."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from alignment.engines.config import Site, samplers
from alignment.registry import option
from alignment.sampling import Sampler


@samplers.register("vllm", source="this project", evidence="end to end")
@dataclass(frozen=True)
class VllmSamplerConfig:
    """Samples with vLLM: in this process, or, on a cluster, with engines that are processes of their own.

    Its weights are its own. The transport brings new ones between two tokens.
    """

    needs_module: ClassVar[bool] = False
    bans: ClassVar[bool] = True
    """It heeds ``SamplingParams.banned_ids``."""

    engines: Annotated[
        int, option("copies of the model that share the requests; more than one needs a cluster", ge=1)
    ] = 1
    tensor_parallel: Annotated[int, option("GPUs that hold one copy together", ge=1)] = 1
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        option("of weights and cache; auto: bfloat16 on a GPU, what the model has on a CPU"),
    ] = "auto"
    kv_cache_gb: Annotated[
        float | None,
        option(
            "key-value cache of an engine; null: what is left of its GPU, what its rows need on a CPU", unit="GiB", gt=0
        ),
    ] = None
    gpu_memory_utilization: Annotated[
        float, option("share of a GPU's memory for weights, cache and activations of the engine", gt=0, le=1)
    ] = 0.9
    max_num_seqs: Annotated[int, option("completions decoded together in one engine", unit="rows", ge=1)] = 256
    max_num_batched_tokens: Annotated[
        int | None, option("most tokens of one step; null: what vLLM chooses", unit="tokens", ge=1)
    ] = None
    enable_prefix_caching: Annotated[bool, option("compute what prompts have in common once")] = True
    enforce_eager: Annotated[
        bool | None, option("without CUDA graphs or compilation; null: so on a CPU, compiled on a GPU")
    ] = None
    in_flight: Annotated[
        Literal["continue", "recompute", "pause"],
        option(
            "completions under way when weights change: they go on, with the cache of the old weights or with one"
            " computed again; or they end first and nothing new starts"
        ),
    ] = "continue"
    lora: Annotated[
        Literal["merged", "adapter"],
        option("a LoRA adapter is added to the weights before they come, or comes alone; the same as transport.form"),
    ] = "merged"
    sleep: Annotated[bool, option("give the GPU's memory to the learner while it works; nothing on a CPU")] = False
    heartbeat_s: Annotated[
        float, option("an engine of a cluster that is not heard of for so long is replaced", unit="s", gt=0)
    ] = 60.0
    max_restarts: Annotated[int, option("of all engines of a cluster together, in one stage", ge=0)] = 3

    @property
    def needs_cluster(self) -> str | None:
        """Why it does not fit into one process, if it does not."""
        return f"{self.engines} engines are processes of their own" if self.engines > 1 else None

    def build(self, site: Site, learner: Any) -> Sampler:
        """The sampler for ``site``. It cannot sample before a transport has brought its first weights.

        Raises:
            UserError: vLLM is not installed, or cannot run this model or so many engines.
        """
        if site.cluster is not None:
            from alignment.engines.ray_sampler import RaySampler

            return RaySampler(site, self)
        from alignment.engines.vllm_sampler import VllmSampler

        return VllmSampler(site, self)
