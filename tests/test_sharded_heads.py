"""Heads under DDP and FSDP2, two gloo ranks against one process: the drop-ins, and the ops by the
advice that their own message gives."""

import re

import pytest
import ranks
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Partial, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import vgkern
from vgkern.integrations import _head
from vgkern.integrations import transformers as ours

transformers = pytest.importorskip("transformers")
VOCAB, WORLD = 51, 2  # a vocabulary that does not split evenly


def llama(tied):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, initializer_range=0.4, tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).train()


def batch(rank):
    ids = torch.randint(0, VOCAB, (3, 9), generator=torch.Generator().manual_seed(rank))
    return {"input_ids": ids, "labels": ids.clone()}


def full(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def gradients(model):
    return {
        n.removeprefix("module."): full(p.grad).clone()
        for n, p in model.named_parameters()
        if p.grad is not None
    }


def single(tied, function):
    """Mean over the ranks' batches, in one process."""
    model = llama(tied)
    total = sum(function(model, batch(rank)) for rank in range(WORLD)) / WORLD
    total.backward()
    return gradients(model)


def stock(model, given):
    return model(**given).loss


def fused_policy(model, given):
    """A GRPO loss through `add_head`, as TRL's trainer has it."""
    ids = given["input_ids"]

    def loss(hidden, weight, bias):
        h = _head.head(hidden[:, :-1], weight, bias)
        out = vgkern.linear_policy_loss(
            h.hidden, h.weight, ids[:, 1:], torch.tensor([1.0, -0.5, 0.3]), **_head.options(h)
        )
        return out.loss

    return model(input_ids=ids, fused=loss)


def plain_policy(model, given):
    """The same without any of ours."""
    ids = given["input_ids"]
    logp = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    logp = logp.gather(-1, ids[:, 1:, None])[..., 0]
    ratio = (logp - logp.detach()).exp()
    return -(ratio * torch.tensor([1.0, -0.5, 0.3])[:, None]).mean(-1).mean()


def whole(model):
    return fully_shard(model)


def head_alone(model):
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model.lm_head)
    return fully_shard(model)


def head_kept(model):
    fully_shard(model.lm_head, reshard_after_forward=False)
    return fully_shard(model)


def tied_group(model):
    """Both modules of a tied weight in one group, as torch's documentation asks."""
    fully_shard([model.model.embed_tokens, model.lm_head])
    return fully_shard(model)


def compare(got, want, what):
    assert set(got) == set(want), what
    for name, g in got.items():
        gap = float((g - want[name]).abs().max() / want[name].abs().max())
        assert gap < 2e-6, (what, name, gap)


def check_drop_ins(rank):
    cases = [
        ("ddp", DistributedDataParallel, False), ("ddp tied", DistributedDataParallel, True),
        ("whole", whole, False), ("whole tied", whole, True), ("head alone", head_alone, False),
        ("head kept", head_kept, False), ("tied group", tied_group, True),
    ]  # fmt: skip
    for name, shard, tied in cases:
        want = single(tied, stock)
        model = llama(tied)
        patch = ours.patch(model)
        sharded = shard(model)
        sharded(**batch(rank)).loss.backward()
        compare(gradients(sharded), want, f"transformers.patch, {name}")
        assert patch.calls == 1
        want = single(tied, plain_policy)
        model = llama(tied)
        _head.add_head(model, "fused")
        sharded = shard(model)
        fused_policy(sharded, batch(rank)).backward()
        compare(gradients(sharded), want, f"add_head, {name}")
    model = head_alone(llama(False))  # patched when it is sharded already
    with ours.patch(model):
        model(**batch(rank)).loss.backward()
    compare(gradients(model), single(False, stock), "patched after sharding")


def losses(hidden, weight, targets):
    logp = vgkern.linear_token_logprobs(hidden, weight, targets).logp
    advantages = torch.linspace(-1, 1, len(targets))
    return {
        "linear_token_logprobs": logp.sum(),
        "linear_policy_loss": vgkern.linear_policy_loss(
            hidden, weight, targets, advantages, objective="dapo", normalizer=1.0
        ).loss,
        "linear_divergence": vgkern.linear_divergence(
            hidden, weight, hidden.detach().flip(0), weight.detach().flip(0)
        ).divergence.sum(),
    }


def check_ops(rank):
    """The message's own advice, taken from the message."""
    draw = torch.Generator().manual_seed(0)
    w = torch.randn(VOCAB, 16, generator=draw)
    h = torch.randn(WORLD, 6, 16, generator=draw)
    y = torch.randint(0, VOCAB, (WORLD, 6), generator=draw)
    mesh = dist.init_device_mesh("cpu", (WORLD,))
    for name in losses(h[0], w, y[0]):
        plain = w.clone().requires_grad_()
        sum(losses(h[r], plain, y[r])[name] for r in range(WORLD)).backward()
        weight = torch.nn.Parameter(distribute_tensor(w, mesh, [Shard(0)]))
        with pytest.raises(TypeError, match="got a DTensor") as refused:
            losses(h[rank], weight, y[rank])
        advice = re.search(r"pass (\S+\(.*?\.ndim\))", str(refused.value)).group(1)
        gathered = eval(advice, {"weight": weight, "Partial": Partial})
        losses(h[rank], gathered, y[rank])[name].backward()
        compare({name: weight.grad.full_tensor()}, {name: plain.grad}, "advice")


def worker(rank, store):
    ranks.join(rank, store, WORLD)
    check_drop_ins(rank)
    check_ops(rank)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.timeout(300)
def test_two_ranks(tmp_path):
    ranks.run(worker, WORLD, tmp_path / "store")
