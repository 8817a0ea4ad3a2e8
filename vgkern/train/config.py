"""The trainer's configuration: one flat frozen dataclass, a TOML file, then flags.

`python -m vgkern train --config run.toml --lr 2e-4` reads the file, then the flags. Every field is
a flag; `metadata` holds its help and the values it may take.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vgkern import objectives
from vgkern.errors import ConfigError
from vgkern.ops.linear_divergence import KINDS

from .device import DEVICES, DTYPES
from .track import TRACKERS


def _option(
    default: Any, text: str, low: float | None = None, high: float | None = None, **extra: Any
) -> Any:
    return field(default=default, metadata={"help": text, "low": low, "high": high, **extra})


@dataclass(frozen=True)
class Config:
    task: str = _option(
        "sort", "sort, reverse, addition, reasoning_gym:NAME, file.py:Name or data.jsonl"
    )
    task_options: str = _option("{}", "options of the task, as JSON: '{\"max_length\": 10}'")
    few_shot: int = _option(
        0, "fixed examples before every question (reasoning_gym, data.jsonl)", 0
    )
    model: str = _option("", "checkpoint folder, or a Hugging Face name; empty: a new small model")
    line: bool = _option(True, "an answer of a Hugging Face model ends at a line break too")
    chat: bool = _option(False, "a question of text is a user's turn in the model's chat template")
    out: str = _option("", "output folder; empty: runs/<task>-<time>")
    seed: int = _option(0, "seed of weights, data order and sampling", 0, 2**62)
    device: str = _option("auto", "auto: a GPU where there is one", choices=DEVICES)
    dtype: str = _option(
        "auto", "of products; weights and statistics are fp32. auto: bf16 for a Hugging Face model "
        "on a GPU", choices=DTYPES,
    )  # fmt: skip
    threads: int = _option(1, "CPU threads; small models gain nothing from more", 1)

    width: int = _option(128, "model width of a new model", 8)
    layers: int = _option(3, "its layers", 1)
    heads: int = _option(4, "its attention heads", 1)
    mlp: int = _option(384, "its MLP width", 8)
    context: int = _option(128, "its longest sequence", 4)

    warm_target: float = _option(0.12, "warm start until this sampled pass@1; 0: none", 0, 1)
    warm_wrong: float = _option(0.65, "share of demonstrations by a teacher who is wrong", 0, 1)
    warm_steps: int = _option(1000, "give up warming after so many steps", 1)
    warm_batch: int = _option(128, "demonstrations per step", 1)
    warm_lr: float = _option(2e-3, "learning rate of the warm start", 0)

    steps: int = _option(80, "RL steps", 0)
    prompts: int = _option(32, "prompts per step", 1)
    group: int = _option(8, "samples per prompt", 2)
    temperature: float = _option(1.0, "sampling temperature, in sampler and loss alike", 1e-3)
    objective: str = _option("grpo", "preset of vgkern.objectives")
    clip_low: float = _option(0.0, "ratio clipped below 1 - clip_low; 0: as the objective", 0, 1)
    clip_high: float = _option(0.0, "ratio clipped above 1 + clip_high; 0: as the objective", -1)
    reward_coef: float = _option(1.0, "weight of the task's reward; 0: only what follows", 0)
    beta: float = _option(0.0, "weight of the KL to the starting policy", 0)
    entropy_coef: float = _option(0.0, "weight of the entropy, which is maximised", 0)
    teacher: str = _option("", "frozen model to distil from: checkpoint folder or name")
    distill_coef: float = _option(1.0, "weight of the divergence from the teacher", 0)
    distill_kind: str = _option("reverse_kl", "that divergence", choices=KINDS)
    kl_estimator: str = _option(
        "analytic", "KL, entropy and distillation: over the vocabulary, or of the sampled token",
        choices=("analytic", "sampled"),
    )  # fmt: skip
    future: float = _option(1.0, "weight of what a token does to their later values", 0)
    discount: float = _option(1.0, "discount of those later values, per token", 0, 1)
    lr: float = _option(1e-4, "learning rate", 0)
    lr_warmup: int = _option(10, "steps of linear warm-up", 0)
    lr_final: float = _option(1.0, "the last step's learning rate, as a share of lr", 0, 1)
    weight_decay: float = _option(0.0, "AdamW's weight decay", 0)
    grad_clip: float = _option(1.0, "largest gradient norm", 0)
    updates_per_batch: int = _option(1, "optimizer steps on each batch of samples", 1)
    sparse_tol: float = _option(
        0.0, "relative error the output layer's gradients may have; 0: exact products", 0, 0.5
    )
    micro_prompts: int = _option(0, "prompts per backward pass; 0: all at once", 0)
    replay_every: int = _option(1, "steps between replays of the sampler's noise; 0: never", 0)
    cut_off: str = _option(
        "score", "a sample that ran on has: the task's score of its text, at most that of an empty "
        "answer; cut_off_value; or no part in the loss", choices=("score", "value", "mask"),
    )  # fmt: skip
    cut_off_value: float = _option(0.0, "the reward of a sample that ran on, under value")
    score_seconds: float = _option(30.0, "the task may take over one sample; 0: no limit", 0)
    shuffle_rewards: bool = _option(False, "control: rewards dealt to random samples")

    track: str = _option("", "where the numbers go beside metrics.jsonl", choices=("", *TRACKERS))
    eval_every: int = _option(10, "steps between evaluations", 1)
    eval_prompts: int = _option(256, "held-out prompts", 1)
    eval_seed: int = _option(0, "which held-out prompts", 0)
    save_every: int = _option(0, "steps between checkpoints; 0: only at the end", 0)
    state_every: int = _option(
        0, "steps between states for --resume; 0: as often as costs 1 % of the time; -1: only when "
        "the run is stopped", -1,
    )  # fmt: skip

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            _check(spec, getattr(self, spec.name))
        if not isinstance(self.options, dict):
            raise ConfigError(f"task_options: got {self.task_options!r}; allowed: a JSON object")
        if self.teacher and not self.distill_coef:
            raise ConfigError("distill_coef: got 0.0; allowed: > 0 with a teacher, or no teacher")
        if not (self.reward_coef or self.beta or self.entropy_coef or self.teacher):
            raise ConfigError("reward_coef: got 0.0; allowed: > 0, or a teacher to distil from")
        if self.kl_estimator == "sampled" and self.distill_kind != "reverse_kl":
            raise ConfigError(
                f"distill_kind: got {self.distill_kind!r}; allowed: 'reverse_kl' with kl_estimator "
                f"'sampled': the student's own tokens are samples of no other"
            )
        self._refuse_idle()

    def _refuse_idle(self) -> None:
        """A setting that was changed and would do nothing is a mistake."""
        others = self.beta or self.entropy_coef or self.teacher
        to_come = self.teacher or (others and self.kl_estimator == "analytic")
        learner = "a teacher to distil from"
        idle = {}
        if not self.teacher:
            idle = dict.fromkeys(("distill_coef", "distill_kind"), ("without a teacher", learner))
        if not others:
            remedy = f"beta, entropy_coef or {learner}"
            idle["reward_coef"] = ("with nothing beside the reward (lr is its scale)", remedy)
        if not to_come:
            text = "without an analytic or a teacher's term"
            remedy = f"one of beta, entropy_coef or {learner}"
            if others:
                remedy = "kl_estimator = 'analytic'"
            for name in ("future", "discount"):
                idle[name] = (text, f"any with {remedy}")
        if not self.model:
            needed = ("without a Hugging Face model", "any with --model")
            idle |= dict.fromkeys(("line", "chat"), needed)
        if self.cut_off != "value":
            idle["cut_off_value"] = (f"under cut_off {self.cut_off!r}", "cut_off = 'value'")
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            if spec.name in idle and value != spec.default:
                why, remedy = idle[spec.name]
                raise ConfigError(
                    f"{spec.name}: got {value!r}, which does nothing {why}; "
                    f"allowed: {spec.default!r}, or {remedy}"
                )

        self._check_sparse()

    def _check_sparse(self) -> None:
        if not self.sparse_tol:
            return
        whole = self.kl_estimator == "analytic" and (self.beta or self.entropy_coef or self.teacher)
        if whole:
            raise ConfigError(
                f"sparse_tol: got {self.sparse_tol!r} with analytic terms, which need every column "
                f"of the vocabulary; allowed: 0, or kl_estimator = 'sampled'"
            )
        if not objectives.resolve(self.objective).row_local:
            raise ConfigError(
                f"sparse_tol: got {self.sparse_tol!r} with objective {self.objective!r}, whose "
                f"ratio is of a sequence; allowed: 0, or an objective with a ratio per token"
            )

    @property
    def warming(self) -> bool:
        """A new model is warmed up; weights that are given start as they are."""
        return not self.model and bool(self.warm_target)

    @property
    def options(self) -> Any:
        try:
            return json.loads(self.task_options)
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"task_options: got {self.task_options!r}; allowed: a JSON object ({error})"
            ) from None

    def show(self) -> str:
        width = max(len(spec.name) for spec in dataclasses.fields(self))
        lines = []
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            changed = "" if value == spec.default else f"   (default {spec.default!r})"
            lines.append(f"  {spec.name:<{width}}  {value!r}{changed}")
        return "\n".join(lines)


def _check(spec: dataclasses.Field[Any], value: Any) -> None:
    kind = type(spec.default)
    if type(value) is not kind:
        raise ConfigError(f"{spec.name}: got {value!r}; allowed: {kind.__name__}")
    choices = spec.metadata.get("choices")
    if choices and value not in choices:
        raise ConfigError(f"{spec.name}: got {value!r}; allowed: {', '.join(map(repr, choices))}")
    if kind in (int, float):
        low, high = spec.metadata["low"], spec.metadata["high"]
        above = low is None or value >= low
        below = high is None or value <= high
        if not (above and below) or value != value or value in (float("inf"), float("-inf")):
            words = [f">= {low}"] * (low is not None) + [f"<= {high}"] * (high is not None)
            raise ConfigError(f"{spec.name}: got {value}; allowed: {' and '.join(words)}, finite")


def _convert(spec: dataclasses.Field[Any], value: Any) -> Any:
    """A TOML value or a flag's text, as the field's type; 1 is a fine float, "1" is not."""
    kind = type(spec.default)
    if kind is float and type(value) is int:
        return float(value)
    if spec.name == "task_options" and isinstance(value, dict):
        return json.dumps(value)
    return value


def _flag(kind: type, text: str) -> Any:
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise argparse.ArgumentTypeError(f"got {text!r}; allowed: true, false")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: {kind.__name__}") from None


OTHERS = {  # what other trainers call it
    "learning_rate": "lr", "warmup_steps": "lr_warmup", "max_grad_norm": "grad_clip",
    "num_generations": "group", "rollout_n": "group", "group_size": "group", "n_samples": "group",
    "batch_size": "prompts", "per_device_train_batch_size": "prompts",
    "train_batch_size": "prompts", "max_steps": "steps", "num_train_epochs": "steps",
    "epochs": "steps", "num_iterations": "updates_per_batch", "ppo_epochs": "updates_per_batch",
    "kl_coef": "beta", "kl_loss_coef": "beta",
    "entropy_coeff": "entropy_coef", "epsilon": "clip_low", "epsilon_high": "clip_high",
    "clip_ratio_low": "clip_low", "clip_ratio_high": "clip_high", "loss_type": "objective",
    "output_dir": "out", "save_steps": "save_every", "eval_steps": "eval_every",
    "model_name_or_path": "model", "dataset": "task", "train_files": "task", "report_to": "track",
    "mask_truncated_completions": "cut_off", "resume_from_checkpoint": "resume",
}  # fmt: skip


def _nearest(name: str, names: list[str]) -> str:
    """What a name that nobody knows may stand for, with the dashes that `names` have."""
    known = OTHERS.get(name.replace("-", "_"))
    if known is not None:
        return f"did you mean {known.replace('_', '-') if '-' in ''.join(names) else known}?"
    near = difflib.get_close_matches(name, names, 3, 0.5)
    near = near or [n for n in names if n in name or name in n][:3]
    return f"did you mean {' or '.join(near)}?" if near else "train --help lists every setting"


def from_dict(values: dict[str, Any], source: str) -> Config:
    specs = {spec.name: spec for spec in dataclasses.fields(Config)}
    for name in values:
        if name not in specs:
            raise ConfigError(f"{source}: no setting {name!r}; {_nearest(name, list(specs))}")
    return Config(**_converted(values))


def _converted(values: dict[str, Any]) -> dict[str, Any]:
    specs = {spec.name: spec for spec in dataclasses.fields(Config)}
    return {name: _convert(specs[name], value) for name, value in values.items()}


FREE = {"out", "threads", "track", "save_every", "state_every"}  # what --resume may change


def load_config(arguments: list[str]) -> Config:
    """`--config FILE` first, then every other flag over it."""
    return load_run(arguments)[0]


def load_run(arguments: list[str]) -> tuple[Config, Path | None]:
    """The settings, and the run to go on with (`--resume RUN`): then they are that run's own."""
    given = _flags(arguments)
    path, resume = given.pop("config", None), given.pop("resume", None)
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = tomllib.loads(Path(path).read_text())
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"--config {path}: {error}") from None
        from_dict(values, path)  # so that an error names the file
    values |= given
    if resume is None:
        return from_dict(values, "flags"), None
    return _resumed(Path(resume), values), Path(resume)


