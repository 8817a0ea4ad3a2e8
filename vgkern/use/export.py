"""`python -m vgkern export CKPT OUT`: a plain Hugging Face folder, with a card of what was run.

The small decoder is a Llama: its norms have no gain (ones), its rope turns neighbouring channels
(the rows of q and k are put where Llama's halves have them), its head is tied. Ids that it never
samples are in the generation config's `suppress_tokens`: Llama's head has no bias for them.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vgkern import __version__
from vgkern.errors import CheckpointError, ConfigError
from vgkern.train.checkpoint import whole
from vgkern.train.config import Config
from vgkern.train.layers import EPS
from vgkern.train.model import Decoder
from vgkern.train.tokenizer import CharTokenizer

from . import Model, command, load

INSTALL = "pip install 'transformers>=5' tokenizers"


def main(arguments: list[str]) -> None:
    p = command("export", __doc__)
    p.add_argument("out", metavar="OUT", help="the folder to make")
    asked = p.parse_args(arguments)
    out = Path(asked.out)
    if out.exists():
        raise ConfigError(f"OUT: {out} exists already; choose another folder")
    model = load(asked.model)
    try:
        with whole(out) as partial:
            export(model, partial)
            (partial / "README.md").write_text(card(model))
    except OSError as error:
        raise CheckpointError(f"{out}: not written: {error.strerror or error}") from error
    print(f"{out}: AutoModelForCausalLM.from_pretrained({str(out)!r}) reads it")


def export(model: Model, folder: Path) -> None:
    if not isinstance(model.policy, Decoder):
        model.policy.save(str(folder))
        model.tokenizer.save(str(folder))
        return
    try:
        import tokenizers  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"export needs {error.name}: {INSTALL}") from None
    llama(model.policy, str(folder))
    assert isinstance(model.tokenizer, CharTokenizer)
    characters(model.tokenizer).save_pretrained(str(folder))


def llama(decoder: Decoder, folder: str) -> None:
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    shape = decoder.shape
    ends = {
        "bos_token_id": None,
        "eos_token_id": CharTokenizer.eos,
        "pad_token_id": CharTokenizer.pad,
    }
    config = LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.width, intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, rms_norm_eps=EPS,
        max_position_embeddings=shape.context, tie_word_embeddings=True, attention_bias=False,
        mlp_bias=False, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, **ends,
    )  # fmt: skip
    made = LlamaForCausalLM(config)
    weights: dict[str, Tensor] = {"model.embed_tokens.weight": decoder.embedding.weight}
    for i, layer in enumerate(decoder.layers):
        q, k, v = layer.qkv.weight.chunk(3)
        gate, up = layer.gate_up.weight.chunk(2)
        named = {
            "self_attn.q_proj": _halves(q, shape.heads),
            "self_attn.k_proj": _halves(k, shape.heads), "self_attn.v_proj": v,
            "self_attn.o_proj": layer.out.weight, "mlp.gate_proj": gate,
            "mlp.up_proj": up, "mlp.down_proj": layer.down.weight,
        }  # fmt: skip
        weights |= {f"model.layers.{i}.{name}.weight": w for name, w in named.items()}
    with torch.no_grad():
        parameters = dict(made.named_parameters())
        for name, parameter in parameters.items():
            if name in weights:
                parameter.copy_(weights[name])
            elif name.endswith("norm.weight"):
                parameter.fill_(1.0)
            else:
                raise CheckpointError(f"export: a Llama of this transformers also has {name}")
    made.generation_config = GenerationConfig(suppress_tokens=list(decoder.blocked), **ends)
    made.save_pretrained(folder)


def _halves(rows: Tensor, heads: int) -> Tensor:
    """Rows of neighbouring pairs (0 1)(2 3).. to Llama's (0 2 ..)(1 3 ..), in each head."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(rows.shape)


def characters(own: CharTokenizer) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {"<pad>": own.pad, "<eos>": own.eos, **own.id}
    ids |= {f"<unused {i}>": i for i in range(len(ids), own.vocab)}
    made = Tokenizer(models.WordLevel(ids, "<pad>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token="<eos>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


def card(model: Model) -> str:
    """README.md of the folder: what was run, and what it reached."""
    run, lines = model.run, ["---", "library_name: transformers", "tags: [vgkern]", "---", ""]
    name = run.get("task", "") or Path(model.weights).name
    lines += [f"# {name}", "", f"Weights of `{Path(model.weights).name}`, exported by vgkern "
              f"{__version__}.", ""]  # fmt: skip
    if run:
        defaults = {f.name: f.default for f in dataclasses.fields(Config)}
        changed = {k: v for k, v in run.items() if k != "out" and v != defaults.get(k)}
        lines += ["Trained with `python -m vgkern train`" + (" and" if changed else ""), ""]
        lines += [f"- {k} = {json.dumps(v)}" for k, v in changed.items()]
        lines += ["", *_reached(Path(model.weights).parent / "metrics.jsonl")]
    return "\n".join(lines).rstrip() + "\n"


def _reached(metrics: Path) -> list[str]:
    try:
        records = [json.loads(line) for line in metrics.read_text().splitlines()]
    except (OSError, ValueError):
        return []
    found = [r for r in records if r.get("kind") == "eval"]
    return [
        f"- step {r['step']}: held-out score {r['greedy']:.3f} greedy, {r['sampled']:.3f} sampled"
        for r in dict.fromkeys(map(json.dumps, (found[0], found[-1])) if found else ())
        for r in [json.loads(r)]
    ]
