"""transformers: the stock loss and gradients of a 2-layer model, with and without its logits."""

import copy
import inspect
import types

import pytest
import torch

from vgkern.integrations import IntegrationError, _head
from vgkern.integrations import transformers as ours

torch.set_num_threads(1)  # models this small only wait for a second one
transformers = pytest.importorskip("transformers")
from transformers.loss import loss_utils  # noqa: E402

VOCAB = 50


def llama(**options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, initializer_range=0.4, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).train()


def batch(seed=0, lengths=(9, 4, 1)):
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (3, 9), generator=draw)
    mask = (torch.arange(9) < torch.tensor(lengths)[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100  # a prompt
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def grads_of(model, *calls):
    model.zero_grad()
    losses = []
    for call in calls:
        out = model(**call)
        out.loss.backward()
        losses.append(out.loss.detach())
    return losses, {n: p.grad.clone() for n, p in model.named_parameters()}, out


def same(a, b):
    torch.testing.assert_close(a[0], b[0], atol=1e-5, rtol=1e-5)
    assert max(float(g.abs().max()) for g in b[1].values()) > 1e-2
    torch.testing.assert_close(a[1], b[1], atol=1e-5, rtol=1e-5)


shifted = torch.nn.functional.pad(batch()["labels"], (0, 1), value=-100)[:, 1:].contiguous()
CALLS = {
    "mean": [batch()],
    "micro-batches": [
        {**batch(1), "num_items_in_batch": torch.tensor(13)},
        {**batch(2, (5, 9, 7)), "num_items_in_batch": 13},
    ],
    "shift_labels": [{**batch(), "labels": None, "shift_labels": shifted}],
    "logits_to_keep": [{**batch(), "logits_to_keep": 4, "labels": batch()["labels"][:, -4:]}],
    "positions kept": [
        {**batch(), "logits_to_keep": torch.tensor([2, 5]), "labels": batch()["labels"][:, [1, 6]]}
    ],
}
CALLS["shift_labels"][0]["labels"] = batch()["labels"]  # the model's forward asks for both


@pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS.keys())
def test_loss_and_gradients_are_the_stock_ones(calls):
    model = llama(attention_bias=True)
    stock = grads_of(model, *calls)
    with ours.patch(model) as on:
        fused = grads_of(model, *calls)
        assert on.calls == len(calls) and fused[2].logits is None
    same(fused, stock)
    assert "forward" not in vars(model)
    again = grads_of(model, *calls)
    assert all(torch.equal(again[1][n], g) for n, g in stock[1].items())
    model.loss_function = ours.causal_lm_loss
    same(grads_of(model, *calls), stock)


def test_softcap_and_head_bias():
    config = transformers.Gemma2Config(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2, head_dim=8,
        num_attention_heads=2, num_key_value_heads=2, final_logit_softcapping=2.0,
        initializer_range=0.4, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.Gemma2ForCausalLM(config).train()
    stock = grads_of(model, batch())
    with ours.patch(model):
        same(grads_of(model, batch()), stock)


def test_only_training_passes_with_labels_are_fused():
    model = llama()
    signature = inspect.signature(model.forward)
    with ours.patch(model) as on:
        assert inspect.signature(model.forward) == signature
        assert model(input_ids=batch()["input_ids"]).logits is not None
        assert model(**batch(), output_hidden_states=True).hidden_states is not None
        assert model.eval()(**batch()).logits is not None
        assert on.calls == 0
        assert model.train()(**batch(), return_dict=False)[0].ndim == 0 and on.calls == 1


def test_no_label_at_all_is_a_connected_zero():
    model, call = llama(), batch()
    call["labels"] = torch.full_like(call["labels"], -100)
    with ours.patch(model):
        out = model(**call)
        out.loss.backward()
    assert out.loss == 0 and not any(p.grad.any() for p in model.parameters())


def test_a_model_that_does_more_is_refused():
    class Tilted(torch.nn.Linear):  # as an adapter on the head would
        def forward(self, x):
            return 1.3 * super().forward(x)

    model = llama()
    weight = model.lm_head.weight
    model.lm_head = Tilted(16, VOCAB, bias=False)
    model.lm_head.weight = weight
    with pytest.raises(IntegrationError, match="fused head would train another model"):
        ours.patch(model)
    assert "forward" not in vars(model)


def test_another_loss_is_refused():
    model = llama()
    model.loss_function = lambda **_: 0
    with pytest.raises(IntegrationError, match="loss_function is"):
        ours.patch(model)


def test_a_changed_transformers_is_refused(monkeypatch):
    monkeypatch.setattr(loss_utils, "ForCausalLMLoss", lambda logits, targets, **kwargs: 0)
    with pytest.raises(IntegrationError) as error:
        ours.patch(llama())
    for words in ("logits, targets, kwargs", ours.STOCK, "transformers>=5", "expected", "found"):
        assert words in str(error.value)


def perturbed(model):
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    return model


def test_a_copy_made_while_patched_runs_its_own_weights():
    model = llama()
    with ours.patch(model) as on:
        reference = copy.deepcopy(model)
        perturbed(model)
        stock = grads_of(llama(), batch())
        assert on.calls == 0
        same(grads_of(reference, batch()), stock)
        assert on.calls == 1
        assert inspect.signature(reference.forward) == inspect.signature(llama().forward)
    calls = on.calls
    again = grads_of(reference, batch())
    same(again, stock)
    assert on.calls == calls and again[2].logits is not None
    assert "forward" not in vars(model)


def test_a_copy_of_a_model_with_a_fused_head_runs_its_own_weights():
    model, call = llama().eval(), {"input_ids": batch()["input_ids"]}
    stock, signature = model(**call).logits, inspect.signature(model.forward)
    _head.add_head(model, "ours")
    assert inspect.signature(model.forward) == signature
    reference = copy.deepcopy(model)
    perturbed(model)
    assert torch.equal(reference(**call).logits, stock)
    assert not torch.equal(model(**call).logits, stock)
    logits = reference(**call, ours=lambda hidden, weight, bias: hidden @ weight.T)
    torch.testing.assert_close(logits, stock)


def test_a_copy_of_someone_elses_closure_is_refused():
    model, call = llama().eval(), {"input_ids": batch()["input_ids"]}
    own = model.forward
    model.forward = lambda *args, **kwargs: own(*args, **kwargs)
    _head.add_head(model, "ours")
    model.forward = types.MethodType(model.forward.__func__, model)  # as accelerate wraps it
    assert model(**call).logits is not None
    with pytest.raises(IntegrationError, match="a copy of a model"):
        copy.deepcopy(model)(**call)


def test_modes_of_the_modules_are_left_as_they_are():
    model = llama()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    assert len(set(before)) == 2
    ours.patch(model).undo()
    assert [module.training for module in model.modules()] == before


def test_outputs_without_names_are_refused():
    model = llama()
    model.config.return_dict = False
    with pytest.raises(IntegrationError, match="return_dict is False"):
        ours.patch(model)


def test_shift_labels_alone_give_no_loss_as_stock():
    model, call = llama(), {**batch(), "labels": None, "shift_labels": shifted}
    assert model(**call).loss is None
    with ours.patch(model) as on:
        out = model(**call)
    assert out.loss is None and out.logits is not None and on.calls == 0
