"""Judging a challenger: by hand-computed cases, and by what must hold of any two models."""

import json
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.errors import NightlyError
from tasks.files import write_json
from tasks.judge import (
    Evaluated,
    JudgeParams,
    Verdict,
    bootstrap_interval,
    class_changes,
    compare,
    incomparable,
    judge,
    mcnemar,
    read_evaluation,
)
from tests.miniature import metrics, write_predictions

RULES = JudgeParams(minimum_gain=0.0)


def model(model_id: str, correct: list[bool], targets: list[str], **more: object) -> Evaluated:
    """Return a model of which every single prediction is known."""
    figures = metrics(model_id, round(sum(correct) / len(correct), 6), sorted(set(targets))) | more
    return Evaluated(figures, np.array(targets, object), np.array(correct, bool))


def pair(*counts: tuple[int, int, int], **more: object) -> tuple[Evaluated, Evaluated]:
    """Return challenger and champion by counts ``(images, now right, now wrong)`` of each class; the rest both get."""
    new, old, targets = [], [], []
    for name, (images, right, wrong) in zip("abcdefghijklmnopqrstuvwxyz", counts, strict=False):
        same = images - right - wrong
        new += [True] * right + [False] * wrong + [True] * same
        old += [False] * right + [True] * wrong + [True] * same
        targets += [name] * images
    return model("new", new, targets, **more), model("old", old, targets)


def accuracies(new: float, old: float, minimum_gain: float = 0.0, floor: float = 0.5) -> Verdict:
    """Judge two models of which only the metrics are left."""
    rules = JudgeParams(minimum_gain=minimum_gain, accuracy_floor=floor)
    return judge(Evaluated(metrics("new", new)), Evaluated(metrics("old", old)), rules)


# --- the floor, the gain, what can't be compared


def test_the_first_model_needs_only_the_floor():
    rules = JudgeParams(minimum_gain=0.1, accuracy_floor=0.5, significance=0.05)
    assert judge(Evaluated(metrics("new", 0.5)), None, rules).action == "promote"
    assert judge(Evaluated(metrics("new", 0.499)), None, rules) == Verdict(
        "hold", ["accuracy 49.90% is under the floor of 50.00%"]
    )


@pytest.mark.parametrize(
    ("accuracy", "minimum_gain", "action", "reason"),
    [
        (0.973, 0.001, "promote", "better than the champion on the frozen test set by 0.10 points"),
        (0.9725, 0.001, "hold", "better than the champion on the frozen test set by 0.05 points only; 0.10 points are"),
        (0.9725, 0.0, "promote", "better than the champion"),
        (0.972, 0.0, "hold", "as good as the champion on the frozen test set, and no better"),
        (0.95, 0.0, "hold", "worse than the champion on the frozen test set by 2.20 points"),
    ],
)
def test_a_challenger_must_be_better_by_the_minimum_gain(accuracy, minimum_gain, action, reason):
    verdict = accuracies(accuracy, 0.972, minimum_gain)
    assert verdict.action == action
    assert verdict.reasons[0].startswith(reason)


def test_a_gain_of_exactly_the_minimum_is_enough():
    assert 0.938 - 0.937 < 0.001  # in binary
    assert accuracies(0.938, 0.937, 0.001).action == "promote"
    assert judge(*pair((3000, 3, 0)), JudgeParams(minimum_gain=0.001)).action == "promote"
    assert judge(*pair((3000, 2, 0)), JudgeParams(minimum_gain=0.001)).action == "hold"


def test_a_better_model_under_the_floor_is_held():
    assert accuracies(0.4, 0.3).reasons[0] == "accuracy 40.00% is under the floor of 50.00%"
    assert accuracies(0.4, 0.3).action == "hold"


def test_the_champion_does_not_replace_itself():
    verdict = judge(Evaluated(metrics("same", 0.9)), Evaluated(metrics("same", 0.8)), RULES)
    assert verdict == Verdict("hold", ["same is the champion already"])


def test_other_classes_can_not_be_compared_and_the_way_out_is_named():
    verdict = judge(Evaluated(metrics("new", 0.99, "abc")), Evaluated(metrics("old", 0.5, "abd")), RULES)
    assert verdict == Verdict(
        "hold",
        [
            "its classes differ from the champion's (+c, -d), so the two can't be compared",
            "if it is the one you want, put it in service by hand with 'nightly promote new'",
        ],
    )


def test_another_test_set_can_not_be_compared():
    new, old = metrics("new", 0.9), metrics("old", 0.8, test_digest="t0")
    assert "another test set" in incomparable(new, old)
    assert judge(Evaluated(new), Evaluated(old), RULES).action == "hold"
    assert incomparable(metrics("new", 0.9, "ab"), metrics("old", 0.8, "ba")) is None


