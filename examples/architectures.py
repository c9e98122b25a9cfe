"""Every causal language model of `transformers`, built small, swapped, and held to itself.

For each architecture that the installed `transformers` knows, a model of two layers or so is made
from its own configuration, with random weights; nothing is downloaded. One copy stays as it is, the
other goes through `torch_nnmath.swap(model)`, and both do what people do with such a model: a
training step (`model(input_ids=..., labels=...).loss.backward()`; where `forward` takes no labels,
`F.cross_entropy` on the logits), a forward for the logits, and greedy generation with a cache. What
comes out:

    fused              loss, every parameter's gradient, logits and generated tokens are the same,
                       and the swapped training step never made a plain tensor of logits
    right, not fused   the same too, but the logits were made, and this is what made them
    no head            `swap` finds no last layer that could be fused
    WRONG              this differs, or that raised
    cannot be built    by this script, for this reason

    python examples/architectures.py
    python examples/architectures.py llama gemma2 mamba --trace
    python examples/architectures.py --empty      # without a swap nothing is fused

It needs `pip install transformers`, and takes some minutes on two cores. The exit status is 1 if an
architecture is WRONG.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import inspect
import math
import logging
import multiprocessing
import multiprocessing.connection
import os
import re
import resource
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the import: nothing is looked up

import torch
import transformers
from torch import Tensor
from torch.nn import Module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

import torch_nnmath

# No size below is a multiple of BATCH * LENGTH or of BATCH * (LENGTH - 1), so that by its shape
# nothing else can be taken for logits.
Swap = Callable[[Module], Any]
VOCAB, BATCH, LENGTH, HIDDEN = 211, 2, 23, 64
TOLERANCE = 2e-5  # of the largest gradient (logit) in the model: rounding of float32


# What a number in a configuration becomes, by its name: the first pattern that fits. A number that
# is less already, and 0, which mostly means "without", stay.
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
    r"adapter_\w+_(dim|size)|.*(hidden_size.*|d_model|n_embd|emb\w*_(dim|size)|lru_width|proj_dim|d_ssm)": HIDDEN,
}
UNSET = ("head_dim", "num_key_value_heads", "num_experts_per_tok", "n_routed_experts", "n_shared_experts")
LISTS = ("layer_types", "mlp_layer_types", "layers_block_type")

# By the configuration's own model_type (also within another), what the patterns cannot know.
FIXES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"num_hidden_layers": 2},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "dory": {"num_hidden_layers": 6, "sliding_window": 64},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 8,
        "swa_kv_lora_rank": 8,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 16,
    },
    "dots3_note_vision_encoder": {"pyramid_num_routed": [-1, 4]},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "gemma4_assistant": {
        "text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "longcat_flash": {"head_dim": 8},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds": False, "local_attn_chunk_length": 23, "lsh_attn_chunk_length": 23},
    "qwen4_exp_text": {
        "head_dim": 16,
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
}


def shrink(cls: type[PreTrainedConfig], **overrides: Any) -> PreTrainedConfig:
    """The configuration `cls` with every size small, and each kind of layer that it has once."""
    fixes = FIXES.get(cls.model_type, {}) | overrides
    default = vars(cls(**fixes))
    sizes: dict[str, Any] = dict(fixes)
    special = VOCAB
    for field in dataclasses.fields(cls):
        name, value = field.name, default.get(field.name)
        if isinstance(value, PreTrainedConfig):
            sizes[name] = shrink(type(value), **fixes.get(name, {}))
        elif name in fixes:
            continue
        elif re.fullmatch(r".*token_(id|index)", name):
            if isinstance(value, int) and value >= VOCAB:
                special -= 1
                sizes[name] = special
        elif name == "is_decoder":
            sizes[name] = True
        elif (value is None and name in UNSET) or (
            isinstance(field.default, int | float) and not isinstance(field.default, bool)
        ):
            small = next((v for p, v in SIZES.items() if re.fullmatch(p, name)), None)
            if small is not None and (value is None or field.default > small):
                sizes[name] = small if value is None else type(field.default)(small)
    if default.get("num_key_value_heads") == default.get("num_attention_heads") is not None:
        sizes["num_key_value_heads"] = sizes.get("num_attention_heads")
    kinds = {k: list(dict.fromkeys(default[k])) for k in LISTS if isinstance(default.get(k), list)}
    kinds = {k: v for k, v in kinds.items() if k not in fixes}
    depth = next((k for k in ("num_hidden_layers", "n_layer", "num_layers") if k in sizes), None)
    n = max([sizes[depth] if depth else 2, *map(len, kinds.values())])
    sizes |= {k: (v * n)[:n] for k, v in kinds.items()} | ({depth: n} if depth else {})
    return cls(**sizes)


def build(model_type: str, **overrides: Any) -> tuple[Module, PreTrainedConfig]:
    """A small model of the architecture, with random weights; `overrides` go to its configuration."""
    torch.manual_seed(0)
    config = shrink(CONFIG_MAPPING[model_type], **overrides)
    cls = getattr(transformers, CLASSES[model_type])
    if not isinstance(config, cls.config_class):  # of text and images, say
        config = next((v for v in vars(config).values() if isinstance(v, cls.config_class)), config)
    model = cls(config).train()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
    sharpen(model)
    return model, config


@torch.no_grad()
def sharpen(model: Module) -> None:
    """Makes logits as large as a trained model's, lest caps and scales of them go unnoticed."""
    head = model.get_output_embeddings()
    if isinstance(head, torch.nn.Linear):
        std = copy.deepcopy(model)(**batch(model)[0]).logits.float().std()
        head.weight.mul_(3 / std)


