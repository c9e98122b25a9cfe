"""Builds every causal language model of `transformers` small, swaps it, and compares both.

For each architecture in the installed `transformers`, a model of a few layers with random weights
is made from its own configuration; nothing is downloaded. One copy is left as it is, another goes
through `torch_nnmath.swap(model)`. Both run a training step,
`model(input_ids=..., labels=...).loss.backward()` (with `F.cross_entropy` of the logits where
`forward` takes no labels), a forward pass without labels, and greedy generation with a cache. The
outcomes:

    fused               loss, gradients of all parameters, logits and generated tokens agree, and
                        no operation of the swapped training step materialised the logits
    correct, not fused  all of these agree, but the named operation materialised the logits
    no head             all of these agree, but `swap` found no last layer to use as the head
    WRONG               a result differs by more than rounding, or an exception was raised
    cannot be built     this script cannot build the model, or the model itself fails to train

    python tools/architectures.py
    python tools/architectures.py llama gemma2 mamba --trace
    python tools/architectures.py --empty     # control: a swap that does nothing fuses nothing

It needs `pip install ".[transformers]"`, and takes under a minute on two cores. The exit status is
1 if an outcome is WRONG.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import inspect
import logging
import math
import multiprocessing
import os
import re
import resource
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.utils._python_dispatch import TorchDispatchMode

import torch_nnmath

try:
    import transformers
    from tqdm import tqdm  # a dependency of transformers
    from transformers import CONFIG_MAPPING, PreTrainedConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES
except ModuleNotFoundError as error:
    raise SystemExit('this script needs transformers: pip install ".[transformers]"') from error

Swap = Callable[[Module], Any]

# The number of classes is prime, and no layer's width is a multiple of the number of tokens, so
# that logits can be told from any other tensor (a weight's gradient, say) by shape.
VOCAB, BATCH, LENGTH, HIDDEN = 211, 2, 23, 64
# Relative to the largest loss, gradient or logit: float32 rounding through a few layers.
TOLERANCE = 2e-5

# Small values of configuration fields, by the first pattern that matches the field's name. Smaller
# defaults are kept, as is 0, which mostly disables a feature.
SIZES = {
    r".*(drop|jitter).*": 0,
    r"unpadded_vocab_size": VOCAB - 12,
    r".*vocab.*": VOCAB,
    r"num_kv_shared_layers": 0,
    r"num_dense_layers|first_k_dense_replace|n_layers_per.*|max_window_layers|.*_offset": 1,
    r".*(_layers?|_layers_per_stack|blocks|depth|_period|_interval|every_n_layers|_pattern)": 2,
    r".*(kv|key_value|key)_(n_)?heads": 2,
    r".*heads?": 4,
    r"qk_(nope|rope)_head_dim|rotary_dim": 8,
    r".*(head_?dim|head_size|d_head|dim_head|d_kv|kv_channels)": 16,
    r".*(intermediate_size.*|ffn_dim|ffn_hidden_size|d_ff|dff|dim_ff|forward_size|d_inner)": 96,
    r".*experts?_per_tok(en)?|.*moe_(k|topk|top_k)": 2,
    r".*shared_experts|.*expand|.*(n|expert|topk)_group": 1,
    r".*(experts|expert_num)": 4,
    r".*n_?groups": 2,
    r".*(rank|state_size|d_state|d_rel|window.*|chunk_(size|length)|local_attention)": 8,
    r".*(max_.*position.*|n_positions|n_ctx|max_seq.*|context_length|max_length|extent)": 128,
    r"adapter_\w+_(dim|size)|.*(hidden_size.*|d_model|n_embd|emb\w*_(dim|size))": HIDDEN,
    r".*(lru_width|proj_dim|d_ssm)": HIDDEN,
}
# Values of fields whose default is None, or 1.0, which would hide a missing factor.
VALUES_IF_UNSET = {
    "head_dim": 16,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "final_logit_softcapping": 30.0,
    "logits_scaling": 2.0,
    "lm_head_multiplier": 0.5,
}
# Fields with one entry per layer. Each distinct entry of the default is used once.
LAYER_FIELDS = "layer_types", "mlp_layer_types", "layers_block_type"

# Overrides by `model_type`, also of nested configurations.
OVERRIDES: dict[str, dict[str, Any]] = {
    # sizes that depend on each other
    "dory": {"num_hidden_layers": 6, "sliding_window": 64},
    "dots3_note_vision_encoder": {"pyramid_num_routed": [-1, 4]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "git_vision_model": {"image_size": 32},
    "longcat_flash": {"head_dim": 8},
    "xlstm": {"qk_dim_factor": 1.0},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 8,
        "swa_kv_lora_rank": 8,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 16,
    },
    "reformer": {  # trains on whole chunks only
        "axial_pos_embds": False,
        "num_buckets": 2,
        "local_attn_chunk_length": LENGTH,
        "lsh_attn_chunk_length": LENGTH,
    },
    # a cache needs at least one attention layer
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"],
        "num_hidden_layers": 2,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    # defaults that do not work
    "blt": {"num_hidden_layers": 2},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "gemma4_assistant": {
        "text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    },
    "qwen4_exp_text": {
        "head_dim": 16,
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "xmod": {"default_language": "en_XX"},
}


def shrink(cls: type[PreTrainedConfig], **overrides: Any) -> PreTrainedConfig:
    """Makes a configuration with small sizes, except for `overrides`."""
    fixed = OVERRIDES.get(cls.model_type, {}) | overrides
    default = vars(cls(**fixed))  # includes values derived from sizes
    sizes = dict(fixed)
    next_token = VOCAB  # special tokens beyond the vocabulary move to its end
    for field in dataclasses.fields(cls):
        name, value = field.name, default.get(field.name)
        if isinstance(value, PreTrainedConfig):
            sizes[name] = shrink(type(value), **fixed.get(name, {}))
        elif name in fixed:
            continue
        elif re.fullmatch(r".*token_(id|index)", name):
            if isinstance(value, int) and value >= VOCAB:
                sizes[name] = next_token = next_token - 1
        elif name == "is_decoder":
            sizes[name] = True
        elif name in VALUES_IF_UNSET and (value is None or repr(value) == "1.0"):
            sizes[name] = VALUES_IF_UNSET[name]
        elif type(field.default) in (int, float):
            small = next((s for pattern, s in SIZES.items() if re.fullmatch(pattern, name)), None)
            if small is not None and field.default > small:
                sizes[name] = type(field.default)(small)
    if default.get("num_key_value_heads") == default.get("num_attention_heads") is not None:
        sizes["num_key_value_heads"] = sizes.get("num_attention_heads")
    kinds = {
        name: list(dict.fromkeys(default[name]))
        for name in LAYER_FIELDS
        if isinstance(default.get(name), list) and name not in fixed
    }
    depth = next((n for n in ("num_hidden_layers", "n_layer", "num_layers") if n in sizes), None)
    count = max([sizes.get(depth, 2), *map(len, kinds.values())])
    sizes |= {name: (values * count)[:count] for name, values in kinds.items()}
    return cls(**sizes | ({depth: count} if depth else {}))


def build(model_type: str, **overrides: Any) -> tuple[Module, PreTrainedConfig]:
    """Builds a small model with random weights and no dropout, and its configuration."""
    torch.manual_seed(0)
    config = shrink(CONFIG_MAPPING[model_type], **overrides)
    cls = getattr(transformers, CLASSES[model_type])
    if not isinstance(config, cls.config_class):  # then the language model's is nested
        config = next((v for v in vars(config).values() if isinstance(v, cls.config_class)), config)
    model = cls(config).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    scale_logits(model)
    return model, config


@torch.no_grad()
def scale_logits(model: Module) -> None:
    """Scales logits to their size after training and makes biases non-zero, so that a missing cap
    or bias changes the results."""
    head = model.get_output_embeddings()
    if isinstance(head, torch.nn.Linear):
        head.weight *= 3 / copy.deepcopy(model)(**make_batch(model)[0]).logits.std()
        for x in [*model.parameters(), *model.buffers()]:
            if x.is_floating_point() and x.numel() == head.out_features:
                x += torch.randn(x.shape)


def make_batch(model: Module) -> tuple[dict[str, Any], Tensor]:
    """Returns the inputs of the model's forward, and labels.

    The labels are not the tokens: many untrained models predict those, and a loss near 0 is mostly
    rounding.
    """
    config = model.config
    torch.manual_seed(1)
    ids = torch.randint(10, VOCAB - 20, (BATCH, LENGTH))  # no special tokens
    labels = torch.randint(10, VOCAB - 20, (BATCH, LENGTH))
    labels[0, :5] = labels[1, -3:] = -100
    inputs: dict[str, Any] = {"input_ids": ids}
    if config.model_type == "xlstm":  # its cache is not differentiable
        inputs["use_cache"] = False
    elif config.model_type == "git":  # expects an image before the text
        size = config.vision_config.image_size
        inputs["pixel_values"] = torch.randn(BATCH, 3, size, size)
    elif config.model_type.startswith("musicgen"):  # one row of tokens per codebook
        inputs["input_ids"] = ids.repeat(config.num_codebooks, 1)
        labels = labels[..., None].expand(-1, -1, config.num_codebooks)
    elif config.model_type.endswith("_assistant"):  # attends to keys and values of a larger model
        text, shared = config.get_text_config(), {}
        for layer, kind in zip(model.model.layers, text.layer_types, strict=True):
            shape = BATCH, text.num_key_value_heads, LENGTH, layer.self_attn.head_dim
            shared[kind] = torch.randn(shape), torch.randn(shape)
        embeddings = torch.randn(BATCH, LENGTH, 2 * config.backbone_hidden_size)
        inputs = {"inputs_embeds": embeddings, "shared_kv_states": shared}
        inputs["output_hidden_states"] = True  # the default path of gemma4's raises
    return inputs, labels


def flatten(value: Any) -> Iterator[Any]:
    """Yields the items of nested lists and tuples."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from flatten(item)
    else:
        yield value


