"""Every causal language model of `transformers`, built small, swapped, and held to itself.

Of each architecture that the installed `transformers` knows, a model of a few layers is made from
its own configuration, with random weights; nothing is downloaded. One copy stays as it is, another
goes through `torch_nnmath.swap(model)`, and both do what people do with such a model: a training
step, `model(input_ids=..., labels=...).loss.backward()` (with `F.cross_entropy` of the logits where
`forward` takes no labels), a forward without labels, and greedy generation with a cache. Outcomes:

    fused              loss, gradients of all parameters, logits and generated tokens are the same,
                       and no operation of the swapped training step made a tensor of logits
    right, not fused   the same too, but logits were made: by this operation, there
    no head            `swap` found no last layer that it could take for the head
    WRONG              this differs by more than rounding, or this was raised
    cannot be built    by this script; or the model as it comes fails at a training step

    python examples/architectures.py
    python examples/architectures.py llama gemma2 mamba --trace
    python examples/architectures.py --empty     # a swap that does nothing: nothing is fused

It needs `pip install transformers`, and takes under a minute on two cores. The exit status is 1 if
an outcome is WRONG.
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
from torch.utils._pytree import tree_leaves

import torch_nnmath

try:
    import transformers
    from tqdm import tqdm  # which transformers brings
    from transformers import CONFIG_MAPPING, PreTrainedConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES
except ModuleNotFoundError as error:
    raise SystemExit('this example needs transformers: pip install ".[transformers]"') from error

Swap = Callable[[Module], Any]

# A prime number of classes, and no layer whose width is a multiple of the number of tokens: by
# its shape, nothing else can be taken for logits, such as a weight's gradient.
VOCAB, BATCH, LENGTH, HIDDEN = 211, 2, 23, 64
# Over the largest gradient (loss, logit) of the model: float32's rounding, through a few layers.
TOLERANCE = 2e-5

# What a number in a configuration becomes, by the first pattern that its name fits. What is smaller
# already stays, as does 0, which mostly means "without".
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
# What a number becomes that the default leaves to a checkpoint, or whose default 1.0 says nothing.
UNSET = {
    "head_dim": 16,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "final_logit_softcapping": 30.0,
    "logits_scaling": 2.0,
    "lm_head_multiplier": 0.5,
}
# One kind for each layer. Each kind that the default has comes once.
LAYERS = "layer_types", "mlp_layer_types", "layers_block_type"

# By `model_type`, of a configuration or of one inside it: what the patterns cannot know.
FIXES: dict[str, dict[str, Any]] = {
    # sizes that others prescribe
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
    "reformer": {  # which trains on whole chunks
        "axial_pos_embds": False,
        "num_buckets": 2,
        "local_attn_chunk_length": LENGTH,
        "lsh_attn_chunk_length": LENGTH,
    },
    # an attention among the layers, which a cache needs
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"],
        "num_hidden_layers": 2,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    # defaults that do not work as they are
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
    """A configuration of the class with every size small, but for what `overrides` say."""
    given = FIXES.get(cls.model_type, {}) | overrides
    default = vars(cls(**given))  # what follows from a size is there, too
    sizes = dict(given)
    last = VOCAB  # the special tokens that are beyond the vocabulary come at its end
    for field in dataclasses.fields(cls):
        name, value = field.name, default.get(field.name)
        if isinstance(value, PreTrainedConfig):
            sizes[name] = shrink(type(value), **given.get(name, {}))
        elif name in given:
            continue
        elif re.fullmatch(r".*token_(id|index)", name):
            if isinstance(value, int) and value >= VOCAB:
                sizes[name] = last = last - 1
        elif name == "is_decoder":
            sizes[name] = True
        elif name in UNSET and (value is None or repr(value) == "1.0"):
            sizes[name] = UNSET[name]
        elif type(field.default) in (int, float):
            small = next((s for pattern, s in SIZES.items() if re.fullmatch(pattern, name)), None)
            if small is not None and field.default > small:
                sizes[name] = type(field.default)(small)
    if default.get("num_key_value_heads") == default.get("num_attention_heads") is not None:
        sizes["num_key_value_heads"] = sizes.get("num_attention_heads")
    kinds = {
        name: list(dict.fromkeys(default[name]))
        for name in LAYERS
        if isinstance(default.get(name), list) and name not in given
    }
    depth = next((n for n in ("num_hidden_layers", "n_layer", "num_layers") if n in sizes), None)
    count = max([sizes.get(depth, 2), *map(len, kinds.values())])
    sizes |= {name: (its * count)[:count] for name, its in kinds.items()}
    return cls(**sizes | ({depth: count} if depth else {}))


def build(model_type: str, **overrides: Any) -> tuple[Module, PreTrainedConfig]:
    """A small model with random weights and no dropout; `overrides` go to its configuration."""
    torch.manual_seed(0)
    config = shrink(CONFIG_MAPPING[model_type], **overrides)
    cls = getattr(transformers, CLASSES[model_type])
    if not isinstance(config, cls.config_class):  # then its language model's is inside of it
        config = next((v for v in vars(config).values() if isinstance(v, cls.config_class)), config)
    model = cls(config).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    sharpen(model)
    return model, config


@torch.no_grad()
def sharpen(model: Module) -> None:
    """Makes logits as large as after training and biases other than 0, lest a cap or a bias that
    is forgotten go unnoticed.
    """
    head = model.get_output_embeddings()
    if isinstance(head, torch.nn.Linear):
        head.weight *= 3 / copy.deepcopy(model)(**batch(model)[0]).logits.std()
        for x in [*model.parameters(), *model.buffers()]:
            if x.is_floating_point() and x.numel() == head.out_features:
                x += torch.randn(x.shape)


def batch(model: Module) -> tuple[dict[str, Any], Tensor]:
    """Tokens and what else the model's forward needs, and labels, which are not the tokens: many a
    model would know those already, and a loss near 0 is hardly more than rounding.
    """
    config = model.config
    torch.manual_seed(1)
    ids = torch.randint(10, VOCAB - 20, (BATCH, LENGTH))  # no special ones
    labels = torch.randint(10, VOCAB - 20, (BATCH, LENGTH))
    labels[0, :5] = labels[1, -3:] = -100
    inputs: dict[str, Any] = {"input_ids": ids}
    if config.model_type == "xlstm":  # its cache cannot be differentiated
        inputs["use_cache"] = False
    elif config.model_type == "git":  # it finds the text behind the image
        size = config.vision_config.image_size
        inputs["pixel_values"] = torch.randn(BATCH, 3, size, size)
    elif config.model_type.startswith("musicgen"):  # a row of tokens for each codebook
        inputs["input_ids"] = ids.repeat(config.num_codebooks, 1)
        labels = labels[..., None].expand(-1, -1, config.num_codebooks)
    elif config.model_type.endswith("_assistant"):  # it reads keys and values of a larger model
        text, shared = config.get_text_config(), {}
        for layer, kind in zip(model.model.layers, text.layer_types, strict=True):
            shape = BATCH, text.num_key_value_heads, LENGTH, layer.self_attn.head_dim
            shared[kind] = torch.randn(shape), torch.randn(shape)
        embeddings = torch.randn(BATCH, LENGTH, 2 * config.backbone_hidden_size)
        inputs = {"inputs_embeds": embeddings, "shared_kv_states": shared}
        inputs["output_hidden_states"] = True  # else gemma4's takes a shortcut that raises
    return inputs, labels


class Shapes(TorchDispatchMode):
    """Notes every plain tensor of floating point that an operation makes: which, and its shape."""

    def __init__(self) -> None:
        super().__init__()
        self.made: Counter[tuple[str, tuple[int, ...]]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if {*types} - {Tensor, Parameter}:  # a subclass has its say first; what it calls is seen
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if type(x) is Tensor and x.is_floating_point() and x.device.type != "meta":
                is_expanded = x.untyped_storage().nbytes() < x.numel() * x.element_size()
                self.made[str(func), tuple(x.shape)] += not is_expanded
        return out

    def logits(self, classes: set[int], tokens: set[int]) -> list[str]:
        """Who made logits of so many classes and tokens, or multiples of them."""
        return [
            f"{func} of {shape}"
            for (func, shape), times in self.made.items()
            for c in classes.intersection(shape)
            if times and any(math.prod(shape) // c % n == 0 for n in tokens)
        ]


@dataclasses.dataclass
class Run:
    """What a model did. All but the last three are of the training step."""

    loss: Tensor
    gradients: dict[str, Tensor]
    shapes: Shapes
    fused: int  # the losses without logits that the report counts
    computed: list[str]  # and why logits had to be computed
    heads: list[str]
    left: list[str]
    logits: Tensor
    tokens: Tensor | None = None  # None if it cannot generate
    trace: str = ""  # and why


def run(model: Module, swap: Swap | None = None) -> Run:
    """A training step, a forward and a generation, by a copy of the model after `swap`."""
    model = copy.deepcopy(model)
    report = swap(model) if swap else None
    heads, left = getattr(report, "heads", {}), getattr(report, "left", {})
    inputs, labels = batch(model)
    torch.manual_seed(2)
    with Shapes() as shapes:
        if "labels" in inspect.signature(model.forward).parameters:
            loss = model(**inputs, labels=labels).loss
        else:
            logits = model(**inputs).logits[:, :-1].flatten(0, 1).float()
            loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
        loss.backward()
    torch.manual_seed(2)
    done = Run(
        loss.detach(),
        {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
        shapes,
        sum(log.fused for log in heads.values()),
        [f"{name}: {why}" for name, log in heads.items() for why in log.materialized],
        [*heads],
        [f"{name}: {why}" for name, why in left.items()],
        torch.no_grad()(model)(**inputs).logits,
    )
    options = {"max_new_tokens": 6, "do_sample": False, "use_cache": True}
    torch.manual_seed(2)
    try:
        done.tokens = model.eval().generate(**inputs | options)
    except Exception:  # a few do not, each in its own way
        done.trace = traceback.format_exc()
    return done


def differences(theirs: Run, ours: Run) -> tuple[dict[str, float], list[str]]:
    """Of loss, gradients and logits, over the largest of each. In words, those beyond rounding."""
    names = dict.fromkeys([*theirs.gradients, *ours.gradients])
    pairs: dict[str, dict[str, Any]] = {
        "loss": {"": (theirs.loss, ours.loss)},
        "gradients": {n: (theirs.gradients.get(n), ours.gradients.get(n)) for n in names},
        "logits": {"": (theirs.logits, ours.logits)},
    }
    sizes, wrong = {}, []
    for what, of_name in pairs.items():
        largest = max(float(x.abs().max()) for x, _ in of_name.values() if x is not None)
        sizes[what] = 0.0
        for name, (x, y) in of_name.items():
            kinds = [None if v is None else (v.dtype, *v.shape) for v in (x, y)]
            size = math.nan
            if None not in kinds and kinds[0] == kinds[1]:
                size = float((x - y).abs().max()) / largest
                sizes[what] = max(sizes[what], size)
            if not size <= TOLERANCE:
                how = f"by {size:.0e}" if kinds[0] == kinds[1] else f"{kinds[0]} -> {kinds[1]}"
                wrong.append(f"{what} {name} {how}".replace("  ", " "))
    if theirs.tokens is not None and (ours.tokens is None or not theirs.tokens.equal(ours.tokens)):
        wrong.append("generated tokens")
    return sizes, wrong


def reference(model: Module) -> Run:
    """What the model does as it is. If chance has a part in its training, in eval mode."""
    for mode in (True, False):
        done = run(model.train(mode))
        if not torch.isfinite(done.loss):
            raise ValueError(f"the loss is {done.loss}")
        wrong = differences(done, run(model))[1]
        if not wrong:
            return done
    raise ValueError(f"not the same twice: {wrong[0]}")


@dataclasses.dataclass
class Outcome:
    """Of an architecture: one of KINDS, why, how large differences are, and what was raised."""

    architecture: str
    kind: str
    reason: str = ""
    sizes: dict[str, float] = dataclasses.field(default_factory=dict)
    tokens: str = "-"
    trace: str = ""

    @classmethod
    def of_error(cls, architecture: str, kind: str, error: Exception) -> Outcome:
        words = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return cls(architecture, kind, words, trace=traceback.format_exc())


KINDS = "fused", "right, not fused", "no head", "WRONG", "cannot be built"


def compare(model: Module, swap: Swap = torch_nnmath.swap, theirs: Run | None = None) -> Outcome:
    """The model after `swap`, held to itself: to `theirs`, which is `reference(model)`."""
    config, name = model.config, model.config.model_type
    theirs = theirs or reference(model)
    try:
        ours = run(model, swap)
    except Exception as error:
        return Outcome.of_error(name, "WRONG", error)
    sizes, wrong = differences(theirs, ours)
    classes = {theirs.logits.shape[-1], getattr(config.get_text_config(), "vocab_size", 0)}
    tokens = {BATCH * LENGTH, BATCH * (LENGTH - 1), BATCH * theirs.logits.shape[1]}
    made = ours.shapes.logits(classes, tokens)
    if not theirs.shapes.logits(classes, tokens):
        wrong.append("nothing, but the logits of the model as it is were not seen")
    if not made and not ours.fused:
        wrong.append("nothing, but neither logits were seen nor a fused loss reported")
    generated = "same" if theirs.tokens is not None else "-"
    if wrong:
        generated = "differ" if "generated tokens" in wrong else generated
        more = [f"and {len(wrong) - 3} more"] * (len(wrong) > 3)
        kind, reason = "WRONG", ", ".join([*wrong[:3], *more])
    elif not made and not ours.computed:
        kind, reason = "fused", ""
    elif ours.heads:
        kind, reason = "right, not fused", "; ".join(ours.computed or made)
    else:
        embeddings = type(model.get_output_embeddings()).__name__
        kind, reason = "no head", "; ".join(ours.left) or f"the output embeddings are {embeddings}"
    return Outcome(name, kind, reason, sizes, generated, ours.trace or theirs.trace)


def nothing(model: Module) -> None:
    """A swap that does nothing."""


def silence() -> None:
    """Keeps back what transformers has to say of such models, some of it by `print`."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115, the process's own till its end


