"""Surrogate log-ratios against true ones on Gaussian data, where every network and every likelihood is a formula."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

from invdpo.errors import InvdpoError
from invdpo.experiments.precision import Pairs, agreement, log_ratios, surrogate, true_log_prob
from invdpo.objectives import load_recipe, preference_loss
from invdpo.preferences.order import generator
from invdpo.schedule import NoiseSchedule
from invdpo.types import Conditioning

ABAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
SCHEDULE = NoiseSchedule(ABAR, 1.0, 1, 1000)
SHAPE = (2, 2, 1)
SIZE = math.prod(SHAPE)
PAIRS = 48


class Gaussian:
    """The exact eps-model of data N(mean, std^2); counts the latents it sees."""

    def __init__(self, mean, std):
        self.mean, self.std, self.seen = mean, std, 0

    def __call__(self, x, t, cond):
        self.seen += len(x)
        a = SCHEDULE.alpha_bar(t).to(x)[:, None, None, None]
        return (1 - a).sqrt() * (x - a.sqrt() * self.mean) / (a * self.std**2 + 1 - a)

    def log_density(self, x):
        return -0.5 * (((x - self.mean) / self.std) ** 2 + math.log(2 * math.pi * self.std**2)).flatten(1).sum(dim=1)


REFERENCE = Gaussian(0.0, 0.8)


def pairs(policy, count=PAIRS):
    """Samples of the reference, labelled by Bradley and Terry with the log-ratio as reward."""
    g = torch.Generator().manual_seed(7)
    first, second = 0.8 * torch.randn(2, count, *SHAPE, dtype=torch.float64, generator=g)
    ratio = [policy.log_density(x) - REFERENCE.log_density(x) for x in (first, second)]
    chosen = torch.rand(count, generator=g) < torch.sigmoid(ratio[0] - ratio[1])
    chosen = chosen[:, None, None, None]
    return Pairs(torch.where(chosen, first, second), torch.where(chosen, second, first), None)


def recipe(name, steps=20):
    return load_recipe(name).with_overrides({"trajectory": {"steps": steps}})


def measured(policy, settings):
    data = pairs(policy)
    truth = true_log_prob(policy, data, SCHEDULE, 20) - true_log_prob(REFERENCE, data, SCHEDULE, 20)
    return log_ratios("toy", policy, REFERENCE, data, SCHEDULE, truth, settings)


def single(policy, settings, data, **options):
    """`log_ratios` with a truth of zeros."""
    truth = torch.zeros(2 * len(data.win))
    return log_ratios("toy", policy, REFERENCE, data, SCHEDULE, truth, settings, **options)


# Eq. 16's two terms know how far the policy moved from the reference at a point, but not which way. Where the policy
# concentrates, it moved least at the likeliest points (sign -1); where it widens, most (+1); a mere shift
# of the mean moves all points alike, which leaves rounding (0).
@pytest.mark.parametrize(
    ("policy", "sign"),
    [(Gaussian(0.0, 0.7), -1), (Gaussian(0.2, 0.7), -1), (Gaussian(0.0, 0.9), 1), (Gaussian(0.2, 0.8), 0)],
    ids=["narrower", "narrower and shifted", "wider", "shifted"],
)
def test_who_captures_the_truth(policy, sign):
    names = ["inversion_dpo_implied", "inversion_dpo_paper", "inversion_dpo_minus"]
    table = measured(policy, [(recipe(name), 1) for name in names])
    data = pairs(policy)
    x0 = torch.cat([data.win, data.lose])
    formula = policy.log_density(x0) - REFERENCE.log_density(x0)
    assert spearmanr(table["truth"][: len(x0)], formula).statistic > 0.99
    rows = agreement(table).set_index("recipe")
    implied, plus, minus = (rows.loc[name] for name in names)
    assert implied["low"] > 0.9 and implied["sign_agreement"] > 0.9
    assert implied["true_pair_accuracy"] == pytest.approx(implied["pair_accuracy"], abs=0.05)
    assert minus["spearman"] == pytest.approx(-plus["spearman"], abs=1e-9)
    if sign:
        assert sign * plus["spearman"] > 0.9 and plus["low"] <= plus["spearman"] <= plus["high"]
        assert plus["sign_agreement"] == pytest.approx((1 + sign) / 2, abs=0.05)
    else:
        assert plus["low"] < 0 < plus["high"]


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_a_latent_without_a_density_costs_no_other(divergence):
    win, lose = torch.randn(2, 3, 1, 3, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    slope = torch.tensor([1.0, -9.0, 0.5], dtype=torch.float64)[:, None, None]
    value = true_log_prob(
        lambda x, t, cond: cond.embeds[:, :, :, None] * x,
        Pairs(win, lose, Conditioning(slope)),
        SCHEDULE,
        4,
        divergence,
    )
    assert value.isnan().tolist() == [False, True, False] * 2


def test_rows_columns_and_counts():
    policy, data = Gaussian(0.2, 0.7), pairs(Gaussian(0.2, 0.7), 5)
    settings = [(recipe("inversion_dpo_implied", 6), 1), (load_recipe("diffusion_dpo"), 3)]
    REFERENCE.seen = 0
    table = log_ratios("toy", policy, REFERENCE, data, SCHEDULE, torch.arange(10.0), settings)
    assert table.columns.tolist() == [
        *("policy", "recipe", "steps", "draws", "pair", "side", "surrogate", "truth", "unet_evals")
    ]
    assert len(table) == 20 and set(table["policy"]) == {"toy"}
    assert table["pair"].tolist() == [0, 1, 2, 3, 4] * 4
    assert table["side"].tolist() == (["win"] * 5 + ["lose"] * 5) * 2
    assert table["truth"].tolist() == list(range(10)) * 2
    by_recipe = table.groupby("recipe")[["steps", "draws", "unet_evals"]].agg(["min", "max"])
    assert by_recipe.loc["inversion_dpo_implied"].tolist() == [6, 6, 1, 1, 18, 18]  # 6 to invert, 6 for each network
    assert by_recipe.loc["diffusion_dpo"].tolist() == [1000, 1000, 3, 3, 6, 6]
    assert table["unet_evals"].sum() == policy.seen + REFERENCE.seen
    summary = agreement(table)
    assert summary["unet_evals_per_latent"].tolist() == [18, 6]
    assert summary["pairs"].tolist() == [5, 5]
    assert summary.columns.tolist()[6:] == [
        *("spearman", "low", "high", "pair_accuracy", "true_pair_accuracy", "sign_agreement")
    ]


def test_the_surrogate_is_the_losses_own_averaged_over_draws():
    policy, data = Gaussian(0.2, 0.7), pairs(Gaussian(0.2, 0.7), 4)
    forward = load_recipe("diffusion_dpo")
    total = torch.zeros(2, 4, dtype=torch.float64)
    for draw in range(3):
        for i in range(4):
            win, lose = data.win[i : i + 1], data.lose[i : i + 1]
            g = generator(11, draw, i, "precision")
            out = preference_loss(forward, policy, REFERENCE, win, lose, None, SCHEDULE, g)
            total[:, i] += torch.stack([out.logratio_win, out.logratio_lose]).flatten() / 3
    for chunk in (1, 10, 256):
        values, evals = surrogate(forward, policy, REFERENCE, data, SCHEDULE, 3, 11, chunk)
        torch.testing.assert_close(values, total.flatten(), rtol=0, atol=1e-12)
        assert evals == 6


def test_more_draws_capture_more():
    table = measured(Gaussian(0.2, 0.7), [(load_recipe("diffusion_dpo"), draws) for draws in (1, 8, 64)])
    rows = agreement(table)
    assert rows["draws"].tolist() == [1, 8, 64]
    assert rows["spearman"].is_monotonic_increasing and rows["spearman"].iloc[-1] > 0.9


def hand_made(surrogates, truths):
    n = len(surrogates) // 2
    frame = {"pair": [*range(n)] * 2, "side": ["win"] * n + ["lose"] * n, "surrogate": surrogates, "truth": truths}
    return pd.DataFrame({"policy": "p", "recipe": "r", "steps": 1, "draws": 1, "unet_evals": 2.0} | frame)


def test_agreement_by_hand_whatever_the_order_of_rows():
    frame = hand_made([3, 1, 2, 5, 1, 1, 4, 4], [9.0, 4.0, 3.0, 7.0, 1.0, 5.0, 2.0, 8.0])
    for table in (frame, frame.sample(frac=1, random_state=3)):
        (row,) = agreement(table).to_dict("records")
        assert row["spearman"] == pytest.approx(spearmanr(frame["surrogate"], frame["truth"]).statistic)
        assert row["pair_accuracy"] == (1 + 0.5 + 0 + 1) / 4
        assert row["true_pair_accuracy"] == (1 + 0 + 1 + 0) / 4
        assert row["sign_agreement"] == (1 + 0.5 + 0 + 0) / 4
        assert row["unet_evals_per_latent"] == 2


def test_pairs_without_a_truth_are_left_out():
    surrogates, truths = [3.0, 1, 2, 5, 1, 1, 4, 4], [9.0, 4, 3, math.nan, 1, 5, 2, 8]
    (row,) = agreement(hand_made(surrogates, truths)).to_dict("records")
    fewer = [surrogates[i] for i in (0, 1, 2, 4, 5, 6)], [truths[i] for i in (0, 1, 2, 4, 5, 6)]
    (expected,) = agreement(hand_made(*fewer)).to_dict("records")
    assert row == expected and row["pairs"] == 3
    with pytest.raises(InvdpoError, match="policy 'p'.*more steps"):
        agreement(hand_made(surrogates, [math.nan] * 8))


def test_the_interval_is_that_of_resampled_pairs():
    rng = np.random.default_rng(1)
    truth = rng.normal(size=(40, 1)) + 0.1 * rng.normal(
        size=(40, 2)
    )  # latents of a pair are alike: pairs must be drawn
    values = np.round(truth + rng.normal(size=(40, 1)), 1)  # with ties
    (row,) = agreement(hand_made(values.T.ravel(), truth.T.ravel())).to_dict("records")
    drawn = rng.integers(0, 40, size=(2000, 40))
    brute = [spearmanr(values[index].ravel(), truth[index].ravel()).statistic for index in drawn]
    assert [row["low"], row["high"]] == pytest.approx(np.percentile(brute, [2.5, 97.5]), abs=0.02)


def test_a_policy_that_is_the_reference_has_no_correlation():
    table = measured(REFERENCE, [(recipe("inversion_dpo_paper"), 1)])
    assert not table["surrogate"].any() and not table["truth"].any()
    (row,) = agreement(table).to_dict("records")
    assert all(math.isnan(row[key]) for key in ("spearman", "low", "high"))
    assert row["pair_accuracy"] == row["true_pair_accuracy"] == row["sign_agreement"] == 0.5


def test_every_recipe_with_a_log_ratio_is_measured_and_others_are_refused():
    policy, data = Gaussian(0.2, 0.7), pairs(Gaussian(0.2, 0.7), 2)
    (row, *_) = single(policy, [(load_recipe("smpo"), 1)], data).to_dict("records")  # wants preference strengths
    assert row["surrogate"] != 0
    for settings, match in [
        ([(load_recipe("sft"), 1)], "'sft'.*denoising"),
        ([(recipe("inversion_dpo_implied", 4), 2)], "'inversion_dpo_implied'.*draws.*not 2"),
        ([(load_recipe("diffusion_dpo"), 0)], "draws is 0"),
    ]:
        with pytest.raises(InvdpoError, match=match):
            single(policy, settings, data)
    with pytest.raises(InvdpoError, match="truth: expected 4"):
        log_ratios("toy", policy, REFERENCE, data, SCHEDULE, torch.zeros(3), [(load_recipe("diffusion_dpo"), 1)])
