"""What must be set before vLLM is imported, and what importing and building it must not change in this process."""

import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

ALWAYS = {
    # The engine computes in the process that drives it: its steps, and weights between two of them, are plain calls.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
UNLESS_SET = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    # Who starts a process says how many threads it has (OMP_NUM_THREADS) and on which cores.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def prepare_vllm() -> None:
    """Sets the environment for vLLM, which reads it while it is imported and after. May be called any number of times.

    ``VLLM_CPU_KVCACHE_SPACE`` is taken out: it would overrule the cache size that the recipe says.
    """
    os.environ.update(ALWAYS)
    for name, value in UNLESS_SET.items():
        os.environ.setdefault(name, value)
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Random numbers and the number of threads of this process are afterwards what they were.

    Building an engine seeds every global generator, and on a CPU puts a function that does nothing in the place of
    ``torch.set_num_threads``. A learner in the same process needs both as they were.
    """
    set_threads, threads = torch.set_num_threads, torch.get_num_threads()
    python_state, numpy_state = random.getstate(), np.random.get_state()
    cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=cuda), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of libraries among themselves
            yield
    finally:
        torch.set_num_threads = set_threads
        torch.set_num_threads(threads)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
