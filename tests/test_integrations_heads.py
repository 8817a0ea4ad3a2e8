"""Heads whose weight is not what they multiply by: used rightly, or refused by name, everywhere.

bitsandbytes, torchao and peft are run where they are installed; stand-ins with the same fields run
always. The truth is what the layer itself answers to the unit vectors.
"""

import types

import pytest
import torch
from torch import Tensor

import vgkern
from vgkern.integrations import IntegrationError, _head, _weight
from vgkern.integrations import transformers as ours
from vgkern.integrations import trl as of_trl

torch.set_num_threads(1)
transformers = pytest.importorskip("transformers")
VOCAB, WIDTH = 64, 64


def llama(**options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, initializer_range=0.4, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).train()


def batch():
    ids = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids.clone()}


class Codes(torch.nn.Module):
    """As bitsandbytes' Linear8bitLt: int8 rows, their scales beside them or in `state`."""

    def __init__(self, dense: Tensor, moved: bool):
        super().__init__()
        scales = dense.abs().amax(1)
        codes = (dense / scales[:, None] * 127).round().to(torch.int8)
        self.weight = torch.nn.Parameter(codes, requires_grad=False)
        self.weight.SCB, self.state = (
            (None, types.SimpleNamespace(SCB=scales)) if moved else (scales, None)
        )
        self.SCB = scales

    def forward(self, x):
        return x @ (self.weight.to(x.dtype) * self.SCB[:, None].to(x.dtype) / 127).T


class Quantised(Tensor):
    """As a tensor class of torchao: says it is a float matrix, knows how to become one."""

    @staticmethod
    def __new__(cls, codes, scale):
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def dequantize(self):
        return self.codes.float() * self.scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        plain = [a.dequantize() if isinstance(a, cls) else a for a in args]
        return func(*plain, **(kwargs or {}))


def stand_in_int8(dense):
    return Codes(dense, moved=False)


def stand_in_int8_moved(dense):
    return Codes(dense, moved=True)


def stand_in_tensor_class(dense):
    layer = torch.nn.Linear(WIDTH, VOCAB, bias=False)
    scale = float(dense.abs().max()) / 127
    weight = Quantised((dense / scale).round().to(torch.int8), scale)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return layer


