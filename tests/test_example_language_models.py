"""The examples that train language models, on small models: they learn, agree and resume."""

import math
import sys

import matplotlib.image
import pytest
import torch
from scripts import EXAMPLES, has_ink, import_scripts, list_files, run_script

from torch_nnmath.deferred import logits as deferred_logits

# A model that learns in seconds: 600 tokens, 30 000 weights.
SMALL = [
    *("--vocabulary", "600", "--width", "32", "--layers", "1", "--heads", "2"),
    *("--context", "32", "--batch-size", "16", "--accelerator", "cpu", "--steps"),
]

TRAINING = [*SMALL, "100", "--every", "50", "--lr", "1e-2"]


@pytest.fixture(scope="module")
def text_model():
    with import_scripts("text_model") as (module,):
        yield module


@pytest.fixture(scope="module")
def corpus(text_model):
    return text_model.load_corpus()


@pytest.fixture(scope="module")
def language_model(text_model, corpus):
    with import_scripts("language_model") as (module,), pytest.MonkeyPatch.context() as patch:
        # A sixth of the text is enough for most tests, and takes a sixth of the time.
        texts = tuple(part[::6] for part in corpus)
        patch.setattr(text_model, "load_corpus", lambda size="small": texts)
        yield module


@pytest.fixture(scope="module")
def swap_transformers(language_model):
    with import_scripts("swap_transformers") as (module,):
        yield module


@pytest.fixture(scope="module")
def calls():
    return []


