"""Rules of a search: every form against a predicate in plain Python, alone and in a search; what is refused."""

import re

import numpy as np
import pytest
from tables import best_by_force, budgets_of, made

from mpq_jax import Refusal
from mpq_jax.search import best_uniform, random_policies, solve
from mpq_jax.search.constraints import allowed_pairs, check_search_rules, shared_groups

# rule -> (layers it speaks of, what holds for their bits)
FORMS = {
    "layer1=3,4": ("layer1", lambda w, a: (w, a) == (3, 4)),
    "layer[01]=2,2|2,4|4,4": ("layer[01]", lambda w, a: (w, a) in [(2, 2), (2, 4), (4, 4)]),
    "layer=w2/4,a3/4": ("layer", lambda w, a: w in (2, 4) and a in (3, 4)),
    "layer=w2/4": ("layer", lambda w, a: w in (2, 4)),
    "layer0=a4": ("layer0", lambda w, a: a == 4),
    "layer[23]=2/4": ("layer[23]", lambda w, a: w in (2, 4) and a in (2, 4)),
    "layer0=w3+": ("layer0", lambda w, a: w >= 3),
    "0$=a3+": ("0$", lambda w, a: a >= 3),
    "layer2=3+": ("layer2", lambda w, a: w >= 3 and a >= 3),
    "layer3=w3-": ("layer3", lambda w, a: w <= 3),
    "layer3=3-": ("layer3", lambda w, a: w <= 3 and a <= 3),
    "layer=not w3": ("layer", lambda w, a: w != 3),
    "layer=not 2/3": ("layer", lambda w, a: w == 4 and a == 4),
    "layer=not a2": ("layer", lambda w, a: a != 2),
    "layer=equal": ("layer", lambda w, a: w == a),
}


def holds(rules, policy):
    return all(
        FORMS[rule][1](*bits) for rule in rules for path, bits in policy.items() if re.search(FORMS[rule][0], path)
    )


@pytest.mark.parametrize("rule", FORMS)
def test_forms(rule):
    importance = made(1)._replace(rules=(rule,))
    pattern, predicate = FORMS[rule]
    allowed = allowed_pairs(importance)
    for row, layer in enumerate(ly for ly in importance.layers if ly.searched):
        for i, w in enumerate(importance.bit_widths):
            for j, a in enumerate(importance.activation_bit_widths):
                assert allowed[row, i, j] == (not re.search(pattern, layer.path) or predicate(w, a))


@pytest.mark.parametrize(
    "rules", [(rule,) for rule in FORMS] + [("layer=equal", "layer0=w3+"), ("layer=w2/4", "0$=a3+")]
)
def test_search_keeps_rules_and_loses_nothing_else(rules):
    """Against all policies, and so do the uniform and the random policies beside the answer."""
    importance = made(1)._replace(rules=rules)

    def searched(policy):
        return {path: bits for path, bits in policy.items() if path.startswith("layer")}

    budgets = budgets_of(importance, "bitops=W4A4" if rules == ("layer=not 2/3",) else "bitops=W4A3")
    best, _ = best_by_force(importance, budgets, allowed=lambda policy: holds(rules, searched(policy)))
    found = solve(importance, budgets)
    assert found.objective == pytest.approx(best) and holds(rules, searched(found.policy))
    name, uniform = best_uniform(importance, budgets)
    assert holds(rules, searched(uniform)) and re.fullmatch(r"W\dA\d", name)
    for policy in random_policies(importance, budgets, 3, within=0.2):
        assert holds(rules, searched(policy))


