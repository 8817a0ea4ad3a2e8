"""K parallel backwards against the rollout that they stand for, exactly.

The rollout is written here from its formula, one token after the other, with nothing of the
package in it but the noise: x_{t+1} = (onehot + q - sg(q)) sg(E) + (onehot E - sg(onehot E)).
"""

import functools

import pytest
import torch
import torch.nn.functional as F

import vgkern
from vgkern import costate
from vgkern.train.model import Decoder, Shape

B, P, T, V, D = 3, 2, 4, 11, 16
L = P + T
NOISE = vgkern.Noise(9, torch.arange(B)[:, None], torch.arange(L - 1))
MASK = (torch.arange(L - 1) >= P - 1).expand(B, -1)
RELAXATIONS = {
    "expected": {"relaxation": "expected", "temperature": 0.8},
    "gumbel": {"relaxation": "gumbel", "tau": 0.7, "temperature": 0.8, "noise": NOISE},
}


def ours(dtype=torch.float64):
    model = Decoder(Shape(V, D, 2, 2, 24, 8), [0], seed=1).to(dtype)
    with torch.no_grad():
        model.embedding.weight *= 20
    return model


def llama(tied, dtype=torch.float64):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16,
        tie_word_embeddings=tied, initializer_range=0.3, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(4)
    model = transformers.LlamaForCausalLM(config).to(dtype).eval()
    for name, module in model.named_modules():
        if name.endswith("norm"):  # its own forward rounds to fp32
            norm = functools.partial(F.rms_norm, weight=module.weight, eps=1e-6)
            module.forward = functools.partial(norm, normalized_shape=(D,))
    return model


MODELS = {"ours": ours, "llama": lambda: llama(False), "llama, tied": lambda: llama(True)}


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


def parts(model):
    """table [V, D], head [V, D], bias, and embeddings -> hidden; without `teacher_forced`."""
    if isinstance(model, Decoder):
        head = model.embedding.weight
        return head, head, model.bias, model.from_embeddings
    body = model.model
    return (
        model.get_input_embeddings().weight, model.lm_head.weight, None,
        lambda x: body(inputs_embeds=x, use_cache=False).last_hidden_state,
    )  # fmt: skip


def soft(hidden, model, options, position):
    """q [B, V], of the token at `position` (an index, or a slice of them)."""
    _, head, bias, _ = parts(model)
    z = (hidden @ head.T + (0 if bias is None else bias)) / options["temperature"]
    if options["relaxation"] == "gumbel":
        z = (z + NOISE.gumbel(V, z.dtype)[:, position]) / options["tau"]
    return z.softmax(-1)


def straight_through(q, y, table):
    onehot = F.one_hot(y, V).to(q.dtype)
    surrogate = (onehot + q - q.detach()) @ table.detach()
    return surrogate + onehot @ table - (onehot @ table).detach()


