"""The multiple-choice problem behind a search, as dense arrays: one row a layer, one column a pair of bits."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mpq_jax import costs
from mpq_jax.costs import add, human
from mpq_jax.importance import combined
from mpq_jax.policy import tied_candidates
from mpq_jax.search.constraints import allowed_pairs, shared_groups, tied_names
from mpq_jax.types import Bits, Budget, Importance, Interaction, Refusal


class Term(NamedTuple):
    """Harm of two rows together: table[level_a[picks[a]], level_b[picks[b]]] is added to the sum.

    a, b: two different rows. level_a, level_b: int [C], which of the table's widths a column stands for.
    """

    a: int
    b: int
    level_a: np.ndarray
    level_b: np.ndarray
    table: np.ndarray


class Problem(NamedTuple):
    """minimise the sum of value[l, picks[l]] and of all terms over one allowed column a row, with sum cost[m][l, picks[l]] <= limit[m].

    paths: L rows, each the searched layers that get the same bits: mostly one, more where a rule says "share".
    w, a: int [C] bits of each column; column i * Ka + j has the i-th weight width and the j-th activation width.
    allowed: bool [L, C]. value: float64 [L, C], infinite where not allowed.
    cost: per budget [L, C] (int64 where exact). limit: what is left of each budget after the fixed layers, which cost
    `fixed` of `whole`. names: of the budgets.
    widths: (Kw, Ka), C = Kw * Ka. tied: groups of rows that share activation bits.
    """

    paths: tuple[tuple[str, ...], ...]
    w: np.ndarray
    a: np.ndarray
    allowed: np.ndarray
    value: np.ndarray
    cost: tuple[np.ndarray, ...]
    limit: tuple[int | float, ...]
    fixed: tuple[int | float, ...]
    whole: tuple[int | float, ...]
    names: tuple[str, ...]
    widths: tuple[int, int]
    tied: tuple[tuple[int, ...], ...]
    terms: tuple[Term, ...] = ()

    def keep(self, chosen: np.ndarray) -> "Problem":
        """The problem with only some choices; chosen: bool [L, C]."""
        allowed = self.allowed & chosen
        return self._replace(allowed=allowed, value=np.where(allowed, self.value, np.inf))

    @property
    def bits(self) -> np.ndarray:
        """int [L, C]: bits that a choice gives away, of all layers of its row."""
        return np.array([len(paths) for paths in self.paths])[:, None] * (self.w + self.a)

    def shared_bits(self, group: tuple[int, ...]) -> set[int]:
        """Activation bits that all rows of a tied group may have."""
        return set.intersection(*(set(self.a[self.allowed[row]].tolist()) for row in group))

    def policy(self, picks: np.ndarray) -> dict[str, Bits]:
        """Bits of the searched layers, from the columns [L] picked."""
        return {
            path: Bits(int(self.w[p]), int(self.a[p]))
            for paths, p in zip(self.paths, picks, strict=True)
            for path in paths
        }

    def picks(self, policy: Mapping[str, Bits]) -> np.ndarray | None:
        """The columns [L] that a policy picks; None where it picks what is not allowed here."""
        found = []
        for row, paths in enumerate(self.paths):
            column = np.flatnonzero((self.w == policy[paths[0]].w) & (self.a == policy[paths[0]].a))
            if len({policy[path] for path in paths}) > 1 or not len(column) or not self.allowed[row, column[0]]:
                return None
            found.append(column[0])
        picks = np.array(found)
        return picks if all(len(set(self.a[picks[list(group)]])) == 1 for group in self.tied) else None

    def spent(self, picks: np.ndarray) -> tuple[int | float, ...]:
        """What the picks cost, exactly."""
        rows = np.arange(len(picks))
        return tuple(add(c[rows, picks].tolist()) for c in self.cost)

    def fits(self, picks: np.ndarray) -> bool:
        """Whether every budget holds: in exact arithmetic; for measured costs as `costs.used` adds them up."""
        rows = np.arange(len(picks))
        return all(
            add([fixed, *c[rows, picks].tolist()]) <= whole
            for c, fixed, whole in zip(self.cost, self.fixed, self.whole, strict=True)
        )

    def only(self, minimise: int, within: int) -> "Problem":
        """The least of one budget's cost within another budget."""
        return self._replace(
            value=np.where(self.allowed, self.cost[minimise].astype(np.float64), np.inf),
            cost=(self.cost[within],),
            limit=(self.limit[within],),
            fixed=(self.fixed[within],),
            whole=(self.whole[within],),
            names=(self.names[within],),
            terms=(),
        )

    def lowered(self) -> "Problem":
        """A problem without terms that is nowhere dearer: each term's least, given one of its rows, goes to that row."""
        value = self.value.copy()
        for term in self.terms:
            open_a = np.unique(term.level_a[self.allowed[term.a]])
            open_b = np.unique(term.level_b[self.allowed[term.b]])
            least_a = term.table[:, open_b].min(1)
            least_b = (term.table - least_a[:, None])[open_a].min(0)
            value[term.a] += least_a[term.level_a]
            value[term.b] += least_b[term.level_b]
        return self._replace(value=value, terms=())


