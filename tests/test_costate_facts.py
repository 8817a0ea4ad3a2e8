"""What a costate is, by enumerating every sequence of a tiny decoder in fp64: no sampling at all.

V = 6, T = 3: 216 sequences. The expectations below are sums over all of them.
"""

import itertools

import pytest
import torch

import vgkern
from vgkern import costate
from vgkern.train.model import Decoder, Shape

V, P, T, D = 6, 2, 3, 16
PROMPT = [1, 4]
TOKENS = torch.tensor(list(itertools.product(range(V), repeat=T)))  # [C, T], sorted by prefix
IDS = torch.cat([torch.tensor(PROMPT).expand(len(TOKENS), P), TOKENS], 1)
MASK = torch.arange(P + T - 1) >= P - 1  # rows that predict a response token


def table():
    return torch.rand(V**T, generator=torch.Generator().manual_seed(5)).double()


REWARDS = {
    "table": table(),
    "ascending": (TOKENS[:, 1:] > TOKENS[:, :-1]).double().mean(-1),
    "count": (TOKENS == 2).double().sum(-1),
    "last is first": (TOKENS[:, -1] == TOKENS[:, 0]).double(),
}
BASELINES = {"no baseline": 0.0, "baseline": 0.7}


def decoder(seed):
    made = Decoder(Shape(V, D, 2, 2, 32, 8), [], seed=seed).double()
    with torch.no_grad():  # far from uniform, with an attention that looks at the tokens
        for weight in made.parameters():
            weight *= 1.5
        made.embedding.weight *= 10
    return made


@pytest.fixture
def model(threads):
    threads(1)
    return decoder(3)


def logp(model, inputs):
    """log pi of every sampled token [C, T] given input embeddings [C, P+T, D]."""
    hidden = model.from_embeddings(inputs)[:, P - 1 : -1]
    return vgkern.linear_token_logprobs(hidden, model.embedding.weight, TOKENS).logp


def value_gradients(model, reward):
    """grad V(prefix) w.r.t. the input at the prefix's last position, for every prefix: T tensors
    [V^s, D]. Differentiates the expectation itself, sum p R, and knows nothing of scores."""
    out = []
    for s in range(T):
        own = torch.arange(len(TOKENS)) // V ** (T - s)  # prefix of s sampled tokens
        first = torch.arange(V**s) * V ** (T - s)
        leaf = model.embedding.weight.detach()[IDS[first, P + s - 1]].requires_grad_()
        x = model.embedding.weight.detach()[IDS].clone()
        x = torch.cat([x[:, : P + s - 1], leaf[own][:, None], x[:, P + s :]], 1)
        p = logp(model, x)[:, s:].sum(-1).exp()  # of the continuation, given the prefix
        values = torch.zeros(V**s, dtype=p.dtype).index_add(0, own, p * reward)
        out.append(torch.autograd.grad(values.sum(), leaf)[0])
    return out


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("name", REWARDS)
def test_mean_costate_is_the_value_gradient(model, name, baseline):
    """E[dL/dx_t | prefix] = grad V(prefix) at x_t, L = sum A log pi, tokens held fixed."""
    reward = REWARDS[name]
    x = model.embedding.weight.detach()[IDS].clone().requires_grad_()
    lp = logp(model, x)
    surrogate = ((reward - BASELINES[baseline])[:, None] * lp).sum()
    (costates,) = torch.autograd.grad(surrogate, x)
    for s, want in enumerate(value_gradients(model, reward)):
        p = lp.detach()[:, s:].sum(-1).exp()
        mean = (p[:, None] * costates[:, P + s - 1]).view(V**s, -1, D).sum(1)
        assert float((mean - want).abs().max()) < 1e-12
        assert float(want.norm(dim=-1).median()) > 1e-3  # there is something to be equal to


def test_an_earlier_position_holds_decisions_already_taken(model):
    """Given the prefix, the costate one position back has the score of the prefix's last token."""
    reward = REWARDS["table"]
    x = model.embedding.weight.detach()[IDS].clone().requires_grad_()
    lp = logp(model, x)
    p = lp.detach()[:, 1:].sum(-1).exp()
    (all_terms,) = torch.autograd.grad((reward[:, None] * lp).sum(), x, retain_graph=True)
    (future,) = torch.autograd.grad((reward[:, None] * lp[:, 1:]).sum(), x)
    x = model.embedding.weight.detach()[IDS].clone().requires_grad_()
    (want,) = torch.autograd.grad((logp(model, x)[:, 1:].sum(-1).exp() * reward).sum(), x)
    want = want[:, P - 1].view(V, -1, D).sum(1)
    means = [(p[:, None] * c[:, P - 1]).view(V, -1, D).sum(1) for c in (all_terms, future)]
    assert float((means[1] - want).abs().max()) < 1e-12
    assert float((means[0] - want).norm() / want.norm()) > 0.1


def test_the_surrogate_through_the_sampled_token_is_bias(threads):
    """The score's gradient is exact by itself, so all that a hop of its costate adds is bias: not
    small, across the gradient in part, and with or against it as the model happens to be."""
    threads(1)
    cosines = []
    for seed, reward in itertools.product(range(3), REWARDS.values()):
        model = decoder(seed)
        weights, head = list(model.parameters()), model.embedding.weight
        lp = logp(model, model.embedding(IDS))
        p = lp.detach().sum(-1).exp()
        want = flat(torch.autograd.grad((lp.sum(-1).exp() * reward).sum(), weights))

        x = model.embedding(IDS)
        hidden = model.from_embeddings(x)
        lp = vgkern.linear_token_logprobs(hidden[:, P - 1 : -1], head, TOKENS).logp
        surrogate = ((p * (reward - p @ reward))[:, None] * lp).sum()
        score = flat(torch.autograd.grad(surrogate, weights, retain_graph=True))
        assert float((score - want).abs().max()) < 1e-12

        with pytest.raises(ValueError, match=r"objective: .*sampled tokens.*pure bias"):
            mask = MASK.expand(len(IDS), -1)
            costate.hops(surrogate, x, hidden, head, head, IDS[:, 1:], mask=mask)

        (local,) = torch.autograd.grad(surrogate, x, retain_graph=True)
        token = vgkern.noisy_embedding(
            hidden[:, P - 1 : -1], head, head.detach(), TOKENS, relaxation="expected"
        )
        hop = flat(torch.autograd.grad(token, weights, local[:, P:]))
        assert float(hop.norm() / want.norm()) > 0.05
        cosines.append(float(hop @ want / (hop.norm() * want.norm())))
    assert max(map(abs, cosines)) < 0.9 and min(cosines) < -0.2 and max(cosines) > 0.2


def flat(grads):
    return torch.cat([g.flatten() for g in grads])
