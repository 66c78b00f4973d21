"""Classes that tests place on a cluster."""

import ctypes
import os
import signal
import sys
import time

import numpy as np

from alignment.errors import UserError


class Rank:
    """What a learner's rank is to a cluster: a process with an environment, which can fail in every way."""

    def __init__(self, greeting="hello", refuse=False):
        if refuse:
            raise UserError("this rank cannot be: set something else")
        self.greeting = greeting

    def environment(self):
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "EXTRA")
        return {name: os.environ.get(name) for name in names}

    def greet(self, name):
        return f"{self.greeting} {name} from {os.environ['RANK']}"

    def path(self):
        return sys.path

    def modules(self, name):
        return name in sys.modules

    def is_instance_of_plugin(self, thing):
        return thing.double()

    def pid(self):
        return os.getpid()

    def refuse(self):
        raise UserError("not like this: do that")

    def divide(self):
        raise ZeroDivisionError("by zero, in the actor")

    def complain_when_the_other_is_gone(self):
        time.sleep(0.3)
        raise RuntimeError("connection closed by peer")

    def say_and_die(self):
        print("about to go", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    def crash(self):
        ctypes.string_at(0)

    def stop(self):
        os.kill(os.getpid(), signal.SIGSTOP)

    def sleep(self, seconds):
        time.sleep(seconds)

    def zeros(self, size):
        return np.zeros(size, dtype=np.uint8)
