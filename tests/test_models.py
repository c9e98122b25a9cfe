"""`swap` in models as people use them: transformers, PEFT, accelerate, Lightning, DDP and FSDP2.

Each model is small and random, and held to a copy that was left as it was: the same loss and
gradients, the same logits, weights after training and generated tokens, all to rounding; and where
the report counts a loss without logits, no tensor of tokens x classes was made. Nothing is
downloaded. What is not installed is skipped.
"""

import copy
import datetime
import io
import json
import os
import pickle
import re
import subprocess
import sys
import types
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import parallel as tensor_parallel
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

import torch_nnmath
from torch_nnmath.bench.measure import measure_peak as peak
from torch_nnmath.deferred import DeferredLogits, MaterializedLogits
from torch_nnmath.swapping import Report

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{warning}")
    for warning in (
        ".*is deprecated and will be removed in v6:FutureWarning",  # transformers, of its own
        ".*isinstance.treespec, LeafSpec.*:FutureWarning",  # Lightning calls what PyTorch renamed
        ".*is deprecated. Please switch to `torch.compile`:DeprecationWarning",  # Inductor
        "torch.ao.quantization is deprecated:DeprecationWarning",
        "torch.quantize_per_tensor:UserWarning",  # torch.ao
        "`torch.nn.utils.weight_norm` is deprecated:FutureWarning",
    )
]

V, ROWS, LENGTH = 307, 2, 23  # classes; tokens. No other size is like these
TOKENS_OF_BATCH = (ROWS * LENGTH, ROWS * (LENGTH - 1))
WHEN = pytest.mark.parametrize("when", ["before", "after"])  # swap, than what the user does


# A model and its copy


class Watch(TorchDispatchMode):
    """Lists every plain tensor of so many rows of so many classes that is made."""

    def __init__(self, rows: Collection[int], classes: int):
        super().__init__()
        self.rows, self.classes, self.logits = rows, classes, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DeferredLogits in types:  # whose own rules come first; what they call is seen
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if not isinstance(x, Tensor) or x.device.type == "meta" or self.classes not in x.shape:
                continue
            if x.numel() // self.classes in self.rows:
                self.logits.append(f"{func} {tuple(x.shape)}")
        return out


class Step(NamedTuple):
    loss: Tensor
    gradients: dict[str, Tensor]


def step(model, loss_of) -> Step:
    """One training step, without the optimizer's part."""
    torch.manual_seed(2)
    model.zero_grad()
    loss = loss_of(model)
    loss.backward()
    named = ((name.replace("_orig_mod.", ""), p.grad) for name, p in model.named_parameters())
    return Step(loss.detach(), {name: g.clone() for name, g in named if g is not None})