class ShapeRecorder(TorchDispatchMode):
    """Counts the plain floating-point tensors that operations return, by operation and shape."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, tuple[int, ...]]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if {*types} - {
            Tensor,
            Parameter,
        }:  # subclasses dispatch first; the operations they call are recorded
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        for x in flatten(out):
            if type(x) is Tensor and x.is_floating_point() and x.device.type != "meta":
                is_expanded = x.untyped_storage().nbytes() < x.numel() * x.element_size()
                self.counts[str(func), tuple(x.shape)] += not is_expanded
        return out

    def find_logits(self, classes: set[int], tokens: set[int]) -> list[str]:
        """Lists operations that returned logits: one axis in `classes`, the others a multiple of
        a number in `tokens`."""
        return [
            f"{func} of {shape}"
            for (func, shape), count in self.counts.items()
            for c in classes.intersection(shape)
            if count and any(math.prod(shape) // c % n == 0 for n in tokens)
        ]


@dataclasses.dataclass
class Run:
    """The results of a model: a training step, then logits, then generated tokens."""

    loss: Tensor
    gradients: dict[str, Tensor]
    shapes: ShapeRecorder
    fused: int  # number of fused losses in the report
    materialized: list[str]  # operations that materialised the logits, by head
    heads: list[str]
    skipped: list[str]  # Linear layers that swap left, with reasons
    logits: Tensor
    tokens: Tensor | None = None  # None if generation fails
    trace: str = ""  # of that failure


def run(model: Module, swap: Swap | None = None) -> Run:
    """Runs a training step, a forward pass and generation on a copy of the model after `swap`."""
    model = copy.deepcopy(model)
    report = swap(model) if swap else None
    heads, skipped = getattr(report, "heads", {}), getattr(report, "left", {})
    inputs, labels = make_batch(model)
    torch.manual_seed(2)
    with ShapeRecorder() as shapes:
        if "labels" in inspect.signature(model.forward).parameters:
            loss = model(**inputs, labels=labels).loss
        else:
            logits = model(**inputs).logits[:, :-1].flatten(0, 1).float()
            loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
        loss.backward()
    torch.manual_seed(2)
    result = Run(
        loss.detach(),
        {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
        shapes,
        sum(log.fused for log in heads.values()),
        [f"{name}: {reason}" for name, log in heads.items() for reason in log.materialized],
        [*heads],
        [f"{name}: {reason}" for name, reason in skipped.items()],
        torch.no_grad()(model)(**inputs).logits,
    )
    options = {"max_new_tokens": 6, "do_sample": False, "use_cache": True}
    torch.manual_seed(2)
    try:
        result.tokens = model.eval().generate(**inputs | options)
    except Exception:  # some architectures cannot, for various reasons
        result.trace = traceback.format_exc()
    return result


def find_differences(reference: Run, swapped: Run) -> tuple[dict[str, float], list[str]]:
    """Returns the relative differences of loss, gradients and logits, and describes those beyond
    rounding."""
    names = dict.fromkeys([*reference.gradients, *swapped.gradients])
    pairs: dict[str, dict[str, Any]] = {
        "loss": {"": (reference.loss, swapped.loss)},
        "gradients": {n: (reference.gradients.get(n), swapped.gradients.get(n)) for n in names},
        "logits": {"": (reference.logits, swapped.logits)},
    }
    sizes, errors = {}, []
    for quantity, tensors in pairs.items():
        largest = max(float(x.abs().max()) for x, _ in tensors.values() if x is not None)
        sizes[quantity] = 0.0
        for name, (x, y) in tensors.items():
            kinds = [None if v is None else (v.dtype, *v.shape) for v in (x, y)]
            size = math.nan
            if None not in kinds and kinds[0] == kinds[1]:
                size = float((x - y).abs().max()) / largest
                sizes[quantity] = max(sizes[quantity], size)
            if not size <= TOLERANCE:
                difference = (
                    f"by {size:.0e}" if kinds[0] == kinds[1] else f"{kinds[0]} -> {kinds[1]}"
                )
                errors.append(f"{quantity} {name} {difference}".replace("  ", " "))
    tokens = reference.tokens
    if tokens is not None and (swapped.tokens is None or not tokens.equal(swapped.tokens)):
        errors.append("generated tokens")
    return sizes, errors


def run_reference(model: Module) -> Run:
    """Runs the unswapped model; in eval mode if its training is not deterministic."""
    for mode in (True, False):
        result = run(model.train(mode))
        if not torch.isfinite(result.loss):
            raise ValueError(f"the loss is {result.loss}")
        errors = find_differences(result, run(model))[1]
        if not errors:
            return result
    raise ValueError(f"two runs differ: {errors[0]}")


def swap_at_any_size(model: Module) -> Any:
    """`swap` that defers the logits of tiny models, too, as it does for heads that are named."""
    report = torch_nnmath.swap(model)
    for log in report.heads.values():
        log.is_named = True
    return report


@dataclasses.dataclass
class Outcome:
    """An architecture's outcome: one of KINDS, the reason, relative differences, a traceback."""

    architecture: str
    kind: str
    reason: str = ""
    sizes: dict[str, float] = dataclasses.field(default_factory=dict)
    tokens: str = "-"
    trace: str = ""

    @classmethod
    def from_error(cls, architecture: str, kind: str, error: Exception) -> Outcome:
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return cls(architecture, kind, message, trace=traceback.format_exc())