def bnb_int8(dense):
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(WIDTH, VOCAB, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(dense, requires_grad=False, has_fp16_weights=False)
    return layer.to("cpu")


def bnb_int8_called(dense):
    layer = bnb_int8(dense)
    layer(torch.ones(1, WIDTH))  # which moves the scales off the weight
    assert layer.weight.SCB is None
    return layer


def bnb_4bit(dense):
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(WIDTH, VOCAB, bias=False, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(dense, requires_grad=False, quant_type="nf4")
    return layer.to("cpu")


def bnb_4bit_in_bfloat16(dense):
    """Codes that say they are bfloat16, as FSDP has them."""
    bnb = pytest.importorskip("bitsandbytes")
    kinds = {"quant_type": "nf4", "quant_storage": torch.bfloat16}
    layer = bnb.nn.Linear4bit(WIDTH, VOCAB, bias=False, **kinds)
    layer.weight = bnb.nn.Params4bit(dense, requires_grad=False, **kinds)
    layer = layer.to("cpu")
    assert layer.weight.dtype == torch.bfloat16
    return layer


def torchao_int8(dense):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    layer = torch.nn.Linear(WIDTH, VOCAB, bias=False).requires_grad_(False)
    layer.weight.data.copy_(dense)
    quantize_(layer, Int8WeightOnlyConfig())
    return layer


MAKERS = (stand_in_int8, stand_in_int8_moved, stand_in_tensor_class, bnb_int8, bnb_int8_called,
          bnb_4bit, bnb_4bit_in_bfloat16, torchao_int8)  # fmt: skip


def truth(layer):
    return layer(torch.eye(WIDTH)).T.detach().double()


@pytest.mark.parametrize("make", MAKERS)
def test_a_quantised_head_is_dequantised_and_frozen(make):
    """Loss and the backbone's gradients, against the matrix that the layer multiplies by."""
    model = llama()
    dense = model.lm_head.weight.detach().clone()
    want = truth(make(dense))
    model.lm_head = make(dense)
    with ours.patch(model) as on:
        loss = model(**batch()).loss
        loss.backward()
        assert on.calls == 1
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert not any(n.startswith("lm_head") for n in got)
    model.lm_head = torch.nn.Linear(WIDTH, VOCAB, bias=False).requires_grad_(False)
    model.lm_head.weight.data.copy_(want)
    model.zero_grad()
    stock = model(**batch()).loss
    stock.backward()
    # on CPUs with bf16 products bitsandbytes rounds the scales of 4-bit codes once it evaluates
    tolerance = 1e-2 if "4bit" in make.__name__ else 1e-5
    assert abs(float(loss - stock)) < tolerance
    for name, gradient in got.items():
        expected = model.get_parameter(name).grad
        assert (gradient - expected).abs().max() < 10 * tolerance * expected.abs().max(), name


@pytest.mark.parametrize("make", MAKERS)
def test_under_every_trl_trainer(make):
    """TRL hands over the weight alone: what knows its matrix is dequantised, the rest refused."""
    dense = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(0))
    want, layer = truth(make(dense)), make(dense)
    draw = torch.Generator().manual_seed(2)
    h = torch.randn(6, WIDTH, generator=draw).requires_grad_()
    y = torch.arange(6)
    args = (h, layer.weight, None, y, 1.0, 4)
    if make in (stand_in_int8_moved, bnb_int8_called):
        with pytest.raises(NotImplementedError, match="codes whose scales are elsewhere"):
            of_trl.scores(*args)
        return
    logp = of_trl.scores(*args)[0]
    (gradient,) = torch.autograd.grad(logp.sum(), h)
    x = h.detach().double().requires_grad_()
    exact = (x @ want.T).log_softmax(-1).gather(-1, y[:, None])[:, 0]
    torch.testing.assert_close(logp, exact.float(), atol=2e-5, rtol=1e-5)
    exact_gradient = torch.autograd.grad(exact.sum(), x)[0]
    torch.testing.assert_close(gradient, exact_gradient.float(), atol=2e-5, rtol=1e-4)


FP8 = torch.randn(VOCAB, WIDTH).to(torch.float8_e4m3fn)
UNKNOWN = {
    "int8": (torch.ones(VOCAB, WIDTH, dtype=torch.int8), "int8 tensor .* codes whose scales"),
    "fp8": (FP8, "float8_e4m3fn tensor .* codes whose scales"),
    "packed": (torch.ones(VOCAB * WIDTH // 2, 1, dtype=torch.uint8), "uint8 tensor"),
    "packed as floats": (torch.ones(VOCAB * WIDTH // 4), "which is packed; allowed: .V, H."),
    "offloaded": (torch.empty(VOCAB, WIDTH, device="meta"), "meta tensor"),
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_codes_that_know_no_matrix_are_refused(what):
    weight, words = UNKNOWN[what]
    with pytest.raises(NotImplementedError, match=words):
        _weight.matrix(weight)
    with pytest.raises(NotImplementedError, match="weight: got a"):
        of_trl.scores(torch.ones(2, WIDTH), weight, None, torch.tensor([0, 1]), 1.0, 4)
    model = llama()
    model.lm_head.weight = torch.nn.Parameter(weight, requires_grad=False)
    with pytest.raises((NotImplementedError, IntegrationError), match="weight: got a"):
        _weight.through(model.lm_head, lambda *a: a, torch.ones(1, WIDTH))


@pytest.mark.parametrize("target", ["lm_head", "all-linear with the head"])
def test_adapters_on_the_head_are_refused_even_when_they_add_nothing_yet(target):
    peft = pytest.importorskip("peft")
    modules = ["lm_head"] if target == "lm_head" else ["q_proj", "lm_head"]
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=modules))
    base = model.get_base_model()
    with pytest.raises(NotImplementedError, match=r"with adapters \(lora_A"):
        ours.patch(base)
    with pytest.raises(NotImplementedError, match="with adapters"):
        _head.add_head(base, "fused")


def test_a_head_that_peft_saves_whole_trains():
    """modules_to_save, which the message advises: the copy gets the gradient."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(llama(), config)
    base = model.get_base_model()
    results = []
    for on in (False, True):
        model.zero_grad()
        patch = ours.patch(base) if on else None
        loss = model(**batch()).loss
        loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((loss.detach(), grads))
        if patch is not None:
            assert patch.calls == 1
            patch.undo()
    assert any("lm_head.modules_to_save" in n for n in results[1][1])
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-4)


class Adapted(torch.nn.Linear):
    """As peft's layers: the weight of the base, and a product of its own that starts at zero."""

    def __init__(self):
        super().__init__(WIDTH, VOCAB, bias=False)
        self.down = torch.nn.Parameter(torch.randn(2, WIDTH))
        self.up = torch.nn.Parameter(torch.zeros(VOCAB, 2))

    def forward(self, x):
        return super().forward(x) + x @ self.down.T @ self.up.T


def test_any_other_trainable_part_of_a_head_is_refused():
    model = llama()
    model.lm_head = Adapted()
    with pytest.raises(NotImplementedError, match=r"Adapted with adapters \(down, up\)"):
        ours.patch(model)


def test_the_heads_own_hooks_run_and_its_forward_comes_back():
    model, seen = llama(), []
    model.lm_head.register_forward_pre_hook(lambda *_: seen.append("before"))
    model.lm_head.register_forward_hook(lambda *_: seen.append("after"))
    with ours.patch(model):
        seen.clear()
        model(**batch()).loss.backward()
    assert seen == ["before", "after"] and "forward" not in vars(model.lm_head)
    with pytest.raises(ValueError, match="stop"):

        def stop(*_):
            raise ValueError("stop")

        _weight.through(model.lm_head, stop, torch.ones(1, WIDTH))
    assert "forward" not in vars(model.lm_head)


def test_the_ops_themselves_refuse_codes():
    h, y = torch.ones(2, WIDTH), torch.tensor([0, 1])
    for w in (FP8, FP8.to(torch.int8)):
        with pytest.raises(TypeError, match=r"weight: got .* allowed: float32"):
            vgkern.linear_token_logprobs(h, w, y)
