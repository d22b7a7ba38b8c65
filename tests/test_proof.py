"""The proof's own parts, and that docs/results.md says what the committed lines say; the stages on digits."""

import itertools
import json

import numpy as np
import pytest
from tables import budgets_of, made

from benchmarks import (
    proof,
    proof_accuracy,
    proof_alpha,
    proof_cheaper,
    proof_contest,
    proof_document,
    proof_firm,
    proof_lines,
    proof_prediction,
    proof_statistics,
    proof_tables,
)
from mpq_jax import build, config, costs, importance
from mpq_jax.criteria import files
from mpq_jax.search import random_policies
from mpq_jax.types import Bits, Importance, Layer


@pytest.fixture(scope="module")
def runs():
    return proof_document.read(proof_document.LINES)


def test_the_document_agrees_with_the_lines(runs):
    assert proof_document.DOCUMENT.read_text() == proof_document.document(
        runs, proof_document.read(proof_document.CHEAPER)
    ), "write it again: python -m benchmarks.proof_document"


def test_a_correlation_computed_another_way(runs):
    lines = runs["resnet8", 0]
    found = proof_prediction.correlations({("resnet8", 0): lines}, "resnet8", "W3A3", "learned", after=False)
    ranks = [
        np.argsort(np.argsort(x)) for x in (lines["predicted W3A3 learned"]["values"], lines["random W3A3"]["loss"])
    ]
    assert found == pytest.approx([np.corrcoef(*ranks)[0, 1]])


def test_a_difference_computed_another_way(runs):
    wanted = []
    for seed in range(5):
        lines = runs["resnet8", seed]
        one = lines["finetuned " + proof_lines.digest(lines["chosen W3A3 sampled"]["policy"])]
        others = [
            lines["finetuned " + proof_lines.digest(lines[f"chosen W3A3 uniform {name}"]["policy"])]
            for name in ("W2A4", "W3A3", "W4A2")
        ]
        wanted.append(one["test_accuracy"] - min(others, key=lambda each: each["loss"])["test_accuracy"])
    assert proof_accuracy.differences(runs, "resnet8", "W3A3", "sampled") == pytest.approx(wanted)


def of_accuracies(accuracies, own=None):
    """{("resnet8", seed): lines} of contestants' test accuracies at W2A3, a value a seed; own: of the running statistics."""
    runs = {}
    for number, (name, values) in enumerate(accuracies.items()):
        for seed, value in enumerate(values):
            bits = [[number, seed]]
            line = {"test_accuracy": value, "loss": 1 - value, "train_loss": 1.0}
            if own:
                line["running"] = {"test_accuracy": own[name][seed], "loss": 1 - own[name][seed], "train_loss": 0.9}
            lines = runs.setdefault(("resnet8", seed), {})
            lines[f"chosen W2A3 {name}"] = {"policy": bits}
            lines[f"finetuned {proof_lines.digest(bits)}"] = line
    return runs


def test_who_is_ahead_of_the_default_by_more_than_one_standard_error():
    """Three seeds: a constant that is ahead by 1, 2 and 3 points, a random policy by -1, 0 and 3, MPQCO in two seeds alone."""
    accuracies = {
        "uniform W2A3": (0.5, 0.5, 0.51),  # a budget is one that uniform policies were fine-tuned at
        "output_fisher_third": (0.80, 0.80, 0.80),
        "constant": (0.81, 0.82, 0.83),  # mean 2, standard error 1 / sqrt(3)
        "random": (0.79, 0.80, 0.83),  # mean 2/3, standard error 2.08 / sqrt(3)
        "learned": (0.70, 0.71, 0.72),
        "mpqco": (0.90, 0.90),
    }
    runs = of_accuracies(accuracies)
    found = proof_accuracy.told_apart(runs, "resnet8")
    assert found == {"ahead": "control: constant at W2A3 (-2.00 ± 2.48)", "behind": "1", "count": "3"}
    assert proof_accuracy.uniform_ahead(runs, "resnet8") == f"{-(0.89 / 3) / (0.01 / 3):.1f}"


