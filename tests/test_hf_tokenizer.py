"""Hugging Face tokenizers: where an answer ends, what starts a prompt, chat templates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from test_hf import tiny

from vgkern.train import hf_load
from vgkern.train.hf import HFPolicy


def words(**special: Any) -> Any:
    """A tokenizer that appends its end, and has a line break in a token with text before it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {"<s>": 0, "</s>": 1, "<end>": 2, "a": 3, "b": 4, "5\n": 5, "\n": 6, "<unk>": 7}
    made = Tokenizer(models.WordLevel(ids, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    made.decoder = decoders.Fuse()
    made.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **special
    )


def test_prompts_start_once_and_do_not_end() -> None:
    inner = words()
    assert inner.encode("a b") == [0, 3, 4, 1] and inner.encode("<s> a")[:2] == [0, 0]
    tokenizer = hf_load.HFTokenizer(inner)
    assert tokenizer.encode("a b") == [0, 3, 4]
    assert tokenizer.encode("<s> a") == [0, 3]
    assert tokenizer.encode("a </s>")[-1] == 1  # the text's own


def test_every_end_stops_and_text_before_a_line_break_is_kept() -> None:
    from vgkern.train.generate import Rollout, decode

    tokenizer = hf_load.HFTokenizer(words(pad_token="<end>"), ends=[2, 1])
    assert tokenizer.stops == (1, 2, 5, 6)
    assert 2 not in tokenizer.blocked(8)  # the padding id is among the ends
    rows = torch.tensor([[3, 5, 0], [3, 4, 6], [3, 4, 1], [3, 4, 2], [3, 4, 4]])
    finished = torch.tensor([True, True, True, True, False])
    rollout = Rollout(rows, rows.float(), torch.tensor([2, 3, 3, 3, 3]), finished)
    assert decode(rollout, tokenizer) == ["a5", "ab", "ab", "ab", "abb"]


def test_the_ends_of_the_generation_config_are_read(tmp_path: Path) -> None:
    policy = HFPolicy(tiny(), blocked=[0])
    policy.model.generation_config.eos_token_id = [1, 2]
    policy.model.save_pretrained(tmp_path)
    words().save_pretrained(tmp_path)
    _, tokenizer = hf_load.load(str(tmp_path))
    assert {1, 2} <= set(tokenizer.stops)


def test_messages_go_through_the_chat_template() -> None:
    from vgkern.train.policy import encode
    from vgkern.train.tokenizer import CharTokenizer

    inner = words()
    question = [{"role": "user", "content": "b"}]
    tokenizer = hf_load.HFTokenizer(inner)
    with pytest.raises(ValueError, match=r"question: got chat messages, and .* no chat template"):
        encode(tokenizer, question)
    with pytest.raises(ValueError, match="CharTokenizer has no chat template"):
        encode(CharTokenizer(), question)
    inner.chat_template = (
        "{{ bos_token }}{% for m in messages %} {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %} a{% endif %}"
    )
    ids = encode(tokenizer, question)
    assert ids.count(0) == 1 and ids[-1] == 3 and 4 in ids and 1 not in ids
    inner.chat_template = "{{ raise_exception('no system here') }}"
    with pytest.raises(ValueError, match=r"refuses them .*no system here"):
        encode(tokenizer, question)


def test_text_can_be_a_users_turn_and_the_checkpoint_remembers(tmp_path: Path) -> None:
    from vgkern.train.policy import encode

    inner = words()
    with pytest.raises(ValueError, match=r"chat: got true, and .*no chat template"):
        hf_load.HFTokenizer(inner, chat=True)
    inner.chat_template = "{{ bos_token }}{% for m in messages %} {{ m.content }}{% endfor %} a"
    plain, chatty = hf_load.HFTokenizer(inner), hf_load.HFTokenizer(inner, line=False, chat=True)
    turn = [{"role": "user", "content": "b"}]
    assert encode(chatty, "b") == encode(chatty, turn) == encode(plain, turn) != encode(plain, "b")
    assert set(chatty.stops) <= set(plain.stops)
    HFPolicy(tiny(vocab_size=len(inner))).save(str(tmp_path))
    chatty.save(str(tmp_path))
    assert (tmp_path / hf_load.ASKED).exists()
    found = hf_load._asked(tmp_path / hf_load.ASKED)
    assert found == {"line": False, "chat": True}
    again = hf_load.load(str(tmp_path))[1]
    assert again.turns and not again.line and encode(again, "b") == encode(chatty, "b")
    other = hf_load.load(str(tmp_path), line=True, chat=False)[1]
    assert not other.turns and other.line
    (tmp_path / hf_load.ASKED).write_text("[1")
    assert hf_load.load(str(tmp_path))[1].line
