"""Costate readouts: norms that stream, a signal without bias, and the command that shows them."""

import gc
import itertools
import sys

import pytest
import torch
from torch import nn

import vgkern
from vgkern import costate
from vgkern.costate.sampling_gap import sampling_gap_ref
from vgkern.train import model as decoder
from vgkern.train.checkpoint import new_policy
from vgkern.train.config import Config
from vgkern.train.generate import generate
from vgkern.train.model import tree_nodes
from vgkern.train.readouts import Sampling, read

SMALL = Config(width=32, layers=3, heads=2, mlp=48, context=40)
PROMPTS, GROUP, WIDTH = [[5, 6, 7, 8], [9, 3], [4, 4, 6]], 4, 5


@pytest.fixture
def policy():
    made, _ = new_policy(SMALL)
    for name, weight in made.named_parameters():  # far from the identity: every path counts
        if name.endswith(("out.weight", "down.weight")):
            weight.data *= 3
    return made


@pytest.fixture
def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=24, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=32, initializer_range=0.2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def completions():
    generator = torch.Generator().manual_seed(3)
    rows = len(PROMPTS) * GROUP
    tokens = torch.randint(2, 6, (rows, WIDTH), generator=generator)  # shared prefixes happen
    return tokens, torch.randint(1, WIDTH + 1, (rows,), generator=generator)


def loss_of(policy, shared):
    tokens, lengths = completions()
    hidden = policy.hidden(PROMPTS, tokens, GROUP, lengths, shared)
    head = policy.head()
    targets = tokens.masked_fill(torch.arange(WIDTH) >= lengths[:, None], -100)
    logp = vgkern.linear_token_logprobs(hidden, head.weight, targets, bias=head.bias).logp
    return (logp * torch.linspace(-1, 2, len(tokens))[:, None]).sum()


@pytest.mark.parametrize("shared", [False, True])
def test_norms_of_the_decoder_are_those_of_whole_gradients(policy, monkeypatch, shared):
    """Against the residual stream itself, kept whole, and slots from the tree's own positions."""
    stream = []
    finish = decoder.Layer.finish

    def keeping(layer, x, attended):
        stream.append(finish(layer, x, attended))
        return stream[-1]

    monkeypatch.setattr(decoder.Layer, "finish", keeping)
    handle = policy.embedding.register_forward_hook(lambda *a: stream.append(a[2]))
    with costate.probe(policy) as p:
        loss = loss_of(policy, shared)
        whole = torch.autograd.grad(loss, stream, retain_graph=True)
        loss.backward()
    handle.remove()
    norms, layers = p.result()
    tokens, lengths = completions()
    prompts, group = (PROMPTS, GROUP) if shared else ([q for q in PROMPTS for _ in range(4)], 1)
    nodes, _ = tree_nodes(prompts, tokens.numpy(), group, lengths.numpy())
    width = nodes.mask.shape[-1]
    assert norms.shape == (4, len(prompts), width) and layers[0] == "embedding"
    if not shared:  # chains: the slot is the position in the text
        assert torch.equal(nodes.slot % width, nodes.position)
    for layer, gradient in enumerate(whole):
        want = torch.zeros(len(prompts) * width)
        for slot, row in zip(nodes.slot[-len(gradient) :], gradient, strict=True):
            want[slot] = row.norm()
        assert want.count_nonzero() > 12
        torch.testing.assert_close(norms[layer].flatten(), want, rtol=1e-5, atol=1e-7)


def llama_loss(model, ids, **extra):
    logp = model(input_ids=ids, **extra).logits[:, :-1].log_softmax(-1)
    return logp.gather(-1, ids[:, 1:, None]).sum()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_norms_of_a_hugging_face_model_are_those_of_whole_gradients(llama, checkpointed):
    ids = torch.randint(61, (3, 9), generator=torch.Generator().manual_seed(0))
    stream = []
    blocks = llama.model.layers
    handles = [blocks[0].register_forward_pre_hook(lambda m, a: stream.append(a[0]))]
    handles += [b.register_forward_hook(lambda m, a, out: stream.append(out)) for b in blocks]
    whole = torch.autograd.grad(llama_loss(llama, ids), stream)
    for handle in handles:
        handle.remove()
    if checkpointed:
        llama.train()
        llama.gradient_checkpointing_enable({"use_reentrant": False})
    for options in ({}, {"layers": list(blocks)}):
        with costate.probe(llama, **options) as p:
            with torch.no_grad():
                llama(ids)  # a rollout is no pass
            llama_loss(llama, ids).backward()
        norms = p.result().norms
        assert norms.shape == (3, 3, 9)
        for got, want in zip(norms, whole, strict=True):
            torch.testing.assert_close(got, want.norm(dim=-1), rtol=1e-5, atol=1e-7)
    with costate.probe(llama, layers=blocks[1:]) as p:
        llama_loss(llama, ids).backward()
    torch.testing.assert_close(p.result().norms, norms[1:], rtol=1e-5, atol=1e-7)