def agree(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """To rounding, of a tensor's largest entry or, less, of the largest of all."""
    assert ours.keys() == theirs.keys()
    ours, theirs = ({name: x.detach() for name, x in of.items()} for of in (ours, theirs))
    largest = max(float(t.abs().max()) for t in theirs.values())
    for name, t in theirs.items():
        atol = torch.finfo(t.dtype).eps * (64 * float(t.abs().max()) + 8 * largest)
        torch.testing.assert_close(ours[name], t, rtol=0, atol=atol, msg=lambda m, n=name: n + m)


def changed(model, change):
    """What the user's `change` makes of a model, which may be another module."""
    torch.manual_seed(3)
    found = change(model)
    return found if isinstance(found, nn.Module) else model


class Pair:
    """`plain`, a model as it was, and `ours`, its copy after swap. The user's `change` is made to
    both; in `ours` swap comes before or after that.
    """

    def __init__(self, model, change=lambda model: model, when="after", **options):
        self.plain = changed(copy.deepcopy(model), change)
        if when == "before":
            self.report = torch_nnmath.swap(model, **options)
        self.ours = changed(model, change)
        if when == "after":
            self.report = torch_nnmath.swap(self.ours, **options)

    @property
    def fused(self) -> int:
        return sum(log.fused for log in self.report.heads.values())

    @property
    def computed(self) -> list[str]:
        return [why for log in self.report.heads.values() for why in log.materialized]

    def trains(self, loss_of, fused=1, computed=None, rows=TOKENS_OF_BATCH, classes=V):
        """A training step: the same loss and gradients; so many losses `fused`, and then no logits;
        or why they were `computed`.
        """
        before, theirs = self.fused, step(self.plain, loss_of)
        with warnings.catch_warnings():
            if computed:
                warnings.simplefilter("ignore", MaterializedLogits)
            ours = step(self.ours, loss_of)
        agree({"loss": ours.loss}, {"loss": theirs.loss})
        agree(ours.gradients, theirs.gradients)
        assert self.fused - before == fused, f"fused {self.fused - before}: {self.report!r}"
        assert bool(computed) == bool(self.computed), f"computed by {self.computed}"
        assert all(re.search(computed, why) for why in self.computed), self.computed
        if fused and not computed:
            self.makes_no_logits(loss_of, rows, classes)

    def makes_no_logits(self, loss_of, rows, classes):
        with Watch(rows, classes) as plain:
            step(self.plain, loss_of)
        with Watch(rows, classes) as ours:
            step(self.ours, loss_of)
        assert plain.logits, "nothing was seen where logits are"
        assert not ours.logits

    def says(self, logits_of):
        """The same logits, as an ordinary tensor would hold them."""
        with torch.no_grad():
            ours, theirs = logits_of(self.ours.eval()), logits_of(self.plain.eval())
        assert ours.stride() == theirs.stride()
        agree({"logits": ours + 0}, {"logits": theirs})
        self.ours.train()
        self.plain.train()


# Models


def batch(rows=ROWS, length=LENGTH, classes=V, seed=1):
    """Tokens, and labels, some of which are ignored."""
    ids = torch.randint(3, classes, (rows, length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[0, :5] = labels[-1, -2:] = -100
    return ids, labels


OURS = torch_nnmath.nn.CrossEntropyLoss(z_loss=1e-3)
IDS, LABELS = batch()
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
DECODER = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
ENCODER = {"encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
DECODER |= {"decoder_start_token_id": 1, "forced_eos_token_id": None}
ONLY_DECODER = DECODER | {"is_decoder": True, "is_encoder_decoder": False}
CAUSAL = {
    "bart": ONLY_DECODER,
    "bloom": {"n_head": 4, "n_layer": 2},
    "cohere": {"logit_scale": 0.25},
    "falcon": {},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 5.0, "sliding_window": 16},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "gpt_neox": {},
    "granite": {"logits_scaling": 3.0},
    "llama": {},
    "mamba": {"state_size": 4, "conv_kernel": 4},
    "marian": ONLY_DECODER,
    "mixtral": {"num_local_experts": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi": {},
    "qwen2": {},
    "recurrent_gemma": {
        "num_hidden_layers": 3,
        "lru_width": 32,
        "head_dim": 8,
        "attention_window_size": 16,
    },
}


@torch.no_grad()
def sharpened(model):
    """In training, with logits as large as a trained model's: else caps and scales hardly show."""
    head = model.get_output_embeddings()
    head.weight.mul_(20)
    for bias in (head.bias, getattr(model, "final_logits_bias", None)):
        if bias is not None:
            bias.normal_()
    return model.train()


def causal(name="llama", **changes):
    """A causal language model of transformers, by the name of its architecture."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **(SIZES | TOKENS | CAUSAL[name] | changes))
    return sharpened(transformers.AutoModelForCausalLM.from_config(config))


def other(name):
    """Another model of transformers, what it takes, and rows and classes of its logits."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    words = {"input_ids": IDS, "labels": LABELS}
    tags = {"input_ids": IDS, "labels": LABELS.clamp(max=88)}
    pictures = torch.randn(48, 3, 16, 16), torch.randint(1013, (48,))
    images = dict(zip(("pixel_values", "labels"), pictures, strict=True))
    t5 = {"vocab_size": V, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    t5["decoder_start_token_id"] = 0
    s2s = {"vocab_size": V} | ENCODER | DECODER | TOKENS
    picture = SIZES | {"image_size": 16, "patch_size": 8, "num_labels": 1013}
    kind, options, inputs, classes = {
        "bert": ("BertForMaskedLM", SIZES, words, V),
        "bert tagger": ("BertForTokenClassification", SIZES | {"num_labels": 89}, tags, 89),
        "bart": ("BartForConditionalGeneration", s2s | {"tie_word_embeddings": False}, words, V),
        "marian": ("MarianMTModel", s2s, words, V),
        "t5": ("T5ForConditionalGeneration", t5, words, V),
        "vit": ("ViTForImageClassification", picture, images, 1013),
    }[name]
    cls = getattr(transformers, kind)
    model = cls(cls.config_class(**options))
    if model.get_output_embeddings() is not None:
        sharpened(model)
    return model.train(), inputs, [inputs["labels"].numel()], classes


class LM(nn.Module):
    """A language model of PyTorch's modules alone: logits, or with labels the loss and logits."""

    def __init__(self, classes=V, hidden=32, bias=True, spare=False):
        super().__init__()
        self.spare = nn.Linear(hidden, hidden) if spare else None  # unused
        self.embed = nn.Embedding(classes, hidden)
        layers = (nn.Sequential(nn.Linear(hidden, hidden), nn.Tanh()) for _ in range(2))
        self.body = nn.Sequential(*layers)
        self.lm_head = nn.Linear(hidden, classes, bias)

    def forward(self, ids, labels=None):
        z = self.lm_head(self.body(self.embed(ids)))
        return z if labels is None else (loss_outside(z, labels), z)


def small(**options):
    torch.manual_seed(0)
    return LM(**options).double()


def loss_outside(logits, labels=LABELS):
    """What is written where the model does not compute the loss."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def of_labels(model):
    return model(input_ids=IDS, labels=LABELS).loss


def of_logits(model):
    return loss_outside(model(input_ids=IDS).logits)


def of_small(model):
    return loss_outside(model(IDS))


# What is compared must be able to differ


def test_a_swap_that_does_nothing_fails(monkeypatch):
    """The comparison below asks for losses without logits, and looks for logits."""
    with pytest.raises(AssertionError, match="fused 0"):
        Pair(small(), head=None).trains(of_small)
    monkeypatch.setattr(torch_nnmath, "swap", lambda model: Report())
    with pytest.raises(AssertionError, match="fused 0"):
        Pair(small()).trains(of_small)
    with pytest.raises(AssertionError, match=r"assert not \["):
        Pair(small()).makes_no_logits(of_small, TOKENS_OF_BATCH, V)


# Architectures


@pytest.mark.parametrize("name", CAUSAL)
def test_a_causal_language_model(name):
    """Tied weights, caps, scales, divisions, rows of bias, experts, recurrences: a training step
    with ignored labels makes no logits; logits and greedily generated tokens are the same.
    """
    pair = Pair(causal(name))
    pair.trains(of_labels)
    pair.trains(of_logits)
    pair.says(lambda model: model(input_ids=IDS).logits)
    assert generated(pair.ours).equal(generated(pair.plain))


@pytest.mark.parametrize(
    ("name", "option", "without"),
    [
        ("gemma2", "final_logit_softcapping", None),
        ("cohere", "logit_scale", 1.0),
        ("granite", "logits_scaling", 1.0),
    ],
)
def test_caps_and_scales_matter_here(name, option, without):
    """Or the test above could not tell whether they were heard."""
    loss, other = of_labels(causal(name)), of_labels(causal(name, **{option: without}))
    assert abs(loss - other) > 0.1


def test_a_step_of_several_blocks_of_rows():
    """The kernel goes over the logits in blocks; 1400 rows of 4099 classes are three."""
    ids, labels = batch(2, 700, 4099)
    pair = Pair(causal("llama", vocab_size=4099, max_position_embeddings=1024))
    pair.trains(
        lambda model: model(input_ids=ids, labels=labels).loss, rows=(1400, 1398), classes=4099
    )


@pytest.mark.parametrize("name", ["bert", "bert tagger", "bart", "marian", "t5", "vit"])
def test_other_tasks(name):
    """A masked language model, a tagger, encoders with decoders, a classifier of images."""
    model, inputs, rows, classes = other(name)
    pair = Pair(model)
    pair.trains(lambda model: model(**inputs).loss, rows=rows, classes=classes)
    pair.says(lambda model: model(**inputs).logits)


def test_a_tied_weight_has_both_gradients():
    """That of an embedding and that of a head with the same numbers, summed."""
    pair, untied = Pair(causal("gpt2")), causal("gpt2", tie_word_embeddings=False)
    assert pair.ours.lm_head.weight is pair.ours.transformer.wte.weight
    untied.load_state_dict(pair.plain.state_dict())
    gradients = step(untied, of_labels).gradients
    gradients["transformer.wte.weight"] += gradients.pop("lm_head.weight")
    pair.trains(of_labels)
    agree(step(pair.ours, of_labels).gradients, gradients)


# Generation


def generated(model, ids=IDS, **options):
    torch.manual_seed(5)
    model.eval()
    options = {"do_sample": False, "attention_mask": torch.ones_like(ids)} | options
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=6, **options)
    model.train()
    return out


@pytest.mark.parametrize("name", ["llama", "gpt2", "bart"])
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False, "use_cache": True},
        {"do_sample": False, "use_cache": False},
        {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.9},
        {"num_beams": 3},
        {"num_beams": 2, "do_sample": True},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    ],
    ids=["greedy", "without cache", "sampling", "beams", "sampled beams", "penalties"],
)
def test_generated_tokens_are_the_same(name, options):
    pair = Pair(other("bart")[0] if name == "bart" else causal(name))
    ours, theirs = generated(pair.ours, **options), generated(pair.plain, **options)
    assert type(ours) is Tensor
    assert ours.equal(theirs)
    assert ours.unique().numel() > 3


# Trainer


def sequences():
    """Of unequal length, in batches with unequal numbers of tokens."""
    generator = torch.Generator().manual_seed(0)
    return [
        {"labels": torch.randint(3, V, (n,), generator=generator)}
        for n in (23, 9, 17, 5, 20, 12, 7, 21)
    ]


def collated(sequences):
    def padded(rows, value):
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    rows = [row["labels"] for row in sequences]
    return {
        "input_ids": padded(rows, 0),
        "labels": padded(rows, -100),
        "attention_mask": padded([torch.ones_like(row) for row in rows], 0),
    }


def accuracy(prediction):
    found = prediction.predictions.argmax(-1)
    return {"accuracy": (found == prediction.label_ids).mean()}


@pytest.mark.parametrize(
    ("options", "fused"),
    [
        ({}, 3),
        ({"gradient_accumulation_steps": 2}, 6),
        ({"label_smoothing_factor": 0.1}, 6),  # each by a gather and a sum over the classes
        ({"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2}, 12),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, 3),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": False}}, 3),
    ],
    ids=["as is", "accumulation", "smoothing", "both", "reentrant", "not reentrant"],
)
def test_trainer_comes_to_the_same_weights(tmp_path, options, fused):
    """And to the same losses on the way, predictions and metrics."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    options = options | {"gradient_checkpointing": "gradient_checkpointing_kwargs" in options}
    arguments = transformers.TrainingArguments(
        output_dir=tmp_path,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
        logging_steps=1,
        max_steps=3,
        seed=0,
        optim="sgd",
        learning_rate=0.5,
        per_device_train_batch_size=2,
        **options,
    )
    pair = Pair(causal())

    def trained(model):
        trainer = transformers.Trainer(
            model=model,
            args=arguments,
            train_dataset=sequences(),
            data_collator=collated,
            compute_metrics=accuracy,
        )
        trainer.train()
        was_fused = pair.fused
        found = trainer.predict(sequences()[:5])
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        losses += [found.metrics["test_loss"], found.metrics["test_accuracy"]]
        state = {name: x.detach() for name, x in model.named_parameters()}
        state |= {"losses": torch.tensor(losses), "logits": torch.from_numpy(found.predictions)}
        return state, was_fused

    before = step(pair.plain, of_labels).loss
    theirs, _ = trained(pair.plain)
    ours, was_fused = trained(pair.ours)
    agree(ours, theirs)
    assert was_fused == fused
    assert all("nested_detach" in why for why in pair.computed)  # Trainer, which keeps predictions
    assert abs(step(pair.plain, of_labels).loss - before) > 0.05, "it learnt"


# PEFT


@WHEN
@pytest.mark.parametrize("kind", ["beside the head", "on the head", "the head saved", "tied"])
def test_peft(when, kind):
    """LoRA's gradients, and the merged model's, which has its head back."""
    peft = pytest.importorskip("peft")
    options = {
        "beside the head": {"target_modules": ["q_proj", "v_proj"]},
        "on the head": {"target_modules": ["q_proj", "lm_head"]},
        "the head saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        "tied": {"target_modules": ["q_proj", "v_proj"]},
    }[kind]

    def change(model):
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, **options)
        return peft.get_peft_model(model, config)

    pair = Pair(causal(tie_word_embeddings=kind == "tied"), change, when)
    if kind == "on the head" and when == "before":  # what LoRA adds is tokens x classes anyway
        pair.trains(of_labels, fused=0, computed="peft")
    elif kind in ("on the head", "the head saved") and when == "after":
        pair.trains(of_labels, fused=0)
        ((name, why),) = pair.report.left.items()
        assert name == "base_model.model.lm_head"
        assert "is no torch.nn.Linear" in why
    elif kind == "the head saved":  # PEFT's copy of the head has an account of its own
        before = pair.report
        pair.report = torch_nnmath.swap(pair.ours)
        pair.trains(of_labels)
        assert not before.heads["lm_head"].fused
    else:
        pair.trains(of_labels)
    pair.plain, pair.ours = (
        model.merge_and_unload().requires_grad_() for model in (pair.plain, pair.ours)
    )
    pair.report = torch_nnmath.swap(pair.ours)
    for log in pair.report.heads.values():
        log.materialized.clear()
    pair.trains(of_labels)


# Saving, copying, resizing


def test_checkpoints_go_both_ways(tmp_path):
    """A swapped model's loads into one that is not, and the reverse; neither knows of a swap."""
    pair = Pair(causal("gpt2"))
    cls = type(pair.ours)
    for name, model in (("ours", pair.ours), ("plain", pair.plain)):
        model.save_pretrained(tmp_path / name)
    states = [cls.from_pretrained(tmp_path / name).state_dict() for name in ("ours", "plain")]
    assert list(states[0]) == list(states[1]) == list(pair.plain.state_dict())
    for name, x in pair.plain.state_dict().items():
        assert x.equal(states[0][name])
        assert x.equal(states[1][name])
    read = Pair(cls.from_pretrained(tmp_path / "ours").train())
    assert type(read.plain.lm_head) is nn.Linear
    read.trains(of_labels)
    with torch.no_grad():
        pair.plain.transformer.wte.weight.mul_(0.5)
    pair.ours.load_state_dict(pair.plain.state_dict())
    pair.trains(of_labels)
    pair.plain.load_state_dict(pair.ours.state_dict())


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
def test_a_copy_of_a_swapped_model_is_swapped(copied):
    """It has an account of its own, which a second swap reports."""
    pair = Pair(causal())
    pair.trains(of_labels)
    first, pair.ours = pair.report, copied(pair.ours)
    count = first.heads["lm_head"].fused
    pair.report = torch_nnmath.swap(pair.ours)
    assert len(pair.report) == 0
    pair.trains(of_labels)
    assert first.heads["lm_head"].fused == count


def test_resized_embeddings_bring_a_new_head():
    """A plain Linear, which a second swap turns over; both add tokens to the same ones."""
    pair = Pair(causal())
    for model in (pair.plain, pair.ours):
        torch.manual_seed(0)
        model.resize_token_embeddings(V + 12, mean_resizing=False)
    assert type(pair.ours.lm_head) is nn.Linear
    pair.trains(of_labels, fused=0)
    pair.report = torch_nnmath.swap(pair.ours)
    assert [change.name for change in pair.report] == ["lm_head"]
    pair.trains(of_labels, classes=V + 12)


def test_unswap_puts_the_classes_back():
    pair = Pair(causal("gemma2"))
    torch_nnmath.unswap(pair.ours)
    for ours, theirs in zip(pair.ours.modules(), pair.plain.modules(), strict=True):
        assert type(ours) is type(theirs)
        assert list(vars(ours)) == list(vars(theirs))
    pair.trains(of_labels, fused=0)


# torch.compile


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_compiled_as_a_whole(name):
    """Logits are plain then, and the numbers the same."""
    torch.compiler.reset()
    pair = Pair(causal(name, num_hidden_layers=1), lambda m: torch.compile(m, backend="aot_eager"))
    pair.plain = pair.plain._orig_mod
    pair.trains(of_labels, fused=0)
    pair.says(lambda model: model(input_ids=IDS).logits)


@WHEN
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_body_keeps_the_fused_head(when, backend):
    torch.compiler.reset()

    def change(model):
        model.model = torch.compile(model.model, backend=backend)

    pair = Pair(causal(num_hidden_layers=1), change, when)
    pair.plain.model = pair.plain.model._orig_mod
    pair.trains(of_labels)


def test_a_compiled_model_can_be_swapped_and_the_loss_stay_outside():
    torch.compiler.reset()
    pair = Pair(small(), lambda m: torch.compile(m, backend="aot_eager"))
    pair.plain = pair.plain._orig_mod
    assert [*pair.report.heads] == ["_orig_mod.lm_head"]
    pair.trains(of_small, fused=0)


# Half precision


def errors(ours: Step, theirs: Step, truth: Step, roundings: int = 1) -> None:
    """No gradient, nor the loss, is farther from the truth than the plain one, but for an eps."""
    eps = roundings * torch.finfo(torch.bfloat16).eps
    compared = {n: [ours.gradients[n], theirs.gradients[n], t] for n, t in truth[1].items()}
    if truth.loss is not None:
        compared["loss"] = [ours.loss, theirs.loss, truth.loss]
    largest = max(float(t.abs().max()) for t in truth.gradients.values())
    for name, (o, p, t) in compared.items():
        assert o.dtype == p.dtype
        error, allowed = (float((x.double() - t).abs().max()) for x in (o, p))
        scale = float(t.abs().max()) + largest / 8
        assert error <= allowed + eps * scale, f"{name}: {error}, plain {allowed}, scale {scale}"


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "granite", "gpt2", "phi"])
@pytest.mark.parametrize("kind", ["pure", "autocast", "loss outside", "accelerate"])
def test_bfloat16_is_as_near_to_the_truth_as_the_plain_model(name, kind):
    """The truth is the same model in float64. accelerate widens what the model returns."""
    model = causal(name)
    if kind == "pure":
        model = model.bfloat16()
    truth = step(copy.deepcopy(model).double(), of_labels)

    def change(model):
        if kind == "accelerate":
            accelerate = pytest.importorskip("accelerate")
            accelerate.state.AcceleratorState._reset_state(True)
            return accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
        return model

    pair = Pair(model, change)

    def loss_of(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=kind in ("autocast", "loss outside")):
            out = model(input_ids=IDS, labels=LABELS if kind in ("pure", "autocast") else None)
        dtypes.append(out.logits.dtype)
        return loss_outside(out.logits.float()) if out.loss is None else out.loss

    dtypes = []
    errors(step(pair.ours, loss_of), step(pair.plain, loss_of), truth)
    assert pair.fused == 1
    pair.makes_no_logits(loss_of, TOKENS_OF_BATCH, V)
    assert not pair.computed
    assert len(set(dtypes)) == 1


# Lightning


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning(tmp_path, precision):
    """Loss outside the model, in `training_step`; weights after three steps."""
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def training_step(self, batch, _):
            ids, labels = batch
            return loss_outside(self.model(ids), labels)

        def validation_step(self, batch, _):
            ids, labels = batch
            self.log("hits", (self.model(ids).argmax(-1) == labels).float().mean())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.5)

    def trained(module, precision):
        data = torch.utils.data.TensorDataset(IDS.repeat(3, 1), LABELS.repeat(3, 1))
        loaders = [torch.utils.data.DataLoader(data, batch_size=2) for _ in range(2)]
        quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        trainer = lightning.Trainer(
            accelerator="cpu",
            precision=precision,
            max_epochs=1,
            **{"default_root_dir": tmp_path, **dict.fromkeys(quiet, False)},
        )
        trainer.fit(module, *loaders)
        return Step(None, {name: p.detach() for name, p in module.named_parameters()})

    model = small()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    truth = trained(Module(copy.deepcopy(model)), "64-true")
    pair = Pair(Module(model.float()))
    theirs, ours = trained(pair.plain, precision), trained(pair.ours, precision)
    if precision == "32-true":
        agree(ours.gradients, theirs.gradients)
    errors(ours, theirs, truth, 3)
    assert pair.fused == 3
    assert all("argmax" in why for why in pair.computed)


# Hooks, other weights, other heads


def register(kind, hook):
    return lambda model: getattr(model.lm_head, f"register_{kind}_hook")(hook)


@WHEN
@pytest.mark.parametrize(
    ("kind", "hook", "computed"),
    [
        ("forward", lambda module, args, out: None, "forward hooks of the head"),
        ("forward", lambda module, args, out: out * 2, "forward hooks of the head"),
        ("forward_pre", lambda module, args: (args[0] * 2,), None),
        ("full_backward", lambda module, given, of: (given[0] * 3,), "grad_fn"),
        ("full_backward_pre", lambda module, given: (given[0] * 3,), "grad_fn"),
    ],
)
def test_hooks_on_the_head_are_heard(when, kind, hook, computed):
    """Who sees logits or their gradient gets them; the report says so."""
    pair = Pair(small(), register(kind, hook), when)
    pair.trains(of_small, fused=not computed, computed=computed)


def test_the_user_is_warned_that_memory_is_not_saved():
    """Once, in training; the line is the user's."""
    model = small()
    torch_nnmath.swap(model)
    with pytest.warns(MaterializedLogits, match=r"exp at .*test_models.py:\d+"):
        step(model, lambda model: model(IDS).exp().mean())
    step(model, lambda model: model(IDS).exp().mean())


class Tripled(torch.autograd.Function):
    """Of the gradient; the value is as it was."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return 3 * gradient


@pytest.mark.parametrize(
    ("between", "computed"),
    [
        (lambda head, x: Tripled.apply(head(x)), "TripledBackward stands between"),
        (lambda head, x: checkpoint(head, x, use_reentrant=True), "CheckpointFunctionBackward"),
        (lambda head, x: checkpoint(head, x, use_reentrant=False), None),
        (lambda head, x: checkpoint(lambda y: head(y) / 2, x, use_reentrant=False), None),
    ],
    ids=["function", "reentrant", "not reentrant", "scaled"],
)
def test_who_stands_between_head_and_loss_is_heard(between, computed):
    """A Function of the user's, a checkpoint around the head."""

    def loss_of(model):
        return loss_outside(between(model.lm_head, model.body(model.embed(IDS))))

    Pair(small()).trains(loss_of, fused=not computed, computed=computed)


@WHEN
@pytest.mark.parametrize("kind", ["own", "devices"])
def test_hooks_of_accelerate(when, kind):
    """They put a `forward` into the instance; put there before, it keeps the head from changing."""
    hooks = pytest.importorskip("accelerate.hooks")

    class Doubled(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            return (args[0] * 2, *args[1:]), kwargs

    hook = Doubled() if kind == "own" else hooks.AlignDevicesHook("cpu", io_same_device=True)

    def change(model):
        model.lm_head = hooks.add_hook_to_module(model.lm_head, hook)

    pair = Pair(small(), change, when)
    pair.trains(of_small, fused=when == "before")
    own = {"lm_head": "its instance has a forward of its own"}
    assert pair.report.left == (own if when == "after" else {})


@WHEN
@pytest.mark.parametrize(
    "norm", [parametrizations.weight_norm, parametrizations.orthogonal, "pruned", "old"]
)
def test_a_weight_that_is_made_anew(when, norm):
    """A parametrised head that was swapped before stays fused, and its parts have the gradients;
    one that comes parametrised is left, and the report says so.
    """
    norms = {"pruned": lambda m: prune.l1_unstructured(m, "weight", 0.3)}
    norms["old"] = nn.utils.weight_norm
    norm = norms.get(norm, norm)

    def change(model):
        model.lm_head = norm(model.lm_head)

    pair = Pair(small(bias=False), change, when)
    is_left = when == "after" and norm not in norms.values()
    pair.trains(of_small, fused=not is_left)
    why = {"lm_head": "torch.nn.utils.parametrize.ParametrizedLinear is a class of its own"}
    assert pair.report.left == (why if is_left else {})


class Wrapped(Tensor):
    """A tensor subclass that holds another, as those of quantised weights do."""

    @staticmethod
    def __new__(cls, inner):
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def unwrapped(x):
            return x.inner if isinstance(x, Wrapped) else x

        out = func(*tree_map(unwrapped, args), **tree_map(unwrapped, kwargs or {}))
        name = func.overloadpacket.__name__
        return Wrapped(out) if name in ("detach", "alias", "clone") else out


class Named(Tensor):
    """A tensor subclass without rules of its own."""


@WHEN
@pytest.mark.parametrize("wrap", [Wrapped, lambda w: w.as_subclass(Named)])
def test_a_weight_of_another_tensor_class(when, wrap):
    """Logits are plain, the gradients right."""

    def change(model):
        model.lm_head.weight = nn.Parameter(wrap(model.lm_head.weight.detach()))

    Pair(small(), change, when).trains(of_small, fused=0)


@pytest.mark.parametrize("when", ["after", "unswapped", "before"])
def test_dynamic_quantisation(when):
    """A quantised head is left; PyTorch, which looks for exact classes, leaves a swapped one."""
    quantization = pytest.importorskip("torch.ao.quantization")
    if not hasattr(quantization, "quantize_dynamic"):
        pytest.skip("this PyTorch quantises no modules")

    def change(model):
        if when == "unswapped":
            torch_nnmath.unswap(model)
        return quantization.quantize_dynamic(model.float().eval(), {nn.Linear})

    pair = Pair(causal(), change, "after" if when == "after" else "before")
    if when == "after":
        ((name, why),) = pair.report.left.items()
        assert name == "lm_head"
        assert "is no torch.nn.Linear" in why
    if when == "before":
        assert type(pair.ours.lm_head) is torch_nnmath.nn.Linear
        pair.plain = causal()
    pair.says(lambda model: model(input_ids=IDS).logits)


def test_functional_call_with_other_parameters():
    """Also under a transform of `torch.func`, where logits are plain."""
    pair = Pair(small())

    def loss_of(parameters, model):
        return loss_outside(torch.func.functional_call(model, parameters, (IDS,)))

    def with_autograd(model):
        others = {n: (1.5 * p).detach().requires_grad_() for n, p in model.named_parameters()}
        loss = loss_of(others, model)
        return dict(zip(others, torch.autograd.grad(loss, [*others.values()]), strict=True))

    def with_func(model):
        return torch.func.grad(loss_of)(dict(model.named_parameters()), model)

    agree(with_autograd(pair.ours), with_autograd(pair.plain))
    assert pair.fused == 1
    agree(with_func(pair.ours), with_func(pair.plain))
    assert pair.fused == 1


@pytest.mark.parametrize(
    ("loss_of", "fused", "computed"),
    [
        (lambda z, y: nn.CrossEntropyLoss(label_smoothing=0.1)(z.transpose(1, 2), y), 1, None),
        (lambda z, y: OURS(z.flatten(0, 1), y.flatten()), 1, None),
        (lambda z, y: -z.log_softmax(-1).gather(-1, y.clamp(min=0)[..., None]).mean(), 1, None),
        (lambda z, y: sum(F.cross_entropy(a, b) for a, b in zip(z, y, strict=True)), 2, None),
        (lambda z, y: F.cross_entropy(z[y != -100], y[y != -100]), 1, None),
        (lambda z, y: loss_outside(5 * torch.tanh(z / 2) / 1.5, y), 1, None),
        (lambda z, y: torch.stack([a.logsumexp(-1) for a in z]).mean(), 2, None),
        (lambda z, y: torch.stack([a.logcumsumexp(-1) for a in z]).mean(), 0, "logcumsumexp"),
        (lambda z, y: loss_outside(z, y) + z.softmax(-1)[..., 3].mean(), 1, "softmax"),
    ],
    ids=[
        *("module", "ours", "log-probability", "sequences", "masked", "capped", "logsumexp"),
        *("sums of exponentials", "two"),
    ],
)
def test_losses_outside_the_model(loss_of, fused, computed):
    """As users of `model(...).logits` write them."""
    pair = Pair(causal("phi"))
    pair.trains(lambda m: loss_of(m(input_ids=IDS).logits, LABELS), fused, computed)


def test_logits_are_to_be_read_before_the_weights_change():
    """Read first they stay as they are; no numbers are made of other weights than the call's."""

    @torch.no_grad()
    def logits_after_a_step(model, read):
        with torch.enable_grad():
            out = model(input_ids=IDS, labels=LABELS)
        out.loss.backward()
        if read:
            out.logits.argmax()
        torch.optim.SGD(model.parameters(), 0.1).step()
        return {"logits": out.logits + 0}

    pair = Pair(causal())
    with pytest.warns(MaterializedLogits, match="argmax at"):
        ours = logits_after_a_step(pair.ours, True)
    agree(ours, logits_after_a_step(pair.plain, True))
    with pytest.raises(RuntimeError, match="changed in place since, as by an optimizer's step"):
        logits_after_a_step(pair.ours, False)


# Which head


def test_a_model_without_a_linear():
    """There is nothing to fuse; what else there is changes."""
    pair = Pair(nn.Sequential(nn.Embedding(V, V), nn.Tanh()).double())
    assert pair.report.heads == pair.report.left == {}
    pair.trains(of_small, fused=0)


@pytest.mark.parametrize("head", ["lm_head", "module", "auto", None])
def test_the_head_of_a_model_of_transformers(head):
    model = causal()
    pair = Pair(model, head=model.lm_head if head == "module" else head)
    assert [*pair.report.heads] == (["lm_head"] if head else [])
    assert any(change.name == "lm_head" for change in pair.report)
    pair.trains(of_labels, fused=bool(head))
    again = torch_nnmath.swap(pair.ours, head=None if head is None else "auto")
    assert [*again] == []
    assert again.heads == pair.report.heads


def test_another_layer_as_head_is_right():
    """Features that go on into the network are computed."""
    pair = Pair(small(), head="body.0.0")
    with pytest.warns(MaterializedLogits):
        ours = step(pair.ours, of_small)
    agree(ours.gradients, step(pair.plain, of_small).gradients)
    assert not pair.fused
    assert len(pair.computed) == 1


@pytest.mark.parametrize(
    ("head", "error", "sentence"),
    [
        ("lm_haed", ValueError, "no module named 'lm_haed'; near it are 'lm_head'"),
        ("model.embed_tokens", ValueError, "must be a torch.nn.Linear"),
        ("model", ValueError, "must be a torch.nn.Linear"),
        (nn.Linear(32, V), ValueError, "is not in the model"),
        (7, TypeError, "a name, a module"),
    ],
)
def test_a_head_that_cannot_be_is_said_in_a_sentence(head, error, sentence):
    model = causal()
    with pytest.raises(error, match=sentence):
        torch_nnmath.swap(model, head=head)
    assert type(model.lm_head) is nn.Linear


# Two processes


class Case(NamedTuple):
    kind: str
    options: dict
    loss: str  # inside the model or outside
    outcome: str  # "fused", "computed" logits, both, or other words
    when: tuple[str, ...] = ("before", "after")  # swap, than the wrapper


CASES = [
    Case("ddp", {}, "inside", "fused"),
    Case("ddp", {}, "outside", "fused"),
    # these look at the graph of what the model returns, loss and logits; the last at first only
    Case("ddp", {"find_unused_parameters": True}, "inside", "fused"),
    Case("ddp", {"find_unused_parameters": True}, "outside", "computed"),
    Case("ddp", {"static_graph": True}, "outside", "computed"),
    Case("fsdp", {}, "inside", "fused"),
    Case("fsdp", {"reshard_after_forward": True}, "inside", "fused"),
    Case("fsdp", {"reshard_after_forward": False}, "inside", "fused"),
    # FSDP has a hook on what the model returns
    Case("fsdp", {}, "outside", "computed"),
    Case("fsdp", {"reshard_after_forward": False}, "outside", "computed"),
    # the weight is gone when logits are needed
    Case("fsdp", {"reshard_after_forward": True}, "outside", "freed"),
    Case("fsdp", {}, "inside, then logits", "freed"),
    # the head is wrapped by itself: it has hooks, and another class
    Case("fsdp, the head too", {}, "inside", "computed", ("before",)),
    Case("fsdp, the head too", {}, "inside", "left", ("after",)),
    Case("tensor parallel", {}, "inside", "plain"),  # the weight is a DTensor
]
CASES = [(case, when) for case in CASES for when in case.when]


def of_case(case, when, ids, labels):
    """How many losses were fused and why logits were computed, if the numbers are right."""

    def change(model):
        if case.kind == "ddp":
            return DistributedDataParallel(model, **case.options)
        if case.kind == "tensor parallel":
            plan = {"lm_head": tensor_parallel.ColwiseParallel(output_layouts=Replicate())}
            mesh = dist.init_device_mesh("cpu", (2,))
            return tensor_parallel.parallelize_module(model, mesh, plan)
        for module in (model.body, *[model.lm_head] * case.kind.endswith("too")):
            fsdp.fully_shard(module)
        return fsdp.fully_shard(model, **case.options)

    def loss_of(model):
        if case.loss == "outside":
            return loss_outside(model(ids), labels)
        loss, loss_of.logits = model(ids, labels)
        return loss

    def whole(step):
        gradients = {name.removeprefix("module."): g for name, g in step.gradients.items()}
        return {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients.items()}

    pair = Pair(small(spare=case.options.get("find_unused_parameters", False)), change, when)
    theirs, ours = step(pair.plain, loss_of), step(pair.ours, loss_of)
    agree({"loss": ours.loss}, {"loss": theirs.loss})
    agree(whole(ours), whole(theirs))
    if case.loss == "inside, then logits":
        loss_of.logits.sum()
    return pair.fused, pair.computed, pair.report.left


def work(rank, path):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store, limit = f"file://{path}/store", datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=limit)
    results = []
    for case, when in CASES:
        part = 0 if case.kind == "tensor parallel" else rank  # of the data
        ids, labels = batch(seed=10 + part)
        labels[0, : 9 * part] = -100  # so that each has another number of tokens
        try:
            results.append(of_case(case, when, ids, labels))
        except Exception as error:
            results.append(f"{type(error).__name__}: {error}")
            if case.outcome != "freed":  # which both processes meet; else one would wait for ever
                results += [f"not run after {results[-1]}"] * (len(CASES) - len(results))
                break
    Path(path, str(rank)).write_text(json.dumps(results))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What two processes found in every case, each."""
    path = str(tmp_path_factory.mktemp("processes"))
    torch.multiprocessing.spawn(work, (path,), 2)
    return [json.loads(Path(path, str(rank)).read_text()) for rank in range(2)]


def said(case):
    *words, _ = case[0]
    return " ".join([*map(str, words), case[1]])


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo")
@pytest.mark.parametrize("i", range(len(CASES)), ids=[*map(said, CASES)])
def test_two_processes(processes, i):
    """DDP, FSDP2 and tensor parallelism: the same gradients as without swap; or, where FSDP has
    freed the weight that logits are computed from, an error that says what to do.
    """
    outcome = CASES[i][0].outcome
    for results in processes:
        if outcome == "freed":
            assert results[i].startswith("RuntimeError: the logits of head")
            assert "as FSDP does after the forward" in results[i]
            assert "reshard_after_forward=False" in results[i]
            continue
        assert isinstance(results[i], list), results[i]
        fused, computed, left = results[i]
        assert fused == ("fused" in outcome)
        assert bool(computed) == ("computed" in outcome), computed
        assert [*left] == ["lm_head"] * (outcome == "left")


# Memory


def measure(kind, path):
    """Run in a process of its own: the peak of a training step beyond parameters and gradients."""
    torch.manual_seed(0)
    model = LM(classes=131072, bias=False)
    if kind == "swapped":
        report = torch_nnmath.swap(model)
    ids, labels = batch(2, 256, 131072)
    parameters = dict(model.named_parameters())

    def run(length=None):
        loss, _ = model(ids[:, :length], labels[:, :length])
        return loss, *torch.autograd.grad(loss, [*parameters.values()])

    run(8)  # what a first call loads is not counted
    found = {"peak": peak(run, types.SimpleNamespace(args=[*parameters.values()]))}
    loss, *gradients = run()
    assert kind == "plain" or report.heads["lm_head"].fused == 3
    found |= {"loss": loss.detach(), "gradients": dict(zip(parameters, gradients, strict=True))}
    torch.save(found, path)


def test_a_step_of_a_large_vocabulary_takes_a_fraction_of_the_memory(tmp_path):
    """512 tokens of 131072 classes: logits are 256 MiB, of which PyTorch holds several copies."""
    found = {}
    for kind in ("plain", "swapped"):
        code = f"import test_models; test_models.measure({kind!r}, {str(tmp_path / kind)!r})"
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True)
        found[kind] = torch.load(tmp_path / kind)
    plain, swapped, logits = found["plain"], found["swapped"], 512 * 131072 * 4
    assert plain["peak"] > 2 * logits
    assert swapped["peak"] < logits / 2
    agree({"loss": swapped["loss"]}, {"loss": plain["loss"]})
    agree(swapped["gradients"], plain["gradients"])
