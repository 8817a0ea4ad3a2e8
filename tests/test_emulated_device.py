"""The emulated device itself, and the whole trainer on it: the CPU's numbers, few waits."""

import dataclasses
import json
import math

import pytest
import torch
from emulated.device import CUDA, Device, Emulated, Refused

from vgkern.errors import ConfigError, TrainingError
from vgkern.train import device as place_of
from vgkern.train import run
from vgkern.train.config import Config
from vgkern.train.log import Log

SMALL = Config(
    width=32, layers=2, heads=2, mlp=64, warm_target=0.0, steps=5, prompts=4, group=4,
    eval_prompts=4, eval_every=5, lr=1e-3,
)  # fmt: skip
SAME = ("reward", "loss", "grad_norm", "tokens", "length", "groups_used", "sampler_gap")


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setenv("VGKERN_BACKEND", "torch")
    monkeypatch.setattr(place_of, "no_gpu", lambda: None)
    monkeypatch.setattr(place_of, "bf16_gpu", lambda: True)
    with Device() as device:
        yield device


def test_numbers_are_the_cpus_and_gradients_flow(gpu):
    x = torch.randn(3, 4, requires_grad=True)
    y = x.to("cuda")
    assert y.device == CUDA and isinstance(y * 2, Emulated)
    (torch.zeros(3, 4, device="cuda") + y).square().sum().backward()
    assert torch.equal(x.grad, 2 * x.detach())
    assert not gpu.syncs


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x + torch.ones(3),
        lambda x: torch.cat([x, torch.ones(3)]),
        lambda x: torch.ones(3)[x.long()],
        lambda x: x.numpy(),
        lambda x: x.data_ptr(),
    ],
)
def test_what_a_gpu_refuses(gpu, wrong):
    with pytest.raises((Refused, TypeError, RuntimeError)):
        wrong(torch.zeros(3, device="cuda"))


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool((x > 0).any()),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.unique(),
        lambda x: torch.empty(3).copy_(x),
    ],
)
def test_what_waits_is_counted_and_can_be_forbidden(gpu, waits):
    x = torch.arange(3.0, device="cuda")
    waits(x)
    assert len(gpu.syncs) == 1
    with gpu.forbid(), pytest.raises(Refused, match="wait"):
        waits(x)


def test_what_does_not_wait(gpu):
    x = torch.arange(3.0, device="cuda")
    with gpu.forbid():
        y = x.where(x > 1, 0).masked_fill(x == 2, 5.0)
        y[torch.tensor([0, 1], device="cuda")] += 1
        torch.isin(x, torch.tensor([1.0], device="cuda")), x * 2, x.float(), x.to("cuda")


def trained(config):
    steps = [json.loads(line) for line in (run.train(config) / "metrics.jsonl").open()]
    return [r for r in steps if r["kind"] == "step"]


def equal(cpu, there):
    assert len(cpu) == len(there) == 5
    for a, b in zip(cpu, there, strict=True):
        for name in SAME:
            assert b[name] == pytest.approx(a[name], abs=1e-6, rel=1e-6), name


def test_the_trainer_learns_the_same_there(gpu, tmp_path):
    changed = dataclasses.replace(
        SMALL, width=48, warm_target=0.06, warm_steps=600, warm_batch=64, warm_wrong=0.0,
        task_options='{"min_length": 2, "max_length": 3}', prompts=8,
    )  # fmt: skip
    cpu = trained(dataclasses.replace(changed, device="cpu", out=str(tmp_path / "c")))
    assert not gpu.syncs
    there = trained(dataclasses.replace(changed, device="cuda", out=str(tmp_path / "g")))
    assert gpu.syncs and any(math.isfinite(r["loss"]) and r["loss"] for r in there)
    equal(cpu, there)


@pytest.mark.parametrize(
    "changes",
    [{}, {"beta": 0.1}, {"beta": 0.1, "kl_estimator": "sampled"}, {"entropy_coef": 0.1},
     {"objective": "gspo"}, {"micro_prompts": 2}],
)  # fmt: skip
def test_one_wait_an_update(gpu, tmp_path, changes):
    config = dataclasses.replace(SMALL, device="cuda", **changes)
    made = run.build(config)[0]
    assert next(made.policy.parameters()).device == CUDA and made.policy.device == CUDA
    _, prompts, rollout = made.sample(1)
    rewards = torch.arange(16.0)
    batch = made.batch(prompts, rollout, rewards)
    made.log = Log(tmp_path)
    made.gradient(batch, True)  # the first looks at what the heads block, once
    gpu.syncs.clear()
    made.parts.replay = True
    made.update(batch)
    assert len(gpu.syncs) == 1, gpu.syncs


def test_a_hugging_face_model_too(gpu, monkeypatch, tmp_path):
    transformers = pytest.importorskip("transformers")
    from vgkern.train.hf import HFPolicy
    from vgkern.train.tokenizer import CharTokenizer

    def llama(_):
        torch.manual_seed(0)
        tokenizer = CharTokenizer()
        sizes = transformers.LlamaConfig(
            vocab_size=tokenizer.vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
        )  # fmt: skip
        return HFPolicy(transformers.LlamaForCausalLM(sizes), tokenizer.blocked), tokenizer

    monkeypatch.setattr(run, "new_policy", llama)
    monkeypatch.setattr(run, "save_checkpoint", lambda *_: None)  # a file of safetensors needs
    monkeypatch.setattr(run.Keeper, "save", lambda *_, **__: True)  # addresses
    small = {"dtype": "fp32", "beta": 0.01}
    cpu = trained(dataclasses.replace(SMALL, device="cpu", out=str(tmp_path / "c"), **small))
    there = dataclasses.replace(SMALL, device="cuda", out=str(tmp_path / "g"), **small)
    equal(cpu, trained(there))


@pytest.mark.parametrize(
    "changes",
    [{}, {"objective": "gspo"}, {"updates_per_batch": 2}, {"beta": 0.1}, {"objective": "vespo"},
     {"objective": "cispo_relative", "updates_per_batch": 2, "entropy_coef": 0.01}],
)  # fmt: skip
def test_bf16_agrees_with_itself(tmp_path, changes):
    config = dataclasses.replace(
        SMALL, device="cpu", dtype="bf16", out=str(tmp_path / "b"), **{"beta": 0.01, **changes}
    )
    rows = trained(config)
    assert all(0 < r["sampler_gap"] < place_of.LIMITS["bf16"].gap_warn for r in rows if r["loss"])


def test_what_cannot_be_had_is_said():
    with pytest.raises(ConfigError, match="device: got 'cuda', and "):
        run.build(dataclasses.replace(SMALL, device="cuda"))
    with pytest.raises(ConfigError, match="device: got 'tpu'"):
        dataclasses.replace(SMALL, device="tpu")


@pytest.mark.parametrize(
    ("where", "setting"), [("sample", "prompts"), ("gradient", "micro_prompts")]
)
def test_a_batch_that_does_not_fit_names_the_setting(tmp_path, monkeypatch, where, setting):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(run.Trainer, where, full)
    monkeypatch.setattr(run.Trainer, "score", lambda *_: torch.arange(16.0))
    out = tmp_path / "r"
    with pytest.raises(TrainingError, match=f"{setting}: 4 do not fit.*try {setting} = 2"):
        run.train(dataclasses.replace(SMALL, device="cpu", out=str(out)))
    assert list((out / "state").glob("step-*"))  # the beginning of that step