def sampled(model, options):
    """ids [B, L]: prompts, then what the noise chooses."""
    table, _, _, run = parts(model)
    ids = torch.randint(1, V, (B, P), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for t in range(P - 1, L - 1):
            gumbel = {"relaxation": "gumbel", "tau": 1.0, "temperature": options["temperature"]}
            q = soft(run(table[ids])[:, -1], model, gumbel, t)
            ids = torch.cat([ids, q.argmax(-1, keepdim=True)], 1)
    return ids


REWARD = torch.randn(D, D, generator=torch.Generator().manual_seed(6)).double()


def objective(x, hidden, model):
    """A reward model that reads the embeddings, and an entropy of what the policy would say."""
    _, head, bias, _ = parts(model)
    z = hidden[:, :-1] @ head.T + (0 if bias is None else bias)
    entropy = torch.distributions.Categorical(logits=z).entropy()[MASK].mean()
    reward = ((x @ REWARD.to(x.dtype)).tanh().cumsum(1).sin()).mean()
    return -reward - 0.3 * entropy


def gradients(model, inputs=None):
    grads = {name: w.grad for name, w in model.named_parameters()}
    if inputs is not None:
        grads["inputs"] = inputs
    for w in model.parameters():
        w.grad = None
    return grads


def sequential(model, ids, options):
    """One token after the other; the gradient of each input as it enters."""
    table, _, _, run = parts(model)
    inputs, hidden = [table[ids[:, i]] for i in range(P)], None
    for x in inputs:
        x.retain_grad()
    for t in range(P - 1, L):
        hidden = run(torch.stack(inputs, 1))
        if t < L - 1:
            q = soft(hidden[:, -1], model, options, t)
            inputs.append(straight_through(q, ids[:, t + 1], table))
            inputs[-1].retain_grad()
    objective(torch.stack(inputs, 1), hidden, model).backward()
    return gradients(model, torch.stack([x.grad for x in inputs], 1))


def truncated(model, ids, options, k):
    """The rollout with k + 1 levels of tokens, of which the lowest one cuts: a path from the top
    crosses at most k sampled tokens, and takes each such path once."""
    table, _, _, run = parts(model)
    x = table[ids]
    x.retain_grad()
    levels = [x]
    for _ in range(k):
        q = soft(run(x)[:, :-1], model, options, slice(0, L - 1))
        soft_x = straight_through(q, ids[:, 1:], table)
        x = torch.cat(
            [table[ids[:, :1]], torch.where(MASK[..., None], soft_x, table[ids[:, 1:]])], 1
        )
        x.retain_grad()
        levels.append(x)
    objective(x, run(x), model).backward()
    return gradients(model, sum(x.grad for x in levels))


def by_hops(model, ids, options, k, **kw):
    run = costate.teacher_forced(model, ids, MASK)
    run.inputs_embeds.retain_grad()
    h = run.hops(objective(run.inputs_embeds, run.hidden, model), k, **options, **kw)
    total = h.costates()
    h.backward()
    assert torch.allclose(total, run.inputs_embeds.grad, rtol=1e-9, atol=1e-13)
    return gradients(model, total), h


def same(got, want, tolerance=1e-10):
    assert got.keys() == want.keys()
    for name in want:
        error = float((got[name] - want[name]).norm() / want[name].norm())
        assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("relaxation", RELAXATIONS)
@pytest.mark.parametrize("name", MODELS)
def test_all_hops_are_sequential_backpropagation(name, relaxation):
    model, options = MODELS[name](), RELAXATIONS[relaxation]
    ids = sampled(model, options)
    got, h = by_hops(model, ids, options, T)
    same(got, sequential(model, ids, options))
    assert float(h.norms[1] / h.norms[0]) > 1e-3  # the tokens do carry something


@pytest.mark.parametrize("relaxation", RELAXATIONS)
@pytest.mark.parametrize("name", MODELS)
def test_fewer_hops_are_truncated_backpropagation(name, relaxation):
    model, options = MODELS[name](), RELAXATIONS[relaxation]
    ids = sampled(model, options)
    before = None
    for k in range(T + 1):
        want = truncated(model, ids, options, k)
        same(by_hops(model, ids, options, k)[0], want)
        if before is not None and k < 3:  # each hop matters at this tolerance
            assert float((want["inputs"] - before["inputs"]).norm()) > 1e-8
        before = want
    same(before, sequential(model, ids, options))
    same(by_hops(model, ids, options, T + 5)[0], before)  # M is nilpotent


@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_one_backward_mixes_score_and_pathwise(relaxation):
    model, options = ours(), RELAXATIONS[relaxation]
    ids = sampled(model, options)
    advantages = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)

    def score(run):
        rows = run.hidden[:, :-1]
        return vgkern.linear_policy_loss(
            rows, run.weight, run.tokens, advantages, bias=run.bias, mask=run.mask, temperature=0.8
        ).loss

    score(costate.teacher_forced(model, ids, MASK)).backward()
    alone = gradients(model)
    hop = by_hops(model, ids, options, 1)[0]
    run = costate.teacher_forced(model, ids, MASK)
    h = run.hops(objective(run.inputs_embeds, run.hidden, model), 1, **options)
    w = costate.Mix.constant(0.3)(0)
    h.backward(w.score * score(run), weight=w.pathwise)
    want = {n: 0.7 * alone[n] + 0.3 * hop[n] for n in alone}
    same(gradients(model), want)
    run = costate.teacher_forced(model, ids, MASK)
    h = run.hops(objective(run.inputs_embeds, run.hidden, model), 1, **options)
    h.backward(score(run), weight=0.0)
    same(gradients(model), alone)


@pytest.mark.parametrize("objective_name", ["grpo", "gspo"])  # row-local; of whole sequences
@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_the_last_hop_in_the_pass_of_the_loss(relaxation, objective_name):
    """What a backward of both parts gives, and the value of the loss unchanged."""
    options, model = RELAXATIONS[relaxation], ours(torch.float32)
    ids = sampled(model, options)

    def run(fused):
        tf = costate.teacher_forced(model, ids, MASK)
        d = objective(tf.inputs_embeds, tf.hidden, model)
        h = tf.hops(d, 2, **options)
        loss = vgkern.linear_policy_loss(
            tf.hidden[:, :-1], tf.weight, tf.tokens, torch.tensor([1.0, -0.5, 2.0]), bias=tf.bias,
            mask=tf.mask, temperature=0.8, objective=objective_name,
            costate=h.term(0.3 / 0.7) if fused else None,
        ).loss  # fmt: skip
        (0.7 * loss + 0.3 * d).backward() if fused else h.backward(0.7 * loss, weight=0.3)
        return loss.detach(), gradients(model)

    (got_loss, got), (want_loss, want) = run(True), run(False)
    assert torch.equal(got_loss, want_loss)
    same(got, want, 1e-5)


