"""The score of a checkpoint: without bias, with intervals that cover, and a ranking that says when
it is none."""

import itertools
import math

import numpy as np
import pytest
import torch

from vgkern import costate
from vgkern.costate import impact
from vgkern.train.generate import Rollout
from vgkern.train.layers import RMSNorm
from vgkern.train.model import Decoder, Nodes, Shape
from vgkern.train.prompt_costates import prompt_costates


def chain(n):
    every, blocked = torch.arange(n), torch.full((n, n), -torch.inf).triu(1)
    return Nodes(every, every, every, every, blocked.expand(1, 1, n, n), keys_only=0)


def test_the_signal_is_the_value_gradient_by_enumeration():
    """Ids 3 (which ends), 4 and 5; all answers of at most two tokens and all groups of four of
    them, each with its probability: the mean of S2 is |grad V|^2 at the layer looked at."""
    policy = Decoder(Shape(vocab=6, width=16, layers=2, heads=2, mlp=24, context=8), [0, 1, 2])
    with torch.no_grad():  # far from the identity, and far from uniform
        policy.embedding.weight.mul_(12)
        policy.layers[1].out.weight.mul_(4)
    prompt = [3, 5, 4]
    answers = [[3], *([a, b] for a in (4, 5) for b in (3, 4, 5))]
    rewards = torch.tensor([0.0, 1.0, 0.3, 0.0, 2.0, 1.0, 0.5]).double()

    def below(ids):
        return policy.through(policy.embedding(torch.tensor(ids)), chain(len(ids)), 0, 1)

    x, logp = below(prompt).detach().requires_grad_(), []
    for answer in answers:
        ids = prompt + answer[:-1]
        stream = torch.cat([x, below(ids)[len(prompt) :]])
        hidden = RMSNorm.apply(policy.through(stream, chain(len(ids)), 1, 2))
        z = hidden[len(prompt) - 1 :] @ policy.head().weight.T + policy.head().bias
        logp.append(z.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum())
    p = torch.stack(logp).exp()
    assert abs(float(p.detach().sum()) - 1) < 1e-5
    (dv,) = torch.autograd.grad((p * rewards).sum(), x)
    truth, p = float(dv.double().square().sum()), p.detach().double()

    tokens = torch.tensor([a + [0] * (2 - len(a)) for a in answers])
    lengths, n = torch.tensor([len(a) for a in answers]), len(answers)
    rollout = Rollout(tokens, torch.zeros(n, 2), lengths, torch.ones(n, dtype=torch.bool))
    found = prompt_costates(policy, [prompt], rollout, n, 1)
    groups = torch.tensor(list(itertools.product(range(n), repeat=4)))
    gram = found.gram[0].double()[groups[:, :, None], groups[:, None, :]]
    ones = torch.ones(len(groups), 4)
    got = impact.measured(gram, rewards[groups], ones, ones)
    chance = p[groups].prod(-1)
    assert abs(float(chance @ got.s2) / truth - 1) < 1e-4
    assert float(chance @ got.naive) / truth > 1.1  # what the U-statistic is for


def table(prompts, seed, *, signal=0.5, right=0.4, spread=0.15, group=8):
    """Prompts of different difficulty; costates eps + signal * (r - p) * e_0 in 6 dimensions."""
    generator = torch.Generator().manual_seed(seed)
    chance = (right + spread * torch.randn(prompts, 1, generator=generator)).clamp(0.02, 0.98)
    rewards = (torch.rand(prompts, group, generator=generator) < chance).double()
    u = torch.randn(prompts, group, 6, generator=generator).double()
    u[..., 0] += signal * (rewards - chance) / (chance * (1 - chance))
    ones = torch.ones(prompts, group)
    return impact.measured(u @ u.mT, rewards, -2 * ones, ones)