@given(new=st.floats(0, 1), old=st.floats(0, 1), gain=st.floats(0, 1), floor=st.floats(0, 1))
def test_no_model_that_is_worse_or_under_the_floor_is_ever_promoted(new, old, gain, floor):
    verdict = accuracies(new, old, gain, floor)
    assert verdict.reasons
    if new <= old or new < floor:
        assert verdict.action == "hold"


# --- McNemar's test and the interval


@pytest.mark.parametrize(
    ("now_right", "now_wrong", "p"),
    [
        (10, 2, 2 * (1 + 12 + 66) / 2**12),  # 0.0386
        (5, 0, 2 / 2**5),
        (6, 0, 2 / 2**6),
        (8, 1, 2 * (1 + 9) / 2**9),
        (1, 1, 1.0),
        (7, 7, 1.0),
        (1, 0, 1.0),
        (0, 0, 1.0),
        (59, 121, 4.434e-06),  # a table of Sheskin's handbook, as statsmodels's documentation tests it
    ],
)
def test_mcnemars_exact_p(now_right, now_wrong, p):
    assert mcnemar(now_right, now_wrong) == pytest.approx(p, rel=1e-3 if p < 1e-5 else 1e-12)


@settings(deadline=None)  # the first example waits for SciPy
@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemars_p_is_twice_the_tail_of_fair_coins_whichever_model_is_first(right, wrong):
    p = mcnemar(right, wrong)
    discordant = right + wrong
    tail = sum(comb(discordant, k) for k in range(min(right, wrong) + 1))
    assert p == mcnemar(wrong, right) == pytest.approx(min(1.0, 2 * tail / 2**discordant), rel=1e-9)


def test_the_interval_is_that_of_resampled_images():
    right, wrong, images = 31, 12, 1000
    difference = np.repeat([1, -1, 0], [right, wrong, images - right - wrong])
    picks = np.random.default_rng(7).integers(0, images, (4000, images))
    expected = np.quantile(difference[picks].mean(axis=1), [0.025, 0.975])
    low, high = bootstrap_interval(right, wrong, images)
    assert (low, high) == pytest.approx(expected, abs=0.0011)  # one image either way
    assert (low, high) == bootstrap_interval(right, wrong, images)
    assert (low, high) == pytest.approx((0.006, 0.032), abs=0.0011)  # 0.019 ± 1.96 · sqrt(43 - 0.361) / 1000


@given(st.integers(0, 200), st.integers(0, 200), st.integers(0, 1000))
def test_the_interval_holds_the_difference_and_turns_round_with_the_models(right, wrong, same):
    images = right + wrong + same or 1
    low, high = bootstrap_interval(right, wrong, images)
    assert -1 <= low <= (right - wrong) / images <= high <= 1
    turned = bootstrap_interval(wrong, right, images)
    slack = 2 / images + 0.05 * (high - low)
    assert (-turned[1], -turned[0]) == pytest.approx((low, high), abs=slack)
    if not right and not wrong:
        assert (low, high) == (0.0, 0.0)


# --- pairs in words and figures


def test_the_difference_is_told_in_words_and_figures():
    verdict = judge(*pair((1000, 20, 6), (1000, 11, 6)), RULES)
    assert verdict.action == "promote"
    [low, high] = verdict.comparison.pop("interval")
    assert (low, high) == pytest.approx((0.0031, 0.0159), abs=0.0006)  # 0.0095 ± 1.96 · sqrt(43 - 0.181) / 2000
    assert verdict.reasons == [
        "better than the champion on the frozen test set by 0.95 points "
        f"(95 % interval {low * 100:.2f} to {high * 100:.2f}; 31 images now right, 12 now wrong; p = 0.0054)"
    ]
    assert verdict.comparison == {
        "gain": 0.0095,
        "test_images": 2000,
        "now_right": 31,
        "now_wrong": 12,
        "p": 0.005402,
        "classes": [],
    }


def test_the_interval_of_a_worse_model_has_the_sign_of_the_words():
    verdict = judge(*pair((1000, 2, 0), (1000, 0, 24)), RULES)
    assert verdict.action == "hold"
    assert verdict.reasons[0].startswith(
        "worse than the champion on the frozen test set by 1.10 points (95 % interval 0."
    )
    assert "; 2 images now right, 24 now wrong; p < 0.001)" in verdict.reasons[0]
    low, high = verdict.comparison["interval"]
    assert low < verdict.comparison["gain"] < high < 0


def test_significance_asks_for_more_than_a_gain():
    rules = JudgeParams(minimum_gain=0.0, significance=0.05)
    by_chance, sound = pair((1000, 5, 0)), pair((1000, 6, 0))
    assert judge(*by_chance, RULES).action == "promote"
    verdict = judge(*by_chance, rules)
    assert verdict.action == "hold"
    assert verdict.reasons[0].endswith("; 5 images now right, 0 now wrong; p = 0.062); p must be below 0.05")
    assert judge(*sound, rules).action == "promote"