def test_gradients_are_unchanged_to_the_bit_and_hooks_leave(policy):
    def gradient():
        policy.zero_grad()
        loss = loss_of(policy, True)
        loss.backward()
        return [q.grad.clone() for q in policy.parameters()], loss

    def hooks():
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
        return sum(len(getattr(m, kind)) for m in policy.modules() for kind in kinds)

    plain, _ = gradient()
    with costate.probe(policy, each=costate_sink) as p:
        assert hooks() == 7
        probed, _ = gradient()
        late = loss_of(policy, True)
    assert all(map(torch.equal, plain, probed))
    assert hooks() == 0 and len(p.results()) == 1
    late.backward()  # its forward pass was inside, its backward is not: nothing is recorded
    assert len(p.results()) == 1
    with pytest.raises(RuntimeError, match="stop"), costate.probe(policy):
        raise RuntimeError("stop")
    assert hooks() == 0


def costate_sink(layer, x):
    assert x.ndim == 3 and not x.requires_grad


class Stack(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(13, 13) for _ in range(depth))

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def test_live_gradients_do_not_grow_with_the_layers():
    """Gradients [B, T, H] that Python still reaches when the backward pass is at the input."""
    counts = {}
    for depth in (2, 12):
        seen, live = [], []

        def count(layer, x, seen=seen, live=live):
            seen.append(layer)
            if layer == 0:
                shaped = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.ndim == 3]
                live.extend(o for o in shaped if o.shape == x.shape and not o.requires_grad)

        model = Stack(depth)
        x = torch.randn(3, 7, 13, requires_grad=True)
        with costate.probe(model, each=count) as p:
            model(x).square().sum().backward()
        assert seen == list(range(depth, -1, -1)) and p.result().norms.shape == (depth + 1, 3, 7)
        counts[depth] = len(live)
        kept = sum(r.numel() for run in p.passes for r in run.rows)
        assert kept == (depth + 1) * 3 * 7  # a number per layer and position, and no more
    assert counts[12] == counts[2], counts


def test_passes_are_counted_and_what_has_none_says_so(policy):
    with costate.probe(policy) as p:
        for _ in range(2):
            loss_of(policy, True).backward()
    assert len(p.results()) == 2 and torch.equal(p.results()[0].norms, p.results()[1].norms)
    with pytest.raises(ValueError, match="2 forward and 2 backward"):
        p.result()
    loss = loss_of(policy, True)
    with costate.probe(policy) as p:
        loss.backward()
    with pytest.raises(ValueError, match=r"0 forward.*inside"):
        p.result()
    with pytest.raises(ValueError, match=r"model.*layers="):
        costate.probe(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="layers"):
        costate.probe(policy, layers=[])
    with pytest.raises(TypeError, match="model"):
        costate.probe("gpt2")
    frozen = Stack(3)
    frozen.layers[0].requires_grad_(False)
    with costate.probe(frozen) as p:
        frozen(torch.randn(2, 4, 13)).sum().backward()
    assert p.result().norms.isnan().all((1, 2)).tolist() == [
        True,
        True,
        False,
        False,
    ]  # frozen below layer 2


class Shared(nn.Module):
    """Blocks that run more than once in a forward pass."""

    def __init__(self, order, twice=False):
        super().__init__()
        made = [nn.Linear(5, 5) for _ in range(2)]
        self.layers = nn.ModuleList([made[0], made[0]] if twice else made)
        self.order = order

    def forward(self, x):
        for index in self.order:
            x = self.layers[index](x)
        return x


@pytest.mark.parametrize("order", [(0, 1, 0, 1), (0, 0, 1), (0, 1, 1)], ids=str)
def test_a_block_that_runs_twice_in_a_pass_is_refused(order):
    x = torch.randn(2, 3, 5)
    shared = Shared(order)
    again = r"^model: got block layers\.\d, run twice in one forward pass; allowed"
    with costate.probe(shared), pytest.raises(ValueError, match=again):
        shared(x)
    with pytest.raises(ValueError, match=r"^layers: got one module twice"):
        costate.probe(Shared((0, 1), twice=True))
    once = Shared((0, 1))
    with costate.probe(once) as p:  # two passes are two passes
        (once(x).sum() + once(2 * x).sum()).backward()
    assert len(p.results()) == 2


