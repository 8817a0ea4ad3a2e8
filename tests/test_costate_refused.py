"""Which objectives `hops` takes for the score, and which heads `teacher_forced` does not take."""

import pytest
import torch
import torch.nn.functional as F

import vgkern
from vgkern import costate
from vgkern.costate import teacher

transformers = pytest.importorskip("transformers")

B, L, V, D, PROMPT = 3, 8, 16, 16, 3
SIZES = {
    "vocab_size": V, "hidden_size": D, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip
IDS = torch.randint(1, V, (B, L), generator=torch.Generator().manual_seed(1))
MASK = (torch.arange(L - 1) >= PROMPT - 1).expand(B, -1).clone()
MASK[1, -2:] = False  # a shorter answer: the sampled tokens are no rectangle
MASKS = {"all": None, "answers": MASK}


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


def llama(seed=0, tied=False):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied, initializer_range=0.3)
    return transformers.LlamaForCausalLM(config).eval()


def labels(mask):
    """As transformers wants them: ids [B, L], -100 where nothing was sampled."""
    out = IDS.clone()
    if mask is not None:
        out[:, 1:][~mask] = -100
    return out


def hf_loss(model, run, given):
    from transformers.loss.loss_utils import ForCausalLMLoss

    return ForCausalLMLoss(model.lm_head(run.hidden), given, V)


def picked(logits, ids):
    return logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]


def late(model, run):
    """Logits of the model a place later, under the token that they predict."""
    return F.pad(model.lm_head(run.hidden)[:, :-1], (0, 0, 1, 0))


def some(given):  # as in an SFT pack: only the first sampled tokens are labelled
    out = given.clone()
    out[:, PROMPT + 2 :] = -100
    return out


SCORES = {
    "labels": lambda m, r, mask: hf_loss(m, r, IDS),
    "ignored labels": lambda m, r, mask: hf_loss(m, r, labels(mask)),
    "some labels": lambda m, r, mask: hf_loss(m, r, some(labels(mask))),
    "labels of the prompt ignored": lambda m, r, mask: hf_loss(m, r, labels(MASK)),
    "the model's loss": lambda m, r, mask: m(inputs_embeds=r.inputs_embeds, labels=IDS).loss,
    "all rows, then a slice": lambda m, r, mask: picked(
        m.lm_head(r.hidden), IDS.roll(-1, 1)
    )[:, :-1].sum(),
    "under the token": lambda m, r, mask: picked(late(m, r), IDS)[:, 1:].sum(),
    "index under the token": lambda m, r, mask: late(m, r)[
        torch.arange(B)[:, None], torch.arange(L), IDS
    ].sum(),
}  # fmt: skip


