"""The decoder: tree, cache and plain forward are one function, whatever is shared."""

import math

import pytest
import torch
from torch.nn import functional as F

from vgkern.train.generate import generate
from vgkern.train.layers import RMSNorm, SwiGLU
from vgkern.train.model import Decoder, Shape
from vgkern.train.tokenizer import CharTokenizer

SHAPE = Shape(width=32, layers=2, heads=2, mlp=48, context=40)
GROUP = 3
PROMPTS = [[5, 6, 7, 8, 9], [5, 6], [4], [9, 9, 9, 3]]  # odd lengths, a shared first token


@pytest.fixture
def model():
    return Decoder(SHAPE, CharTokenizer().blocked, seed=3)


def completions():
    """Identical rows, rows that part at every depth, rows of one token, odd lengths."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(2, 5, (len(PROMPTS) * GROUP, 6), generator=generator)
    tokens[1] = tokens[0]
    lengths = torch.tensor([6, 6, 1, 3, 6, 2, 5, 5, 4, 1, 1, 6])
    return tokens, lengths, torch.arange(6) < lengths[:, None]


def naive(model, ids):
    """The textbook decoder on one sequence, from the same weights: [T] -> [T, D]."""
    heads, size = SHAPE.heads, SHAPE.width // SHAPE.heads
    norm = lambda x: x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()  # noqa: E731

    def rope(x):  # [T, h, dh]; channel 2i and 2i+1 are a pair
        turn = 10000.0 ** (-torch.arange(size // 2) / (size // 2))
        angle = torch.arange(len(x))[:, None, None] * turn
        a, b = x[..., 0::2], x[..., 1::2]
        turned = (a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin())
        return torch.stack(turned, -1).flatten(-2)

    x = model.embedding.weight[ids]
    for layer in model.layers:
        q, k, v = layer.qkv(norm(x)).view(len(ids), 3, heads, size).unbind(1)
        scores = torch.einsum("qhd,khd->hqk", rope(q), rope(k)) / math.sqrt(size)
        ahead = torch.ones(len(ids), len(ids)).triu(1).bool()
        weights = scores.masked_fill(ahead, -torch.inf).softmax(-1)
        x = x + layer.out(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
        gate, up = layer.gate_up(norm(x)).chunk(2, -1)
        x = x + layer.down(F.silu(gate) * up)
    return norm(x)


def gradient(model, hidden, mask):
    model.zero_grad()
    weight = torch.linspace(-1, 1, hidden.numel()).view(hidden.shape)
    (torch.sin(3 * hidden) * weight * mask[..., None]).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("shared", [True, False])
def test_hidden_equals_the_textbook(model, shared):
    tokens, lengths, mask = completions()
    hidden = model.hidden(PROMPTS, tokens, GROUP, lengths, shared=shared)
    want = torch.zeros_like(hidden)
    for row, count in enumerate(lengths.tolist()):
        prompt = PROMPTS[row // GROUP]
        ids = torch.tensor(prompt + tokens[row, : count - 1].tolist())
        want = want.index_put((torch.tensor(row), torch.arange(count)), naive(model, ids)[-count:])
    assert torch.isfinite(hidden).all()
    assert ((hidden - want)[mask]).abs().max() < 1e-5
    got, wanted = gradient(model, hidden, mask), gradient(model, want, mask)
    assert (got - wanted).norm() < 1e-5 * wanted.norm()


def test_shared_equals_plain(model):
    tokens, lengths, mask = completions()
    one = model.hidden(PROMPTS, tokens, GROUP, lengths)
    two = model.hidden(PROMPTS, tokens, GROUP, lengths, shared=False)
    assert (one - two)[mask].abs().max() < 1e-5
    got, want = gradient(model, one, mask), gradient(model, two, mask)
    assert (got - want).norm() < 1e-5 * want.norm()


def test_cache_equals_hidden_while_rows_finish(model):
    tokens, lengths, _ = completions()
    want = model.hidden(PROMPTS, tokens, GROUP, lengths)
    state, hidden = model.prefill(PROMPTS, GROUP, 6)
    live = torch.arange(len(tokens))
    assert (hidden - want[:, 0]).abs().max() < 1e-5
    for position in range(1, 6):
        going = (lengths[live] > position).nonzero()[:, 0]
        live = live[going]
        model.keep(state, going)
        hidden = model.decode(state, tokens[live, position - 1])
        assert (hidden - want[live, position]).abs().max() < 1e-5


def test_identical_prefixes_are_forwarded_once(model, monkeypatch):
    seen = []
    project = model.layers[0].project
    monkeypatch.setattr(
        model.layers[0], "project", lambda x: (seen.append(len(x)), project(x))[1], raising=False
    )
    tokens = torch.full((8, 4), 5)
    model.hidden([[2, 3, 4]], tokens, 8, torch.full((8,), 4))
    assert seen == [3 + 3]  # the prompt, and one row of 3 tokens instead of 8


@pytest.mark.parametrize("function", [RMSNorm, SwiGLU])
def test_layer_gradients(function):
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function.apply, x)


def sample(model, prompts, group=1, seed=0, sequence=None, max_new=8, temperature=1.0):
    sequence = torch.arange(len(prompts) * group) if sequence is None else sequence
    return generate(
        model, prompts, (1,), group=group, max_new=max_new, seed=seed, sequence=sequence,
        temperature=temperature,
    )  # fmt: skip


def test_samples_do_not_depend_on_the_batch(model):
    together = sample(model, PROMPTS, GROUP)
    for p, prompt in reversed(list(enumerate(PROMPTS))):
        alone = sample(model, [prompt], GROUP, sequence=torch.arange(p * GROUP, (p + 1) * GROUP))
        for g in range(GROUP):
            row, count = p * GROUP + g, int(alone.lengths[g])
            assert together.lengths[row] == count
            assert torch.equal(together.tokens[row, :count], alone.tokens[g, :count])
    assert torch.equal(sample(model, PROMPTS, GROUP).tokens, together.tokens)
    assert not torch.equal(sample(model, PROMPTS, GROUP, seed=1).tokens, together.tokens)


def test_blocked_ids_are_never_sampled(model):
    blocked = torch.tensor(CharTokenizer().blocked)
    with torch.no_grad():  # make them what the model would most like to say
        model.embedding.weight[blocked] = 50 * model.embedding.weight[5]
    rollout = sample(model, [[5]] * 50, 8, temperature=2.0)
    assert not torch.isin(rollout.tokens[rollout.mask], blocked).any()


def test_the_stop_token_is_kept_and_lengths_count_it(model):
    with torch.no_grad():
        model.bias[1] = 1.0
    rollout = sample(model, PROMPTS, 8)
    last = rollout.tokens.gather(1, rollout.lengths[:, None] - 1)[:, 0]
    assert rollout.finished.any() and torch.equal(rollout.finished, last == 1)
    assert (rollout.tokens[~rollout.mask] == 0).all()


def test_too_long_and_empty_prompts_are_named(model):
    with pytest.raises(ValueError, match=r"prompt of 39 tokens \+ 2 new ones exceed context=40"):
        model.prefill([[5] * 39], 1, 2)
    with pytest.raises(ValueError, match="empty prompt"):
        model.prefill([[5], []], 1, 2)
