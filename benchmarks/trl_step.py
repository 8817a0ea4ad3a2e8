"""One RL step of vgkern's trainer and of TRL's GRPOTrainer: same weights, prompts, batch, threads.

    pip install -e '.[train,compare]'
    python benchmarks/trl_step.py [--model RUN/start] [--steps 60] [--block 5] [--json F]

The `sort` demo, Dr. GRPO, 32 prompts x 8 samples, one micro-batch, fp32. One process; blocks of
steps alternate (TRL, vgkern, TRL ...); medians over steps, the first block left out. Asserted: both
models' logits are equal, and so are the first gradients of the vgkern rows, which draw the same
noise; TRL draws its own. Without --model a warm start makes the weights (half a minute).

    vgkern       the trainer as it is: prefixes forwarded once, groups without a gradient dropped
    equal_rows   every row forwards its own prompt and completion, and every group is trained on
    equal_work   also rows that have ended, padding, and the last layer of the prompt: the update
                 forwards exactly the positions that TRL forwards
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
import warnings
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import trl
from run import cpu_name
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor

import vgkern
from vgkern.ops import _native
from vgkern.train.config import Config
from vgkern.train.log import Log
from vgkern.train.model import Cache, Decoder, Nodes
from vgkern.train.run import build, warm_up
from vgkern.train.trainer import Batch, Rollout, Trainer

PARTS = ("ms_rollout", "ms_score", "ms_update")
LLAMA = {  # a weight of the decoder, and those of Llama that are its rows
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


class EqualRows(Decoder):
    def hidden(self, prompts: Any, completions: Tensor, group: int, lengths: Tensor, *_) -> Tensor:
        return super().hidden(prompts, completions, group, lengths, shared=False)

    def prefill(self, prompts: Any, group: int, max_new: int) -> tuple[Cache, Tensor]:
        return super().prefill([prompt for prompt in prompts for _ in range(group)], 1, max_new)


class EqualWork(EqualRows):
    def hidden(self, prompts: Any, completions: Tensor, group: int, lengths: Tensor, *_) -> Tensor:
        width, size = completions.shape[1], torch.tensor([len(prompt) for prompt in prompts])
        extra = size.max() - size + 1  # TRL forwards the last token too
        completions = torch.nn.functional.pad(completions, (0, int(extra.max())))
        lengths = (width + extra).repeat_interleave(group)
        return super().hidden(prompts, completions, group, lengths)[:, :width]

    def forward(self, nodes: Nodes) -> Tensor:
        return super().forward(dataclasses.replace(nodes, keys_only=0))[nodes.keys_only :]

    def prefill(self, prompts: Any, group: int, max_new: int) -> tuple[Cache, Tensor]:
        self.live = torch.arange(len(prompts) * group)
        return super().prefill(prompts, group, max_new)

    def keep(self, state: Cache, rows: Tensor) -> None:
        self.live = self.live[rows]

    def decode(self, state: Cache, tokens: Tensor) -> Tensor:
        every = tokens.new_zeros(len(state.tree.count))
        every[self.live] = tokens
        return super().decode(state, every)[self.live]


class EveryGroup(Trainer):
    def batch(self, prompts: list[list[int]], rollout: Rollout, rewards: Tensor) -> Batch:
        ids = torch.arange(len(prompts)).repeat_interleave(self.config.group)
        advantages = vgkern.group_advantages(rewards, ids, estimator=self.objective.advantage)
        return Batch(prompts, rollout, advantages, self.normalizer(rollout))


VARIANTS = {"vgkern": (Decoder, Trainer), "equal_rows": (EqualRows, EveryGroup)}
VARIANTS["equal_work"] = (EqualWork, EveryGroup)


def to_llama(policy: Decoder) -> Any:
    shape, state = policy.shape, policy.state_dict()
    config = transformers.LlamaConfig(  # default: RMSNorm's epsilon and RoPE's base, as here
        vocab_size=shape.vocab, hidden_size=shape.width, intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, pad_token_id=0,
        eos_token_id=1, max_position_embeddings=shape.context, tie_word_embeddings=True,
    )  # fmt: skip
    weights = {f"{k}.weight": state["embedding.weight"] for k in ("model.embed_tokens", "lm_head")}
    for i, (ours, names) in product(range(shape.layers), LLAMA.items()):
        parts = state[f"layers.{i}.{ours}.weight"].chunk(len(names))
        for name, w in zip(names, parts, strict=True):
            if name[-6:] in ("q_proj", "k_proj"):  # RoPE: pairs are neighbours here, halves there
                w = w.view(shape.heads, -1, 2, shape.width).transpose(1, 2).reshape(w.shape)
            weights[f"model.layers.{i}.{name}.weight"] = w
    model = transformers.LlamaForCausalLM(config)
    for name in model.load_state_dict(weights, strict=False).missing_keys:
        model.get_parameter(name).requires_grad_(False)  # the decoder's norms have no gain: 1
    return model


@torch.no_grad()
def logit_gap(trainer: Trainer, model: Any) -> float:
    """Largest difference of an allowed logit over some right answers."""
    policy, encode, size = trainer.policy, trainer.tokenizer.encode, len(trainer.held_out[0].answer)
    entries = [entry for entry in trainer.held_out if len(entry.answer) == size]
    prompts = [encode(entry.question) for entry in entries]
    answers = torch.tensor([encode(entry.answer) for entry in entries])
    hidden = policy.hidden(prompts, answers, 1, torch.full((len(entries),), size))
    theirs = model(input_ids=torch.cat((torch.tensor(prompts), answers), 1)).logits
    difference = hidden @ policy.head().weight.T - theirs[:, -size - 1 : -1]
    return float(difference[..., policy.bias == 0].abs().max())


def fast_tokenizer(ours: Any) -> Any:
    ids = {"<pad>": ours.pad, "<eos>": ours.eos, **ours.id, "<unk>": len(ours.id) + 2}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "unk")}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def run_trl(base: Trainer, model: Any, folder: str, between: Any) -> None:
    """GRPOTrainer owns its loop: `between` gets each step's row and runs off its clock."""
    config, encode, eos = base.config, base.tokenizer.encode, base.tokenizer.eos
    parts = ("_generate_single_turn", "_generate_and_score_completions")
    now = dict.fromkeys((*parts, "start", "reward"), 0.0)  # of this step

    def reward(completion_ids: list[list[int]], answer: list[str], **_: Any) -> list[float]:
        pairs = zip(completion_ids, map(encode, answer), strict=True)
        rewards = [float(list(ids) == [*right, eos]) for ids, right in pairs]
        now["reward"] = statistics.mean(rewards)
        return rewards

    class Steps(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            generated, scored, start, reward = now.values()
            times = (generated, scored - generated, time.perf_counter() - start - scored)
            row = {part: 1e3 * seconds for part, seconds in zip(PARTS, times, strict=True)}
            between({**row, "reward": reward})
            now.update(dict.fromkeys(now, 0.0), start=time.perf_counter())

    arguments = trl.GRPOConfig(  # default: no KL, one update, clip 0.2, fused AdamW
        output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False,
        per_device_train_batch_size=config.prompts * config.group, num_generations=config.group,
        max_completion_length=base.task.max_new, max_steps=config.steps, shuffle_dataset=False,
        loss_type="dr_grpo", scale_rewards="none", learning_rate=config.lr, adam_beta2=0.95,
        lr_scheduler_type="constant_with_warmup", warmup_steps=config.lr_warmup,
        report_to="none", logging_strategy="no", save_strategy="no", disable_tqdm=True,
        generation_kwargs={"suppress_tokens": base.tokenizer.blocked},
    )  # fmt: skip
    entries = base.stream.take(config.prompts * config.steps)
    rows = [{"prompt": entry.question, "answer": entry.answer} for entry in entries]
    trainer = trl.GRPOTrainer(
        model=model, args=arguments, train_dataset=datasets.Dataset.from_list(rows),
        reward_funcs=reward, processing_class=fast_tokenizer(base.tokenizer), callbacks=[Steps()],
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)

    def timed(name: str, inner: Any, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = inner(*args, **kwargs)
        now[name] += time.perf_counter() - start
        return result

    for name in parts:
        setattr(trainer, name, partial(timed, name, getattr(trainer, name)))
    now["start"] = time.perf_counter()
    trainer.train()


def compare(base: Trainer, block: int, folder: str) -> dict[str, Any]:
    model = to_llama(base.policy)
    gap = logit_gap(base, model)
    assert gap < 5e-5, f"logits differ by {gap:.1e}: more than fp32 rounding (1e-5)"
    trainers = {name: build(base.config)[0] for name in VARIANTS}
    for copy, (decoder, trainer) in zip(trainers.values(), VARIANTS.values(), strict=True):
        copy.policy.load_state_dict(base.policy.state_dict())  # same state, other methods
        copy.policy.__class__, copy.__class__, copy.log = decoder, trainer, base.log
    steps: dict[str, list[dict[str, Any]]] = {name: [] for name in ("trl", *VARIANTS)}

    def between(row: dict[str, Any]) -> None:
        steps["trl"].append(row)
        done = len(steps["trl"])
        if done % block == 0:
            for name in list(VARIANTS)[:: 1 if done // block % 2 else -1]:
                # from 0: the learning rate of transformers' first warm-up step is 0
                steps[name] += [trainers[name].step(i) for i in range(done - block, done)]
            print(f"{done} of {base.config.steps} steps", flush=True)

    run_trl(base, model, folder, between)
    norms = [steps[name][0]["grad_norm"] for name in VARIANTS]
    assert max(norms) - min(norms) <= 1e-4 * max(norms), f"gradient norms differ: {norms}"
    rows: list[dict[str, Any]] = []
    for name, taken in steps.items():
        each = [sum(step[part] for part in PARTS) for step in taken]
        row = {part: statistics.median(step[part] for step in taken[block:]) for part in PARTS}
        row["ms_step"] = statistics.median(each[block:])
        row["trl_ratio"] = (rows[0] if rows else row)["ms_step"] / row["ms_step"]
        for column, some in (("first_2", taken[:2]), ("last_10", taken[-10:])):
            row[column] = statistics.mean(step["reward"] for step in some)
        rows.append({"case": name, **row, "ms_steps": each})
    return {"logit_gap": gap, "rows": rows}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", default="", help="a checkpoint of the sort demo; empty: warm start")
    for name, default in (("--steps", 60), ("--block", 5), ("--threads", 1)):
        p.add_argument(name, type=int, default=default)
    p.add_argument("--json", type=Path)
    a = p.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(a.threads)
    base, *warm = build(Config(model=a.model, steps=a.steps, objective="dr_grpo"))
    with tempfile.TemporaryDirectory() as folder:
        base.log = Log(Path(folder))
        if not a.model:
            warm_up(base, *reversed(warm))
        result = compare(base, a.block, folder)
    machine = {"cpu": cpu_name(), "threads": a.threads, "isa": _native.status()["isa"]}
    machine |= {m.__name__: m.__version__ for m in (vgkern, torch, trl, transformers)}
    print(f"{machine['cpu']}, {a.threads} threads, TRL {machine['trl']}, torch {machine['torch']}")
    print(f"medians; mean reward of the first 2 and the last 10 of {a.steps} steps")
    columns = (*PARTS, "ms_step", "trl_ratio", "first_2", "last_10")
    print(f"{'':10}" + "".join(f"{column:>11}" for column in columns))
    for row in result["rows"]:
        print(f"{row['case']:10}" + "".join(f"{row[column]:11.4g}" for column in columns))
    if a.json:
        a.json.parent.mkdir(parents=True, exist_ok=True)
        a.json.write_text(json.dumps({"machine": machine, **result}, indent=1, default=str))


if __name__ == "__main__":
    main()
