"""Averaging methods other than a plain Allreduce of gradients, each in a file that reads like its paper.

To add one: a class like those here, a line in METHODS, its name in config.CHOICES.
"""

import functools
import importlib

METHODS = {  # averaging.method -> file, class
    "dpsgd": ("dpsgd", "DPSGD"),
    "dpsgd-atc": ("dpsgd", "DPSGDAdaptThenCombine"),
    "sgp": ("push_sum", "StochasticGradientPush"),
    "gradient-tracking": ("gradient_tracking", "GradientTracking"),
    "exact-diffusion": ("exact_diffusion", "ExactDiffusion"),
    "qg-momentum": ("quasi_global", "QuasiGlobalMomentum"),
    "relaysum": ("relaysum", "RelaySum"),
    "local-sgd": ("local_sgd", "LocalSGD"),
    "diloco": ("local_sgd", "DiLoCo"),
    "choco": ("choco", "Choco"),
    "async-gossip": ("async_gossip", "AsyncGossip"),
    "allreduce": ("compressed", "CompressedAllreduce"),  # of compressed gradients; the plain one is averaging.Allreduce
}


def is_plain(config):
    """Whether a Config means a plain Allreduce of gradients, which comm.node.averaging makes."""
    averaging = config.averaging
    return averaging.method == "allreduce" and averaging.compression == "none" and config.train.clip_by != "own"


def method(name):
    """The class of an averaging.method, plain Allreduce apart."""
    file, kind = METHODS[name]
    return getattr(importlib.import_module(f".{file}", __name__), kind)


def make(node, comm, x, gradient, table, config, *others):
    """The method that an AveragingConfig means, on this rank. node: communicator of a node's ranks; others: of OwnSteps."""
    kind = method(config.method)
    if config.hierarchical:
        from .hierarchical import Hierarchical

        kind = functools.partial(Hierarchical, kind, node)
    return kind(comm, x, gradient, table, config, *others)
