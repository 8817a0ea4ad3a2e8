"""The captured rollout on the emulated device: the trees' tokens, one replay each, few waits."""

import gc
import weakref

import pytest
import torch
from emulated import graph
from emulated.device import Device, Refused

from vgkern.train import capture, decoding
from vgkern.train import device as place_of
from vgkern.train.generate import generate
from vgkern.train.model import Decoder, Shape

PROMPTS = [[3, 4, 5], [7, 8, 9, 10, 11], [5], [6, 6]]
GROUP, NEW = 4, 40


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setenv("VGKERN_BACKEND", "torch")
    monkeypatch.setattr(capture, "capture", graph.capture)
    graph.made.clear()
    decoding._batches.clear()
    with Device() as device:
        yield device


def decoder():
    torch.manual_seed(0)
    made = Decoder(Shape(vocab=24, width=32, layers=2, heads=2, mlp=48, context=64), [0])
    torch.nn.init.normal_(made.embedding.weight, std=0.5)
    return made


def llama():
    transformers = pytest.importorskip("transformers")
    from vgkern.train.hf import HFPolicy

    torch.manual_seed(0)
    sizes = transformers.LlamaConfig(
        vocab_size=24, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    return HFPolicy(transformers.LlamaForCausalLM(sizes), [0])


def rollout(policy, seed=3, prompts=PROMPTS, stops=(1, 2), **options):
    options = {"group": GROUP, "max_new": NEW, "temperature": 1.0, **options}
    rows = torch.arange(len(prompts) * options["group"])
    return generate(policy, prompts, stops, seed=seed, sequence=rows, **options)


def there(policy):
    place_of.put(policy, place_of.Place(torch.device("cuda"), "fp32"))
    return policy


def same(a, b):
    assert torch.equal(a.lengths, b.lengths) and torch.equal(a.finished, b.finished)
    assert torch.equal(a.tokens, b.tokens)
    assert torch.allclose(a.logp, b.logp, atol=2e-5)


@pytest.mark.parametrize("make", [decoder, llama])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_k": 3}, {"stops": ()}])
def test_the_tokens_are_the_trees(gpu, make, options):
    want = rollout(make(), **options)
    policy = there(make())
    gpu.syncs.clear()
    found = rollout(policy, **options)
    same(found, want)
    assert len(gpu.syncs) <= 1 + NEW / decoding.LOOK, gpu.syncs
    assert graph.made and sum(g.replays for g in graph.made)


@pytest.mark.parametrize("make", [decoder, llama])
def test_a_step_is_one_replay_and_graphs_are_found_again(gpu, make):
    policy = there(make())
    rollout(policy, stops=())
    (one,) = graph.made
    assert one.replays == NEW - 1 - decoding.WARM
    for seed, prompts in ((3, PROMPTS[::-1]), (3, [[4] * 9, [5], [6], [7]])):  # new data
        same(rollout(policy, seed, prompts, stops=()), rollout(make(), seed, prompts, stops=()))
    assert graph.made == [one] and one.replays == 3 * (NEW - 1) - decoding.WARM


@pytest.mark.parametrize("make", [decoder, llama])
def test_a_step_of_the_optimizer_is_seen_by_the_graph(gpu, make):
    policy, twin = there(make()), make()
    rollout(policy, stops=())
    with torch.no_grad():
        for p, q in zip(policy.parameters(), twin.parameters(), strict=True):
            p.mul_(1.3)
            q.mul_(1.3)
    same(rollout(policy, stops=()), rollout(twin, stops=()))


@pytest.mark.parametrize("make", [decoder, llama])
def test_batches_do_not_keep_their_policy(gpu, make):
    policy = there(make())
    rollout(policy)
    gone = weakref.ref(policy)
    del policy
    gc.collect()
    assert gone() is None and not len(decoding._batches)


@pytest.mark.parametrize("make", [decoder, llama])
def test_what_is_left_moves_to_a_smaller_batch(gpu, monkeypatch, make):
    monkeypatch.setattr(decoding, "LOOK", 4)
    policy = there(make())
    for seed in range(3, 9):
        found = rollout(policy, seed, stops=(1, 2, 3), max_new=48, temperature=2.0)
        same(found, rollout(make(), seed, stops=(1, 2, 3), max_new=48, temperature=2.0))
    sizes = {key[0] * key[1] for key in decoding._batches[policy]}
    assert len(sizes) > 1 and max(sizes) == 16, sizes


def test_a_stale_number_and_a_freed_address_show(gpu):
    x, y = torch.ones(3, device="cuda"), torch.zeros(3, device="cuda")
    count, held = [1.0], {"extra": torch.zeros(3, device="cuda")}

    def step():
        count[0] += 1
        y.copy_(x * count[0] + held["extra"])

    replay = graph.capture(step)
    assert y.tolist() == [0, 0, 0]  # recording runs nothing
    x.fill_(5.0)
    replay()
    assert y.tolist() == [10, 10, 10]  # new data, the recording's number
    held.clear()
    gc.collect()
    with pytest.raises(Refused, match="freed"):
        replay()


def test_waiting_cannot_be_recorded(gpu):
    x = torch.ones(3, device="cuda")
    with pytest.raises(Refused, match="wait"):
        graph.capture(lambda: x.sum().item())


def test_a_model_that_cannot_be_recorded_goes_on_and_says_so_once(gpu, monkeypatch, caplog):
    def fails(step):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(capture, "capture", fails)
    monkeypatch.setattr(decoding, "_said", set())
    policy = there(decoder())
    same(rollout(policy), rollout(decoder()))
    rollout(policy, seed=4)
    assert caplog.text.count("decodes without a CUDA graph") == 1