def test_the_predictors_are_what_they_are_called():
    found = table(40, 0)
    told = impact.scores(found, 4)
    subsets = list(itertools.combinations(range(8), 4))
    best = np.mean([[max(row[list(s)]) for s in subsets] for row in found.rewards.numpy()])
    one = float(found.rewards.mean())
    assert told["pass@1"].value == pytest.approx(one)
    assert told["reward"].value == pytest.approx(one)
    assert told["pass@4"].value == pytest.approx(best)
    assert told["headroom(4)"].value == pytest.approx(best - one)
    assert told["p(1-p)"].value == pytest.approx(one * (1 - one))
    assert told["entropy"].value == pytest.approx(2.0)
    snr = float(found.s2.sum() / found.power.sum())
    assert told["signal/noise"].value == pytest.approx(snr)
    assert told["impact"].value == pytest.approx(math.sqrt(snr) * (best - one))
    naive = math.sqrt(float(found.naive.mean()))
    assert told["gradient norm"].value == pytest.approx(naive)
    assert math.isnan(told["relative signal"].value)  # |x|^2 was not given
    strict = impact.scores(found, 4, right=2.0)
    assert strict["pass@4"].value == 0 and strict["headroom(4)"] == told["headroom(4)"]
    one_prompt = impact.scores(found.first(1), 4)
    assert math.isnan(one_prompt["reward"].low) and "not told" in str(
        impact.stop_sign(table(1, 3), impact.scores(table(1, 3), 4))
    )
    for x in told.values():
        assert x.low <= x.value <= x.high or math.isnan(x.value)


def test_the_naive_norm_is_the_mean_costate():
    u = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)).double()
    rewards = torch.rand(3, 5, generator=torch.Generator().manual_seed(1)).double()
    ahead = rewards - (rewards.sum(1, keepdim=True) - rewards) / 4
    ones = torch.ones(3, 5)
    got = impact.measured(u @ u.mT, rewards, ones, ones, square=torch.ones(3))
    mean = (ahead[..., None] * u).mean(1)
    torch.testing.assert_close(got.naive, mean.square().sum(-1))
    relative = impact.scores(got, 2)["relative signal"].value
    assert relative == pytest.approx(math.sqrt(max(0.0, float(got.s2.mean()))))


def test_intervals_cover():
    """Of 150 measurements with 48 prompts, against the value that 40,000 prompts give."""
    truth = impact.scores(table(40_000, 999), 8)
    hits = dict.fromkeys(("impact", "signal/noise", "headroom(8)", "pass@1", "p(1-p)"), 0)
    for seed in range(150):
        told = impact.scores(table(48, seed), 8)
        for name in hits:
            hits[name] += told[name].low <= truth[name].value <= told[name].high
    for name, count in hits.items():
        assert 0.81 < count / 150 < 0.97, (name, count / 150)  # 90 %: two sd are 5 %


@pytest.fixture(scope="module", autouse=True)
def fewer_draws():
    before, impact.DRAWS = impact.DRAWS, 600
    yield
    impact.DRAWS = before


def test_a_clear_order_is_clear_and_an_unclear_one_says_how_many_more():
    strong, weak = table(200, 1, signal=1.0), table(200, 2, signal=0.4)
    found = impact.rank({"weak": weak, "strong": strong}, 8)
    assert found.order == ("strong", "weak") and found.clear and not found.open
    assert found.places == {"strong": (1, 1), "weak": (2, 2)} and found.pairs[0].more == 1
    near = impact.rank({"a": table(32, 3, signal=0.5), "b": table(32, 5, signal=0.55)}, 8)
    (pair,) = near.pairs
    assert not near.clear and near.open == {"a", "b"} and pair.more > 1
    assert near.places == {"a": (1, 2), "b": (1, 2)}


def test_how_many_more_prompts_is_what_it_takes():
    """The same difference is clear about half the time at the number that is said."""
    clear, more = [], []
    for seed in range(30):
        a, b = table(24, seed, signal=0.75), table(24, 100 + seed, signal=0.45)
        (pair,) = impact.rank({"a": a, "b": b}, 8).pairs
        if pair.upper == "a" and 1.5 < pair.more < 8:
            count = round(24 * pair.more)
            more.append(pair.more)
            big = impact.rank({"a": table(count, 500 + seed, signal=0.75),
                               "b": table(count, 900 + seed, signal=0.45)}, 8)  # fmt: skip
            clear.append(big.order[0] == "a" and big.clear)
    assert len(clear) >= 5 and sum(clear) >= 0.5 * len(clear), (clear, more)


def test_equal_checkpoints_are_seldom_told_apart():
    wrong = 0
    for seed in range(100):
        found = impact.rank({"a": table(32, seed), "b": table(32, 10_000 + seed)}, 8)
        wrong += found.clear
    assert wrong <= 20  # 5 % on either side