def test_what_one_of_two_statistics_tells_apart():
    """The default is ahead of a constant by 1.0, 1.0, 1.1 points, or by 1, -1 and 2; and of uniform policies either way."""
    accuracies = {
        "uniform W2A3": (0.5, 0.5, 0.51),
        "output_fisher_third": (0.8, 0.8, 0.8),
        "constant": (0.79, 0.79, 0.789),
        "learned": (0.9, 0.9, 0.901),
    }
    own = {**accuracies, "constant": (0.79, 0.81, 0.78), "learned": (0.7, 0.7, 0.701)}
    runs = of_accuracies(accuracies, own)
    better = {run: proof_lines.kept(lines) for run, lines in runs.items()}
    found = proof_firm.crossing(runs, better, "resnet8")
    assert found == {
        "crossing": "control: constant at W2A3 (+1.03 ± 0.14 and +0.67 ± 3.79)",
        "count": "3",
        "opposite": "1",
    }


def test_a_fine_tuning_has_failed_that_ends_two_points_below_the_median():
    accuracies = {"learned": (0.80,), "constant": (0.81,), "mpqco": (0.778,), "hawq": (0.5,), "random": (0.1,)}
    runs = of_accuracies(accuracies)
    same = runs["resnet8", 0]["chosen W2A3 hawq"]
    runs["resnet8", 0]["chosen W2A3 hawq_v2"] = same  # the same policy is fine-tuned once
    # Of 0.5, 0.778, 0.80 and 0.81 the median is 0.789.
    assert proof_firm.failed(runs, "resnet8") == "1 of 4: HAWQ and HAWQ-v2, seed 0, W2A3 (-28.9)"


def test_of_two_statistics_those_are_kept_that_lose_less_in_training():
    """Whatever they lose on validation images; a line that has but one of them is left out."""

    def line(train_loss, own_train_loss):
        own = {"train_loss": own_train_loss, "loss": 1.0, "test_accuracy": 0.7}
        return {"steps": 9, "train_loss": train_loss, "loss": 2.0, "test_accuracy": 0.8, "running": own}

    lines = {"chosen a b": {"policy": 1}, "finetuned 1": line(0.3, 0.2), "longer 1": line(0.3, 0.4)}
    lines |= {"tuned W3A3 0": line(0.3, 0.3), "repeat W3A3 0": {"loss": 2.0}, "finetuned 2": {"loss": 2.0}}
    found = proof_lines.kept(lines)
    assert {key: one.get("loss") for key, one in found.items()} == {
        "chosen a b": None,
        "finetuned 1": 1.0,
        "longer 1": 2.0,
        "tuned W3A3 0": 1.0,
    }
    assert [one["steps"] for one in found.values() if "steps" in one] == [9, 9, 9]
    assert (found["finetuned 1"]["test_accuracy"], found["longer 1"]["test_accuracy"]) == (0.7, 0.8)
    runs = {("resnet8", s): {k: {"net": "resnet8", "key": k, **v} for k, v in lines.items()} for s in (0, 1)}
    row = proof_firm.either_table(runs, {"resnet8": "R"}).splitlines()[-1]
    assert row == "| R | 2 | 2 | 10.00 | 10.00 | 2 | -10.00 | -10.00 |"


def test_alpha_after_fine_tuning_computed_another_way():
    """Two policies' order flips where alpha does; of one budget only, and of policies that were fine-tuned."""
    lines = {"parts made": {"alpha": None, "policies": {}}}
    for budget in proof_alpha.BITOPS:
        for i, (weight, activation, loss) in enumerate([(4, 0, 1), (0, 3, 2), (4, 3, 3), (6, 3, 4)]):
            bits = [[proof_alpha.BITOPS.index(budget), i]]
            lines[f"chosen {budget} c{i}"] = {"policy": bits}
            lines[f"finetuned {proof_lines.digest(bits)}"] = {"loss": loss}
            lines["parts made"]["policies"][proof_lines.digest(bits)] = [weight, activation]
        lines[f"chosen {budget} untried"] = {"policy": [[9, 9]]}
    assert proof_alpha.within(lines, "made", 0.5) == pytest.approx(1)  # 2, 3, 5, 6
    assert proof_alpha.within(lines, "made", 1.0) == pytest.approx(0.8)  # 4, 3, 7, 9
    assert proof_alpha.within(lines, "another", 1.0) is None