@pytest.mark.parametrize("group", [4, 8])
def test_the_signal_is_unbiased_and_the_naive_norm_is_not(group):
    """u = eps ~ N(0, I_5), r = w.eps + |eps|^2 / 4 + offset: E[r u] = w exactly."""
    generator = torch.Generator().manual_seed(group)
    count, w = 40_000, torch.tensor([0.3, -0.2, 0.1, 0.0, 0.4]).double()
    u = torch.randn(count, group, 5, generator=generator, dtype=torch.float64)
    r = u @ w + u.square().sum(-1) / 4 + 7
    truth = float(w @ w)
    signal = costate.value_gradient_signal(u @ u.mT, r)

    def z(x):
        return float((x.mean() - truth) / (x.std() / count**0.5))

    assert abs(z(signal.s2)) < 4
    others = (r.sum(-1, keepdim=True) - r) / (group - 1)
    each = (r - others)[..., None] * u
    assert z(each.mean(1).square().sum(-1)) > 40  # the naive norm
    torch.testing.assert_close(signal.power, each.square().sum(-1).mean(-1))
    # and by its definition, term by term, for one group
    total = 0.0
    for i, j in itertools.permutations(range(group), 2):
        b = sum(r[0, k] for k in range(group) if k not in (i, j)) / (group - 2)
        total += (r[0, i] - b) * (r[0, j] - b) * (u[0, i] @ u[0, j])
    assert abs(total / (group * (group - 1)) - signal.s2[0]) < 1e-12


def test_bad_groups_are_refused():
    for count in (2, 3):
        with pytest.raises(ValueError, match=r"rewards.*G >= 4"):
            costate.value_gradient_signal(torch.eye(count), torch.ones(count))
    with pytest.raises(ValueError, match="gram"):
        costate.value_gradient_signal(torch.eye(5), torch.ones(4))
    with pytest.raises(ValueError, match="group"):
        costate.CostateGram(torch.ones(8, 3, dtype=torch.bool), 3)
    with pytest.raises(ValueError, match="k: got"):
        costate.headroom(torch.ones(2, 4), 5)


def test_headroom_is_the_mean_over_all_subsets_and_errors_are_the_usual_ones():
    rewards = torch.rand(3, 7, generator=torch.Generator().manual_seed(0)).double()
    for k in (1, 3, 7):
        subsets = [
            row[list(s)].max() for row in rewards for s in itertools.combinations(range(7), k)
        ]
        best = torch.stack(subsets).view(3, -1).mean(1)
        torch.testing.assert_close(costate.headroom(rewards, k), best - rewards.mean(1))
    x = rewards[:, 0]
    got = costate.over_groups(lambda m: m, x)
    assert abs(got.value - x.mean()) < 1e-12 and abs(got.error - x.std() / 3**0.5) < 1e-12


@pytest.mark.parametrize("softcap", [None, 8.0])
def test_sampling_gap_is_the_direct_formula_and_the_spread_of_draws(monkeypatch, softcap):
    generator = torch.Generator().manual_seed(1)
    h, w, e = (
        torch.randn(n, d, generator=generator).double() for n, d in ((9, 6), (50, 6), (50, 4))
    )
    bias = torch.zeros(50).double()
    bias[3] = -1e9
    options = {"bias": bias, "temperature": 0.7, "softcap": softcap}
    module = sys.modules["vgkern.costate.sampling_gap"]
    monkeypatch.setattr(module, "ROWS", 2 * 50 * 8)  # two rows at a time
    monkeypatch.setattr(module, "VOCAB", 16)
    got = costate.sampling_gap(h.view(3, 3, 6), w, e, **options)
    z = h @ w.T + bias
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    p = (z / 0.7).softmax(-1)
    mean = p @ e
    direct = (p[:, :, None] * (e[None] - mean[:, None]).square()).sum((1, 2))
    torch.testing.assert_close(got.flatten(), direct, rtol=1e-11, atol=1e-12)
    reference = sampling_gap_ref(h, w, e, bias, 0.7, softcap or 0.0)
    torch.testing.assert_close(reference, direct, rtol=1e-9, atol=1e-9)
    drawn = e[p.multinomial(40_000, True, generator=generator)]
    far = (drawn - mean[:, None]).square().sum(-1)
    z = (far.mean(1) - got.flatten()) / (far.std(1) / 200).clamp(min=1e-9)
    assert z.abs().max() < 4.5
    far_off = 1e3 * h.float(), w.float(), e.float() + 100
    sure, truth = costate.sampling_gap(*far_off), sampling_gap_ref(*(t.double() for t in far_off))
    assert truth.min() < 1e-12  # p is certain there, and |e|^2 = 40000 cancels in fp32
    torch.testing.assert_close(sure.double(), truth, rtol=1e-2, atol=1e-7)
    with pytest.raises(ValueError, match="embedding"):
        costate.sampling_gap(h, w, e[:-1])