KINDS = "fused", "correct, not fused", "no head", "WRONG", "cannot be built"


def compare(model: Module, swap: Swap = swap_at_any_size, reference: Run | None = None) -> Outcome:
    """Compares the model after `swap` with `reference`, by default `run_reference(model)`."""
    config, name = model.config, model.config.model_type
    reference = reference or run_reference(model)
    try:
        swapped = run(model, swap)
    except Exception as error:
        return Outcome.from_error(name, "WRONG", error)
    sizes, errors = find_differences(reference, swapped)
    classes = {reference.logits.shape[-1], getattr(config.get_text_config(), "vocab_size", 0)}
    tokens = {BATCH * LENGTH, BATCH * (LENGTH - 1), BATCH * reference.logits.shape[1]}
    logits = swapped.shapes.find_logits(classes, tokens)
    if not reference.shapes.find_logits(classes, tokens):
        errors.append("no logits were recorded in the unswapped model")
    if not logits and not swapped.fused:
        errors.append("neither logits were recorded nor a fused loss reported")
    generated = "same" if reference.tokens is not None else "-"
    if errors:
        generated = "differ" if "generated tokens" in errors else generated
        omitted = [f"and {len(errors) - 3} more"] * (len(errors) > 3)
        kind, reason = "WRONG", ", ".join([*errors[:3], *omitted])
    elif not logits and not swapped.materialized:
        kind, reason = "fused", ""
    elif swapped.heads:
        kind, reason = "correct, not fused", "; ".join(swapped.materialized or logits)
    else:
        embeddings = type(model.get_output_embeddings()).__name__
        kind = "no head"
        reason = "; ".join(swapped.skipped) or f"the output embeddings are {embeddings}"
    return Outcome(name, kind, reason, sizes, generated, swapped.trace or reference.trace)