def test_without_predictions_significance_can_not_be_shown():
    new, old = pair((1000, 50, 0))
    for challenger, champion, whose in (
        (new, Evaluated(old.metrics), "the champion's"),
        (Evaluated(new.metrics), old, "the challenger's"),
    ):
        verdict = judge(challenger, champion, JudgeParams(significance=0.05))
        assert verdict.action == "hold"
        assert verdict.reasons == [
            "better than the champion on the frozen test set by 5.00 points only; "
            "without predictions there is no p, and it must be below 0.05",
            f"compared by their accuracies alone: {whose} predictions are missing",
        ]
        assert judge(challenger, champion, RULES).action == "promote"
        assert verdict.comparison == {"gain": 0.05, "unpaired": f"{whose} predictions are missing"}


def test_predictions_of_other_images_are_not_paired():
    new, old = model("new", [True, True], ["a", "b"]), model("old", [True, False], ["b", "a"])
    assert compare(new, old, 0.05)["unpaired"] == "their predictions are of different images"
    longer = model("old", [True, False, False], ["a", "b", "b"])
    assert compare(new, longer, 0.05)["unpaired"] == "their predictions are of different images"


# --- classes


@pytest.mark.parametrize(
    ("counts", "lost"),
    [
        ((10, 0, 1), False),  # one image of ten: 10 points, and half the time by chance
        ((10, 0, 4), False),  # p = 1/16
        ((10, 0, 6), True),  # p = 1/64, under 0.05 / 2
        ((10, 0, 5), False),  # p = 1/32 would do for one class, not for two
        ((1000, 0, 40), False),  # no chance, but within the tolerance
        ((1000, 0, 50), False),  # exactly the tolerance
        ((1000, 0, 51), True),
        ((100, 40, 50), False),  # 10 points, p = 0.17
        ((100, 20, 40), True),  # 20 points, p = 0.007
    ],
)
def test_a_class_is_lost_beyond_the_tolerance_and_beyond_chance(counts, lost):
    new, old = pair((1000, 300, 0), counts)
    [entry] = class_changes(new, old, 0.05)
    assert (entry["name"], entry["lost"]) == ("b", lost)
    verdict = judge(new, old, RULES)
    assert verdict.action == ("hold" if lost else "promote")
    assert verdict.reasons[-1].startswith("otherwise better than" if lost else "better than")


def test_a_lost_class_is_named_with_its_figures():
    verdict = judge(*pair((1000, 300, 0), (100, 5, 20)), RULES)
    assert verdict.reasons[0] == (
        "recall of 'b' fell by 15.00 points (5 images now right, 20 now wrong; p = 0.002): "
        "5.00 points are allowed, and chance does not explain it"
    )
    assert verdict.reasons[1].startswith("otherwise better than the champion on the frozen test set by 25.91 points (")
    assert verdict.comparison["classes"] == [
        {"name": "b", "change": -0.15, "images": 100, "now_right": 5, "now_wrong": 20, "p": 0.002039, "lost": True}
    ]
    lenient = JudgeParams(minimum_gain=0.0, class_recall_tolerance=0.15)
    assert judge(*pair((1000, 300, 0), (100, 5, 20)), lenient).action == "promote"


def test_the_more_classes_the_more_a_loss_must_stand_out():
    few, many = pair((1000, 300, 0), (10, 0, 6)), pair((1000, 300, 0), (10, 0, 6), *[(10, 0, 0)] * 20)
    assert [entry["lost"] for entry in class_changes(*few, 0.05)] == [True]
    assert [entry["lost"] for entry in class_changes(*many, 0.05)] == [False]


def test_lost_classes_come_first_then_the_largest_changes():
    counts = [(1000, 400, 0), (5, 0, 3), (10, 0, 1), (1000, 0, 100), (100, 0, 3), (50, 0, 1), (200, 0, 1)]
    found = compare(*pair(*counts), 0.05)
    assert [entry["name"] for entry in found["classes"]] == ["d", "b", "c", "e", "f"]
    assert [entry["lost"] for entry in found["classes"]] == [True, False, False, False, False]


def test_equally_good_models_seldom_lose_a_class():
    """Two models that err at random: at most one night in twenty is lost to chance, and a few are enough to tell."""
    random = np.random.default_rng(3)
    targets = np.repeat(np.array(list("abcdefghij"), object), 100)
    nights = [
        [Evaluated(metrics(name, 0.7), targets, random.random(1000) < 0.7) for name in ("new", "old")]
        for _ in range(200)
    ]
    assert sum(any(entry["lost"] for entry in class_changes(*night, 0.0)) for night in nights) <= 20


# --- calibration, engines


