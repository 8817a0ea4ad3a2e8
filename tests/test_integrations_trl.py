"""TRL: patched and subclassed trainers give TRL's own losses and gradients, and TRL comes back."""

import contextlib
import math
import types

import pytest
import torch

import vgkern
from vgkern.integrations import IntegrationError, _patch
from vgkern.integrations import trl as ours

trl = pytest.importorskip("trl", reason="TRL is not installed (pip install 'trl>=1.16,<1.17')")
datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")
if not trl.__version__.startswith("1.16"):
    pytest.skip(f"TRL {trl.__version__}, these are of 1.16", allow_module_level=True)

from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from trl.trainer import utils  # noqa: E402

torch.set_num_threads(1)  # models this small only wait for a second one
STOCK = utils._ChunkedLogProbFunction
VOCAB, PROMPT, NEW = 40, 5, 6


def close(a, b, tolerance=1e-5):
    assert a.dtype == b.dtype and a.shape == b.shape
    scale = max(1.0, float(b.detach().abs().max()))
    assert float((a - b).detach().abs().max()) <= tolerance * scale


def llama(seed=0, **options):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, pad_token_id=0, eos_token_id=1, max_position_embeddings=64,
        initializer_range=0.4, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def tokenizer():
    ids = {"<pad>": 0, "<eos>": 1, **{chr(95 + i): i for i in range(2, VOCAB - 1)}, "<unk>": 39}
    made = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "unk")}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names)


def trainer(kind, tmp_path, model=None, backend=None, **options):
    arguments = trl.GRPOConfig(**{
        "output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "max_steps": 2, "seed": 3,
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_generations": 4,
        "max_completion_length": NEW, "temperature": 0.8, "report_to": "none", "logging_steps": 1,
        "save_strategy": "no", "disable_tqdm": True, "gradient_checkpointing": False,
        "learning_rate": 1e-2, **options,
    })  # fmt: skip
    rows = [{"prompt": text} for text in ("abc", "cabba", "bc", "eda")]
    extra = {} if backend is None else {"backend": backend}
    made = kind(
        model=model or llama(), args=arguments, train_dataset=datasets.Dataset.from_list(rows),
        reward_funcs=lambda completion_ids, **_: [float(sum(c) % 5) for c in completion_ids],
        processing_class=tokenizer(), **extra,
    )  # fmt: skip
    made.remove_callback(transformers.PrinterCallback)
    made.current_gradient_accumulation_steps = 2
    return made


def batch(seed=0, **more):
    """Prompts padded on the left, completions on the right, one of them not to be trained on."""
    draw = torch.Generator().manual_seed(seed)
    sizes, lengths = torch.tensor([5, 3, 1, 4]), torch.tensor([6, 2, 4, 1])
    inputs = {
        "prompt_ids": torch.randint(2, VOCAB, (4, PROMPT), generator=draw),
        "prompt_mask": (torch.arange(PROMPT) >= PROMPT - sizes[:, None]).long(),
        "completion_ids": torch.randint(2, VOCAB, (4, NEW), generator=draw),
        "completion_mask": (torch.arange(NEW) < lengths[:, None]).long(),
        "advantages": torch.tensor([1.3, -0.7, 0.0, -1.1]),
        "num_items_in_batch": torch.tensor(31),
        "old_per_token_logps": torch.randn(4, NEW, generator=draw) * 0.3 - 4,
        "ref_per_token_logps": torch.randn(4, NEW, generator=draw) * 0.3 - 4,
    }
    return {**inputs, **more}


def grads_of(made, inputs):
    made.model.train()
    made.model.zero_grad()
    loss = made._compute_loss(made.model, inputs)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in made.model.named_parameters()}


def same(a, b, tolerance=1e-5, moves=True):
    close(a[0], b[0], tolerance)
    assert a[1].keys() == b[1].keys()
    assert not moves or any(float(g.abs().max()) > 1e-3 for g in b[1].values())
    for name in a[1]:
        close(a[1][name], b[1][name], tolerance)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap, scale", [(None, 1.0), (3.0, 1.0), (None, 0.25), (3.0, 2.5)])