def batch(model: Module) -> tuple[dict[str, Any], Tensor]:
    """Tokens (2, 23) and whatever else the model's forward needs, and labels."""
    config = model.config
    torch.manual_seed(1)
    ids = torch.randint(10, VOCAB - 20, (BATCH, LENGTH))
    labels = ids.clone()
    labels[0, :5] = labels[1, -3:] = -100
    if config.model_type.startswith("musicgen"):  # one row of tokens for each codebook
        n = config.num_codebooks
        return {"input_ids": ids.repeat(n, 1)}, labels[..., None].repeat(1, 1, n)
    if config.model_type.endswith("_assistant"):  # which reads the keys and values of a larger one
        text = config.get_text_config()
        kv = {}
        for layer, kind in zip(model.model.layers, text.layer_types, strict=True):
            shape = BATCH, text.num_key_value_heads, LENGTH, layer.self_attn.head_dim
            kv[kind] = torch.randn(shape), torch.randn(shape)
        features = torch.randn(BATCH, LENGTH, 2 * config.backbone_hidden_size)
        inputs = {"inputs_embeds": features, "shared_kv_states": kv}
        return inputs | {"output_hidden_states": True}, labels  # else gemma4's wants more inputs
    return {"input_ids": ids}, labels


class Shapes(TorchDispatchMode):
    """Notes the shape of every plain tensor of floating point that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.made: Counter[tuple[str, tuple[int, ...]]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if types:  # a subclass's own rules come first; what they call is seen in turn
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if type(x) is Tensor and x.is_floating_point() and x.device.type != "meta":
                if x.untyped_storage().nbytes() >= x.numel() * x.element_size():  # not expanded
                    self.made[str(func), tuple(x.shape)] += 1
        return out

    def logits(self, classes: set[int]) -> list[str]:
        """What made logits of all tokens, or of all but the last of each row."""
        rows = BATCH * LENGTH, BATCH * (LENGTH - 1)
        return [
            f"{func} {shape}"
            for func, shape in self.made
            for c in classes.intersection(shape)
            if any(math.prod(shape) // c % n == 0 for n in rows)
        ]


@dataclasses.dataclass
class Run:
    """What a model did in a training step, of which the first five tell, and after it."""

    loss: Tensor
    gradients: dict[str, Tensor]
    shapes: Shapes
    heads: dict[str, int]  # how many losses each computed without logits
    computed: list[str]  # why logits were, as the report says
    logits: Tensor
    tokens: Tensor | None  # that it generated, if it can
    wrong: str = ""


def run(model: Module, swap: Swap) -> Run:
    """A training step, a forward and a generation by a copy of the model, after `swap`."""
    model = copy.deepcopy(model)
    heads = getattr(swap(model), "heads", {})
    inputs, labels = batch(model)
    torch.manual_seed(2)
    with Shapes() as shapes:
        if "labels" in inspect.signature(model.forward).parameters:
            loss = model(**inputs, labels=labels).loss
        else:
            logits = model(**inputs).logits[:, :-1].flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits.float(), labels[:, 1:].flatten())
        loss.backward()
    fused = {name: log.fused for name, log in heads.items()}
    computed = [why for log in heads.values() for why in log.materialized]
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    torch.manual_seed(2)
    with torch.no_grad():
        logits = model(**inputs).logits
    return Run(loss.detach(), gradients, shapes, fused, computed, logits, generate(model, inputs))


def generate(model: Module, inputs: dict[str, Any]) -> Tensor | None:
    torch.manual_seed(2)
    return model.eval().generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=True)


def differences(theirs: Run, ours: Run) -> dict[str, float]:
    """Of loss, gradients and logits, each over the largest of them all."""
    largest = max(g.abs().max() for g in theirs.gradients.values())
    return {
       "loss":  (ours.loss - theirs.loss).abs() / theirs.loss.abs(),
       "gradients": max((ours.gradients[n] - g).abs().max() for n, g in theirs.gradients.items()) / largest,
       "logits": (ours.logits - theirs.logits).abs().max() / theirs.logits.abs().max()
    }
