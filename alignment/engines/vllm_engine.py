"""One vLLM engine in this process, driven step by step: completions stream, and weights change between two steps.

It begins without weights: the first update brings them. vLLM's own interface is used as it is (``add_request``,
``step``, ``abort_request``, ``collective_rpc``); what is ours is the records, who waits while weights change, and that
nothing computed with old weights is taken for the work of new ones:

- every request carries the policy version as the salt of its cached prefix, so that a prefix computed with other
  weights is not found; an update that meets an idle engine empties the cache;
- at an update, requests that have no token yet are taken back and given to vLLM again after it, as of the new version;
- vLLM itself notes which weights sampled which token: the runs of :class:`alignment.types.Completion`.
"""

import math
import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from alignment.engines.vllm_adapter import entrance
from alignment.engines.vllm_build import build_engine, on_cpu
from alignment.engines.vllm_environment import prepare_vllm
from alignment.engines.vllm_spec import EngineSpec
from alignment.sampling import Received
from alignment.types import Completion, Request


class VllmEngine:
    """One engine, in this process; under tensor parallelism its workers are processes of their own.

    Log-probabilities are those of the distribution that was sampled, as with the other samplers: after temperature,
    ``top_k`` and ``top_p``. Greedy completions record 0, a point mass.

    Args:
        spec: What to build.
        base: Under ``lora: adapter``, the weights below the adapter; without them ``spec.origin`` is loaded.

    Raises:
        UserError: vLLM cannot run this model.
    """

    def __init__(self, spec: EngineSpec, base: Mapping[str, Tensor] | None = None) -> None:
        prepare_vllm()
        self.spec = spec
        self.version: int | None = None
        """Of the weights; None before the first update and while one is under way: no step is possible."""
        self.requests: dict[str, Request] = {}
        """All that are pending, by id."""
        self.held: dict[str, Request] = {}
        """Those of them that vLLM does not have: they wait for weights."""
        self.finished: list[Completion] = []
        """Completions that ended while an update waited for them."""
        self.asleep: set[str] = set()
        self._next_version: int | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="vllm-"))
        try:
            self._engine: Any = build_engine(spec, self._folder)
            self.entrance = entrance(spec, self._engine, self._folder, base)
        except BaseException:
            self.close()
            raise

    # Requests

    @property
    def pending(self) -> int:
        """Requests without a completion."""
        return len(self.requests)

    def add(self, requests: Sequence[Request]) -> None:
        """Takes requests, whose ids differ from all that are pending.

        Raises:
            UserError: One of them cannot be sampled; then none was taken.
        """
        self.spec.check(requests)
        for request in requests:
            assert request.id not in self.requests, f"request {request.id!r} is pending already"
            self.requests[request.id] = request
            if self.version is None:
                self.held[request.id] = request
            else:
                self._start(request)

    def step(self) -> list[Completion]:
        """Computes one more token of as many requests as fit; returns those that finished.

        Raises:
            FloatingPointError: The model's logits are not finite.
        """
        assert self.version is not None and not self.asleep, "it has no weights"
        return self._take() + self._step()

    def abort(self, ids: Collection[str]) -> None:
        """Forgets requests: no completion comes for them. Unknown ids are ignored."""
        known = [i for i in ids if self.requests.pop(i, None) is not None]
        running = [i for i in known if self.held.pop(i, None) is None]
        self.finished = [c for c in self.finished if c.id not in ids]
        if running:
            self._engine.abort_request(running)

    def _start(self, request: Request) -> None:
        from vllm.inputs.engine import tokens_input

        prompt = tokens_input(list(request.prompt_ids), cache_salt=str(self.version))
        self._engine.add_request(request.id, prompt, _parameters(request), lora_request=self.entrance.request)

    def _step(self) -> list[Completion]:
        random_state = torch.get_rng_state()  # vLLM draws from the generator of everybody, too
        outputs = [o for o in self._engine.step() if o.finished and o.request_id in self.requests]
        torch.set_rng_state(random_state)
        return [self._completion(self.requests.pop(o.request_id), o.outputs[0]) for o in outputs]

    def _take(self) -> list[Completion]:
        finished, self.finished = self.finished, []
        return finished

    def _completion(self, request: Request, output: Any) -> Completion:
        logp = tuple(output.logprobs.logprobs)
        assert len(logp) == len(output.token_ids), "one log-probability for each token"
        if not all(map(math.isfinite, logp)):
            raise FloatingPointError(
                f"the model of the vLLM sampler (version {self.version}) gives logits that are not finite: training has"
                " diverged; lower the learning rate or clip gradients harder"
            )
        if output.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM ended request {request.id!r} with {output.finish_reason!r}")
        if request.params.temperature == 0.0:
            logp = (0.0,) * len(logp)
        runs = tuple((int(span.version), span.start) for span in output.weight_versions)
        return Completion(request.id, tuple(output.token_ids), logp, output.finish_reason, runs)

    # Weights

    def begin_update(self, version: int) -> None:
        """What :meth:`load` brings next is policy ``version``; no step until :meth:`end_update`.

        Under ``in_flight: pause``, completions that have begun are finished first.
        """
        assert "weights" not in self.asleep, "wake the weights first"
        if self.version is not None:
            self._hold()
        self.version, self._next_version = None, version
        self.entrance.begin()

    def _hold(self) -> None:
        """Takes back what has no token yet, and finishes what has where that is asked for."""
        states = {s.external_req_id: s for s in self._engine.output_processor.request_states.values()}
        waiting = [i for i, s in states.items() if not s.detokenizer.num_output_tokens()]
        self._engine.abort_request(waiting)
        untouched = self.held.keys() | set(waiting)
        self.held = {i: request for i, request in self.requests.items() if i in untouched}
        if self.spec.options.in_flight == "pause":
            while len(self.requests) > len(self.held):
                self.finished += self._step()

    def load(self, bucket: Mapping[str, Tensor]) -> None:
        """Some of the weights, by their names in transformers, or of an adapter, by their names in peft.

        The tensors must stay as they are until :meth:`end_update`.

        Raises:
            UserError: It wants an adapter and gets something else, or the other way round.
        """
        assert self._next_version is not None, "begin_update comes first"
        self.entrance.load(bucket)

    def end_update(self) -> Received:
        """The new weights are in use, and no cached prefix of the old ones is used again.

        Raises:
            ValueError: Tensors that the model has no place for, or parts of the model that got none.
        """
        assert self._next_version is not None, "begin_update comes first"
        version, self._next_version = self._next_version, None
        received = self.entrance.end(version)
        self._engine.set_weight_version(str(version))
        self.version = version
        if not self.asleep:
            self._resume()
        return received

    def _resume(self) -> None:
        running = len(self.requests) > len(self.held)
        if not running or self.spec.options.in_flight == "recompute":
            self._engine.reset_prefix_cache(reset_running_requests=running)
        held, self.held = self.held, {}
        for request in held.values():
            self._start(request)

    # Memory of a GPU

    def sleep(self) -> None:
        """Gives up the memory of weights and cache; what is pending goes on after the next update.

        On a CPU there is no other memory to go to, and only the order of calls is kept.
        """
        if self.asleep:
            return
        if self.version is not None:
            self._hold()
        self.version, self.asleep = None, {"weights", "cache"}
        if not on_cpu():
            self._engine.sleep(level=2, mode="keep")

    def wake(self, what: Literal["weights", "cache"]) -> None:
        """Takes memory again, for the weights first, which then have to come anew; steps are possible after both."""
        assert what in self.asleep and (what == "weights" or "weights" not in self.asleep), "weights, then the cache"
        if not on_cpu():
            self._engine.wake_up(["weights" if what == "weights" else "kv_cache"])
        self.asleep.remove(what)
        if not self.asleep and self.version is not None:
            self._resume()

    def close(self) -> None:
        """Gives everything back; may be called twice."""
        engine, self._engine = getattr(self, "_engine", None), None
        self.requests, self.held, self.finished = {}, {}, []
        if engine is not None:
            engine.engine_core.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)


def _parameters(request: Request) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    from alignment.engines.vllm_guidance import PARAMETER

    p = request.params
    return SamplingParams(
        max_tokens=p.max_tokens,
        temperature=p.temperature,
        top_p=p.top_p,
        top_k=p.top_k,
        seed=request.seed % (1 << 63),
        stop_token_ids=list(p.stop_ids),
        ignore_eos=True,  # what ends a completion is what the request says
        logprobs=0,  # of the sampled token alone
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_clone=True,
        # Tokens, where the public ``bad_words`` takes texts and wants a tokenizer, which the engine has not.
        _bad_words_token_ids=[[i] for i in p.banned_ids] or None,
        extra_args={PARAMETER: list(p.tilt)} if any(p.tilt) else None,
    )
