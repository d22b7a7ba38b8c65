"""A policy as rules of Qwix (github.com/google/qwix), and the same Flax model run by it.

What Qwix 0.1.8 takes here: equal types of weights and activations (a convolution with others is refused by it, and XLA
has no product of int4 with int8), of 8 or 4 bits, one rule a module, hence one width for all layers of a scanned stack.
Not our numbers: Qwix finds its own scales, symmetric ones from the largest magnitude (absmax), for weights one an output
channel, for activations anew in every call, one a sample (convolution) or a row (dot product). Our learned step sizes
and clipping are not in it, so outputs are near ours, not equal.
"""

import functools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import qwix
from flax import linen

from mpq_jax import flax_seam
from mpq_jax.layers import LayerSpec
from mpq_jax.policy import completed
from mpq_jax.types import Bits, Policy, QuantizedModel, Refusal

TYPES = {8: "int8", 4: "int4"}


class QwixRules(NamedTuple):
    """rules: leaf path of a parameter -> its rule. refused: path of each layer without one -> why, in a line."""

    rules: dict[str, qwix.QuantizationRule]
    refused: dict[str, str]

    def lines(self) -> list[str]:
        """The refused layers for people, a line each."""
        return [f"{path}: {why}" for path, why in self.refused.items()]


class QwixModel(NamedTuple):
    """module.apply(variables, *inputs) is the model under Qwix.

    provider: "ptq", the parameters hold codes and scales; or "qt", where layers are scanned: Qwix cannot make such
    parameters under nn.scan (0.1.8), they stay float and every call rounds them to the same codes.
    """

    module: linen.Module
    variables: dict[str, Any]
    provider: str
    taken: QwixRules


@functools.cache
def device_widths() -> tuple[int, ...]:
    """The bit-widths of TYPES whose dot product the default device has: found by running one."""
    found = []
    for bits, name in TYPES.items():
        ones = jnp.ones((2, 2), jnp.float32)
        try:
            out = jax.jit(lambda x, name=name: jnp.dot(*(2 * [x.astype(name)]), preferred_element_type=jnp.int32))(ones)
            found += [bits] if bool((out == 2).all()) else []
        except jax.errors.JaxRuntimeError:  # what XLA says of a type that it lacks
            pass
    return tuple(found)


def qwix_rules(model: QuantizedModel, policy: Policy, widths: Collection[int] | None = None) -> QwixRules:
    """The rules for layers whose weights and activations are both at 8, or both at 4, bits.

    widths: those of 8 and 4 to make rules for; None: those that the default device can multiply. CPUs have no int4.
    Raises Refusal for a policy of another model.
    """
    widths = device_widths() if widths is None else tuple(widths)
    policy = completed(policy, model.layers, model.bit_widths, model.activation_bit_widths)
    result = QwixRules({}, {})
    for leaf, spec in model.specs.items():
        module = _module(leaf)
        together = [other for other in model.specs.values() if _module(other.leaf) == module]
        why = _refusal(model, together, policy, widths)
        if why is None:
            kind = TYPES[policy[spec.paths[0]].w]
            result.rules[leaf] = qwix.QuantizationRule(module_path=re.escape(module), weight_qtype=kind, act_qtype=kind)
        else:
            result.refused.update(dict.fromkeys(spec.paths, why))
    return result


def qwix_model(
    model: QuantizedModel,
    module: linen.Module,
    variables: Mapping[str, Any],
    policy: Policy,
    *inputs: Any,
    widths: Collection[int] | None = None,
    **kwargs: Any,
) -> QwixModel:
    """The Linen model that `model` was made of, under Qwix by the policy's rules.

    inputs, kwargs: an example call. Layers that Qwix turns out not to take when it traces the model are added to those
    that are refused, and stay in float as these do.
    Raises Refusal for an NNX model, and where no layer is left.
    """
    if not isinstance(module, linen.Module):
        raise Refusal(
            f"{type(module).__name__} is no Linen model; for NNX call qwix.quantize_model(model, "
            "qwix.PtqProvider(list(qwix_rules(…).rules.values())), *inputs)"
        )
    taken = qwix_rules(model, policy, widths)
    scanned = any(model.specs[leaf].stack for leaf in taken.rules)
    under = functools.partial(_under, module, variables, inputs, kwargs, scanned)
    for leaf, why in _faults(under, taken.rules).items():
        del taken.rules[leaf]
        taken.refused.update(dict.fromkeys(model.specs[leaf].paths, why))
    if not taken.rules:
        raise Refusal(f"Qwix takes none of the {len(taken.refused)} layers; the first: {taken.lines()[0]}")
    quantized, own, _ = under(taken.rules)
    return QwixModel(quantized, own, "qt" if scanned else "ptq", taken)