def test_share():
    """Layers bound together: all that match, or those whose groups match alike; chains of rules join."""
    importance = made(1, layers=6)
    assert shared_groups(importance._replace(rules=("layer[135]=share",))) == [[0], [1, 3, 5], [2], [4]]
    assert shared_groups(importance._replace(rules=("layer[01]=share", "layer[12]=share"))) == [
        [0, 1, 2],
        [3],
        [4],
        [5],
    ]
    names = ["b0/attn/query", "b0/attn/key", "b0/mlp", "b1/attn/query", "b1/attn/key", "b1/mlp"]
    table = [
        ly._replace(path=names[int(ly.path[-1])]) if ly.path.startswith("layer") else ly for ly in importance.layers
    ]
    named = importance._replace(layers=tuple(table), rules=(r"(b\d)/attn/(?:query|key)=share",))
    assert shared_groups(named) == [[0, 1], [2], [3, 4], [5]]
    budgets = budgets_of(named, "bitops=W3A3")
    policy = solve(named, budgets).policy
    assert policy["b0/attn/query"] == policy["b0/attn/key"] and policy["b1/attn/query"] == policy["b1/attn/key"]
    for other in random_policies(named, budgets, 5):
        assert other["b0/attn/query"] == other["b0/attn/key"]


def test_share_with_ties_equals_brute_force():
    for seed in range(4):
        importance = made(seed, tied=True)._replace(rules=("layer[12]=share",))
        budgets = budgets_of(importance, "bitops=W3A3", "size=W3")
        best, _ = best_by_force(importance, budgets, allowed=lambda policy: policy["layer1"] == policy["layer2"])
        assert solve(importance, budgets).objective == pytest.approx(best)


def test_share_activations_alone_equals_brute_force():
    """With a tie that the table has, they are one group; weight bits stay free."""
    for seed in range(4):
        importance = made(seed, tied=True)._replace(rules=("layer[12]=share a",))
        budgets = budgets_of(importance, "bitops=W3A3", "size=W3")
        best, _ = best_by_force(importance, budgets, allowed=lambda policy: policy["layer1"].a == policy["layer2"].a)
        found = solve(importance, budgets)
        assert found.objective == pytest.approx(best)
        assert len({found.policy[f"layer{i}"].a for i in range(3)}) == 1
        for policy in random_policies(importance, budgets, 3, within=0.3):
            assert len({policy[f"layer{i}"].a for i in range(3)}) == 1


@pytest.mark.parametrize(
    "rules, words",
    [
        (["layer0"], "write"),
        (["=w4"], "write"),
        (["layer0=w"], "value 'w'"),
        (["layer0=sharing"], "must be like"),
        (["lay(er=w4"], "not a regular expression"),
        (["conv=w4"], "matches no layer"),
        (["first=w4"], "matches no layer that is searched: 'first' is fixed at 8,8"),
        (["last=8,8"], "'last' is fixed at float"),
        (["layer0=w8"], 'train.py --quantize.rules "layer0=8,8"'),
        (["layer0=w3+", "layer=w2"], "'layer=w2' leaves layer 'layer0' no bits"),
    ],
)
def test_refused(rules, words):
    with pytest.raises(Refusal, match=re.escape(words)) as refusal:
        check_search_rules(rules, made(1))
    assert "\n" not in str(refusal.value)


def test_layers_that_share_or_tie_without_anything_in_common():
    importance = made(1, tied=True)
    with pytest.raises(Refusal, match=r"layer0, layer2.*leave no bits"):
        solve(
            importance._replace(rules=("layer[02]=share", "layer0=w2", "layer2=w4")), budgets_of(importance, "size=W4")
        )
    with pytest.raises(Refusal, match="no activation bits are left in common"):
        solve(importance._replace(rules=("layer0=a2", "layer1=a4")), budgets_of(importance, "size=W4"))


def test_rules_survive_the_file(tmp_path):
    from mpq_jax.importance import load_importance, save_importance

    importance = made(1)._replace(rules=("layer0=w3+", "layer=equal"))
    save_importance(tmp_path / "i.json", importance)
    again = load_importance(tmp_path / "i.json")
    assert again.rules == importance.rules and np.array_equal(allowed_pairs(again), allowed_pairs(importance))