def build(importance: Importance, budgets: Sequence[Budget], alpha: float | None = None) -> Problem:
    """All allowed choices: each layer's own candidates, within the table's rules, and within budgets on the largest.

    Raises Refusal where a row has no choice left, where tied layers have no activation bits in common, and for numbers
    too large to add up.
    """
    with np.errstate(over="ignore"):
        table = combined(importance, alpha)
    # 1e140: squares, and products with a solver's scales and multipliers, stay finite too.
    if not np.abs(table).max(initial=0.0) < 1e140:
        raise Refusal("the importance holds numbers of 1e140 or more; divide the whole table by a constant")
    searched = [layer for layer in importance.layers if layer.searched]
    allowed = allowed_pairs(importance)
    for budget in budgets:
        if budget.table.shape != allowed.shape:
            raise Refusal(
                f"the budget {budget.text!r} is of {' x '.join(map(str, budget.table.shape))} layers and widths, the importance "
                f"of {' x '.join(map(str, allowed.shape))}: it was parsed for another table; parse it for this one"
            )
    check_largest(importance, budgets, allowed)
    for budget in budgets:
        if budget.largest:
            allowed &= budget.table <= budget.limit
    sums = [budget for budget in budgets if not budget.largest]
    groups = shared_groups(importance)
    members = [[searched[i].path for i in group] for group in groups]
    names = tied_names(importance)
    kw, ka = len(importance.bit_widths), len(importance.activation_bit_widths)

    alone = len(groups) == len(searched)

    def summed(values: np.ndarray) -> np.ndarray:
        return (values if alone else np.array([values[group].sum(0) for group in groups])).reshape(len(groups), kw * ka)

    together = allowed if alone else np.array([allowed[group].all(0) for group in groups])
    own = together.reshape(len(groups), kw * ka)
    _check_left(own, members, "the rules and candidates leave no bits")
    problem = Problem(
        paths=tuple(tuple(paths) for paths in members),
        w=np.repeat(importance.bit_widths, ka),
        a=np.tile(importance.activation_bit_widths, kw),
        allowed=own,
        value=np.where(own, summed(table), np.inf),
        cost=tuple(summed(budget.table) for budget in sums),
        limit=tuple(budget.limit - budget.fixed for budget in sums),
        fixed=tuple(budget.fixed for budget in sums),
        whole=tuple(budget.limit for budget in sums),
        names=tuple(budget.name for budget in sums),
        widths=(kw, ka),
        tied=_tied_rows([[name for i in group for name in names[i]] for group in groups]),
    )
    tied_candidates(importance.layers, importance.activation_bit_widths)  # refuses ties without common candidates
    return _with_terms(_within_ties(problem), importance.interactions)