def work(pipe: Any, swap: Swap, memory: int) -> None:
    """A process: a name comes, "built" goes when its model is and works, then the outcome."""
    resource.setrlimit(resource.RLIMIT_DATA, (memory << 30, memory << 30))
    torch.set_num_threads(1)
    silence()
    while True:
        name = pipe.recv()
        try:
            model, _ = build(name)
            theirs = reference(model)
        except Exception as error:
            pipe.send(Outcome.of_error(name, "cannot be built", error))
            continue
        pipe.send("built")
        pipe.send(dataclasses.replace(compare(model, swap, theirs), architecture=name))


class Worker:
    """A process that does one architecture after the other."""

    def __init__(self, args: argparse.Namespace):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        swap = nothing if args.empty else torch_nnmath.swap
        self.process = context.Process(target=work, args=(theirs, swap, args.memory), daemon=True)
        self.process.start()
        theirs.close()  # here, so that it is closed when the process ends
        self.timeout, self.name = args.timeout, ""

    def start(self, name: str) -> None:
        self.name, self.failure = name, "cannot be built"
        self.deadline = time.monotonic() + self.timeout
        self.pipe.send(name)

    def outcome(self) -> Outcome | None:
        """None if there is none yet. One that says that the process ended, or ends it as too slow,
        leaves a dead process.
        """
        try:
            if self.pipe.poll():
                said = self.pipe.recv()
                if isinstance(said, Outcome):
                    return said
                self.failure = "WRONG"
        except EOFError:
            self.process.join()
            return Outcome(self.name, self.failure, f"exit code {self.process.exitcode}")
        if time.monotonic() < self.deadline:
            return None
        self.process.kill()
        self.process.join()
        return Outcome(self.name, self.failure, f"not done after {self.timeout:g} s")


