"""mpq_jax: mixed-precision quantization for JAX and Flax by learned layer-wise importance.

The public names, loaded on first use: search, costs and policies never import JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names for type checkers; a test compares the two lists
    from mpq_jax.config import Config
    from mpq_jax.costs import bitops, parse_budgets, size
    from mpq_jax.criteria.learned import learned
    from mpq_jax.criteria.output_fisher import output_fisher
    from mpq_jax.evaluation import make_batch_statistics, make_evaluate
    from mpq_jax.float_model import FloatModel
    from mpq_jax.importance import load_importance, repair, save_importance
    from mpq_jax.joint import Distill, TrainState, init_state, joint_loss, make_step, row_variables
    from mpq_jax.optimizers import log_space, partition
    from mpq_jax.policy import load_policy, save_policy, stack, uniform
    from mpq_jax.quantized_model import quantize
    from mpq_jax.quantizers import lq_nets, lsq, pact, qil
    from mpq_jax.row_policies import random_rows, uniform_rows
    from mpq_jax.search import best_uniform, random_policies, solve
    from mpq_jax.tasks import Task, by_example, classification
    from mpq_jax.types import (
        Bits,
        Budget,
        Importance,
        Interaction,
        Layer,
        Policy,
        QuantizedModel,
        Quantizer,
        Refusal,
        Solution,
    )

_HOME = {
    "config": ("Config",),
    "costs": ("bitops", "parse_budgets", "size"),
    "criteria.learned": ("learned",),
    "criteria.output_fisher": ("output_fisher",),
    "evaluation": ("make_batch_statistics", "make_evaluate"),
    "float_model": ("FloatModel",),
    "importance": ("load_importance", "repair", "save_importance"),
    "joint": ("Distill", "TrainState", "init_state", "joint_loss", "make_step", "row_variables"),
    "optimizers": ("log_space", "partition"),
    "policy": ("load_policy", "save_policy", "stack", "uniform"),
    "quantized_model": ("quantize",),
    "quantizers": ("lq_nets", "lsq", "pact", "qil"),
    "row_policies": ("random_rows", "uniform_rows"),
    "search": ("best_uniform", "random_policies", "solve"),
    "tasks": ("Task", "by_example", "classification"),
    "types": (
        "Bits",
        "Budget",
        "Importance",
        "Interaction",
        "Layer",
        "Policy",
        "QuantizedModel",
        "Quantizer",
        "Refusal",
        "Solution",
    ),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}
__version__ = "0.1.0"
__all__ = [
    "Bits",
    "Budget",
    "Config",
    "Distill",
    "FloatModel",
    "Importance",
    "Interaction",
    "Layer",
    "Policy",
    "QuantizedModel",
    "Quantizer",
    "Refusal",
    "Solution",
    "Task",
    "TrainState",
    "__version__",
    "best_uniform",
    "bitops",
    "by_example",
    "classification",
    "init_state",
    "joint_loss",
    "learned",
    "load_importance",
    "load_policy",
    "log_space",
    "lq_nets",
    "lsq",
    "make_batch_statistics",
    "make_evaluate",
    "make_step",
    "output_fisher",
    "pact",
    "parse_budgets",
    "partition",
    "qil",
    "quantize",
    "random_policies",
    "random_rows",
    "repair",
    "row_variables",
    "save_importance",
    "save_policy",
    "size",
    "solve",
    "stack",
    "uniform",
    "uniform_rows",
]


def __getattr__(name: str) -> Any:
    if name in _MODULE:
        return getattr(importlib.import_module(f"mpq_jax.{_MODULE[name]}"), name)
    raise AttributeError(f"module 'mpq_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