@pytest.fixture(scope="module")
def trained(language_model, calls, tmp_path_factory):
    """The results of the command; `calls` gets the shapes of the fused head's arguments."""
    real = language_model.linear_cross_entropy

    def record(x, W, t, **options):
        calls.append((tuple(x.shape), tuple(W.shape), tuple(t.shape), x.requires_grad))
        return real(x, W, t, **options)

    out = tmp_path_factory.mktemp("language_model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language_model, "linear_cross_entropy", record)
        return language_model.main([*TRAINING, "--out", str(out)])


def test_corpus_is_split_by_file(corpus):
    training, validation = corpus
    assert sum(map(len, training)) > 1_000_000
    assert 0.02 < sum(map(len, validation)) / sum(map(len, training)) < 0.2
    assert not set(training) & set(validation)
    for text in (
        "Assert statements are a convenient way",
        "Utility functions for copying and archiving files",
    ):
        assert any(text in one for one in (*training, *validation))


def test_blocks_have_every_token_as_target_once(text_model):
    ids = torch.arange(32 * 7 + 5)
    blocks = text_model.split_blocks(ids, 32)
    assert blocks.shape == (7, 33)
    assert torch.equal(blocks[:, 1:].flatten(), torch.arange(1, 32 * 7 + 1))
    assert torch.equal(blocks[:, :-1] + 1, blocks[:, 1:])


def test_encoded_corpus_decodes_to_text(text_model, language_model):
    tokenizer, training, validation = text_model.encode_corpus("small", 600)
    texts = text_model.load_corpus()[1]
    decoded = tokenizer.decode(validation.tolist(), skip_special_tokens=False)
    assert decoded == "".join(text + text_model.END for text in texts)
    assert tokenizer.get_vocab_size() == 600 > training.max()


def test_unigram_loss_of_three_tokens(language_model):
    loss = language_model.compute_unigram_loss(torch.tensor([0, 0, 1]), torch.tensor([0, 2]), 3)
    assert loss == pytest.approx(-(math.log(3 / 6) + math.log(1 / 6)) / 2)


def test_transformer_is_causal(text_model):
    torch.manual_seed(0)
    net = text_model.Transformer(300, 32, 2, 4, 16)
    ids = torch.randint(300, (2, 16))
    other = ids.clone()
    other[:, 9:] = torch.randint(300, (2, 7))
    a, b = net(ids), net(other)
    assert a.shape == (2, 16, 300)
    torch.testing.assert_close(a[:, :9], b[:, :9])
    assert not torch.allclose(a[:, 9:], b[:, 9:])
    assert net.head.weight is net.embedding.weight
    torch.testing.assert_close(net.head(net.features(ids)), a)


def test_language_model_beats_unigram_model(trained):
    for run in (trained.fused, trained.plain):
        assert run.training.shape == (100,)
        assert run.training[0] == pytest.approx(math.log(600), rel=0.05)
        assert run.validated == [50, 100]
        assert run.validation[-1] == run.validation.min()
        # Measured: 0.63, after 100 steps of 512 tokens.
        assert run.perplexity < 0.7 * math.exp(trained.unigram_loss)


def test_losses_of_both_heads_agree(trained):
    # Measured: 2e-6. A relative error of 1e-3 in the gradient of the weight gives 4e-3.
    assert trained.difference < 5e-5
    assert trained.difference == (trained.fused.training - trained.plain.training).abs().max()
    torch.testing.assert_close(
        trained.fused.validation, trained.plain.validation, atol=5e-5, rtol=0
    )


def test_training_calls_fused_head_at_every_step(trained, calls):
    training = [shapes for *shapes, requires_grad in calls if requires_grad]
    assert training == [[(16, 32, 32), (600, 32), (16, 32)]] * 100


def test_wrong_weight_gradient_changes_losses(
    text_model, language_model, trained, tmp_path, monkeypatch
):
    """A relative error of 1e-3 gives ten times the tolerance of the test of both heads."""
    real = language_model.linear_cross_entropy

    def scale_weight_gradient(x, W, t, **options):
        return real(x, W.detach() + 1.001 * (W - W.detach()), t, **options)

    monkeypatch.setattr(language_model, "linear_cross_entropy", scale_weight_gradient)
    args = language_model.parse_arguments([*TRAINING, "--out", str(tmp_path)])
    _, *data = text_model.encode_corpus("small", 600)
    with language_model.silence_lightning():
        _, run, _ = language_model.train("fused", args, data)
    assert (run.training - trained.plain.training).abs().max() > 5e-4


def test_resumed_training_equals_uninterrupted(language_model, tmp_path, monkeypatch):
    arguments = [*SMALL, "10", "--every", "4"]
    whole = language_model.main([*arguments, "--out", str(tmp_path / "whole")])
    cut = [*arguments, "--out", str(tmp_path / "cut")]
    real, steps = language_model.LanguageModel.training_step, iter(range(100))

    def fail_at_step_6(self, ids, batch_idx):
        if next(steps) == 6:  # between two checkpoints
            raise RuntimeError("interrupted")
        return real(self, ids, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(language_model.LanguageModel, "training_step", fail_at_step_6)
        with pytest.raises(RuntimeError, match="interrupted"):
            language_model.main(cut)
    heads = []

    def record(self, ids, batch_idx):
        heads.append(self.is_fused)
        return real(self, ids, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(language_model.LanguageModel, "training_step", record)
        resumed = language_model.main([*cut, "--resume"])
        assert heads == [True] * 6 + [False] * 10
        again = language_model.main([*cut, "--resume"])  # nothing is left to train
        assert len(heads) == 16
    for results in (resumed, again):
        for run, other in ((whole.fused, results.fused), (whole.plain, results.plain)):
            assert torch.equal(run.training, other.training)
            assert torch.equal(run.validation, other.validation)
            assert run.validated == other.validated == [4, 8, 10]
        assert results.sample == whole.sample
    with pytest.raises(SystemExit, match="other options"):
        language_model.main([*cut, "--resume", "--lr", "1"])


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory of a CPU is measured on Linux")
def test_fused_head_needs_less_memory(language_model, tmp_path):
    arguments = [*SMALL, "6", "--out", str(tmp_path), "--batch-size", "32", "--context", "64"]
    results = language_model.main([*arguments, "--vocabulary", "4096"])
    # The logits take 32 MiB, and the plain head needs their gradient, too.
    assert results.plain.peak > 2 * 2**25
    assert results.fused.peak < results.plain.peak / 2


def test_command_with_two_processes_equals_one(text_model, language_model, tmp_path, monkeypatch):
    # Every process loads the text, so it is short.
    texts = ["".join(part)[:40_000] for part in text_model.load_corpus()]
    command = tmp_path / "command.py"
    command.write_text(
        f"import sys\nsys.path.insert(0, {str(EXAMPLES)!r})\nimport text_model\n"
        f"text_model.load_corpus = lambda size: [[text] for text in {texts!r}]\n"
        "import language_model\nlanguage_model.main()\n",
        encoding="utf-8",
    )
    options = [*SMALL, "4", "--every", "2", "--vocabulary", "601"]
    done = run_script(command, *options, "--devices", "2", folder=tmp_path, timeout=600)
    assert done.stdout.count("validation perplexity") == 1
    assert len(done.stdout.splitlines()) < 40  # the bars write few lines to a pipe
    out = tmp_path / "language_model_out"
    assert list_files(out) == ["fused.ckpt", "language_model.png", "plain.ckpt"]
    monkeypatch.setattr(text_model, "load_corpus", lambda size: [[text] for text in texts])
    one = language_model.main([*options, "--out", str(tmp_path / "one")])
    for name, run in (("fused", one.fused), ("plain", one.plain)):
        record = torch.load(out / f"{name}.ckpt", weights_only=True)["record"]
        two = torch.tensor(record["training"] + record["validation"])
        torch.testing.assert_close(
            torch.cat([run.training, run.validation]), two, rtol=0, atol=1e-5
        )


def test_both_halves_of_pictures_have_ink(trained, swapped):
    for picture in (trained.picture, swapped.picture):
        image = matplotlib.image.imread(picture)[..., :3]
        width = image.shape[1]
        assert has_ink(image[:, : width // 2])
        assert has_ink(image[:, width // 2 :])


@pytest.fixture(scope="module")
def swapped(swap_transformers, tmp_path_factory):
    out = tmp_path_factory.mktemp("swap_transformers")
    arguments = [*SMALL, "30", "--lr", "1e-2", "--vocabulary", "4096", "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deferred_logits, "MIN_DEFERRED_BYTES", 0)  # the model is small
        return swap_transformers.main(arguments)


def test_swapped_model_has_equal_losses(swapped):
    for run in (swapped.plain, swapped.swapped):
        assert len(run.training) == 30
        assert run.first == pytest.approx(math.log(4096), rel=0.02)
        assert run.last < run.first - 0.5
    # Measured: 2e-6 and 6e-7. A planted relative error of 1e-3 is tested below.
    assert swapped.difference < 5e-5
    assert swapped.gradient_difference < 1e-5
    assert swapped.swapped.last == pytest.approx(swapped.plain.last, abs=5e-5)


def test_swapped_model_materialises_no_logits(swapped):
    (log,) = swapped.report.heads.values()
    assert log.fused > 30
    assert not log.materialized
    if sys.platform == "linux":
        assert swapped.swapped.peak < 0.7 * swapped.plain.peak


def test_wrong_gradient_of_swapped_model_is_reported(swap_transformers, tmp_path, monkeypatch):
    real = swap_transformers.torch_nnmath.swap

    def swap_and_scale_gradient(model):
        report = real(model)
        model.get_output_embeddings().weight.register_hook(lambda gradient: 1.001 * gradient)
        return report

    monkeypatch.setattr(swap_transformers.torch_nnmath, "swap", swap_and_scale_gradient)
    results = swap_transformers.main([*SMALL, "1", "--out", str(tmp_path)])
    assert results.gradient_difference > 5e-4


@pytest.mark.parametrize("name", ["language_model", "swap_transformers"])
def test_command_line_defaults_and_errors(name, language_model, swap_transformers, capsys):
    module = {"language_model": language_model, "swap_transformers": swap_transformers}[name]
    with pytest.raises(SystemExit) as done:
        module.main(["--help"])
    assert done.value.code == 0
    assert str(module.SIZES["small"]["vocabulary"]) in capsys.readouterr().out
    large = module.parse_arguments(["--size", "large", "--width", "96"])
    assert (large.vocabulary, large.width) == (module.SIZES["large"]["vocabulary"], 96)
    for arguments, message in [
        (["--vocabulary", "10"], "at least 257"),
        (["--steps", "0"], "must be a positive integer, got '0'"),
        (["--width", "97"], "must be a"),
        (["--lr", "-1"], "must be above 0"),
    ]:
        with pytest.raises(SystemExit) as done:
            module.main(arguments)
        assert done.value.code == 2
        assert message in capsys.readouterr().err


def test_missing_checkpoint_model_or_gpu_exits(
    language_model, swap_transformers, tmp_path, monkeypatch, capsys
):
    with pytest.raises(SystemExit, match="there is no checkpoint in"):
        language_model.main([*SMALL, "2", "--resume", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        swap_transformers.main(["--model", "nope"])
    assert "transformers has no nope" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for module in (language_model, swap_transformers):
        with pytest.raises(SystemExit, match="PyTorch finds no GPU"):
            module.main(["--accelerator", "gpu"])