def _resumed(run: Path, values: dict[str, Any]) -> Config:
    try:
        saved = from_dict(json.loads((run / "config.json").read_text()), f"{run}/config.json")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"--resume {run}: not the folder of a run ({error})") from None
    if (run / "final").exists():
        raise ConfigError(
            f"--resume {run}: the run has ended; train on from it with --model {run / 'final'}"
        )
    config = dataclasses.replace(saved, **_converted(values))
    differ = [
        f"{name} {getattr(saved, name)!r} -> {getattr(config, name)!r}"
        for name in values
        if getattr(saved, name) != getattr(config, name) and name not in FREE
    ]
    if "out" in values and Path(config.out) != run:
        differ.append(f"out {str(run)!r} -> {config.out!r}")
    if differ:
        raise ConfigError(
            f"--resume {run}: got other settings ({'; '.join(differ)}); allowed: the run's own, "
            "and another threads, save_every or state_every"
        )
    return config


def _flags(arguments: list[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        prog="python -m vgkern train", allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    parser.add_argument("--config", metavar="FILE", help="TOML file; flags go over it")
    parser.add_argument(
        "--resume", metavar="RUN", help="go on with an interrupted run, bit for bit"
    )
    for spec in dataclasses.fields(Config):
        kind = type(spec.default)
        parser.add_argument(
            "--" + spec.name.replace("_", "-"),
            dest=spec.name,
            metavar=kind.__name__.upper(),
            type=functools.partial(_flag, kind),
            help=f"{spec.metadata['help']} (default: {spec.default!r})".replace("%", "%%"),
        )
    flags, unknown = parser.parse_known_args(arguments)
    names = [spec.name.replace("_", "-") for spec in dataclasses.fields(Config)]
    for word in unknown:
        bare = word.removeprefix("--").split("=")[0]
        raise ConfigError(f"no flag {word!r}; {_nearest(bare, names)}")
    return vars(flags)