@pytest.mark.parametrize("tied", [False, True], ids=["two tables", "tied"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", SCORES)
def test_the_score_in_other_layouts_is_refused(name, mask, tied):
    model = llama(tied=tied)
    run = costate.teacher_forced(model, IDS, MASKS[mask])
    fine = run.inputs_embeds.square().mean()
    run.hops(fine)
    with pytest.raises(ValueError, match=r"objective: holds the log-probability.*Hops\.backward"):
        run.hops(fine + SCORES[name](model, run, MASKS[mask]))


def test_the_answers_columns_of_ragged_answers_are_refused():
    model = llama()
    run = costate.teacher_forced(model, IDS, MASK)
    score = picked(model.lm_head(run.hidden[:, PROMPT - 1 : -1]), IDS[:, PROMPT:])
    with pytest.raises(ValueError, match="objective: holds the log-probability"):
        run.hops((score * MASK[:, PROMPT - 1 :]).sum())


@pytest.mark.parametrize("tied", [False, True], ids=["two tables", "tied"])
@pytest.mark.parametrize("mask", MASKS)
def test_other_lookups_are_not_the_score(mask, tied):
    model, teacher = llama(tied=tied), llama(1, tied)
    run = costate.teacher_forced(model, IDS, MASKS[mask])
    logits, inputs = model.lm_head(run.hidden), run.inputs_embeds
    other = (IDS + 1) % V
    kept = labels(MASKS[mask])
    read = teacher.model(inputs_embeds=inputs).last_hidden_state
    objectives = {
        "a teacher's loss": teacher(inputs_embeds=inputs, labels=IDS).loss,
        "ignored labels": teacher(inputs_embeds=inputs, labels=kept).loss,
        "a teacher's gather": picked(teacher.lm_head(read), IDS.roll(-1, 1))[:, :-1].sum(),
        "a fused teacher": vgkern.linear_token_logprobs(
            read[:, :-1], teacher.lm_head.weight, run.tokens
        ).logp.sum(),
        "other tokens": F.cross_entropy(logits.flatten(0, 1), other.flatten()),
        "one id": picked(logits, torch.full_like(IDS, 2)).sum(),
        "nothing labelled": picked(logits, other).sum()
        + 0 * F.cross_entropy(logits.flatten(0, 1), torch.full((B * L,), -100), reduction="sum"),
        "the next but one": picked(logits[:, :-1], IDS.roll(-2, 1)[:, :-1]).sum(),
    }
    for name, value in objectives.items():
        assert float(run.hops(value).norms[0]) > 0, name


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_the_entropy_of_an_op_with_a_costate_is_not_the_score(backend):
    run = costate.teacher_forced(llama(), IDS)
    third = vgkern.Costate(torch.ones(B, L - 1, D), run.embedding.detach())
    logp, entropy = vgkern.linear_token_logprobs(
        run.hidden[:, :-1], run.weight, run.tokens, costate=third, backend=backend
    )
    assert float(run.hops(-entropy.sum()).norms[0]) > 0
    for score in (logp.sum(), (logp + entropy).sum(), (entropy + logp).sum()):
        with pytest.raises(ValueError, match="objective: holds the log-probability"):
            run.hops(score)


HEADS = {
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": D, "head_dim": 8},
    "falcon_h1": {
        "mamba_d_ssm": D, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_d_state": 8,
        "mamba_n_groups": 1, "head_dim": 8,
    },
    "gemma2": {"head_dim": 8},
}  # fmt: skip


def made(kind, **options):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **HEADS[kind], **options})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(100)  # a cap and a scale make a difference
    return model


CAPS = {
    "recurrent_gemma": "logits_soft_cap",
    "gemma2": "final_logit_softcapping",
}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kind", CAPS)
def test_soft_caps_by_other_names(kind, train, monkeypatch):
    model = made(kind, **{CAPS[kind]: 2.0}).train(train)
    run = costate.teacher_forced(model, IDS)
    z = run.softcap * torch.tanh(F.linear(run.hidden, run.weight, run.bias) / run.softcap)
    assert torch.allclose(z, model(inputs_embeds=run.inputs_embeds).logits, rtol=1e-4, atol=1e-5)
    assert run.softcap == 2.0 and float(z.detach().abs().max()) > 1.5
    monkeypatch.setattr(teacher, "SOFTCAPS", ())  # a name that nobody knows
    for _ in range(2):
        with pytest.raises(ValueError, match=r"model: .* has logits other than .*\(off by up to"):
            costate.teacher_forced(model, IDS)


def test_a_multiplier_of_the_head_is_refused(monkeypatch):
    message = r"model: FalconH1.* scales its logits \(lm_head_multiplier=3.0\); allowed"
    model = made("falcon_h1", lm_head_multiplier=3.0)
    with pytest.raises(ValueError, match=message):
        costate.teacher_forced(model, IDS)
    costate.teacher_forced(made("falcon_h1", lm_head_multiplier=1.0), IDS)
    monkeypatch.setattr(teacher, "SCALES", ())
    with pytest.raises(ValueError, match=r"model: .* has logits other than"):
        costate.teacher_forced(model, IDS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_model_is_looked_at_once_and_left_as_it_was(dtype):
    model, passes = llama().to(dtype).train(), []
    model.config.attention_dropout = 0.5
    model.register_forward_hook(lambda *_: passes.append(1))
    before = torch.get_rng_state()
    for _ in range(3):
        costate.teacher_forced(model, IDS)
    assert passes == [1] and model.training and not model.base_model._forward_hooks
    torch.set_rng_state(before)
    first = costate.teacher_forced(model, IDS).hidden
    torch.set_rng_state(before)
    teacher.CHECKED.clear()
    assert torch.equal(costate.teacher_forced(model, IDS).hidden, first)
