"""`swap` in models of transformers: training, generation, Trainer, PEFT, copies, half precision."""

import copy
import io
import itertools
import math
import pickle

import pytest
import torch
from conftest import OperationRecorder, limit_head_blocks
from swapped_models import (
    CAUSAL,
    IDS,
    IGNORED_WARNINGS,
    LABELS,
    SWAP_BEFORE_OR_AFTER,
    Pair,
    V,
    assert_agree,
    assert_no_larger_errors,
    loss_in_model,
    loss_of_logits,
    make_batch,
    make_causal,
    make_task,
    run_step,
    shifted_loss,
)
from torch import Tensor, nn
from torch.nn import functional as F

import torch_nnmath
from torch_nnmath.deferred import MaterializedLogits

pytestmark = IGNORED_WARNINGS
NNMATH_LOSS = torch_nnmath.nn.CrossEntropyLoss(z_loss=1e-3)

# Architectures


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_language_model_trains_and_generates_alike(name):
    """Has tied weights, caps, scales, divisions, biases, experts or recurrences."""
    pair = Pair(make_causal(name))
    pair.assert_trains_alike(loss_in_model)
    pair.assert_trains_alike(loss_of_logits)
    pair.assert_same_logits(lambda model: model(input_ids=IDS).logits)
    assert generate(pair.swapped).equal(generate(pair.plain))


@pytest.mark.parametrize(
    ("name", "option", "neutral"),
    [
        ("gemma2", "final_logit_softcapping", None),
        ("cohere", "logit_scale", 1.0),
        ("granite", "logits_scaling", 1.0),
    ],
)
def test_caps_and_scales_change_the_loss(name, option, neutral):
    """Otherwise the test above could not tell whether they were applied."""
    loss, other = (
        loss_in_model(make_causal(name)),
        loss_in_model(make_causal(name, **{option: neutral})),
    )
    assert abs(loss - other) > 0.1


def test_step_of_several_blocks_of_rows_agrees():
    """1400 rows of 4099 classes are three blocks of the kernel."""
    ids, labels = make_batch(2, 700, 4099)
    pair = Pair(make_causal("llama", vocab_size=4099, max_position_embeddings=1024))
    pair.assert_trains_alike(
        lambda model: model(input_ids=ids, labels=labels).loss, rows=(1400, 1398), classes=4099
    )


@pytest.mark.parametrize("name", ["bert", "bert tagger", "bart", "marian", "t5", "vit"])
def test_model_of_other_task_trains_alike(name):
    """A masked language model, a tagger, encoder-decoders, an image classifier."""
    task = make_task(name)
    pair = Pair(task.model)
    pair.assert_trains_alike(
        lambda model: model(**task.inputs).loss, rows=task.rows, classes=task.classes
    )
    pair.assert_same_logits(lambda model: model(**task.inputs).logits)


def test_gradient_of_a_tied_weight_is_the_sum_of_both():
    """The sum of those of an untied embedding and an untied head."""
    pair, untied = Pair(make_causal("gpt2")), make_causal("gpt2", tie_word_embeddings=False)
    assert pair.swapped.lm_head.weight is pair.swapped.transformer.wte.weight
    untied.load_state_dict(pair.plain.state_dict())
    gradients = run_step(untied, loss_in_model).gradients
    gradients["transformer.wte.weight"] += gradients.pop("lm_head.weight")
    pair.assert_trains_alike(loss_in_model)
    assert_agree(run_step(pair.swapped, loss_in_model).gradients, gradients)


# Generation


def generate(model, ids=IDS, **options):
    torch.manual_seed(5)
    model.eval()
    options = {"do_sample": False, "attention_mask": torch.ones_like(ids)} | options
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=6, **options)
    model.train()
    return out


@pytest.mark.parametrize("name", ["llama", "bart"])
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
def test_generated_tokens_are_equal(name, options):
    pair = Pair(make_task("bart").model if name == "bart" else make_causal(name))
    tokens, expected = generate(pair.swapped, **options), generate(pair.plain, **options)
    assert type(tokens) is Tensor
    assert tokens.equal(expected)
    assert tokens.unique().numel() > 3


# Trainer


