"""The examples that train language models: run small, they learn, agree, and resume."""

import math
import os
import subprocess
import sys

import matplotlib.image
import pytest
import torch
from scripts import EXAMPLES, ROOT, scripts

# The whole text, but a model that learns in seconds: of 600 tokens, with 30 000 weights.
SMALL = [
    *("--vocabulary", "600", "--width", "32", "--layers", "1", "--heads", "2"),
    *("--context", "32", "--batch-size", "16", "--accelerator", "cpu", "--steps"),
]

PICTURE = "language_model.png"


@pytest.fixture(scope="module")
def language_model():
    with scripts("language_model") as (module,):
        module.whole = module.corpus
        # A sixth of the text is enough for most tests, and takes a sixth of the time.
        training, validation = module.whole()
        module.corpus = lambda size="small": (training[::6], validation[::6])
        yield module


@pytest.fixture(scope="module")
def swap_transformers(language_model):
    with scripts("swap_transformers") as (module,):
        yield module


@pytest.fixture(scope="module")
def calls():
    return []


@pytest.fixture(scope="module")
def trained(language_model, calls, tmp_path_factory):
    """A run as by the command; `calls` has the shapes of what the fused head was given."""
    real = language_model.linear_cross_entropy

    def counted(x, W, t, **options):
        calls.append((tuple(x.shape), tuple(W.shape), tuple(t.shape), x.requires_grad))
        return real(x, W, t, **options)

    out = tmp_path_factory.mktemp("language_model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language_model, "linear_cross_entropy", counted)
        more = ["100", "--every", "40", "--lr", "1e-2", "--out", str(out)]
        return language_model.main([*SMALL, *more])


def test_text_is_real_and_split_by_file(language_model):
    training, validation = language_model.whole()
    assert sum(map(len, training)) > 1_000_000
    assert 0.02 < sum(map(len, validation)) / sum(map(len, training)) < 0.2
    assert not set(training) & set(validation)
    for text in (
        "Assert statements are a convenient way",
        "Utility functions for copying and archiving files",
    ):
        assert any(text in one for one in (*training, *validation))


def test_blocks_have_every_token_as_a_target_once(language_model):
    ids = torch.arange(32 * 7 + 5)
    of = language_model.blocks(ids, 32)
    assert of.shape == (7, 33)
    assert torch.equal(of[:, 1:].flatten(), torch.arange(1, 32 * 7 + 1))
    assert torch.equal(of[:, :-1] + 1, of[:, 1:])


def test_tokens_are_the_text(language_model):
    tokenizer, training, validation = language_model.tokens("small", 600)
    texts = language_model.corpus()[1]
    end = f"{language_model.END}"
    decoded = tokenizer.decode(validation.tolist(), skip_special_tokens=False)
    assert decoded == "".join(text + end for text in texts)
    assert tokenizer.get_vocab_size() == 600 > training.max()


def test_unigram_is_the_loss_of_the_frequencies(language_model):
    loss = language_model.unigram(torch.tensor([0, 0, 1]), torch.tensor([0, 2]), 3)
    assert loss == pytest.approx(-(math.log(3 / 6) + math.log(1 / 6)) / 2)


def test_model_sees_only_what_was_before(language_model):
    torch.manual_seed(0)
    net = language_model.Transformer(300, 32, 2, 4, 16)
    ids = torch.randint(300, (2, 16))
    other = ids.clone()
    other[:, 9:] = torch.randint(300, (2, 7))
    a, b = net(ids), net(other)
    assert a.shape == (2, 16, 300)
    torch.testing.assert_close(a[:, :9], b[:, :9])
    assert not torch.allclose(a[:, 9:], b[:, 9:])
    assert net.head.weight is net.embedding.weight
    torch.testing.assert_close(net.head(net.features(ids)), a)


def test_language_model_learns_more_than_frequencies(trained):
    for run in (trained.fused, trained.plain):
        assert run.training.shape == (100,)
        assert run.training[0] == pytest.approx(math.log(600), rel=0.05)
        assert run.validated == [40, 80, 100]
        assert run.validation[-1] == run.validation.min()
        # Measured: 0.63, after 100 steps of 512 tokens.
        assert run.perplexity < 0.7 * math.exp(trained.unigram)


def test_heads_agree(trained):
    # Measured: 2e-6; a gradient of the head that is wrong by 1e-3 of itself gives 4e-3.
    assert trained.difference < 5e-5
    assert trained.difference == (trained.fused.training - trained.plain.training).abs().max()
    torch.testing.assert_close(
        trained.fused.validation, trained.plain.validation, atol=5e-5, rtol=0
    )


def test_the_fused_head_is_used(trained, calls):
    training = [shapes for *shapes, wants_gradient in calls if wants_gradient]
    assert training == [[(16, 32, 32), (600, 32), (16, 32)]] * 100


def test_a_wrong_gradient_is_seen(language_model, trained, tmp_path, monkeypatch):
    """Of the weights alone, by a thousandth: ten times what `test_heads_agree` lets pass."""
    real = language_model.linear_cross_entropy

    def wrong(x, W, t, **options):
        return real(x, W.detach() + 1.001 * (W - W.detach()), t, **options)

    monkeypatch.setattr(language_model, "linear_cross_entropy", wrong)
    arguments = [*SMALL, "100", "--every", "40", "--lr", "1e-2", "--out", str(tmp_path)]
    args = language_model.parse(arguments)
    _, *data = language_model.tokens("small", 600)
    with language_model.quiet():
        _, run, _ = language_model.train("fused", args, data)
    assert (run.training - trained.plain.training).abs().max() > 5e-4


def test_resumed_is_uninterrupted(language_model, tmp_path, monkeypatch):
    arguments = [*SMALL, "10", "--every", "4"]
    whole = language_model.main([*arguments, "--out", str(tmp_path / "whole")])
    cut = [*arguments, "--out", str(tmp_path / "cut")]
    real, steps = language_model.LanguageModel.training_step, iter(range(100))

    def until_the_power_fails(self, ids, batch_idx):
        if next(steps) == 6:  # between two checkpoints
            raise RuntimeError("the power fails")
        return real(self, ids, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(language_model.LanguageModel, "training_step", until_the_power_fails)
        with pytest.raises(RuntimeError, match="the power fails"):
            language_model.main(cut)
    taken = []

    def counted(self, ids, batch_idx):
        taken.append(self.is_fused)
        return real(self, ids, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(language_model.LanguageModel, "training_step", counted)
        resumed = language_model.main([*cut, "--resume"])
        assert taken == [True] * 6 + [False] * 10
        again = language_model.main([*cut, "--resume"])  # all is done
        assert len(taken) == 16
    for results in (resumed, again):
        for run, other in ((whole.fused, results.fused), (whole.plain, results.plain)):
            assert torch.equal(run.training, other.training)
            assert torch.equal(run.validation, other.validation)
            assert run.validated == other.validated == [4, 8, 10]
        assert results.sample == whole.sample
    with pytest.raises(SystemExit, match="other options"):
        language_model.main([*cut, "--resume", "--lr", "1"])


def test_fused_head_needs_less_memory(language_model, tmp_path):
    if sys.platform != "linux":
        pytest.skip("peaks are measured on Linux alone")
    arguments = [*SMALL, "6", "--out", str(tmp_path), "--batch-size", "32", "--context", "64"]
    results = language_model.main([*arguments, "--vocabulary", "4096"])
    # One matrix of logits is 32 MiB; the plain head has two, with the gradient.
    assert results.plain.peak > 2 * 2**25
    assert results.fused.peak < results.plain.peak / 2


def test_two_processes_as_a_command(language_model, tmp_path, monkeypatch):
    """The curve is that of one process; on little text, which every process would read anew."""
    texts = [part[:40_000] for part in ("".join(texts) for texts in language_model.corpus())]
    command = tmp_path / "command.py"
    command.write_text(
        f"import sys\nsys.path.insert(0, {str(EXAMPLES)!r})\nimport language_model\n"
        f"language_model.corpus = lambda size: [[text] for text in {texts!r}]\n"
        "language_model.main()\n",
        encoding="utf-8",
    )
    options = [*SMALL, "4", "--every", "2", "--vocabulary", "601"]
    done = subprocess.run(
        [sys.executable, str(command), *options, "--devices", "2"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert done.stdout.count("validation perplexity") == 1
    assert len(done.stdout.splitlines()) < 40  # the bars write few lines into a file
    out = tmp_path / "language_model_out"
    assert {path.name for path in out.iterdir()} == {"fused.ckpt", "plain.ckpt", PICTURE}
    monkeypatch.setattr(language_model, "corpus", lambda size: [[text] for text in texts])
    one = language_model.main([*options, "--out", str(tmp_path / "one")])
    for name, run in (("fused", one.fused), ("plain", one.plain)):
        account = torch.load(out / f"{name}.ckpt", weights_only=True)["account"]
        two = torch.tensor(account["training"] + account["validation"])
        torch.testing.assert_close(
            torch.cat([run.training, run.validation]), two, rtol=0, atol=1e-5
        )


def test_pictures_show_something(trained, swapped):
    for picture in (trained.picture, swapped.picture):
        image = matplotlib.image.imread(picture)[..., :3]
        width = image.shape[1]
        for part in (image[:, : width // 2], image[:, width // 2 :]):  # ink, on a white page
            assert 0.02 < (part.min(-1) < 0.9).mean() < 0.5


@pytest.fixture(scope="module")
def swapped(swap_transformers, tmp_path_factory):
    out = tmp_path_factory.mktemp("swap_transformers")
    arguments = [*SMALL, "30", "--lr", "1e-2", "--vocabulary", "4096", "--out", str(out)]
    return swap_transformers.main(arguments)


def test_swapped_model_trains_alike(swapped):
    for run in (swapped.plain, swapped.swapped):
        assert len(run.training) == 30
        assert run.first == pytest.approx(math.log(4096), rel=0.02)
        assert run.last < run.first - 0.5
    # Measured: 2e-6 and 6e-7. A gradient that is wrong by 1e-3 of itself is wrong by 1e-3.
    assert swapped.difference < 5e-5
    assert swapped.gradients < 1e-5
    assert swapped.swapped.last == pytest.approx(swapped.plain.last, abs=5e-5)


def test_swapped_model_makes_no_logits(swapped):
    (log,) = swapped.report.heads.values()
    assert log.fused > 30
    assert not log.materialized
    if sys.platform == "linux":
        assert swapped.swapped.peak < 0.7 * swapped.plain.peak


def test_a_wrong_gradient_of_a_swapped_model_is_seen(swap_transformers, tmp_path, monkeypatch):
    real = swap_transformers.torch_nnmath.swap

    def wrong(model):
        report = real(model)
        model.get_output_embeddings().weight.register_hook(lambda gradient: 1.001 * gradient)
        return report

    monkeypatch.setattr(swap_transformers.torch_nnmath, "swap", wrong)
    results = swap_transformers.main([*SMALL, "1", "--out", str(tmp_path)])
    assert results.gradients > 5e-4


@pytest.mark.parametrize("name", ["language_model", "swap_transformers"])
def test_help(name, language_model, swap_transformers, capsys):
    module = {"language_model": language_model, "swap_transformers": swap_transformers}[name]
    with pytest.raises(SystemExit) as done:
        module.main(["--help"])
    assert done.value.code == 0
    said = capsys.readouterr().out
    assert str(module.SIZES["small"]["vocabulary"]) in said
    large = module.parse(["--size", "large", "--width", "96"])
    assert (large.vocabulary, large.width) == (module.SIZES["large"]["vocabulary"], 96)
    for bad, said in [
        (["--vocabulary", "10"], "at least 257"),
        (["--steps", "0"], "must be a whole number from 1 on, got '0'"),
        (["--width", "97"], "must be a"),
        (["--lr", "-1"], "must be above 0"),
    ]:
        with pytest.raises(SystemExit) as done:
            module.main(bad)
        assert done.value.code == 2
        assert said in capsys.readouterr().err


def test_what_is_not_there(language_model, swap_transformers, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="there is no checkpoint in"):
        language_model.main([*SMALL, "2", "--resume", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        swap_transformers.main(["--model", "nope"])
    assert "transformers has no nope" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for module in (language_model, swap_transformers):
        with pytest.raises(SystemExit, match="PyTorch sees none"):
            module.main(["--accelerator", "gpu"])