def test_two_fine_tunings_agree_as_computed_another_way():
    """A prediction in the order of the mean has 1; the ceiling follows from how far the two agree."""
    rng = np.random.default_rng(1)
    once = rng.permutation(20).astype(float)
    again = once[:14] + rng.normal(size=14, scale=5)
    lines = {f"tuned W3A3 {i}": {"loss": loss} for i, loss in enumerate(once)}
    lines |= {f"repeat W3A3 {i}": {"loss": loss} for i, loss in enumerate(again)}
    lines |= {
        "random W3A3": {"loss": list(-once)},
        "predicted W3A3 learned": {"values": [*(once[:14] + again), *once[14:]]},
    }
    rows = proof_prediction.twice_table({("resnet8", 9): lines}, "resnet8").splitlines()
    found = {row.split(" | ")[0][2:]: row.split(" | ")[1].rstrip(" |") for row in rows if " | " in row}
    r = 1 - 6 * sum((np.argsort(np.argsort(once[:14])) - np.argsort(np.argsort(again))) ** 2) / (14 * (14**2 - 1))
    assert found["predicted by"] == "seed 9, W3A3 (14)" and found["learned step sizes, as published"] == "1.00"
    assert float(found["one fine-tuning with the other"]) == pytest.approx(r, abs=0.005)
    assert 0 < r < 1 and float(found["ceiling"]) ** 2 * (1 + r) == pytest.approx(2 * r, abs=0.02)
    assert set(found) >= {"ceiling", "the joint model's loss itself"} and len(rows) == 6


def test_a_table_of_the_other_runs_knows_nothing_of_its_own():
    """Runs whose losses are the same sums but for place and scale; in the last one their order is reversed."""
    rng = np.random.default_rng(2)
    entries, bits, runs = rng.uniform(size=(3, 2)), rng.integers(2, 7, (15, 3, 2)), {}
    for seed, sign in enumerate((1, 1, 1, -1)):
        losses = seed + sign * 2.0**seed * (entries / 4.0**bits).sum((1, 2))
        runs["resnet8", seed] = {"random W3A3": {"policies": bits.tolist(), "loss": losses.tolist(), "halves": []}}
    upright = dict(list(runs.items())[:3])
    assert proof_prediction.of_others(upright, "resnet8", "W3A3", after=False) == pytest.approx([1, 1, 1])
    assert proof_prediction.of_others(runs, "resnet8", "W3A3", after=False)[3] == pytest.approx(-1)
    assert not proof_prediction.of_others(dict(list(runs.items())[:2]), "resnet8", "W3A3", after=False)


def test_a_table_is_found_again_in_what_it_predicted():
    """W and A up to a constant each; layers 0 and 1 share their activation bits; layer 2 never had 4 bits."""
    rng = np.random.default_rng(0)
    table = rng.uniform(size=(2, 3, 3))  # weights or activations, layers, bits 2 to 4

    def drawn(count):
        bits = rng.integers(2, 5, (count, 3, 2))
        bits[:, 1, 1], bits[:, 2, 0] = bits[:, 0, 1], np.minimum(bits[:, 2, 0], 3)
        return bits

    def sums(bits):
        return np.stack([table[kind, np.arange(3), bits[:, :, kind] - 2].sum(1) for kind in (0, 1)], 1)

    lines = {"indicators": {"bit_widths": [2, 3, 4]}}
    for level in proof_lines.PREDICTED:
        bits = drawn(40)
        lines[f"random {level}"] = {"policies": bits.tolist()}
        lines[f"predicted {level} made"] = {"values": sums(bits).sum(1).tolist()}
        lines[f"predicted {level} pairs"] = {"values": sums(bits).prod(1).tolist()}
    asked = drawn(10)
    unknown = asked[:1].copy()
    unknown[0, 2, 0] = 4
    policies = dict(enumerate([*asked.tolist(), *unknown.tolist()]))
    found = proof_alpha.parts_of(lines, "made", policies)
    assert list(found) == list(range(10))
    apart = np.array(list(found.values())) - sums(asked)
    np.testing.assert_allclose(apart, np.broadcast_to(apart[0], apart.shape), atol=1e-9)
    third = proof_alpha.third(lines, "W3A3", "made") - sums(np.array(lines["random W3A3"]["policies"])) @ [1 / 3, 1]
    np.testing.assert_allclose(third, third[0], atol=1e-9)
    assert proof_alpha.parts_of(lines, "pairs", policies) is None
    assert proof_alpha.parts_of(lines, "another", policies) is None


