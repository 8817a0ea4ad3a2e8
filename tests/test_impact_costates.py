"""Costates at the prompt by the fast path, against autograd one sample at a time."""

import contextlib

import pytest
import torch
from test_probe import SMALL

from vgkern.errors import ConfigError
from vgkern.train import model as decoding
from vgkern.train.checkpoint import new_policy
from vgkern.train.generate import Rollout
from vgkern.train.prompt_costates import depth, frozen, prompt_costates

PROMPTS, GROUP, WIDTH = [[5, 6, 7, 8], [9], [4, 4, 6]], 4, 5
SHARED = [[5, 6, 7, 8], [5, 6, 3], [5, 6, 6, 2, 7]]  # two leading tokens in common


def hugging_face(kind="Llama", **changes):
    transformers = pytest.importorskip("transformers")
    from vgkern.train.hf import HFPolicy

    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
             "initializer_range": 0.3}  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **changes})
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    return HFPolicy(model, blocked=[0])


def decoder():
    policy, _ = new_policy(SMALL)
    for name, weight in policy.named_parameters():  # far from the identity: every path counts
        if name.endswith(("out.weight", "down.weight")):
            weight.data *= 3
    return policy


MAKES = {
    "decoder": decoder,
    "llama": hugging_face,
    "gemma2": lambda: hugging_face("Gemma2", head_dim=6, sliding_window=64,
                                   query_pre_attn_scalar=6),
}  # fmt: skip


def sampled(policy, prompts, temperature):
    """Random answers, some of them equal, and the policy's own log-probs of them."""
    generator = torch.Generator().manual_seed(3)
    rows = len(prompts) * GROUP
    tokens = torch.randint(2, 6, (rows, WIDTH), generator=generator)
    lengths = torch.randint(1, WIDTH + 1, (rows,), generator=generator)
    lengths[0] = WIDTH
    mask = torch.arange(WIDTH) < lengths[:, None]
    tokens = tokens.where(mask, 0)
    with torch.no_grad():
        logp = score(policy, prompts, tokens, lengths, temperature)
    return Rollout(tokens, logp.where(mask, 0), lengths, torch.ones(rows, dtype=torch.bool))


def score(policy, prompts, tokens, lengths, temperature, group=GROUP):
    """[R, w] log-probs, as one plain forward pass of every whole text gives them."""
    hidden = policy.hidden(prompts, tokens, group, lengths, shared=False)
    head = policy.head()
    z = hidden @ head.weight.T + (0 if head.bias is None else head.bias)
    z = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
    return (z / temperature).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


@contextlib.contextmanager
def streams(policy):
    """Every residual stream of every forward pass, whole: what enters the first block and what
    leaves each."""
    kept = []
    if isinstance(policy, decoding.Decoder):
        finish = decoding.Layer.finish
        handles = [policy.embedding.register_forward_hook(lambda m, a, out: kept.append(out))]

        def keeping(layer, x, attended):
            kept.append(finish(layer, x, attended))
            return kept[-1]

        decoding.Layer.finish = keeping
    else:
        finish = decoding.Layer.finish
        blocks = policy.model.model.layers
        handles = [blocks[0].register_forward_pre_hook(lambda m, a: kept.append(a[0]))]
        handles += [b.register_forward_hook(lambda m, a, out: kept.append(out)) for b in blocks]
    try:
        yield kept
    finally:
        decoding.Layer.finish = finish
        for handle in handles:
            handle.remove()


def slow(policy, prompts, rollout, layer, common, temperature):
    """<u_i, u_j> and mean |x|^2: one sample after the other, each with a backward of its own."""
    gram, square = [], []
    for p, prompt in enumerate(prompts):
        us = []
        for row in range(p * GROUP, (p + 1) * GROUP):
            n = int(rollout.lengths[row])
            with streams(policy) as kept:
                logp = score(policy, [prompt], rollout.tokens[row : row + 1, :n],
                             rollout.lengths[row : row + 1], temperature, 1)  # fmt: skip
            x = kept[layer]
            (du,) = torch.autograd.grad(logp.sum(), x)
            x, du = (t.detach().reshape(-1, t.shape[-1]) for t in (x, du))
            if len(x) < len(prompt) + n - 1:  # the decoder's last layer drops the prompt
                x, du = (torch.cat([t.new_zeros(len(prompt) - 1, t.shape[1]), t]) for t in (x, du))
            us.append(du[common : len(prompt)].flatten())
        square.append(x[common : len(prompt)].double().square().sum() / (len(prompt) - common))
        gram.append(torch.stack(us) @ torch.stack(us).T)
    return torch.stack(gram), torch.stack(square)


@pytest.mark.parametrize("layer", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", MAKES)
def test_the_fast_path_is_autograd_one_sample_at_a_time(kind, layer):
    policy = MAKES[kind]()
    for prompts, common, temperature in ((PROMPTS, 0, 0.7), (SHARED, 2, 1.0), ([[7], [8]], 0, 1.0)):
        rollout = sampled(policy, prompts, temperature)
        found = prompt_costates(
            policy, prompts, rollout, GROUP, layer, common=common, temperature=temperature
        )
        gram, square = slow(policy, prompts, rollout, layer, common, temperature)
        assert gram.diagonal(dim1=1, dim2=2).min() > 0
        scale = float(gram.abs().max())
        torch.testing.assert_close(found.gram, gram, rtol=1e-4, atol=1e-5 * scale)
        torch.testing.assert_close(found.square, square, rtol=1e-4, atol=1e-7)
        assert found.gap < 1e-4


def test_weights_learn_again_afterwards_and_a_wrong_sampler_shows():
    policy = decoder()
    policy.embedding.weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match="stop"), frozen(policy):
        assert not any(p.requires_grad for p in policy.parameters())
        raise RuntimeError("stop")
    learning = [name for name, p in policy.named_parameters() if not p.requires_grad]
    assert learning == ["embedding.weight"]
    rollout = sampled(policy, PROMPTS, 1.0)
    assert prompt_costates(policy, PROMPTS, rollout, GROUP, 2, temperature=0.8).gap > 0.01


def test_what_cannot_be_hooked_is_named():
    class Bare(torch.nn.Module):
        pass

    with pytest.raises(ConfigError, match=r"model: got Bare.*nothing to hook"):
        depth(Bare())
    with pytest.raises(ConfigError, match=r"model: got Bare; allowed: this package's decoder"):
        prompt_costates(Bare(), PROMPTS, sampled(decoder(), PROMPTS, 1.0), GROUP, 1)
    assert depth(decoder()) == 3
