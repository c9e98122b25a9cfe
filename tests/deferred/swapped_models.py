"""Small random models, and the comparison of a swapped model with its plain copy.

Where the report counts a loss without logits, no tensor of tokens x classes may be made. Nothing is
downloaded.
"""

import copy
import functools
import math
import os
import re
import warnings
from typing import NamedTuple

import pytest
import torch
from conftest import OperationRecorder
from torch import Tensor, nn
from torch.nn import functional as F

import torch_nnmath
from torch_nnmath.deferred import MaterializedLogits
from torch_nnmath.deferred import logits as deferred_logits

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

IGNORED_WARNINGS = [
    pytest.mark.filterwarnings(f"ignore:{warning}")
    for warning in (
        ".*is deprecated and will be removed in v6:FutureWarning",  # transformers, of its own
        ".*isinstance.treespec, LeafSpec.*:FutureWarning",  # Lightning calls what PyTorch renamed
        ".*is deprecated. Please switch to `torch.compile`",  # Inductor
        "torch.ao.quantization is deprecated:DeprecationWarning",
        "torch.quantize_per_tensor:UserWarning",  # torch.ao
        "`torch.nn.utils.weight_norm` is deprecated:FutureWarning",
    )
]

V, ROWS, LENGTH = 307, 2, 23  # classes; tokens. No other size is equal to these
TOKENS_OF_BATCH = (ROWS * LENGTH, ROWS * (LENGTH - 1))

# Whether `swap` comes before or after the user's change of the model.
SWAP_BEFORE_OR_AFTER = pytest.mark.parametrize("when", ["before", "after"])


def defer_small_logits() -> None:
    """Defers logits of any size in this process, as a fixture does in the tests' own process."""
    deferred_logits.MIN_DEFERRED_BYTES = deferred_logits.MIN_CLASSES_PER_FEATURE = 0


class Step(NamedTuple):
    loss: Tensor | None
    gradients: dict[str, Tensor]


def run_step(model, loss_of) -> Step:
    """Computes the loss and its gradients, as a training step without the optimizer."""
    torch.manual_seed(2)
    model.zero_grad()
    loss = loss_of(model)
    loss.backward()
    named = ((name.replace("_orig_mod.", ""), p.grad) for name, p in model.named_parameters())
    return Step(loss.detach(), {name: g.clone() for name, g in named if g is not None})