def test_the_difference_is_taken_prompt_by_prompt():
    """What both owe to the prompts cancels: b is a little worse than a on every prompt."""
    a = table(40, 4)
    b = impact.Measured(a.rewards * 0.8, a.s2 * 0.64, a.power * 0.64, a.naive, *list(
        (a.square, a.surprise, a.tokens)))  # fmt: skip
    told = {name: impact.scores(x, 8)["impact"] for name, x in (("a", a), ("b", b))}
    assert told["b"].high > told["a"].value  # the intervals say nothing of it
    assert impact.rank({"a": a, "b": b}, 8).clear
    # and one with fewer prompts is compared on those
    few = impact.rank({"a": a.first(20), "b": b}, 8)
    assert few.pairs[0].odds == impact.rank({"a": a.first(20), "b": b.first(20)}, 8).pairs[0].odds


def test_stop_signs_and_the_exception():
    zero = torch.zeros(6, 8)
    same = impact.measured(torch.zeros(6, 8, 8), zero, zero, zero + 1)
    told = impact.scores(same, 8)
    assert told["impact"].value == 0 and math.isnan(told["signal/noise"].value)
    assert "every reward is 0" in str(impact.stop_sign(same, told))
    rows = torch.tensor([0.0, 1.0])[:, None].expand(2, 8)
    mixed = impact.measured(torch.zeros(2, 8, 8), rows, rows, rows + 1)
    assert "within each prompt" in str(impact.stop_sign(mixed, impact.scores(mixed, 8)))
    noise = table(32, 7, signal=0.0)
    assert "not told from zero" in str(impact.stop_sign(noise, impact.scores(noise, 8)))
    good = table(64, 8, signal=1.0)
    assert impact.stop_sign(good, impact.scores(good, 8)) is None
    assert impact.rank({"same": same, "good": good}, 8).order == ("good", "same")
    with pytest.raises(ValueError, match=r"^rewards: got 64 samples, equal within every prompt"):
        impact.rank({"same": same, "mixed": mixed}, 8)


def test_what_does_not_fit_is_named():
    ones = torch.ones(2, 8)
    with pytest.raises(ValueError, match="k: got int 9; allowed: 1 <= k <= 8"):
        impact.scores(table(4, 0), 9)
    with pytest.raises(ValueError, match=r"rewards.*G >= 4"):
        impact.measured(torch.ones(2, 3, 3), ones[:, :3], ones[:, :3], ones[:, :3])
    with pytest.raises(ValueError, match="logp"):
        impact.measured(torch.ones(2, 8, 8), ones, ones[:, :5], ones)
    with pytest.raises(ValueError, match="rewards: got NaN"):
        impact.measured(torch.ones(2, 8, 8), ones * math.nan, ones, ones)
    with pytest.raises(ValueError, match="found: got no checkpoint"):
        impact.rank({}, 8)


def test_the_price_by_hand():
    """Two prompts of 10 tokens, 4 samples of 5: a step is 4 x 60; here 60 to sample, and for the
    half that is used 30 forward and a quarter of the layers of 4 x 15 backward."""
    price = impact.price(10, 5, 2, 4, above=0.25, used=0.5)
    assert price.step == 240 and price.impact == 60 + 0.5 * (60 + 0.25 * 2 * 4 * 15)
    assert price.share(200) == pytest.approx(price.impact / 48_000)


def test_the_fast_path_is_under_one_percent_of_a_run():
    """A 135M model of 30 layers, 64 prompts of 40 tokens, answers of 16: and of few tokens too."""
    for prompt, answer in ((40, 16), (8, 8), (200, 8), (20, 256)):
        assert impact.price(prompt, answer, 64, 8, above=0.5).share(200) < 0.01


def test_a_gram_from_the_probe_of_another_loop():
    """The API as its docstring has it, on somebody's own model."""

    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(5, 5) for _ in range(2))

        def forward(self, x):
            for layer in self.layers:
                x = x + layer(x).cumsum(1)
            return x

    torch.manual_seed(0)
    model, x = Own(), torch.randn(8, 6, 5)
    each = costate.CostateGram(torch.arange(6).expand(8, 6) < 3, 4)
    with costate.probe(model, each=each):
        logp = model(x).tanh().sum((1, 2))
        logp.sum().backward()
    rewards = torch.tensor([[0.0, 1, 1, 0], [1, 1, 1, 1]])
    a = impact.measured(each.layers[1], rewards, logp.view(2, 4), torch.full((2, 4), 3.0))
    assert a.power[0] > 0 and a.power[1] == 0 and len(a.and_then(a)) == 4
    assert impact.mixed(rewards).tolist() == [True, False]