def make_sequences():
    """Returns sequences of unequal length: batches have unequal numbers of tokens."""
    generator = torch.Generator().manual_seed(0)
    return [
        {"labels": torch.randint(3, V, (n,), generator=generator)}
        for n in (23, 9, 17, 5, 20, 12, 7, 21)
    ]


def collate(sequences):
    def pad(rows, value):
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    rows = [row["labels"] for row in sequences]
    return {
        "input_ids": pad(rows, 0),
        "labels": pad(rows, -100),
        "attention_mask": pad([torch.ones_like(row) for row in rows], 0),
    }


def compute_accuracy(prediction):
    predicted = prediction.predictions.argmax(-1)
    return {"accuracy": (predicted == prediction.label_ids).mean()}


@pytest.fixture(scope="module")
def plain_results():
    """Caches results of the plain model: checkpointing does not change them."""
    return {}


@pytest.mark.parametrize(
    ("options", "fused"),
    [
        ({}, 3),
        ({"gradient_accumulation_steps": 2}, 6),
        # each smoothed loss consists of a gather and a sum over the classes
        ({"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2}, 12),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, 3),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": False}}, 3),
    ],
    ids=["default", "accumulation", "smoothing and accumulation", "reentrant", "not reentrant"],
)
def test_trainer_reaches_the_same_weights_and_metrics(tmp_path, plain_results, options, fused):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    is_checkpointed = "gradient_checkpointing_kwargs" in options
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
        gradient_checkpointing=is_checkpointed,
        **options,
    )
    pair = Pair(make_causal())

    def train(model):
        trainer = transformers.Trainer(
            model=model,
            args=arguments,
            train_dataset=make_sequences(),
            data_collator=collate,
            compute_metrics=compute_accuracy,
        )
        trainer.train()
        fused_in_training = pair.fused
        prediction = trainer.predict(make_sequences()[:5])
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        losses += [prediction.metrics["test_loss"], prediction.metrics["test_accuracy"]]
        state = {name: x.detach() for name, x in model.named_parameters()}
        state |= {
            "losses": torch.tensor(losses),
            "logits": torch.from_numpy(prediction.predictions),
        }
        return state, fused_in_training

    key = () if is_checkpointed else tuple(options)
    if key not in plain_results:
        before = run_step(pair.plain, loss_in_model).loss
        plain_results[key], _ = train(pair.plain)
        assert abs(run_step(pair.plain, loss_in_model).loss - before) > 0.05, "nothing was learnt"
    results, fused_in_training = train(pair.swapped)
    assert_agree(results, plain_results[key])
    assert fused_in_training == fused
    assert all("trainer" in reason for reason in pair.reasons), pair.reasons  # of its predictions