def test_every_policy_keeps_its_budget(runs):
    used = [one["used"] for lines in runs.values() for key, one in lines.items() if key.startswith("chosen ")]
    assert len(used) > 100 and max(used) <= 1


def test_interval_and_reliability():
    mean, half = proof_statistics.interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.302653 / np.sqrt(3))  # t of two degrees of freedom at 0.975
    assert proof_statistics.cell([1.0]) == "1.00"
    assert proof_statistics.reliability([[1, 1], [2, 2], [3, 3]]) == pytest.approx(1)
    # Ranks 1 2 3 and 1 3 2: r = 1/2, stepped up to 2/3.
    assert proof_statistics.reliability([[1, 1], [2, 3], [3, 2]]) == pytest.approx(2 / 3)


TABLE = Importance(
    "made",
    (2, 3, 4),
    (2, 3, 4),
    (Layer("ends", 10, 100, False, Bits(8, 8)), *(Layer(f"l{i}", 10 * i, 100 * i, True) for i in (1, 2))),
    np.zeros((2, 3)),
    np.zeros((2, 3)),
)


@pytest.mark.parametrize("text", ["bitops=W2A3", "bitops=W3A3", "bitops=W4A4", "size=W3"])
def test_uniform_policies_that_no_other_has_all_bits_of(text):
    budgets = costs.parse_budgets([text], TABLE.layers, TABLE.bit_widths, TABLE.activation_bit_widths)
    policies = {
        (w, a): {layer.path: layer.bits or Bits(w, a) for layer in TABLE.layers}
        for w, a in itertools.product((2, 3, 4), repeat=2)
    }
    fitting = {wa for wa, each in policies.items() if costs.used(budgets[0], each, TABLE) <= budgets[0].limit}
    largest = {
        (w, a) for w, a in fitting if not fitting & {(v, b) for v, b in policies if v >= w and b >= a} - {(w, a)}
    }
    assert proof_contest.uniforms(TABLE, budgets) == {f"uniform W{w}A{a}": policies[w, a] for w, a in largest}


def test_policies_survive_a_line(tmp_path):
    policy = {"ends": Bits(8, 8), "l1": Bits(2, 3), "l2": Bits(4, 4)}
    lines = proof_lines.Lines(tmp_path / "lines.jsonl")
    lines.add("one", policy=proof_lines.as_lists([policy], TABLE)[0])
    with lines.path.open("a") as file:
        file.write(json.dumps({"key": "two", "policy": []})[:-4])  # a kill in the middle of a line
    again = proof_lines.Lines(lines.path)
    assert "two" not in again and proof_lines.as_policy(again["one"]["policy"], TABLE) == policy


