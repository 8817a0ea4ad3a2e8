"""verl: its registries, its losses and advantages, its fused heads, with the installed package."""

import importlib.util
import logging
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from vgkern import objectives
from vgkern.integrations import IntegrationError
from vgkern.integrations import verl as ours

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)
if importlib.util.find_spec("verl") is None:
    pytest.skip("verl is not installed (0.9.1 and its dependencies)", allow_module_level=True)


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    """verl imported with our entry point in the metadata, as of an installed vgkern."""
    assert "verl" not in sys.modules
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    lines = [f"{name} = {value}" for name, value in groups["verl.plugins"].items()]
    folder = tmp_path_factory.mktemp("site")
    info = folder / "vgkern_entry-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vgkern-entry\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[verl.plugins]\n" + "\n".join(lines))
    for name in [ours.__name__]:
        sys.modules.pop(name)  # so that the entry point is what imports it
    sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != "_Registry"]
    sys.path.insert(0, str(folder))
    try:
        import verl  # noqa: F401

        assert ours.__name__ in sys.modules
        assert ours.CORE not in sys.modules  # verl starts as light as without us
        assert importlib.util.find_spec(ours.CORE) is not None  # as a tool that only looks
        from verl.trainer.ppo import core_algos
    finally:
        sys.path.remove(str(folder))
        sys.modules[ours.__name__] = ours
    return core_algos


def config(core, **options):
    from verl.workers.config import ActorConfig

    given = {"strategy": "fsdp", "rollout_n": 4, "ppo_micro_batch_size_per_gpu": 2, **options}
    return ActorConfig(**given)


def batch(seed=0):
    draw = torch.Generator().manual_seed(seed)
    old = torch.randn(4, 7, generator=draw) * 0.5 - 3
    new = old + 0.3 * torch.randn(4, 7, generator=draw)
    new[1, 0] = old[1, 0] + 2.0  # beyond the dual clip
    mask = torch.arange(7) < torch.tensor([7, 3, 5, 0])[:, None]
    advantages = torch.randn(4, 1, generator=draw).expand(4, 7) * mask
    advantages[1] = -1.0
    return old, new, advantages, mask, torch.rand(4, 7, generator=draw) + 0.5


GLOBAL = {"dp_size": 2, "batch_num_tokens": 31, "global_batch_size": 9, "loss_scale_factor": None}
AGGREGATIONS = [*ours.REDUCTIONS]
PAIRS = {
    "vgkern": "vanilla", "vgkern_gspo": "gspo", "vgkern_sapo": "sapo", "vgkern_cispo": "cispo",
}  # fmt: skip


def test_every_name_is_registered(core):
    assert {*ours.LOSSES} <= core.POLICY_LOSS_REGISTRY.keys()
    assert {f"vgkern_{e}" for e in objectives.ESTIMATORS} <= core.ADV_ESTIMATOR_REGISTRY.keys()
    ours.register()  # again: harmless


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", PAIRS)
def test_losses_are_verls(core, name, aggregation):
    for info in ({}, GLOBAL, {**GLOBAL, "loss_scale_factor": 5}):
        for weighted in (False, True):
            c = config(core, clip_ratio_low=0.1, clip_ratio_high=0.25, tau_neg=1.3)
            c.global_batch_info.update(info)
            old, new, a, mask, w = batch()
            results = []
            for chosen in (name, PAIRS[name]):
                logp = new.clone().requires_grad_()
                loss, metrics = core.get_policy_loss_fn(chosen)(
                    old_log_prob=old, log_prob=logp, advantages=a, response_mask=mask,
                    loss_agg_mode=aggregation, config=c, rollout_is_weights=w if weighted else None,
                )  # fmt: skip
                loss.backward()
                results.append((loss.detach(), logp.grad, metrics))
            torch.testing.assert_close(results[0][:2], results[1][:2], atol=1e-5, rtol=1e-5)
            assert results[1][1].abs().max() > 1e-3
            if name == "vgkern":
                assert results[0][2] == pytest.approx(results[1][2]) and results[0][2][
                    "actor/pg_clipfrac_lower"] > 0  # fmt: skip
            assert results[0][2].keys() == results[1][2].keys()


def test_a_loss_without_a_global_batch_is_refused_on_many_ranks(core):
    c = config(core)
    c.global_batch_info["dp_size"] = 2
    old, new, a, mask, _ = batch()
    with pytest.raises(ValueError, match="batch_num_tokens: got None"):
        core.get_policy_loss_fn("vgkern")(old, new, a, mask, "token-mean", c)
    with pytest.raises(ValueError, match="loss_agg_mode: got 'mean'"):
        core.get_policy_loss_fn("vgkern")(old, new, a, mask, "mean", c)