def test_calibration_may_not_become_worse_than_the_tolerance():
    new, old = pair((1000, 50, 0))
    old.metrics["calibration_error"] = 0.01
    for error, action in ((0.06, "promote"), (0.0, "promote"), (0.0601, "hold")):
        new.metrics["calibration_error"] = error
        verdict = judge(new, old, RULES)
        assert verdict.action == action
        assert verdict.comparison["calibration_change"] == round(error - 0.01, 9)
    assert verdict.reasons[0] == (
        "its calibration error is 6.01% where the champion's is 1.00%: 5.00 points more are allowed"
    )
    assert verdict.reasons[1].startswith("otherwise better")


def test_the_engine_that_rounds_as_keras_does_must_have_passed_on_the_test_split():
    found = {"agreement": 0.99, "accuracy_lost": 0.004, "passed": False}
    good = {"agreement": 1.0, "accuracy_lost": 0.0, "passed": True}
    engines = {"keras-float32": good, "openvino-float32": found, "openvino-int8": found}
    new, old = pair((1000, 50, 0), engines=engines)
    for champion in (old, None):
        for offered, action in (
            (("openvino-float32", "openvino-int8"), "hold"),
            (("openvino-int8",), "promote"),  # not offered any more, see tasks.promote
            (("openvino-bfloat16",), "promote"),  # not run where the test was
            ((), "promote"),
        ):
            verdict = judge(Evaluated(new.metrics, new.targets, new.correct, offered), champion, RULES)
            assert verdict.action == action
    verdict = judge(Evaluated(new.metrics, new.targets, new.correct, ("openvino-float32",)), None, RULES)
    assert verdict.reasons == [
        "engine openvino-float32 was to be offered and failed on the test split: "
        "same label as Keras on 99.00% of the images, 0.40 points lost"
    ]


# --- of any two models


@st.composite
def two_models(draw) -> tuple[Evaluated, Evaluated]:
    images = draw(st.integers(1, 60))
    targets = draw(st.lists(st.sampled_from("abc"), min_size=images, max_size=images))
    new, old = (draw(st.lists(st.booleans(), min_size=images, max_size=images)) for _ in range(2))
    errors = [draw(st.floats(0, 1)) for _ in range(2)]
    return tuple(
        model(name, correct, targets, calibration_error=error)
        for name, correct, error in zip(("new", "old"), (new, old), errors, strict=True)
    )


@settings(deadline=None)  # the first example waits for SciPy
@given(two_models(), st.none() | st.floats(0.001, 0.999), st.floats(0, 1))
def test_of_two_models_at_most_one_replaces_the_other_and_all_figures_are_json(models, significance, gain):
    new, old = models
    rules = JudgeParams(minimum_gain=gain, accuracy_floor=0.0, significance=significance)
    there, back = judge(new, old, rules), judge(old, new, rules)
    assert "hold" in (there.action, back.action)
    for verdict in (there, back):
        assert json.loads(json.dumps(verdict.comparison, allow_nan=False)) == verdict.comparison
        assert verdict.reasons
        assert "nan" not in " ".join(verdict.reasons)
    assert there.comparison["p"] == back.comparison["p"]
    assert there.comparison["gain"] == -back.comparison["gain"]
    assert there.comparison["now_right"] == back.comparison["now_wrong"]
    if there.action == "promote":
        assert new.correct.sum() > old.correct.sum()


@settings(deadline=None)  # the first example waits for SciPy
@given(two_models())
def test_a_model_that_predicts_the_same_is_held(models):
    new, _ = models
    twin = Evaluated(new.metrics | {"model_id": "twin"}, new.targets, new.correct)
    verdict = judge(twin, new, JudgeParams(minimum_gain=0.0, accuracy_floor=0.0))
    assert verdict.action == "hold"
    assert verdict.reasons == [
        "as good as the champion on the frozen test set, and no better "
        "(95 % interval 0.00 to 0.00; 0 images now right, 0 now wrong; p = 1)"
    ]
    assert (verdict.comparison["p"], verdict.comparison["interval"]) == (1.0, [0.0, 0.0])
    assert verdict.comparison["classes"] == []


# --- files


def test_an_evaluation_is_read_with_or_without_its_predictions(tmp_path):
    with pytest.raises(NightlyError, match=r"metrics\.json is missing: run 'nightly retrain'"):
        read_evaluation(tmp_path)
    write_json(tmp_path / "metrics.json", metrics("new", 0.9))
    assert read_evaluation(tmp_path).correct is None
    write_predictions(tmp_path, 0.9, "ab")
    found = read_evaluation(tmp_path, ("openvino-float32",))
    assert (found.id, found.offered) == ("new", ("openvino-float32",))
    assert found.correct.dtype == bool
    assert found.correct.sum() == 90
    assert list(found.targets[:3]) == ["a", "b", "a"]