def assert_agree(tensors: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    """Asserts equality up to rounding, relative to a tensor's and to all tensors' largest entry."""
    assert tensors.keys() == truth.keys()
    largest = max(float(t.detach().abs().max()) for t in truth.values())
    for name, expected in truth.items():
        expected = expected.detach()
        atol = torch.finfo(expected.dtype).eps * (64 * float(expected.abs().max()) + 8 * largest)
        torch.testing.assert_close(
            tensors[name].detach(), expected, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_steps_agree(step: Step, truth: Step) -> None:
    assert step.loss is not None
    assert truth.loss is not None
    assert_agree({"loss": step.loss}, {"loss": truth.loss})
    assert_agree(step.gradients, truth.gradients)


def record_logits(model, loss_of, rows, classes) -> tuple[Step, list[str]]:
    """Runs a step, and lists the tensors with these numbers of rows and classes that it made."""

    def has_logits_shape(shape):
        return classes in shape and math.prod(shape) // classes in rows

    with OperationRecorder() as recorder:
        step = run_step(model, loss_of)
    return step, recorder.list_outputs(has_logits_shape)


def apply_change(model, change):
    """Applies a change, which may return another module."""
    torch.manual_seed(3)
    changed = change(model)
    return changed if isinstance(changed, nn.Module) else model


class Pair:
    """A plain model and its swapped copy, both changed as a user might change them.

    `when` tells whether the copy is swapped before or after the change.
    """

    def __init__(self, model, change=lambda model: model, when="after", **options):
        self.plain = apply_change(copy.deepcopy(model), change)
        if when == "before":
            self.report = torch_nnmath.swap(model, **options)
        self.swapped = apply_change(model, change)
        if when == "after":
            self.report = torch_nnmath.swap(self.swapped, **options)

    @property
    def fused(self) -> int:
        """The number of losses that were computed without logits."""
        return sum(log.fused for log in self.report.heads.values())

    @property
    def reasons(self) -> list[str]:
        """The reasons for which logits were computed."""
        return [reason for log in self.report.heads.values() for reason in log.materialized]

    def assert_trains_alike(
        self, loss_of, fused=1, reason=None, rows=TOKENS_OF_BATCH, classes=V
    ) -> None:
        """Asserts that a training step has the same loss and gradients in both models.

        The number of losses computed without logits must be `fused`. If there is a `reason`, logits
        must be computed, for reasons that match it.
        """
        fused_before = self.fused
        is_without_logits = fused and not reason
        if is_without_logits:
            truth, plain_logits = record_logits(self.plain, loss_of, rows, classes)
            assert plain_logits, "the plain model's logits were not recorded"
        else:
            truth = run_step(self.plain, loss_of)
        with warnings.catch_warnings():
            if reason:
                warnings.simplefilter("ignore", MaterializedLogits)
            step = run_step(self.swapped, loss_of)
        assert_steps_agree(step, truth)
        fused_now = self.fused - fused_before
        assert fused_now == fused, f"fused {fused_now}: {self.report!r}"
        assert bool(reason) == bool(self.reasons), f"computed by {self.reasons}"
        assert all(re.search(reason, other) for other in self.reasons), self.reasons
        if is_without_logits:
            self.assert_no_logits(loss_of, rows, classes)

    def assert_no_logits(self, loss_of, rows=TOKENS_OF_BATCH, classes=V) -> None:
        """Asserts that a step of the swapped model makes no tensor of tokens x classes."""
        _, logits = record_logits(self.swapped, loss_of, rows, classes)
        assert not logits, f"logits were made: {logits}"

    def assert_same_logits(self, logits_of) -> None:
        """Asserts equal logits with the strides of a plain tensor."""
        with torch.no_grad():
            logits, expected = logits_of(self.swapped.eval()), logits_of(self.plain.eval())
        assert logits.stride() == expected.stride()
        assert_agree({"logits": logits + 0}, {"logits": expected})
        self.swapped.train()
        self.plain.train()


# Data and losses


def make_batch(rows=ROWS, length=LENGTH, classes=V, seed=1):
    """Returns tokens, and labels, some of which are ignored."""
    ids = torch.randint(3, classes, (rows, length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[0, :5] = labels[-1, -2:] = -100
    return ids, labels


IDS, LABELS = make_batch()


def shifted_loss(logits, labels=LABELS):
    """The loss as users write it where the model does not compute it."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def loss_in_model(model):
    return model(input_ids=IDS, labels=LABELS).loss


def loss_of_logits(model):
    return shifted_loss(model(input_ids=IDS).logits)


def loss_of_lm(model):
    return shifted_loss(model(IDS))


# Models


class LM(nn.Module):
    """A language model of PyTorch's modules: returns logits, or with labels the loss and logits."""

    def __init__(self, classes=V, hidden=32, bias=True, has_unused_layer=False):
        super().__init__()
        self.unused = nn.Linear(hidden, hidden) if has_unused_layer else None
        self.embed = nn.Embedding(classes, hidden)
        layers = (nn.Sequential(nn.Linear(hidden, hidden), nn.Tanh()) for _ in range(2))
        self.body = nn.Sequential(*layers)
        self.lm_head = nn.Linear(hidden, classes, bias)

    def forward(self, ids, labels=None):
        z = self.lm_head(self.body(self.embed(ids)))
        return z if labels is None else (shifted_loss(z, labels), z)


def make_lm(**options):
    torch.manual_seed(0)
    return LM(**options).double()


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
def enlarge_logits(model):
    """Gives a model logits as large as a trained one's; with small ones caps hardly show."""
    head = model.get_output_embeddings()
    head.weight.mul_(20)
    for bias in (head.bias, getattr(model, "final_logits_bias", None)):
        if bias is not None:
            bias.normal_()
    return model.train()


def make_causal(name="llama", **changes):
    """Returns a causal language model of transformers, by the name of its architecture."""
    return copy.deepcopy(_build_causal(name, tuple(changes.items())))


@functools.cache
def _build_causal(name, changes):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    options = SIZES | TOKENS | CAUSAL[name] | dict(changes)
    config = transformers.AutoConfig.for_model(name, **options)
    return enlarge_logits(transformers.AutoModelForCausalLM.from_config(config))


class Task(NamedTuple):
    """A model of transformers, its inputs, and the rows and classes of its logits."""

    model: nn.Module
    inputs: dict[str, Tensor]
    rows: list[int]
    classes: int


def make_task(name) -> Task:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    words = {"input_ids": IDS, "labels": LABELS}
    tags = {"input_ids": IDS, "labels": LABELS.clamp(max=88)}
    images = {"pixel_values": torch.randn(48, 3, 16, 16), "labels": torch.randint(1013, (48,))}
    t5 = {"vocab_size": V, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    t5["decoder_start_token_id"] = 0
    sequences = {"vocab_size": V} | ENCODER | DECODER | TOKENS
    untied = sequences | {"tie_word_embeddings": False}
    vit = SIZES | {"image_size": 16, "patch_size": 8, "num_labels": 1013}
    kind, options, inputs, classes = {
        "bert": ("BertForMaskedLM", SIZES, words, V),
        "bert tagger": ("BertForTokenClassification", SIZES | {"num_labels": 89}, tags, 89),
        "bart": ("BartForConditionalGeneration", untied, words, V),
        "marian": ("MarianMTModel", sequences, words, V),
        "t5": ("T5ForConditionalGeneration", t5, words, V),
        "vit": ("ViTForImageClassification", vit, images, 1013),
    }[name]
    cls = getattr(transformers, kind)
    model = cls(cls.config_class(**options))
    if model.get_output_embeddings() is not None:
        enlarge_logits(model)
    return Task(model.train(), inputs, [inputs["labels"].numel()], classes)


# Half precision


def assert_no_larger_errors(step: Step, plain: Step, truth: Step, roundings: int = 1) -> None:
    """Asserts that the errors of the loss and of every gradient are at most the plain model's.

    They may exceed them by this number of bfloat16 roundings.
    """
    eps = roundings * torch.finfo(torch.bfloat16).eps
    compared = {
        name: [step.gradients[name], plain.gradients[name], expected]
        for name, expected in truth.gradients.items()
    }
    if truth.loss is not None:
        compared["loss"] = [step.loss, plain.loss, truth.loss]
    largest = max(float(t.abs().max()) for t in truth.gradients.values())
    for name, (value, plain_value, expected) in compared.items():
        assert value.dtype == plain_value.dtype
        error, allowed = (float((x.double() - expected).abs().max()) for x in (value, plain_value))
        scale = float(expected.abs().max()) + largest / 8
        assert error <= allowed + eps * scale, f"{name}: {error}, plain {allowed}, scale {scale}"