def test_an_objective_of_your_own(core):
    ours.register_objective("mine", objectives.GRPO.replace(clip_low=0.1, clip_high=0.25))
    old, new, a, mask, _ = batch()
    c = config(core, clip_ratio_low=0.1, clip_ratio_high=0.25, clip_ratio_c=1e6)
    arguments = (old, new, a, mask, "seq-mean-token-mean", c)
    results = [core.get_policy_loss_fn(n)(*arguments)[0] for n in ("mine", "vanilla")]
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name, theirs, options",
    [
        ("vgkern_grpo_verl", "grpo", {}),
        ("vgkern_dr_grpo", "grpo", {"norm_adv_by_std_in_grpo": False}),
        ("vgkern_rloo", "rloo", {}),
        ("vgkern_rloo", "rloo_vectorized", {}),
    ],
)
def test_advantages_are_verls(core, name, theirs, options):
    rewards = torch.zeros(6, 5)
    rewards[range(6), [4, 0, 2, 2, 1, 3]] = torch.tensor([1.0, 0.0, 0.5, 2.0, -1.0, 2.0])
    mask = (torch.arange(5) < torch.tensor([5, 1, 3, 3, 2, 4])[:, None]).float()
    index = np.array(["b", "a", "b", "a", "b", "a"], dtype=object)
    given = {"token_level_rewards": rewards, "response_mask": mask, "index": index}
    mine = core.get_adv_estimator_fn(name)(**given, config=None)
    stock = core.get_adv_estimator_fn(theirs)(**given, **options)
    torch.testing.assert_close(mine[0], stock[0], atol=1e-5, rtol=1e-5)
    assert mine[0].abs().max() > 0.1 and torch.equal(mine[0], mine[1])
    with pytest.raises(ValueError, match="index"):
        core.get_adv_estimator_fn(name)(rewards, mask)


def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, initializer_range=0.4,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(shape)


@pytest.mark.parametrize("forward", ["forward_with_triton_backend", "forward_with_torch_backend"])
def test_fused_heads_of_a_model(core, forward):
    """The stock numbers are those of verl's torch backend: its Triton one needs a GPU."""
    from verl.models.transformers import dense_common
    from verl.utils.kernel import linear_cross_entropy as fused

    stock, ids = fused.linear_cross_entropy, torch.arange(24).view(2, 12) % 40
    mask = (torch.arange(12) < torch.tensor([[12], [7]])).long()
    results = []
    for name, patched in (("forward_with_torch_backend", False), (forward, True)):
        model = llama()
        on = ours.patch() if patched else None
        out = getattr(dense_common, name)(
            model, input_ids=ids, attention_mask=mask, temperature=0.7, return_dict=True
        )
        logp, entropy = (x.reshape(2, 12)[:, :-1] for x in (out.log_probs, out.entropy))
        ((logp - 0.1 * entropy) * mask[:, 1:]).sum().backward()
        if on is not None:
            on.undo()
            assert on.calls == 1
        grads = [p.grad for p in model.parameters()]
        results.append([logp.detach(), entropy.detach(), *grads])
    for mine, theirs in zip(*reversed(results), strict=True):
        scale = max(1.0, float(theirs.abs().max()))
        torch.testing.assert_close(mine, theirs, atol=1e-5 * scale, rtol=0)
    assert fused.linear_cross_entropy is stock


def test_a_changed_verl_is_refused(core, monkeypatch, caplog):
    from verl.utils.experimental import torch_functional
    from verl.utils.kernel import linear_cross_entropy as fused

    class Changed:
        def forward(self, hidden, weight, labels): ...

    with monkeypatch.context() as m:
        m.setattr(fused, "LinearCrossEntropy", Changed)
        with pytest.raises(IntegrationError) as error:
            ours.patch()
    for words in ("self, hidden, weight, labels", ours.FUSED_FORWARD, "verl>=0.9", "0.9.1"):
        assert words in str(error.value)
    with monkeypatch.context() as m:
        m.setattr(torch_functional, "FusedLinearForPPO", Changed)
        with pytest.raises(IntegrationError, match="FusedLinearForPPO"):
            ours.patch()
    with monkeypatch.context() as m:
        m.setattr(core, "compute_policy_loss_vanilla", lambda logp, config: 0)
        with pytest.raises(IntegrationError, match="signature of a policy loss"):
            ours.register()
        with caplog.at_level(logging.WARNING, "vgkern"):
            ours._register_or_say()  # as when verl starts: said, and verl lives on
        assert "not registered" in caplog.text