def _with_terms(problem: Problem, interactions: Sequence[Interaction]) -> Problem:
    """Interactions as terms; what two decisions of one row do together is that row's own value."""
    row_of = {path: row for row, paths in enumerate(problem.paths) for path in paths}
    ka = problem.widths[1]
    columns = np.arange(len(problem.w))
    level = {"w": columns // ka, "a": columns % ka}
    value = problem.value.copy()
    terms: dict[tuple[int, str, int, str], np.ndarray] = {}
    for each in interactions:
        (a, kind_a), (b, kind_b) = (row_of[each.a[0]], each.a[1]), (row_of[each.b[0]], each.b[1])
        if not np.abs(each.table).max() < 1e140:
            raise Refusal("the interactions hold numbers of 1e140 or more; divide the whole table by a constant")
        if a == b:
            value[a] += each.table[level[kind_a], level[kind_b]]
        else:
            key = a, kind_a, b, kind_b
            terms[key] = terms.get(key, 0.0) + each.table
    return problem._replace(
        value=value,
        terms=tuple(Term(a, b, level[ka_], level[kb_], table) for (a, ka_, b, kb_), table in terms.items()),
    )


def check_largest(importance: Importance, budgets: Sequence[Budget], allowed: np.ndarray) -> None:
    """Raises Refusal for a budget on the largest layer that some layer cannot keep; allowed: bool [L, Kw, Ka]."""
    searched = [layer.path for layer in importance.layers if layer.searched]
    for budget in budgets:
        if not budget.largest:
            continue
        least_each = np.where(allowed, budget.table, np.iinfo(np.int64).max).min((1, 2)).tolist()
        reachable, path = max([(budget.fixed, "a fixed layer"), *zip(least_each, searched, strict=True)])
        if reachable > budget.limit:
            raise _beyond(budget, reachable, f" (of {path})")


def _tied_rows(tied: Sequence[Sequence[str]]) -> tuple[tuple[int, ...], ...]:
    """Groups of rows that share activation bits: rows of one tied name, and all rows that chains of names connect."""
    group_of: dict[str, set[int]] = {}
    for row, names in enumerate(tied):
        joined = set().union({row}, *(group_of.get(name, set()) for name in names))
        for name in [*names, *(n for n, rows in group_of.items() if rows & joined)]:
            group_of[name] = joined
    groups = {tuple(sorted(rows)) for rows in group_of.values()}
    return tuple(sorted(group for group in groups if len(group) > 1))


def _within_ties(problem: Problem) -> Problem:
    """Drops choices whose activation bits another row of the group cannot have."""
    for group in problem.tied:
        rows = list(group)
        mask = np.ones_like(problem.allowed)
        mask[rows] = np.isin(problem.a, list(problem.shared_bits(group)))
        problem = problem.keep(mask)
        paths = [problem.paths[row] for row in rows]
        _check_left(problem.allowed[rows], paths, "they read one tensor, and no activation bits are left in common")
    return problem


def _check_left(allowed: np.ndarray, paths: Sequence[Sequence[str]], why: str) -> None:
    for row, names in zip(allowed, paths, strict=True):
        if not row.any():
            raise Refusal(f"no choice is left for {', '.join(names)}: {why}; loosen a rule, or allow more bits")


def without_dominated(problem: Problem) -> Problem:
    """Drops every choice that another of its row beats or equals in value and in every cost.

    One of equal value goes only if the other has no more bits, since fewer bits win ties: of equal choices the one
    with fewer bits stays (then fewer weight bits), the same way every time. Among tied rows only choices of the same
    activation bits compare; rows with terms are left as they are.
    """
    # Rank first what should win a tie.
    order = np.lexsort((problem.w, problem.w + problem.a))
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    value = problem.value
    # [l, x, y]: y stands above x.
    better = value[:, None, :] < value[:, :, None]
    better |= (value[:, None, :] == value[:, :, None]) & (rank[None, :] < rank[:, None])
    for c in problem.cost:
        better &= c[:, None, :] <= c[:, :, None]
    in_group = np.isin(np.arange(len(value)), [row for group in problem.tied for row in group])
    better &= (problem.a[None, :] == problem.a[:, None]) | ~in_group[:, None, None]
    dominated = (better & problem.allowed[:, None, :]).any(2)
    dominated[[row for term in problem.terms for row in (term.a, term.b)]] = False
    return problem.keep(~dominated)


def within_room(problem: Problem) -> Problem:
    """Drops every choice that breaks a budget even beside the least of all other rows."""
    for cost, limit in zip(problem.cost, problem.limit, strict=True):
        lowest = np.where(problem.allowed, cost, cost.max()).min(1)
        room = limit - add(lowest.tolist())
        # Measured costs are added up to 9 decimals.
        slack = 0 if cost.dtype.kind == "i" else 1e-8
        problem = problem.keep(cost - lowest[:, None] <= room + slack)
    return problem


def least(problem: Problem, budget: int, fixed: int | float = 0) -> int | float:
    """The least that any policy costs in one budget beside `fixed`, ties respected."""
    cost = problem.cost[budget]
    grouped = {row for group in problem.tied for row in group}
    terms = [cost[row][mask].min().item() for row, mask in enumerate(problem.allowed) if row not in grouped]
    for group in problem.tied:
        rows = list(group)
        cheapest = [
            [cost[r][problem.allowed[r] & (problem.a == a)].min().item() for r in rows]
            for a in problem.shared_bits(group)
        ]
        terms += min(cheapest, key=add)
    return add([fixed, *terms])


def check_reachable(problem: Problem, budgets: Sequence[Budget]) -> None:
    """Raises Refusal for a budget that no policy keeps, with the least reachable value."""
    for m, budget in enumerate(budget for budget in budgets if not budget.largest):
        reachable = least(problem, m, budget.fixed)
        if reachable > budget.limit:
            raise _beyond(budget, reachable)


def _beyond(budget: Budget, reachable: int | float, where: str = "") -> Refusal:
    limit, least_of = costs.shown(budget, budget.limit), costs.shown(budget, reachable)
    return Refusal(
        f"budget {budget.text} allows {human(limit, budget.unit)} ({limit}), but the least reachable is "
        f"{human(least_of, budget.unit)} ({least_of}){where}; ask for at least that, or allow fewer bits"
    )