def test_every_output_is_that_of_the_stock_function(softcap, scale, bias):
    draw = torch.Generator().manual_seed(1)
    shapes = ((7, 8), (50, 8), (50,))
    results = []
    for function in (STOCK.apply, ours.scores):
        draw.manual_seed(1)
        leaves = [torch.randn(s, generator=draw).requires_grad_() for s in shapes]
        b = leaves[2] if bias else None
        targets = torch.arange(7) * 7
        out = function(*leaves[:2], b, targets, 0.6, 16, softcap, scale, ours.OUTPUTS)
        (out[0] @ torch.arange(7.0) - out[1].square().sum()).backward()
        results.append([*out, *(leaf.grad for leaf in leaves[: 2 + bias])])
        assert not any(x.requires_grad for x in out[2:])
    for a, b in zip(*results, strict=True):
        close(a, b) if a.is_floating_point() else torch.testing.assert_close(a, b)
    only = ours.scores(torch.ones(2, 3), torch.ones(4, 3), None, torch.zeros(2).long(), 1.0, 8,
                       None, 1.0, ("log_probs",))  # fmt: skip
    assert only[1:] == (None, None, None, None)
    assert only[0].tolist() == pytest.approx([-math.log(4)] * 2)


def test_autocast_is_followed():
    h, w = torch.randn(3, 4), torch.randn(6, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = ours.scores(h, w, None, torch.arange(3), 1.0, 8)
    lp = vgkern.linear_token_logprobs(h.bfloat16(), w.detach().bfloat16(), torch.arange(3))
    assert torch.equal(out[0].detach(), lp.logp)
    out[0].sum().backward()
    assert w.grad.dtype == torch.float32


@pytest.mark.parametrize("fails", [False, True])
def test_patch_is_undone(fails):
    with pytest.raises(KeyError) if fails else contextlib.nullcontext(), ours.patch() as on:
        bound = utils._ChunkedLogProbFunction
        assert bound is not STOCK
        bound.apply(torch.ones(2, 3), torch.ones(4, 3), None, torch.zeros(2).long(), 1.0, 8)
        assert on.calls == 1
        if fails:
            raise KeyError
    assert utils._ChunkedLogProbFunction is STOCK
    on.undo()  # a second end does nothing
    assert utils._ChunkedLogProbFunction is STOCK and not _patch.Patch._on


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (1, 0, 2)])
def test_patches_nest_and_end_in_any_order(order):
    patches, bound = [], []
    for _ in range(3):
        patches.append(ours.patch())
        bound.append(utils._ChunkedLogProbFunction)
    left = [0, 1, 2]
    for i in order:
        patches[i].undo()
        left.remove(i)
        assert utils._ChunkedLogProbFunction is (bound[max(left)] if left else STOCK)


def test_a_foreign_rebinding_is_left_alone(monkeypatch):
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", STOCK)  # for its undoing, at the end
    on = ours.patch()
    foreign = utils._ChunkedLogProbFunction = types.SimpleNamespace()
    with pytest.warns(RuntimeWarning, match="left as it is"):
        on.undo()
    assert utils._ChunkedLogProbFunction is foreign


class Renamed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, temperature, chunk_size, final_logit_softcapping,
                logit_scale, outputs): ...  # fmt: skip


class Reordered(STOCK):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, chunk_size,
                final_logit_softcapping=None, logit_scale=1.0, outputs=()):  # fmt: skip
        a, b, *rest = STOCK.forward(ctx, hidden, weight, bias, targets, temperature, chunk_size,
                                    final_logit_softcapping, logit_scale, outputs)  # fmt: skip
        return (b, a, *rest)


@pytest.mark.parametrize(
    "stock, words",
    [
        (None, ["_ChunkedLogProbFunction", "NoneType"]),
        (Renamed, ["hidden, weight, bias, labels", "hidden, weight, bias, targets"]),
        (Reordered, ["differs from ours by", "at most 1e-4"]),
    ],
)
def test_a_changed_trl_is_refused(monkeypatch, stock, words):
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", stock)
    with pytest.raises(IntegrationError) as error:
        ours.patch()
    for word in (*words, "trl 1.16", "expected", "found", "Install trl>=1.16,<1.17"):
        assert word in str(error.value)
    assert utils._ChunkedLogProbFunction is stock