def test_the_sampled_table_finds_additive_harm(tmp_path):
    settings = config.load("configs/digits.py")
    found, classes = build.features(settings)
    model = build.quantized(settings, build.float_model(settings, classes), found)
    paths = [layer.path for layer in model.layers if layer.searched]
    rng = np.random.default_rng(0)
    weight = np.sort(rng.uniform(0, 1, (len(paths), 5)))[:, ::-1]  # falls with bits
    activation = np.sort(rng.uniform(0, 1, (len(paths), 5)))[:, ::-1]
    tied = {layer.path: layer.tied for layer in model.layers}
    policies = rng.integers(2, 7, (600, len(paths), 2))
    for i, j in itertools.combinations(range(len(paths)), 2):
        if tied[paths[i]] is not None and tied[paths[i]] == tied[paths[j]]:
            policies[:, j, 1] = policies[:, i, 1]
    rows = np.arange(len(paths))
    log = (weight[rows, policies[..., 0] - 2] + activation[rows, policies[..., 1] - 2]).sum(1)
    lines = proof_lines.Lines(tmp_path / "lines.jsonl")
    lines.add("samples W3A3", policies=policies.tolist(), loss=np.ones(600).tolist(), divergence=np.exp(log).tolist())
    table = proof_tables.sampled_table(model, (), lines, "sampled", "W3A4")
    assert table.weight is not None
    np.testing.assert_allclose(table.weight, weight - weight[:, -1:], atol=0.02)


def test_two_tables_added_weigh_alike(tmp_path):
    """Of a policy: what either table says over its standard deviation over random policies, from tables and from lines."""
    tables = [
        made(seed, layers=6)._replace(criterion=name, alpha=1.0 if name == "output_fisher" else 0.7)
        for seed, name in ((0, "output_fisher"), (1, "regression"))
    ]
    # The same layers in both.
    tables[1] = tables[1]._replace(layers=tables[0].layers, weight=100 * tables[1].weight)
    for each in tables:
        importance.save_importance(files.path_of(tmp_path, each.criterion), each)
    (budget,) = budgets_of(tables[0], "bitops=W3A3")
    policies = random_policies(tables[0], [budget], 60, seed=4)
    said = [
        np.array([importance.total(each._replace(alpha=alpha), policy) for policy in policies])
        for each, alpha in zip(tables, (1 / 3, 0.7), strict=True)
    ]
    wanted = said[0] / said[0].std() + said[1] / said[1].std()
    found = proof_tables.combined_table(tmp_path, "combined", [budget], seed=4)
    np.testing.assert_allclose([importance.total(found, policy) for policy in policies], wanted, rtol=1e-9)
    lines = {
        f"predicted W3A3 {name}": {"values": values.tolist()}
        for name, values in zip(("output_fisher_third", "regression"), said, strict=True)
    }
    np.testing.assert_allclose(proof_prediction.predicted(lines, "W3A3", "combined"), wanted, rtol=1e-9)
    assert proof_prediction.predicted({}, "W3A3", "combined") is None


def test_a_regret_computed_another_way():
    lines = proof_document.read(proof_document.CHEAPER)["resnet8", 0]
    full, variant = lines["full"], lines["slices"]

    def objective(bits):
        harm = 0.0
        for layer, (w, a) in enumerate(bits):
            harm += full["alpha"]["measured"] * full["weight"][layer][w - 2] + full["activation"][layer][a - 2]
        return harm

    wanted = [
        objective(variant["policies"]["measured"][budget]) / objective(full["policies"]["measured"][budget]) - 1
        for budget in proof_lines.LEVELS
    ]
    assert proof_cheaper.regrets(full, variant, "measured") == pytest.approx(wanted)
    assert min(wanted) > -1e-6  # no policy beats the proven optimum of the full run's table
    # 18,000 of 300 steps x 6 rows x 64 samples: six slices of ten samples a step.
    assert (variant["samples"], full["samples"]) == (300 * 6 * 10, 300 * 6 * 64)