EVALUATIONS = {
    "loss": {"args": {"prediction_loss_only": True}},
    "smoothed loss": {"args": {"prediction_loss_only": True, "label_smoothing_factor": 0.1}},
    "accuracy": {
        "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1),
        "compute_metrics": lambda p: {"accuracy": (p.predictions == p.label_ids).mean()},
    },
}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_trainer_evaluates_without_logits(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    pair = Pair(make_causal())
    options = dict(EVALUATIONS[name])
    arguments = transformers.TrainingArguments(
        output_dir=tmp_path,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        per_device_eval_batch_size=2,
        **options.pop("args", {}),
    )

    def evaluate(model):
        sequences = make_sequences()
        trainer = transformers.Trainer(
            model=model,
            args=arguments,
            eval_dataset=sequences,
            data_collator=collate,
            **options,
        )
        with OperationRecorder() as recorder:
            metrics = trainer.evaluate()
        logits = recorder.list_outputs(lambda s: math.prod(s) > 32 * V and math.prod(s) % V == 0)
        names = ("eval_loss", "eval_accuracy")
        return [metrics[name] for name in names if name in metrics], logits

    with limit_head_blocks():  # blocks of 32 rows
        results, logits = evaluate(pair.swapped)
    expected, plain_logits = evaluate(pair.plain)
    assert results == pytest.approx(expected, rel=1e-5)
    assert plain_logits
    assert not logits
    assert not pair.reasons
    assert pair.fused == 4 * (1 + (name == "smoothed loss"))


# PEFT


@SWAP_BEFORE_OR_AFTER
@pytest.mark.parametrize("kind", ["beside the head", "on the head", "the head saved", "tied"])
def test_peft_and_merged_model_train_alike(when, kind):
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

    pair = Pair(make_causal(tie_word_embeddings=kind == "tied"), change, when)
    if kind == "on the head" and when == "before":  # LoRA itself makes tokens x classes
        pair.assert_trains_alike(loss_in_model, fused=0, reason="peft")
        pair.report = torch_nnmath.swap(pair.swapped)
        for log in pair.report.heads.values():
            log.materialized.clear()
        pair.assert_trains_alike(loss_in_model)
    elif kind == "the head saved" and when == "before":  # PEFT copies the head, with its log
        before = pair.report
        pair.report = torch_nnmath.swap(pair.swapped)
        pair.assert_trains_alike(loss_in_model)
        assert not before.heads["lm_head"].fused
    else:
        pair.assert_trains_alike(loss_in_model)
    pair.plain, pair.swapped = (
        model.merge_and_unload().requires_grad_() for model in (pair.plain, pair.swapped)
    )
    pair.report = torch_nnmath.swap(pair.swapped)
    for log in pair.report.heads.values():
        log.materialized.clear()
    pair.assert_trains_alike(loss_in_model)


# Saving, copying, resizing


def test_checkpoints_load_into_swapped_and_plain_models(tmp_path):
    pair = Pair(make_causal("gpt2"))
    cls = type(pair.swapped)
    for name, model in (("swapped", pair.swapped), ("plain", pair.plain)):
        model.save_pretrained(tmp_path / name)
    states = [cls.from_pretrained(tmp_path / name).state_dict() for name in ("swapped", "plain")]
    assert list(states[0]) == list(states[1]) == list(pair.plain.state_dict())
    for name, x in pair.plain.state_dict().items():
        assert x.equal(states[0][name])
        assert x.equal(states[1][name])
    read = Pair(cls.from_pretrained(tmp_path / "swapped").train())
    assert type(read.plain.lm_head) is nn.Linear
    read.assert_trains_alike(loss_in_model)
    with torch.no_grad():
        pair.plain.transformer.wte.weight.mul_(0.5)
    pair.swapped.load_state_dict(pair.plain.state_dict())
    pair.assert_trains_alike(loss_in_model)
    pair.plain.load_state_dict(pair.swapped.state_dict())


def copy_by_pickle(model):
    return pickle.loads(pickle.dumps(model))


def copy_by_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copy_model", [copy.deepcopy, copy_by_pickle, copy_by_file])
def test_copy_of_a_swapped_model_has_its_own_log(copy_model):
    pair = Pair(make_causal())
    pair.assert_trains_alike(loss_in_model)
    first, pair.swapped = pair.report, copy_model(pair.swapped)
    count = first.heads["lm_head"].fused
    pair.report = torch_nnmath.swap(pair.swapped)
    assert len(pair.report) == 0
    pair.assert_trains_alike(loss_in_model)
    assert first.heads["lm_head"].fused == count


def test_second_swap_changes_the_new_head_of_resized_embeddings():
    pair = Pair(make_causal())
    for model in (pair.plain, pair.swapped):
        torch.manual_seed(0)
        model.resize_token_embeddings(V + 12, mean_resizing=False)
    assert type(pair.swapped.lm_head) is nn.Linear
    pair.assert_trains_alike(loss_in_model, fused=0)
    pair.report = torch_nnmath.swap(pair.swapped)
    assert [change.name for change in pair.report] == ["lm_head"]
    pair.assert_trains_alike(loss_in_model, classes=V + 12)


def test_unswap_restores_classes_and_attributes():
    pair = Pair(make_causal("gemma2"))
    torch_nnmath.unswap(pair.swapped)
    for module, plain in zip(pair.swapped.modules(), pair.plain.modules(), strict=True):
        assert type(module) is type(plain)
        assert list(vars(module)) == list(vars(plain))
    pair.assert_trains_alike(loss_in_model, fused=0)


# Half precision


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *itertools.product(
            ["llama", "gemma2", "cohere", "granite", "gpt2", "phi"], ["pure", "autocast"]
        ),
        *itertools.product(["llama", "gemma2"], ["loss outside", "accelerate"]),
    ],
)
def test_bfloat16_error_is_no_larger_than_the_plain_models(name, kind):
    """The truth is the same model in float64. accelerate widens what the model returns."""
    model = make_causal(name)
    if kind == "pure":
        model = model.bfloat16()
    truth = run_step(copy.deepcopy(model).double(), loss_in_model)

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
        return shifted_loss(out.logits.float()) if out.loss is None else out.loss

    dtypes = []
    steps = [run_step(model, loss_of) for model in (pair.swapped, pair.plain)]
    assert_no_larger_errors(*steps, truth)
    assert pair.fused == 1
    pair.assert_no_logits(loss_of)
    assert not pair.reasons
    assert len(set(dtypes)) == 1