def sampled(policy, **changes):
    sequence = torch.arange(len(PROMPTS) * GROUP)
    options = {"group": GROUP, "max_new": 6, "seed": 5, "temperature": 0.9}
    rollout = generate(policy, PROMPTS, (1,), sequence=sequence, **{**options, **changes})
    rewards = (rollout.tokens % 3 == 0).float().mean(1)
    return rollout, rewards, sequence


def test_readouts_are_those_of_one_text_at_a_time(policy):
    """Gram matrix of score costates, entropy and agreement, each by plain autograd on one text."""
    rollout, rewards, sequence = sampled(policy)
    groups, text = read(policy, PROMPTS, rollout, rewards, sequence, Sampling(GROUP, 0.9, 5, 1))
    assert torch.equal(groups.again, groups.tokens) and groups.tokens.sum() == rollout.mask.sum()
    other = read(policy, PROMPTS, rollout, rewards, sequence, Sampling(GROUP, 1.4, 5, 1))[0]
    assert other.again.sum() < 0.98 * other.tokens.sum()  # a wrong temperature shows
    head, u = policy.head(), []
    for row in range(GROUP):  # the second prompt's
        row += GROUP
        size = rollout.lengths[row : row + 1]
        fed = []
        handle = policy.embedding.register_forward_hook(lambda *a, fed=fed: fed.append(a[2]))
        tokens = rollout.tokens[row : row + 1]
        hidden = policy.hidden([PROMPTS[1]], tokens, 1, size)[0, : int(size)]
        handle.remove()
        z = (hidden @ head.weight.T + head.bias) / 0.9
        logp = z.log_softmax(-1)[torch.arange(int(size)), tokens[0, : int(size)]]
        u.append(torch.autograd.grad(logp.sum(), fed[0])[0][: len(PROMPTS[1])].flatten())
    u = torch.stack(u)
    torch.testing.assert_close(groups.gram[1, 0], u @ u.T, rtol=1e-3, atol=1e-5)
    assert text.norms.shape == (4, len(text.ids)) and not text.norms[:, -1].any()


@pytest.mark.parametrize("kind", ["decoder", "llama"])
def test_hop_products_are_those_of_the_straight_through_rollout(policy, llama, kind):
    """One hop: d entropy / d x with the sampled inputs x_{t+1} = p_t E (value: the hard token)."""
    from vgkern.train.hf import HFPolicy

    policy = policy if kind == "decoder" else HFPolicy(llama)
    rollout, rewards, sequence = sampled(policy)
    groups, _ = read(policy, PROMPTS, rollout, rewards, sequence, Sampling(GROUP, 0.9, 5, 1))
    layer = policy.embedding if kind == "decoder" else llama.get_input_embeddings()
    head, table = policy.head(), layer.weight.detach()
    for which in (2,):
        want = torch.zeros(3).double()
        for row in range(which * GROUP, (which + 1) * GROUP):
            size, start = int(rollout.lengths[row]), len(PROMPTS[which])
            tokens = rollout.tokens[row : row + 1, :size]
            x = []

            def forward(extra, tokens=tokens, which=which, size=size, x=x):
                def fed(_, args, out):
                    x.append(out)
                    return out if extra is None else out + extra

                handle = layer.register_forward_hook(fed)
                length = torch.tensor([size])
                out = policy.hidden([PROMPTS[which]], tokens, 1, length, shared=False)[0]
                handle.remove()
                z = (out @ head.weight.T + head.bias) / 0.9
                return z.log_softmax(-1)

            def entropy(p):  # of log-probabilities
                return -(p.exp() * p).sum()

            p = forward(None)
            (first,) = torch.autograd.grad(entropy(p), x[0], retain_graph=True)
            soft = p[:-1].exp() @ table
            places = torch.arange(start, start + size - 1)
            if kind == "decoder":  # prompt but its last token, its last, then the answer: in order
                extra = torch.zeros_like(first).index_add(0, places, soft - soft.detach())
            else:
                extra = torch.zeros_like(first[0]).index_add(0, places, soft - soft.detach())[None]
            # the second pass looks its inputs up anew: x[0] reaches it through `extra` only
            both = first + torch.autograd.grad(entropy(forward(extra)), x[0])[0]
            pairs = ((first, first), (both, both), (first, both))
            want += torch.stack([(a.double() * b).sum() for a, b in pairs])
        torch.testing.assert_close(groups.hops[which], want, rtol=1e-3, atol=1e-8)
        assert abs(want[1] - want[0]) > 1e-3 * want[0]  # the hop is there
