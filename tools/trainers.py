"""Trains tiny models by the trainers of `transformers` and TRL, plain and swapped.

Each row of the table is a trainer with some options. It trains a model with random weights for a
few steps of SGD; nothing is downloaded. Then it trains again, with the same weights and batches,
after `torch_nnmath.swap(trainer.model)`. Where TRL multiplies by `lm_head.weight` itself, `swap`
alone changes nothing: there the second run is also within `use_in_trl()` of
`examples/trl_head.py`. The outcomes:

    fused    no operation of the losses and gradients returned logits
    blocks   as "fused", but a metric was computed from blocks of logits
    logits   the named operation computed the logits
    plain    there are no logits: the head has one output
    WRONG    losses, metrics or weights are wrong, or logits were computed and nothing reported it

The truth is a plain run in float64. In float32 the error of the swapped run may be twice that of
the plain one, plus a tolerance. In float64 both runs agree to rounding. TRL's Functions compute in
float32, so in float64 functions of this script, which compute all logits, replace them.

    python tools/trainers.py
    python tools/trainers.py Trainer GKD         # rows whose name contains one of these
    python tools/trainers.py --json trainers.json --markdown trainers.md

It needs `pip install ".[transformers]" peft`, and TRL 1.16 for its trainers, which are left out
otherwise. It takes five minutes. The exit status is 1 if a row is WRONG.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import logging
import math
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported

import torch
import transformers
from architectures import ShapeRecorder, swap_at_any_size
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn import Module, functional
from tqdm import tqdm  # a dependency of transformers

sys.path.append(str(Path(__file__).parent.parent / "examples"))
import trl_head

VOCAB, WIDTHS, STEPS = 307, (32, 40), 3  # VOCAB is prime: no other tensor has its size
Function = Callable[..., Any]
Functions = tuple[Function, Function]
TIMES = re.compile("time|runtime|per_second|flos|mfu")  # metrics that differ in every run
END, PAD = "<|im_end|>", "<|pad|>"
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SENTENCES = [
    "Return a list of the files in a folder.",
    "The iterator yields pairs.",
    "Raise an error unless the value is a number.",
    "Copy the tree, and keep its links.",
]

# Models and data


@functools.cache
def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of bytes, with as many tokens as the models have classes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = [PAD, END, "<|im_start|>"]
    others = [f"<|{i}|>" for i in range(VOCAB - len(alphabet) - len(special))]
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(others)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        padding_side="left",
        chat_template=TEMPLATE,
        model_max_length=64,
    )


SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": None,
}
CAPS_AND_SCALES = {
    "gemma2": {"final_logit_softcapping": 5.0, "attn_implementation": "eager"},
    "granite": {"logits_scaling": 2.0},
}


@torch.no_grad()
def save_model(folder: Path, seed: int, width: int, architecture: str, **options: Any) -> str:
    """Saves a model with random weights and its tokenizer, and returns their folder.

    Its logits are as large as those of a trained model.
    """
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    config = transformers.AutoConfig.for_model(
        architecture,
        **SIZES,
        hidden_size=width,
        intermediate_size=2 * width,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **CAPS_AND_SCALES.get(architecture, {}),
        **options,
    )
    model = get_class(options).from_config(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter *= 10
    path = folder / f"{architecture}-{seed}"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def get_class(options: dict[str, Any]) -> Any:
    if "num_labels" in options:
        return transformers.AutoModelForSequenceClassification
    return transformers.AutoModelForCausalLM


MODELS: dict[str, dict[str, Any]] = {  # by purpose: the arguments of `save_model`
    "policy": {"seed": 0, "width": WIDTHS[0]},
    "teacher": {"seed": 1, "width": WIDTHS[1]},
    "reward": {"seed": 2, "width": WIDTHS[0], "num_labels": 1},
}


class Models:
    """Loads copies of the same models in a dtype."""

    def __init__(self, folder: Path):
        self.folder, self.dtype = folder, torch.float32
        self.paths: dict[tuple[str, str], str] = {}

    def load(self, architecture: str, purpose: str = "policy") -> Module:
        key, options = (architecture, purpose), MODELS[purpose]
        if key not in self.paths:
            self.paths[key] = save_model(self.folder, architecture=architecture, **options)
        return get_class(options).from_pretrained(self.paths[key], dtype=self.dtype)


def make_dataset(kind: str) -> Any:
    """The sentences as `datasets.Dataset` with the columns that a kind of trainer needs."""
    from datasets import Dataset

    texts = [*SENTENCES, *(s[::-1] for s in SENTENCES)]
    rows: list[dict[str, Any]] = []
    if kind == "prompt":
        rows = [{"prompt": s[:12]} for s in texts]
    elif kind == "completion":
        rows = [{"prompt": s[:12], "completion": s[12:]} for s in texts]
    elif kind == "label":
        rows = [{"prompt": s[:12], "completion": s[12:], "label": i % 2 == 0}
                for i, s in enumerate(texts)]  # fmt: skip
    elif kind == "preference":
        rows = [{"prompt": s[:12], "chosen": s[12:], "rejected": s[12:].upper() + " no"}
                for s in texts]  # fmt: skip
    elif kind == "messages":
        roles = "user", "assistant"
        for s in texts:
            parts = zip(roles, (s[:8], s[8:]), strict=True)
            rows.append({"messages": [{"role": r, "content": c} for r, c in parts]})
    else:
        raise ValueError(kind)
    return Dataset.from_list(rows)


# Trainers

ARGUMENTS: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "optim": "sgd",  # AdamW divides small gradients by their size, and their rounding errors, too
    "logging_steps": 1,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "disable_tqdm": True,
    "seed": 0,
}


TRAINERS_WITH_TRL_HEAD = "SFT", "DPO", "KTO", "GRPO", "RLOO", "Distillation"


@dataclass(frozen=True)
class Case:
    """A trainer with some options."""

    trainer: str
    path: str
    options: dict[str, Any] = field(default_factory=dict)  # of the trainer's configuration
    adapter: str = ""  # names of modules that get a LoRA adapter
    extra: dict[str, Any] = field(default_factory=dict)  # arguments of the trainer itself
    architecture: str = "llama"
    has_metric_in_blocks: bool = False  # whether `trl_head` computes a metric from blocks

    @property
    def tolerance(self) -> float:
        """Allowed beside twice the plain error; relative to a curve's largest value, or to 1."""
        return float(torch.finfo(torch.bfloat16).eps) if self.options.get("bf16") else 1e-5

    @property
    def has_trl_head(self) -> bool:
        """Whether TRL multiplies by the head's weight itself, and `trl_head` replaces that."""
        return self.trainer in TRAINERS_WITH_TRL_HEAD