def test_a_head_that_calls_another_function_is_refused(monkeypatch):
    monkeypatch.setattr(utils, "add_fused_lm_head", lambda model: utils.Fused)
    with pytest.raises(IntegrationError, match="that add_fused_lm_head calls"):
        ours.patch()


def test_fused_head_of_trl_gives_the_same_on_a_model():
    """Padding, labels of -100, a row without any label; softcap and scale by config."""
    ids = batch()["completion_ids"]
    labels = ids.masked_fill(batch()["completion_mask"] == 0, -100)
    labels[3] = -100
    results = []
    for patched in (False, True):
        model = llama()
        model.config.final_logit_softcapping, model.config.logit_scale = 4.0, 0.5
        utils.add_fused_lm_head(model, 0.7, outputs=("log_probs", *ours.OUTPUTS))
        with ours.patch() if patched else contextlib.nullcontext() as on:
            out = model(input_ids=ids, labels=labels, fused_lm_head=True, num_items_in_batch=9)
        (out.loss - 0.1 * out.entropy.sum()).backward()
        assert not patched or on.calls == 1
        grads = {n: p.grad for n, p in model.named_parameters()}
        results.append((out, (out.loss.detach(), grads)))
    same(results[1][1], results[0][1])
    for a, b in zip(results[1][0].values(), results[0][0].values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


CONFIGS = [
    {},
    {"loss_type": "grpo", "beta": 0.1},
    {"loss_type": "bnpo", "delta": 1.25},
    {"loss_type": "dr_grpo", "beta": 0.1, "use_bias_correction_kl": False},
    {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    {"loss_type": "cispo", "epsilon_high": 1.1},
    {"loss_type": "cispo", "epsilon_high": 0.2},
    {"loss_type": "sapo", "beta": 0.1},
    {"loss_type": "vespo"},
    {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.05},
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """TRL's trainer and ours. Their making is slow, so tests set options on these."""
    folder = tmp_path_factory.mktemp("trl")
    return trainer(trl.GRPOTrainer, folder), trainer(ours.GRPOTrainer, folder)


@pytest.fixture
def configured(pair, monkeypatch, request):
    from vgkern.integrations._trl_grpo import objective_of

    for made in pair:
        for name, value in request.param.items():
            for owner in (made, made.args):
                if hasattr(owner, name):
                    monkeypatch.setattr(owner, name, value)
        made._metrics["train"].clear()
    monkeypatch.setattr(pair[1], "objective", objective_of(pair[1]))
    return pair


@pytest.mark.parametrize("configured", CONFIGS, ids=str, indirect=True)
def test_fused_trainer_has_the_loss_and_gradients_of_trl(configured):
    stock, fused = configured
    for inputs in (
        batch(),
        # as on-policy steps come; tokens of a tool are not trained on
        batch(1, old_per_token_logps=None, tool_mask=(torch.arange(NEW) != 1).long()),
        batch(2, advantages=torch.randn(4, NEW)),
        batch(3, advantages=torch.zeros(4)),
    ):
        expected = grads_of(stock, inputs)
        same(grads_of(fused, inputs), expected, moves=bool(inputs["advantages"].any()))
        with ours.patch() as on:
            same(grads_of(stock, inputs), expected, moves=False)
        assert on.calls == 1
    metrics = fused._metrics["train"]
    for name in ("clip_ratio/region_mean", "clip_ratio/low_mean"):
        if stock.importance_sampling_level == "token":
            assert metrics[name] == pytest.approx(stock._metrics["train"][name][::2])
    assert len(metrics["entropy"]) == 4 and 0 < metrics["entropy"][0] < math.log(VOCAB)


@pytest.mark.parametrize("configured", [{"use_vllm": True, "beta": 0.1}], ids=str, indirect=True)
@pytest.mark.parametrize("width", [1, NEW])
def test_the_correction_of_vllm_and_evaluation(configured, width):
    ratio = torch.rand(4, width, generator=torch.Generator().manual_seed(0)) + 0.5
    inputs = batch(importance_sampling_ratio=ratio)
    same(*(grads_of(made, inputs) for made in reversed(configured)))
    for made in configured:
        made.model.eval()
    with torch.no_grad():
        close(*(made._compute_loss(made.model, inputs) for made in reversed(configured)))


REFUSED = [
    ({"top_entropy_quantile": 0.8}, "top_entropy_quantile"),
    ({"entropy_coef": 0.1}, "entropy_coef"),
    ({"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold"),
    ({"loss_type": "cispo", "epsilon_high": 0.0}, "epsilon_high: got 0.0"),
    ({"loss_type": "vespo", "importance_sampling_level": "sequence"}, "vespo with sequence"),
]


@pytest.mark.parametrize("options, words", REFUSED, ids=str)
def test_options_without_a_fused_form_are_refused(options, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        trainer(ours.GRPOTrainer, tmp_path, **options)


def test_images_are_refused(pair):
    with pytest.raises(NotImplementedError, match="pixel_values"):
        pair[1]._compute_loss(pair[1].model, batch(pixel_values=torch.ones(1)))


def test_costates_go_through_the_tokens(pair):
    """The extra gradient is that of the noisy embedding composed by hand; the value stays."""
    fused, inputs = pair[1], batch()
    value = torch.randn(4, NEW, 16)
    loss, before = grads_of(fused, inputs)
    with_costates, after = grads_of(fused, {**inputs, "costates": value})
    assert torch.equal(loss, with_costates)
    model, ids = fused.model, torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    model.zero_grad()
    logits = model(input_ids=ids, attention_mask=mask).logits[:, -NEW - 1 : -1]
    x = (logits / fused.temperature).softmax(-1) @ model.get_input_embeddings().weight.detach()
    (x * value * inputs["completion_mask"][..., None]).sum().backward()
    for name, p in model.named_parameters():
        close(after[name] - before[name], p.grad / 2)  # of two accumulation steps


@pytest.mark.parametrize("kind", ["patched", "fused"])
def test_training_takes_the_same_steps(kind, tmp_path):
    """Two optimizer steps of two micro-batches each, sampled by the models themselves."""
    runs = []
    for ours_too in (False, True):
        fused = kind == "fused" and ours_too
        made = trainer(ours.GRPOTrainer if fused else trl.GRPOTrainer, tmp_path, backend=None)
        patched = ours.patch() if kind == "patched" and ours_too else contextlib.nullcontext()
        with patched as on:
            made.train()
        assert kind == "fused" or not ours_too or on.calls >= 4
        losses = [row["loss"] for row in made.state.log_history if "loss" in row]
        runs.append((torch.tensor(losses), dict(made.model.named_parameters())))
    assert len(runs[0][0]) == 2 and runs[0][0].abs().max() > 0
    close(runs[1][0], runs[0][0], 2e-5)
    for name, p in runs[0][1].items():
        close(runs[1][1][name], p, 1e-3)  # Adam divides by gradients near 0


def test_sft_has_the_same_loss_and_accuracy(tmp_path):
    """The trainer that also asks for the most likely token."""
    runs = []
    for patched in (False, True):
        arguments = trl.SFTConfig(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, max_steps=1, report_to="none",
            per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1,
            save_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
        )  # fmt: skip
        made = trl.SFTTrainer(
            model=llama(), args=arguments, processing_class=tokenizer(),
            train_dataset=datasets.Dataset.from_list([{"text": t} for t in ("abca", "fe", "gaa")]),
        )  # fmt: skip
        made.remove_callback(transformers.PrinterCallback)
        with ours.patch() if patched else contextlib.nullcontext() as on:
            made.train()
        assert not patched or on.calls == 2
        runs.append(made.state.log_history[0])
    for name in ("loss", "entropy", "mean_token_accuracy", "grad_norm"):
        assert runs[1][name] == pytest.approx(runs[0][name], rel=1e-5)


def test_another_version_of_trl_is_refused_by_the_trainer(monkeypatch):
    from vgkern.integrations import _trl_grpo

    monkeypatch.setattr(_trl_grpo, "version", lambda _: "1.17.0")
    with pytest.raises(IntegrationError, match=r"expected: 1\.16\.x\n  found:    1\.17\.x"):
        ours.GRPOTrainer()