def _module(leaf: str) -> str:
    return leaf.rpartition("/")[0]


def _refusal(
    model: QuantizedModel, together: Sequence[LayerSpec], policy: Policy, widths: Collection[int]
) -> str | None:
    """Why the layers of one module cannot have a rule; None where they can."""
    module, each = _module(together[0].leaf), set()
    for spec in together:
        for path, in_float in zip(spec.paths, spec.in_float, strict=True):
            bits = Bits(32, 32) if in_float else policy[path]
            each.add(bits if jnp.ndim(bits.w) == 0 else Bits("one for each output channel", bits.a))
    if len(each) > 1:
        return f"a rule holds for the whole module {module!r}, and its layers have {len(each)} different bits"
    w, a = each.pop()
    if w == a == 32:
        return "left in float"
    if w != a:
        return f"its weight bits are {w} and its activation bits {a}; Qwix takes equal ones"
    if w not in TYPES:
        return f"{w} bits are no type that both operands can have; there are int8 and int4"
    if w not in widths:
        return f"this device has no product of {TYPES[w]}"
    if any(where.rpartition("/")[0].endswith(f"/{module}") for where, _ in model.products):
        return f"module {module!r} also multiplies two activations, which a rule would quantize too"
    return None


Rules = Mapping[str, qwix.QuantizationRule]
# What `_under` returns.
Under = tuple[linen.Module, dict[str, Any], list[str]]


def _under(
    module: linen.Module,
    variables: Mapping[str, Any],
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any],
    scanned: bool,
    rules: Rules,
) -> Under:
    """(module under Qwix, its variables, leaves whose rule was not used), tracing it once."""
    provider = (qwix.QtProvider if scanned else qwix.PtqProvider)(list(rules.values()))
    under = qwix.quantize_model(module, provider)
    if scanned:
        jax.eval_shape(lambda variables, inputs: under.apply(variables, *inputs, **kwargs), variables, inputs)
        idle = {rule.module_path for rule in provider.get_unused_rules()}
        return under, dict(variables), [leaf for leaf, rule in rules.items() if rule.module_path in idle]
    keys = {name: jax.random.key(0) for name in ("params", "dropout")}
    shapes = jax.eval_shape(lambda inputs: under.init(keys, *inputs, **kwargs), inputs)["params"]
    # Quantized parameters come with how they are; ours beside them (step sizes) are left out.
    unused = [leaf for leaf in rules if not hasattr(flax_seam.flatten(shapes)[leaf], "how")]
    quantize = jax.jit(lambda params: qwix.quantize_params(params, shapes, allow_extra_params=True))
    return under, {**variables, "params": quantize(variables["params"])}, unused


def _faults(under: Callable[[Rules], Under], rules: Rules) -> dict[str, str]:
    """leaf -> what Qwix has against its rule, found by tracing: all together, and each alone where that fails."""

    def of(rules: Rules) -> dict[str, str]:
        return dict.fromkeys(under(rules)[2], "Qwix did not find its parameter in a product of its module")

    if not rules:
        return {}
    try:
        return of(rules)
    except Exception:  # Qwix asserts and raises of every kind
        faults: dict[str, str] = {}
        for leaf, rule in rules.items():
            try:
                faults |= of({leaf: rule})
            except Exception as error:
                faults[leaf] = " ".join(f"Qwix: {type(error).__name__}: {error}".split())[:200]
        return faults