def compute_user_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A user's `compute_loss_func`: the cross entropy of the logits."""
    logits, targets = outputs.logits[:, :-1], labels[:, 1:]
    losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    return losses / (num_items_in_batch or (targets != -100).sum())


def find_top_class(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.argmax(-1)


def compute_accuracy(prediction: Any) -> dict[str, float]:
    classes, labels = prediction.predictions, prediction.label_ids
    classes = classes.argmax(-1) if classes.ndim == labels.ndim + 1 else classes
    is_right = classes[:, :-1] == labels[:, 1:]
    return {"accuracy": float(is_right[labels[:, 1:] != -100].mean())}


def reward_tokens(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [float(sum(ids) % 11) for ids in completion_ids]


def make_trainer(case: Case, models: Models, folder: Path) -> transformers.Trainer:
    """Builds the trainer of a case, with a model from the folder of `models`."""
    transformers.set_seed(0)
    config: dict[str, Any] = {"output_dir": str(folder), **ARGUMENTS, **case.options}
    if models.dtype == torch.float64:
        config["bf16"] = False
    load = functools.partial(models.load, case.architecture)
    keywords: dict[str, Any] = {"model": load(), **case.extra}
    if case.adapter:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(
            r=4,
            target_modules=case.adapter.split(),
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )
        if case.trainer == "Trainer":
            keywords["model"] = get_peft_model(keywords["model"], lora)
        else:
            keywords["peft_config"] = lora
    if case.trainer == "Trainer":
        return make_plain_trainer(keywords, config)
    import trl
    from trl.experimental import gkd

    keywords["processing_class"] = make_tokenizer()
    if case.trainer == "GKD":
        config |= {"lmbda": 0.0, "max_length": 64, "gradient_checkpointing": False}
        return gkd.GKDTrainer(
            args=gkd.GKDConfig(**config),
            teacher_model=load("teacher"),
            train_dataset=make_dataset("messages"),
            **keywords,
        )
    config.setdefault("gradient_checkpointing", False)
    kinds = {"SFT": "completion", "KTO": "label"}
    kinds |= dict.fromkeys(("DPO", "Reward", "ORPO", "CPO"), "preference")
    keywords["train_dataset"] = make_dataset(kinds.get(case.trainer, "prompt"))
    if case.trainer == "Reward":
        keywords["model"] = load("reward")
    if case.trainer in ("GRPO", "RLOO"):
        keywords["reward_funcs"] = reward_tokens
        config |= {"num_generations": 4, "max_completion_length": 8}
        config["per_device_train_batch_size"] = 4
    if case.trainer == "Distillation":
        keywords["teacher_model"] = load("teacher")
        config |= {"max_completion_length": 8}
    package = trl
    if case.trainer in ("ORPO", "CPO"):
        package = importlib.import_module(f"trl.experimental.{case.trainer.lower()}")
        config |= {"max_length": 64}
    make_config, make = (getattr(package, case.trainer + x) for x in ("Config", "Trainer"))
    return make(args=make_config(**config), **keywords)


def make_plain_trainer(keywords: dict[str, Any], config: dict[str, Any]) -> transformers.Trainer:
    tokenizer = make_tokenizer()
    data = []
    for text in [*SENTENCES, *SENTENCES]:
        ids = tokenizer(text)["input_ids"][:24]
        mask = [1] * len(ids) + [0] * (24 - len(ids))
        labels = [-100] * 3 + ids[3:] + [-100] * (24 - len(ids))
        ids = ids + [tokenizer.pad_token_id] * (24 - len(ids))
        data.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return transformers.Trainer(
        args=transformers.TrainingArguments(**config),
        train_dataset=data,
        eval_dataset=data,
        **keywords,
    )


LORA = "q_proj v_proj"
EVALUATION = {"eval_strategy": "steps", "eval_steps": 1}
CASES = [
    Case("Trainer", "the model's loss"),
    Case("Trainer", "the model's loss, soft cap", architecture="gemma2"),
    Case("Trainer", "gradient accumulation", {"gradient_accumulation_steps": 2}),
    Case("Trainer", "label smoothing", {"label_smoothing_factor": 0.1}),
    Case("Trainer", "`compute_loss_func`", extra={"compute_loss_func": compute_user_loss}),
    Case("Trainer", "gradient checkpointing", {"gradient_checkpointing": True}),
    Case("Trainer", "bfloat16 by autocast", {"bf16": True}),
    Case("Trainer", "LoRA", adapter=LORA),
    Case("Trainer", "LoRA, also on the head", adapter=LORA + " lm_head"),
    Case("Trainer", "evaluation, `prediction_loss_only`",
         EVALUATION | {"prediction_loss_only": True}),
    Case("Trainer", "evaluation, argmax in `preprocess_logits_for_metrics`", EVALUATION, extra={
        "preprocess_logits_for_metrics": find_top_class, "compute_metrics": compute_accuracy}),
    Case("Trainer", "evaluation, logits in `compute_metrics`", EVALUATION, extra={
        "compute_metrics": compute_accuracy}),
    Case("SFT", "nll"),
    Case("SFT", "nll, soft cap", architecture="gemma2"),
    Case("SFT", "nll, scaled logits", architecture="granite"),
    Case("SFT", "nll, gradient accumulation", {"gradient_accumulation_steps": 2}),
    Case("SFT", "nll, packing", {"packing": True, "max_length": 64}),
    Case("SFT", "nll, bfloat16 by autocast", {"bf16": True}),
    Case("SFT", "nll, LoRA", adapter=LORA),
    Case("SFT", "dft", {"loss_type": "dft"}),
    Case("SFT", "label smoothing", {"label_smoothing_factor": 0.1}),
    Case("SFT", "`compute_loss_func`", extra={"compute_loss_func": compute_user_loss}),
    *(Case("DPO", name, {"loss_type": [name]}) for name in
      ("sigmoid", "hinge", "ipo", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
       "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm")),
    Case("DPO", "exo_pair", {"loss_type": ["exo_pair"], "label_smoothing": 1e-3}),
    Case("DPO", "sigmoid, precomputed reference", {"precompute_ref_log_probs": True}),
    Case("DPO", "sigmoid, WPO's weights", {"use_weighting": True}),
    Case("DPO", "sigmoid, `ld_alpha`", {"ld_alpha": 0.5}),
    Case("DPO", "sigmoid, soft cap", architecture="gemma2", has_metric_in_blocks=True),
    Case("DPO", "sigmoid, LoRA", adapter=LORA),
    Case("KTO", "kto"),
    Case("GRPO", "beta 0"),
    Case("GRPO", "beta 0.1", {"beta": 0.1}),
    Case("GRPO", "beta 0.1, LoRA", {"beta": 0.1}, adapter=LORA),
    Case("GRPO", "mask by entropy", {"top_entropy_quantile": 0.5}),
    Case("GRPO", "entropy bonus", {"entropy_coef": 0.05}),
    Case("GRPO", "two iterations", {"num_iterations": 2}),
    Case("GRPO", "ratios of sequences",
         {"importance_sampling_level": "sequence", "loss_type": "grpo"}),
    Case("RLOO", "beta 0.05"),
    Case("Distillation", "beta 0", {"beta": 0.0}),
    Case("Distillation", "beta 0.5", {"beta": 0.5}),
    Case("Distillation", "beta 1", {"beta": 1.0}),
    Case("Distillation", "beta 0.5, scaled logits", {"beta": 0.5}, architecture="granite"),
    Case("Reward", "pairs"),
    Case("ORPO", "beta 0.1"),
    Case("CPO", "sigmoid"),
    Case("GKD", "beta 0", {"beta": 0.0}),
    Case("GKD", "beta 0.5", {"beta": 0.5}),
    Case("GKD", "beta 1", {"beta": 1.0}),
    Case("GKD", "beta 0.5, LoRA", {"beta": 0.5}, adapter=LORA),
]  # fmt: skip

# Runs


@dataclass
class Run:
    """What a training computed, and how."""

    losses: list[float]  # of every batch
    metrics: dict[str, list[float]]
    changes: dict[str, Tensor]  # of the weights, by all steps
    logits: list[str]  # operations that returned logits
    fused: int  # losses of swapped heads, and calls of `trl_head`
    reduced: int  # metrics from blocks of logits
    materialized: list[str]


class LogitsRecorder(ShapeRecorder):
    """Records operations that return logits: `VOCAB` is the last axis, and they are no weight."""

    def list_logits(self) -> list[str]:
        return [
            f"{func} of {shape}"
            for (func, shape), count in self.counts.items()
            if count and shape[-1:] == (VOCAB,) and math.prod(shape[:-1]) not in (1, *WIDTHS)
        ]


class Observer:
    """Records losses, and what happens to logits, while a trainer computes losses and gradients.

    Generation, which needs logits, is not observed.
    """

    def __init__(self, trainer: transformers.Trainer, heads: Sequence[Any]):
        self.recorder, self.heads = LogitsRecorder(), heads
        self.losses: list[float] = []
        self.materialized: dict[str, None] = {}
        self.fused = self.reduced = 0
        self.is_observing = False
        self.compute_loss = trainer.compute_loss
        trainer.compute_loss = self.observe_loss
        for owner, name in ((trainer.accelerator, "backward"), (trainer, "evaluation_loop")):
            setattr(owner, name, functools.partial(self.observe, getattr(owner, name)))

    def observe(self, function: Function, *args: Any, **kwargs: Any) -> Any:
        if self.is_observing:
            return function(*args, **kwargs)
        self.is_observing = True
        counts = [(log.materialized.copy(), log.fused, log.reduced) for log in self.heads]
        with self.recorder:
            result = function(*args, **kwargs)
        self.is_observing = False
        for log, (materialized, fused, reduced) in zip(self.heads, counts, strict=True):
            self.materialized |= dict.fromkeys(log.materialized - materialized)
            self.fused += log.fused - fused
            self.reduced += log.reduced - reduced
        return result

    def observe_loss(self, *args: Any, **kwargs: Any) -> Any:
        result = self.observe(self.compute_loss, *args, **kwargs)
        self.losses.append(float(result[0] if isinstance(result, tuple) else result))
        return result


def run(
    case: Case, models: Models, *, is_swapped: bool = False, functions: Functions | None = None
) -> Run:
    """Trains a case, with `functions` in place of the two Functions of TRL if they are given."""
    calls: list[str] = []
    with TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        if functions is not None:
            counted = (count_calls(function, calls) for function in functions)
            stack.enter_context(trl_head.use_in_trl(*counted))
        trainer = make_trainer(case, models, Path(folder))
        trainer.remove_callback(transformers.PrinterCallback)
        weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        heads = []
        if is_swapped:
            others = [getattr(trainer, name, None) for name in ("ref_model", "teacher_model")]
            for model in (trainer.model, *others):
                heads += [*swap_at_any_size(model).heads.values()] if model is not None else []
        observer = Observer(trainer, heads)
        transformers.set_seed(0)
        trainer.train()
    metrics: dict[str, list[float]] = {}
    for entry in trainer.state.log_history:
        for name, value in entry.items():
            if isinstance(value, int | float) and not TIMES.search(name):
                metrics.setdefault(name, []).append(float(value))
    return Run(
        observer.losses,
        metrics,
        {name: p.detach() - weights[name] for name, p in trainer.model.named_parameters()},
        observer.recorder.list_logits(),
        observer.fused + len(calls),
        observer.reduced,
        [*observer.materialized],
    )


def count_calls(function: Function, calls: list[str]) -> Function:
    """The function, which then appends its name to `calls` at each call."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        calls.append(function.__name__)
        return function(*args)

    return call


def find_differences(reference: Run, other: Run) -> dict[str, float]:
    """The largest differences: of losses, of metrics and of the change of the weights.

    Each is relative to the largest value of the curve, or of the weights' changes.
    """
    differences = {"losses": compare_curves(reference.losses, other.losses)}
    names = {*reference.metrics, *other.metrics}
    differences["metrics"] = max(
        compare_curves(reference.metrics.get(name, []), other.metrics.get(name, []))
        for name in names
    )
    largest = max(float(x.abs().max()) for x in reference.changes.values())
    differences["weights"] = max(
        float((x - other.changes[name]).abs().max()) / largest
        for name, x in reference.changes.items()
    )
    return differences


def compare_curves(curve: Sequence[float], other: Sequence[float]) -> float:
    """The largest difference, relative to the largest value or 1; infinite for other lengths."""
    if len(curve) != len(other):
        return math.inf
    scale = max(1.0, *map(abs, curve))
    return max(
        0.0 if a == b else abs(a - b) / scale if math.isfinite(a - b) else math.inf
        for a, b in zip(curve, other, strict=True)
    )


# The reference in float64


def compute_plain_log_probs(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    y: Tensor,
    temperature: float,
    chunk_size: int,
    softcap: float | None = None,
    scale: float = 1.0,
    outputs: tuple[str, ...] = (),
) -> tuple[Tensor | None, ...]:
    """What `trl_head.compute_log_probs` returns, from logits."""
    z = scale * functional.linear(x, W, b)
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
    l = z.log_softmax(-1)
    results = {
        "log_probs": l.gather(-1, y[:, None])[:, 0],
        "entropy": -(l.exp() * l).sum(-1),
        "log_sum_sq_probs": (2 * l).logsumexp(-1).detach(),
        "mean_logits": z.mean(-1).detach(),
        "is_top1": z.argmax(-1) == y,
    }
    return tuple(v if name in ("log_probs", *outputs) else None for name, v in results.items())


def compute_plain_divergence(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    xt: Tensor,
    Wt: Tensor,
    bt: Tensor | None,
    beta: float,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: None = None,
    teacher_scale: float = 1.0,
    teacher_softcap: None = None,
) -> tuple[Tensor, Tensor]:
    """What `trl_head.compute_divergence` returns, from logits without a cap."""
    l = (functional.linear(x, W, b) * scale / temperature).log_softmax(-1)
    lt = (functional.linear(xt, Wt, bt) * teacher_scale / temperature).log_softmax(-1).detach()
    q, p = l.exp(), lt.exp()
    if beta in (0, 1):
        divergence = p * (lt - l) if beta == 0 else q * (l - lt)
    else:
        lm = (beta * p + (1 - beta) * q).log()
        divergence = beta * p * (lt - lm) + (1 - beta) * q * (l - lm)
    return divergence.sum(-1), -(q * l).sum(-1).detach()


FUSED: Functions = (trl_head.compute_log_probs, trl_head.compute_divergence)
PLAIN: Functions = (compute_plain_log_probs, compute_plain_divergence)

# The table

Differences = dict[str, float]  # of losses, metrics and weights
KINDS = "fused", "blocks", "logits", "plain", "WRONG"


@dataclass
class Outcome:
    """One row of the table."""

    trainer: str
    path: str
    swap_alone: str  # the kind without `use_in_trl`, or "TRL's head"
    kind: str = ""
    reason: str = ""
    float32: Differences = field(default_factory=dict)  # between swapped and plain
    error: Differences = field(default_factory=dict)  # of swapped in float32
    plain_error: Differences = field(default_factory=dict)
    float64: Differences = field(default_factory=dict)  # between swapped and plain


def compare(case: Case, models: Models) -> Outcome:
    """Trains a case plain and swapped, in float32 and in float64."""
    functions, reference = (FUSED, PLAIN) if case.has_trl_head else (None, None)
    models.dtype = torch.float64
    truth = run(case, models, functions=reference)
    swapped_in_float64 = run(case, models, is_swapped=True, functions=functions)
    models.dtype = torch.float32
    plain = run(case, models)
    swapped = run(case, models, is_swapped=True, functions=functions)
    swapped.reduced += case.has_metric_in_blocks
    kind, reason = describe(swapped)
    outcome = Outcome(
        case.trainer,
        case.path,
        kind,
        kind,
        reason,
        find_differences(plain, swapped),
        find_differences(truth, swapped),
        find_differences(truth, plain),
        find_differences(truth, swapped_in_float64),
    )
    if case.has_trl_head:
        without_functions = run(case, models, is_swapped=True)
        is_bypassed = not without_functions.materialized and without_functions.logits
        outcome.swap_alone = "TRL's head" if is_bypassed else describe(without_functions)[0]
    errors = [
        f"{name} differ by {size:.0e} in float64"
        for name, size in outcome.float64.items()
        if not size <= 1e-11
    ]
    errors += [
        f"the error of {name} is {size:.0e} instead of {outcome.plain_error[name]:.0e}"
        for name, size in outcome.error.items()
        if not size <= 2 * outcome.plain_error[name] + case.tolerance
    ]
    if not truth.logits and kind != "plain":
        errors.append("no logits were recorded in the plain training")
    if errors:
        outcome.kind, outcome.reason = "WRONG", "; ".join(errors)
    return outcome


def describe(swapped: Run) -> tuple[str, str]:
    """The kind of a swapped run, and the operations that returned logits."""
    if swapped.materialized:
        reasons = (re.sub(r"/\S*/", "", reason) for reason in swapped.materialized)
        return "logits", "; ".join(reasons)
    kind = "plain"
    if swapped.fused:
        kind = "blocks" if swapped.reduced else "fused"
    if swapped.logits and kind != "blocks":
        return "WRONG", swapped.logits[0]
    return kind, ""


COLUMNS = (
    "trainer", "path", "`swap` alone", "with `trl_head`", "losses, float32", "weights, float32",
    "error of weights, plain", "error of weights, swapped", "all, float64",
)  # fmt: skip


def make_cells(outcome: Outcome) -> list[str]:
    """The row of the table, with one cell for each of `COLUMNS`."""
    has_trl_head = outcome.trainer in TRAINERS_WITH_TRL_HEAD
    kind = outcome.kind + (f": {outcome.reason}" if outcome.reason else "")
    sizes = (
        outcome.float32["losses"],
        outcome.float32["weights"],
        outcome.plain_error["weights"],
        outcome.error["weights"],
        max(outcome.float64.values()),
    )
    return [
        outcome.trainer,
        outcome.path,
        outcome.swap_alone if has_trl_head else kind,
        kind if has_trl_head else "",
        *(f"{size:.0e}" if size else "0" for size in sizes),
    ]


def format_table(outcomes: Sequence[Outcome]) -> str:
    """The table in Markdown, and the number of rows of each kind."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *map(make_cells, outcomes)]
    count = Counter(outcome.kind for outcome in outcomes)
    total = ", ".join(f"{count[kind]} {kind}" for kind in KINDS)
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines] + ["", total])


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train tiny models by the trainers of transformers and TRL, plain and swapped."
    )
    parser.add_argument("names", nargs="*", help='parts of names, such as "SFT: nll"')
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    return parser.parse_args(argv)


def select_cases(names: Sequence[str]) -> list[Case]:
    """The cases whose names contain one of these; those of TRL only if it is installed."""
    cases = [case for case in CASES if case.trainer == "Trainer" or find_spec("trl") is not None]
    names = names or [""]
    return [case for case in cases if any(n in f"{case.trainer}: {case.path}" for n in names)]


def silence() -> None:
    """Suppresses messages and progress bars; the table shows what matters."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if find_spec("datasets") is not None:
        import datasets

        datasets.disable_progress_bars()


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    silence()
    outcomes = []
    with TemporaryDirectory() as folder:
        models = Models(Path(folder))
        for case in tqdm(select_cases(args.names), unit="row", dynamic_ncols=True):
            outcomes.append(compare(case, models))
    table = format_table(outcomes)
    print(table)
    if args.json is not None:
        packages = ("torch", "transformers", "trl", "peft")
        versions = {name: version(name) for name in packages if find_spec(name) is not None}
        rows = [asdict(outcome) for outcome in outcomes]
        args.json.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")
    if args.markdown is not None:
        args.markdown.write_text(table + "\n", encoding="utf-8")
    return int(any(outcome.kind == "WRONG" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