def swap_nothing(model: Module) -> None:
    """A swap that does nothing."""


def silence() -> None:
    """Suppresses the messages of transformers, some of which it prints."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115, open until the process ends


def serve(pipe: Any, swap: Swap, memory: int) -> None:
    """Runs in a worker process: receives names, and sends for each the outcome.

    Before the outcome it sends "built", once the model is built and works without `swap`.
    """
    resource.setrlimit(resource.RLIMIT_DATA, (memory << 30, memory << 30))
    torch.set_num_threads(1)
    silence()
    while True:
        name = pipe.recv()
        try:
            model, _ = build(name)
            reference = run_reference(model)
        except Exception as error:
            pipe.send(Outcome.from_error(name, "cannot be built", error))
            continue
        pipe.send("built")
        pipe.send(dataclasses.replace(compare(model, swap, reference), architecture=name))


class Worker:
    """A process that handles one architecture after the other."""

    def __init__(self, args: argparse.Namespace):
        context = multiprocessing.get_context("spawn")
        self.pipe, child_end = context.Pipe()
        swap = swap_nothing if args.empty else swap_at_any_size
        child_args = child_end, swap, args.memory
        self.process = context.Process(target=serve, args=child_args, daemon=True)
        self.process.start()
        child_end.close()  # so that the pipe reports the end of the process
        self.timeout, self.name = args.timeout, ""

    def start(self, name: str) -> None:
        self.name, self.failure = name, "cannot be built"
        self.deadline = time.monotonic() + self.timeout
        self.pipe.send(name)

    def poll_outcome(self) -> Outcome | None:
        """Returns the outcome, or None if there is none yet.

        If the process died or took too long, it is dead afterwards.
        """
        try:
            if self.pipe.poll():
                message = self.pipe.recv()
                if isinstance(message, Outcome):
                    return message
                self.failure = "WRONG"
        except EOFError:
            self.process.join()
            return Outcome(self.name, self.failure, f"exit code {self.process.exitcode}")
        if time.monotonic() < self.deadline:
            return None
        self.process.kill()
        self.process.join()
        return Outcome(self.name, self.failure, f"timeout after {self.timeout:g} s")


def sweep(names: Sequence[str], args: argparse.Namespace) -> Iterator[Outcome]:
    """Yields outcomes in the order of completion, from `args.jobs` processes."""
    queue = [*reversed(names)]
    busy: list[Worker] = []
    idle = [Worker(args) for _ in range(min(args.jobs, len(names)))]
    while queue or busy:
        while queue and idle:
            busy.append(idle.pop())
            busy[-1].start(queue.pop())
        seconds = min(worker.deadline for worker in busy) - time.monotonic()
        wait([worker.pipe for worker in busy], max(seconds, 0))
        for worker in [*busy]:
            outcome = worker.poll_outcome()
            if outcome is not None:
                busy.remove(worker)
                idle.append(worker if worker.process.is_alive() else Worker(args))
                yield outcome
    for worker in idle:
        worker.process.kill()


def format_table(outcomes: Sequence[Outcome]) -> str:
    lines = [
        f"{'':46}{'largest relative difference':>27}",
        f"{'architecture':26}{'outcome':20}{'loss':>8}{'gradients':>11}{'logits':>9}  tokens",
        "-" * 82,
    ]
    for o in outcomes:
        numbers = (f"{o.sizes[k]:.0e}" if o.sizes else "-" for k in ("loss", "gradients", "logits"))
        sizes = "{:>8}{:>11}{:>9}".format(*numbers)
        reason = re.sub(r"/\S*/", "", o.reason)  # file names without folders
        reason = reason if len(reason) < 120 else reason[:117] + "..."
        lines.append(f"{o.architecture:26}{o.kind:20}{sizes}  {o.tokens:8}{reason}".rstrip())
    count = Counter(o.kind for o in outcomes)
    total = ", ".join(f"{count[kind]} {kind}" for kind in KINDS[:4])
    built = len(outcomes) - count["cannot be built"]
    return "\n".join([*lines, "", f"built {built} of {len(outcomes)}: {total}"])


def parse_positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Swap every causal language model of transformers, and compare each with its "
        "unswapped copy.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("names", nargs="*", help="architectures, such as llama (default: all)")
    parser.add_argument("--jobs", type=parse_positive, default=2, help="number of processes")
    parser.add_argument("--timeout", type=float, default=120, help="seconds per architecture")
    parser.add_argument(
        "--memory", type=parse_positive, default=6, help="memory limit of a process, in GiB"
    )
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    parser.add_argument("--trace", action="store_true", help="print the tracebacks of failures")
    parser.add_argument(
        "--empty", action="store_true", help="control: replace the swap by one that does nothing"
    )
    args = parser.parse_args(argv)
    unknown = [name for name in args.names if name not in CLASSES]
    if unknown:
        parser.error(f"not a causal language model of transformers: {', '.join(unknown)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    names = list(dict.fromkeys(args.names)) or [*CLASSES]
    outcomes = {}
    interval = 0.1 if sys.stderr.isatty() else 30
    with tqdm(total=len(names), unit="model", dynamic_ncols=True, mininterval=interval) as bar:
        for outcome in sweep(names, args):
            outcomes[outcome.architecture] = outcome
            bar.set_postfix_str(outcome.architecture, refresh=False)
            bar.update()
    in_order = [outcomes[name] for name in names]
    if args.trace:
        print(*(f"{o.architecture}: {o.trace}" for o in in_order if o.trace), sep="\n")
    table = format_table(in_order)
    print(table)
    if args.output:
        args.output.write_text(table + "\n")
    return int(any(o.kind == "WRONG" for o in in_order))


if __name__ == "__main__":
    sys.exit(main())
