"""Rules of a search: which bits a layer may get, and which layers get the same. No JAX.

  REGEX=8,8            these bits and no others          REGEX=4,4|4,8|8,8   these pairs
  REGEX=w2/4/8,a4/8    these weight and activation bits  REGEX=w4/8, =a8, =4/8   of weights, activations, both
  REGEX=w4+, =a3+, =4+   at least                        REGEX=w4-, =4-      at most
  REGEX=not w2/3       any but these                     REGEX=equal         weight and activation bits equal
  REGEX=share          layers that match get the same bits; with groups in the regex, those whose groups match alike,
                       e.g. "(block\\d+)/attn/(?:query|key|value)=share"
  REGEX=share a        the same of activation bits alone, as for layers that read one tensor

All rules that match a layer hold together.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from mpq_jax.rules import check_rules, compiled
from mpq_jax.types import Importance, Refusal

FORMS = '"8,8", "4,4|4,8|8,8", "w2/4/8,a4/8", "4/8", "w4+", "4-", "not w2", "equal", "share" or "share a"'
_LIST = r"\d{1,2}(?:/\d{1,2})*"


class Rule(NamedTuple):
    """pattern: a regex over layer paths. pair(w, a) -> whether bits are allowed; None: the layers share bits.

    shared: which bits, where they share: "wa" or "a".
    """

    pattern: str
    pair: Callable[[int, int], bool] | None
    text: str
    shared: str = ""


def parse_rule(text: str) -> Rule:
    """One rule from text; see the module's docstring for the forms. Raises Refusal for anything else."""
    pattern, equals, value = text.rpartition("=")
    if not equals or not pattern:
        raise Refusal(f'rule {text!r} is not understood; write "regex=value" with a value such as {FORMS}')
    compiled(pattern, f"rule {text!r}:")
    value = value.strip()
    if value in ("share", "share a"):
        return Rule(pattern, None, text, "wa" if value == "share" else "a")
    pair = _pair(value)
    if pair is None:
        raise Refusal(f"rule {text!r} is not understood; its value {value!r} must be like {FORMS}")
    return Rule(pattern, pair, text)


def _pair(value: str) -> Callable[[int, int], bool] | None:
    if value == "equal":
        return lambda w, a: w == a
    if re.fullmatch(r"\d{1,2},\d{1,2}(?:\|\d{1,2},\d{1,2})*", value):
        pairs = {tuple(map(int, pair.split(","))) for pair in value.split("|")}
        return lambda w, a: (w, a) in pairs
    if found := re.fullmatch(f"w({_LIST}),a({_LIST})", value):
        weights, activations = _numbers(found[1]), _numbers(found[2])
        return lambda w, a: w in weights and a in activations
    found = re.fullmatch(rf"(not )?([wa]?)({_LIST})|([wa]?)(\d{{1,2}})([+-])", value)
    if not found:
        return None
    which = found[2] or found[4] or "wa"
    if found[6]:
        bound, up = int(found[5]), found[6] == "+"

        def holds(bits: int) -> bool:
            return bits >= bound if up else bits <= bound

    else:
        listed, wanted = _numbers(found[3]), not found[1]

        def holds(bits: int) -> bool:
            return (bits in listed) == wanted

    return lambda w, a: ("w" not in which or holds(w)) and ("a" not in which or holds(a))


def _numbers(text: str) -> set[int]:
    return {int(number) for number in text.split("/")}


def check_search_rules(texts: Sequence[str], importance: Importance) -> None:
    """Raises Refusal for a rule that is not understood, matches no searched layer, or leaves a layer no bits."""
    searched = [layer.path for layer in importance.layers if layer.searched]
    rules = [parse_rule(text) for text in texts]
    for rule in rules:
        fixed = [(layer.path, layer.bits) for layer in importance.layers if layer.bits and not layer.searched]
        fixed = [(path, bits) for path, bits in fixed if re.search(rule.pattern, path)]
        if fixed and not any(re.search(rule.pattern, path) for path in searched):
            path, bits = fixed[0]
            shown = "float" if max(bits) >= 32 else f"{bits.w},{bits.a}"
            raise Refusal(
                f"rule {rule.text!r} matches no layer that is searched: {path!r} is fixed at {shown} since training "
                "(--quantize.ends, --quantize.rules of train.py); leave the rule out, or train with other ones"
            )
    check_rules([(rule.pattern, None) for rule in rules], searched)
    allowed_pairs(importance._replace(rules=tuple(texts)))


def allowed_pairs(importance: Importance) -> np.ndarray:
    """bool [L, Kw, Ka]: the choices that each searched layer's candidates and the table's rules leave.

    Raises Refusal, naming layer and rule, where nothing is left.
    """
    searched = [layer for layer in importance.layers if layer.searched]
    widths, activation_widths = importance.bit_widths, importance.activation_bit_widths
    allowed = np.ones((len(searched), len(widths), len(activation_widths)), bool)
    for row, layer in enumerate(searched):
        if layer.weight_bit_widths is None and layer.activation_bit_widths is None:
            continue
        w = np.isin(widths, layer.candidates("weight", widths))
        a = np.isin(activation_widths, layer.candidates("activation", activation_widths))
        allowed[row] = w[:, None] & a
    for rule in map(parse_rule, importance.rules):
        if rule.pair is None:
            continue
        holds = np.array([[rule.pair(w, a) for a in activation_widths] for w in widths])
        for row, layer in enumerate(searched):
            if not re.search(rule.pattern, layer.path):
                continue
            allowed[row] &= holds
            if not allowed[row].any():
                has_w, has_a = layer.candidates("weight", widths), layer.candidates("activation", activation_widths)
                raise Refusal(
                    f"rule {rule.text!r} leaves layer {layer.path!r} no bits; its candidates are W "
                    f"{'/'.join(map(str, has_w))}, A {'/'.join(map(str, has_a))}, and all rules that match hold together; other "
                    f'bits are for training: train.py --quantize.rules "{layer.path}=8,8", or --quantize.bit_widths'
                )
    return allowed


def shared_groups(importance: Importance) -> list[list[int]]:
    """The searched layers' numbers in groups that get the same bits, most of them alone; in order."""
    searched = [layer.path for layer in importance.layers if layer.searched]
    group_of = list(range(len(searched)))
    for rule in map(parse_rule, importance.rules):
        if rule.shared == "wa":
            for members in bound_by(rule, searched):
                key = group_of[members[0]]
                joined = {group_of[row] for row in members}
                group_of = [key if g in joined else g for g in group_of]
    groups: dict[int, list[int]] = {}
    for row, g in enumerate(group_of):
        groups.setdefault(g, []).append(row)
    return list(groups.values())


def tied_names(importance: Importance) -> list[list[str]]:
    """For each searched layer, names that it shares with the layers whose activation bits are its own: of the tensor
    that it reads, and of "share a" rules."""
    searched = [layer for layer in importance.layers if layer.searched]
    names = [[layer.tied] if layer.tied is not None else [] for layer in searched]
    for rule in map(parse_rule, importance.rules):
        if rule.shared == "a":
            for number, members in enumerate(bound_by(rule, [layer.path for layer in searched])):
                for row in members:
                    names[row].append(f"{rule.text} {number}")
    return names


def bound_by(rule: Rule, paths: Sequence[str]) -> list[list[int]]:
    """Numbers of the paths that a rule binds together: those that match, by what their regex groups match."""
    found: dict[tuple[str | None, ...], list[int]] = {}
    for row, path in enumerate(paths):
        if match := re.search(rule.pattern, path):
            found.setdefault(match.groups(), []).append(row)
    return list(found.values())