def test_the_stages_on_digits(tmp_path, quick_compilation, capsys):
    """Few steps of a small network: what the lines say, worked out again; a second call finds all of it done."""
    command = ["--net", "digits", "--root", str(tmp_path), "--budgets", "W3A3", "--finetune_steps", "2", "--rows", "3"]
    command += ["--policies", "3", "--samples", "24", "--sample_batches", "1", "--sample_size", "32"]
    command += ["--stages", "learn", "random", "samples", "tune", "repeats", "predicted", "sliced", "accuracy"]
    command += [
        "longer",
        "statistics",
        "parts",
        "--longer_steps",
        "3",
        "--tuned",
        "2",
        "--tune_steps",
        "2",
        "--repeated",
        "2",
    ]
    command += ["--contestants", "sampled", "learned", "learned_third", "sliced", "constant", "reversed"]
    command += ["--model.name", "cnn_nnx", "--model.options", '{"width": 0.25}', "--pretrain.steps", "20"]
    command += ["--joint.steps", "40", "--joint.error_steps", "10", "--joint.alpha_policies", "8"]
    command += ["--statistics_batches", "2", "--eval_batch_size", "100"]
    assert proof.main(command) == 0
    workdir = tmp_path / "digits" / "seed0"
    written = (workdir / "lines.jsonl").read_text()
    lines = proof_lines.Lines(workdir / "lines.jsonl").lines
    table = importance.load_importance(workdir / "importance.json")
    (budget,) = costs.parse_budgets(["bitops=W3A3"], table.layers, table.bit_widths, table.activation_bit_widths)
    policies = [proof_lines.as_policy(bits, table) for bits in lines["random W3A3"]["policies"]]
    assert all(0.98 < costs.used(budget, each, table) / budget.limit <= 1 for each in policies)
    for bits, predicted in zip(
        lines["random W3A3"]["policies"], lines["predicted W3A3 learned"]["values"], strict=True
    ):
        harm = [
            table.alpha * of_w[w - 2] + of_a[a - 2]
            for of_w, of_a, (w, a) in zip(table.weight, table.activation, bits, strict=True)
        ]
        assert predicted == pytest.approx(sum(harm))
    assert (np.diff(lines["random W3A3"]["halves"], axis=1) != 0).all()
    assert (np.array(lines["samples all"]["divergence"]) > 0).all()
    once, again = ([lines[f"{key} W3A3 {n}"]["loss"] for n in range(2)] for key in ("tuned", "repeat"))
    assert (np.array(once) != again).all() and "tuned W3A3 2" not in lines
    for name in ("sampled", "learned", "learned_third", "sliced", "constant", "reversed"):
        one = proof_lines.result(lines, "W3A3", name)
        assert one["steps"] == 2
        # The mean of the halves is not the whole's, where the batches' number is odd; and each statistics' own.
        for which in (one, one["running"]):
            assert min(which["halves"]) <= which["loss"] <= max(which["halves"])
        assert all(one[field] != one["running"][field] for field in ("loss", "train_loss", "test_loss"))
    best = f"uniform {proof_lines.best_uniform(lines, 'W3A3')[0]}"
    named = {
        proof_lines.digest(line["policy"]): key for key, line in lines.items() if key.startswith("chosen W3A3 uniform")
    }
    longer = {key.split()[1]: line["steps"] for key, line in lines.items() if key.startswith("longer ")}
    assert set(longer.values()) == {3} and [named[key][12:] for key in longer if key in named] == [best]
    # What the learned table says of what was fine-tuned, weights and activations apart; each alpha's choice is best by it.
    said = {}
    for name in ("learned", "learned_third", "constant", "uniform W3A3"):
        bits = lines[f"chosen W3A3 {name}"]["policy"]
        said[name] = lines["parts learned"]["policies"][proof_lines.digest(bits)]
        assert said[name] == pytest.approx(
            [
                sum(row[pair[kind] - 2] for row, pair in zip(harm, bits, strict=True))
                for kind, harm in enumerate((table.weight, table.activation))
            ]
        )
    for name, alpha in (("learned", table.alpha), ("learned_third", table.alpha / 3)):
        objective = {other: alpha * weight + activation for other, (weight, activation) in said.items()}
        assert objective[name] <= min(objective.values()) * (1 + 1e-9)
    assert proof_lines.best_uniform(lines, "W3A3") is not None and 0 < lines["float"]["test_accuracy"] < 1
    assert proof.main(command) == 0 and (workdir / "lines.jsonl").read_text() == written