@pytest.mark.parametrize(
    ("loss_of", "fused", "reason"),
    [
        (lambda z, y: nn.CrossEntropyLoss(label_smoothing=0.1)(z.transpose(1, 2), y), 1, None),
        (lambda z, y: NNMATH_LOSS(z.flatten(0, 1), y.flatten()), 1, None),
        (lambda z, y: -z.log_softmax(-1).gather(-1, y.clamp(min=0)[..., None]).mean(), 1, None),
        (lambda z, y: sum(F.cross_entropy(a, b) for a, b in zip(z, y, strict=True)), 2, None),
        (lambda z, y: F.cross_entropy(z[y != -100], y[y != -100]), 1, None),
        (lambda z, y: shifted_loss(5 * torch.tanh(z / 2) / 1.5, y), 1, None),
        (lambda z, y: torch.stack([a.logsumexp(-1) for a in z]).mean(), 2, None),
        (lambda z, y: torch.stack([a.logcumsumexp(-1) for a in z]).mean(), 0, "logcumsumexp"),
        (lambda z, y: shifted_loss(z, y) + z.softmax(-1)[..., 3].mean(), 1, "select"),
    ],
    ids=[
        *("module", "nnmath", "log-probability", "sequences", "masked", "capped", "logsumexp"),
        *("sums of exponentials", "two"),
    ],
)
def test_losses_of_returned_logits_agree(loss_of, fused, reason):
    pair = Pair(make_causal("phi"))
    pair.assert_trains_alike(lambda m: loss_of(m(input_ids=IDS).logits, LABELS), fused, reason)


def test_logits_read_after_the_weights_changed_raise_unless_read_before():

    @torch.no_grad()
    def logits_after_a_step(model, read):
        with torch.enable_grad():
            out = model(input_ids=IDS, labels=LABELS)
        out.loss.backward()
        if read:
            out.logits.argmax()
        torch.optim.SGD(model.parameters(), 0.1).step()
        return {"logits": out.logits + 0}

    pair = Pair(make_causal())
    with pytest.warns(MaterializedLogits, match="argmax at"):
        logits = logits_after_a_step(pair.swapped, True)
    assert_agree(logits, logits_after_a_step(pair.plain, True))
    with pytest.raises(RuntimeError, match="changed in place since, as by an optimizer's step"):
        logits_after_a_step(pair.swapped, False)


@pytest.mark.parametrize("head", ["lm_head", "module", "auto", None])
def test_head_argument_selects_the_head(head):
    model = make_causal()
    pair = Pair(model, head=model.lm_head if head == "module" else head)
    assert [*pair.report.heads] == (["lm_head"] if head else [])
    assert any(change.name == "lm_head" for change in pair.report)
    pair.assert_trains_alike(loss_in_model, fused=bool(head))
    again = torch_nnmath.swap(pair.swapped, head=None if head is None else "auto")
    assert [*again] == []
    assert again.heads == pair.report.heads


@pytest.mark.parametrize(
    ("head", "error", "message"),
    [
        ("lm_haed", ValueError, "no module named 'lm_haed'; similar names are 'lm_head'"),
        ("model.embed_tokens", ValueError, "must be a torch.nn.Linear"),
        ("model", ValueError, "must be a torch.nn.Linear"),
        (nn.Linear(32, V), ValueError, "is not in the model"),
        (7, TypeError, "a name, a module"),
    ],
)
def test_invalid_head_raises_and_changes_nothing(head, error, message):
    model = make_causal()
    with pytest.raises(error, match=message):
        torch_nnmath.swap(model, head=head)
    assert type(model.lm_head) is nn.Linear