def sweep(names: Sequence[str], args: argparse.Namespace) -> Iterator[Outcome]:
    """The outcomes as they come, from `args.jobs` processes."""
    waiting = [*reversed(names)]
    busy: list[Worker] = []
    idle = [Worker(args) for _ in range(min(args.jobs, len(names)))]
    while waiting or busy:
        while waiting and idle:
            busy.append(idle.pop())
            busy[-1].start(waiting.pop())
        left = min(worker.deadline for worker in busy) - time.monotonic()
        wait([worker.pipe for worker in busy], max(left, 0))
        for worker in [*busy]:
            outcome = worker.outcome()
            if outcome is not None:
                busy.remove(worker)
                idle.append(worker if worker.process.is_alive() else Worker(args))
                yield outcome
    for worker in idle:
        worker.process.kill()


def table(outcomes: Sequence[Outcome]) -> str:
    lines = [
        f"{'':44}{'largest difference of':^28}",
        f"{'architecture':26}{'outcome':18}{'loss':>8}{'gradients':>11}{'logits':>9}  tokens",
        "-" * 80,
    ]
    for o in outcomes:
        numbers = (f"{o.sizes[k]:.0e}" if o.sizes else "-" for k in ("loss", "gradients", "logits"))
        sizes = "{:>8}{:>11}{:>9}".format(*numbers)
        reason = re.sub(r"/\S*/", "", o.reason)  # a file's name says enough
        reason = reason if len(reason) < 120 else reason[:117] + "..."
        lines.append(f"{o.architecture:26}{o.kind:18}{sizes}  {o.tokens:8}{reason}".rstrip())
    count = Counter(o.kind for o in outcomes)
    total = ", ".join(f"{count[kind]} {kind}" for kind in KINDS[:4])
    built = len(outcomes) - count["cannot be built"]
    return "\n".join([*lines, "", f"built {built} of {len(outcomes)}: {total}"])


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, got {text!r}")
    return int(text)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Swap every causal language model of transformers, and hold each to itself.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("names", nargs="*", help="of architectures, such as llama; none means all")
    parser.add_argument("--jobs", type=positive, default=2, help="processes")
    parser.add_argument("--timeout", type=float, default=120, help="of an architecture, in seconds")
    parser.add_argument("--memory", type=positive, default=6, help="of a process at most, in GiB")
    parser.add_argument("--output", type=Path, help="a file for the table")
    parser.add_argument("--trace", action="store_true", help="show what was raised, and where")
    parser.add_argument("--empty", action="store_true", help="swap nothing: then nothing is fused")
    args = parser.parse_args(argv)
    unknown = [name for name in args.names if name not in CLASSES]
    if unknown:
        parser.error(f"no causal language model of transformers: {', '.join(unknown)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    names = list(dict.fromkeys(args.names)) or [*CLASSES]
    outcomes = {}
    interval = 0.1 if sys.stderr.isatty() else 30
    with tqdm(total=len(names), unit="model", dynamic_ncols=True, mininterval=interval) as bar:
        for outcome in sweep(names, args):
            outcomes[outcome.architecture] = outcome
            bar.set_postfix_str(outcome.architecture, refresh=False)
            bar.update()
    found = [outcomes[name] for name in names]
    if args.trace:
        print(*(f"{o.architecture}: {o.trace}" for o in found if o.trace), sep="\n")
    print(table(found))
    if args.output:
        args.output.write_text(table(found) + "\n")
    return int(any(o.kind == "WRONG" for o in found))


if __name__ == "__main__":
    sys.exit(main())