@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_the_fused_backend_agrees(relaxation):
    options = RELAXATIONS[relaxation]
    ids = sampled(ours(), options)
    want = by_hops(ours(), ids, options, 2)[0]
    model = ours(torch.float32)
    run = costate.teacher_forced(model, ids, MASK)
    run.inputs_embeds.retain_grad()
    h = run.hops(objective(run.inputs_embeds, run.hidden, model), 2, **options)
    h.backward()
    same(gradients(model, run.inputs_embeds.grad), want, 2e-5)


def test_a_reward_model_with_a_table_of_its_own():
    """Both tables side by side are one table; the reward model reads its columns of the inputs."""
    model, options = ours(), RELAXATIONS["expected"]
    ids = sampled(model, options)
    own = torch.randn(V, 5, generator=torch.Generator().manual_seed(8)).double()

    def reward(x):
        return (x.cumsum(1).sin() ** 2).mean()

    both = torch.cat([model.embedding.weight, own], 1)
    x = both[ids]
    hidden = model.from_embeddings(x[..., :D])
    h = costate.hops(
        reward(x[..., D:]), x, hidden, model.embedding.weight, both, ids[:, 1:], T,
        bias=model.bias, mask=MASK, **options
    )  # fmt: skip
    h.backward()
    got = gradients(model)

    table, _, _, run = parts(model)
    mine, theirs = [table[ids[:, i]] for i in range(P)], [own[ids[:, i]] for i in range(P)]
    for t in range(P - 1, L - 1):
        q = soft(run(torch.stack(mine, 1))[:, -1], model, options, t)
        mine.append(straight_through(q, ids[:, t + 1], table))
        theirs.append(straight_through(q, ids[:, t + 1], own))
    reward(torch.stack(theirs, 1)).backward()
    same(got, gradients(model))


def test_padding_and_unsampled_rows_carry_nothing():
    """A row outside the mask hops nowhere, whatever its token is."""
    model, options = ours(), RELAXATIONS["expected"]
    ids = sampled(model, options)
    run = costate.teacher_forced(model, ids, MASK)
    loss = objective(run.inputs_embeds, run.hidden, model)
    h = run.hops(loss, 2, **options)
    assert bool((h.value[:, 0] == 0).all()) and bool((h.value[:, 1:] != 0).any(-1).all())
    anything = run.tokens.where(run.mask, -100)
    other = costate.hops(loss, *run[:4], anything, 2, mask=run.mask, bias=run.bias, **options)
    assert torch.equal(h.value, other.value) and torch.equal(h.norms, other.norms)
    none = torch.zeros_like(run.mask)
    h = costate.hops(loss, *run[:4], run.tokens, 3, mask=none, bias=run.bias, **options)
    assert bool((h.value == 0).all()) and float(h.norms[1:].sum()) == 0


def test_inputs_stay_as_they_are():
    model, options = ours(), RELAXATIONS["gumbel"]
    ids = sampled(model, options)
    before = {n: w.detach().clone() for n, w in model.named_parameters()}
    run = costate.teacher_forced(model, ids, MASK)
    x, hidden, kept = run.inputs_embeds.detach().clone(), run.hidden.detach().clone(), ids.clone()
    h = run.hops(objective(run.inputs_embeds, run.hidden, model), 2, **options)
    assert all(w.grad is None for w in model.parameters())  # activations only
    h.backward()
    assert torch.equal(x, run.inputs_embeds) and torch.equal(hidden, run.hidden)
    assert torch.equal(kept, ids)
    assert all(torch.equal(before[n], w) for n, w in model.named_parameters())


def test_a_frozen_table_and_a_frozen_head():
    model = llama(False)
    for w in (model.model.embed_tokens.weight, model.lm_head.weight):
        w.requires_grad_(False)
    options = RELAXATIONS["expected"]
    ids = sampled(model, options)
    run = costate.teacher_forced(model, ids, MASK)
    assert run.inputs_embeds.is_leaf
    run.hops(objective(run.inputs_embeds, run.hidden, model), T, **options).backward()
    got = {n: g for n, g in gradients(model).items() if g is not None}
    want = {n: g for n, g in truncated(llama(False), ids, options, T).items() if n in got}
    assert len(got) == len(dict(model.named_parameters())) - 2
    same(got, want)
