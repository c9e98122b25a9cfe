"""The example whose batch and vocabulary are split over processes, on a tiny model."""

import math
import re

import matplotlib.image
import pytest
import torch
from scripts import EXAMPLES, has_ink, import_scripts, list_files, run_script

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_gloo_available(), reason="this PyTorch has no gloo"
)
ROWS, WIDTH, CLASSES = 2 * 32, 32, 301  # rows: half of a batch

# Every process loads the text, so it is short. It has many ends, which are no targets.
COMMAND = f"""
import sys
sys.path.insert(0, {str(EXAMPLES)!r})
import text_model
texts = [f"{{i}} times {{i}} is {{i * i}}." + " Next." * (i % 40) for i in range(300)]
text_model.load_corpus = lambda size: (texts, texts)
import scale_out
scale_out.main()
"""
ARGUMENTS = [
    *("--vocabulary", str(CLASSES), "--width", str(WIDTH), "--layers", "1", "--heads", "2"),
    *("--context", "32", "--batch-size", "4", "--steps", "8", "--lr", "1e-2"),
    *("--accelerator", "cpu", "--devices", "4"),
]


def run(folder, *arguments):
    command = folder / "command.py"
    command.write_text(COMMAND, encoding="utf-8")
    return run_script(command, *ARGUMENTS, *arguments, folder=folder, timeout=600).stdout


def read_difference(output):
    (text,) = re.findall("largest difference at any step +(.*)", output)
    return float(text)


def test_command_with_four_processes_equals_one(tmp_path):
    output = run(tmp_path)
    # Measured: 1e-6. With each process's mean, as tests/distributed shows, more than 1e-3.
    assert read_difference(output) < 2e-5
    first, last = (
        [float(x) for x in re.findall(rf"step {i} +([\d.]+) +([\d.]+)", output)[0]] for i in (1, 8)
    )
    assert first == pytest.approx([math.log(CLASSES)] * 2, rel=0.05)
    assert last[0] < first[0] - 0.5
    assert last[1] == pytest.approx(last[0], abs=2e-5)
    sent = {name: float(size) for name, size in re.findall(r"(.*\S) +([\d,.]+) KiB", output)}
    gradient = 4 * ROWS * WIDTH  # bytes; two ranks send each message once
    shard = math.ceil(CLASSES / 2)
    expected = {
        "this library": gradient + 4 * 3 * ROWS,
        "loss_parallel": gradient + 4 * 3 * ROWS,
        "gathered logits": gradient + 4 * ROWS * shard,
    }
    assert sent == {name: round(size / 2**10, 1) for name, size in expected.items()}
    out = tmp_path / "scale_out_out"
    assert list_files(out) == ["scale_out.png"]
    image = matplotlib.image.imread(out / "scale_out.png")[..., :3]
    width = image.shape[1]
    assert has_ink(image[:, : width // 2])
    assert has_ink(image[:, width // 2 :])


def test_tied_weight_equals_one_process(tmp_path):
    output = run(tmp_path, "--tie", "--steps", "4", "--vocabulary-ranks", "4")
    assert read_difference(output) < 2e-5
    last = re.findall(r"step 4 +([\d.]+)", output)[0]
    assert float(last) < math.log(CLASSES) - 0.1


def test_numbers_of_processes_that_do_not_fit_raise(capsys):
    with import_scripts("scale_out") as (module,):
        for arguments, message in [
            (["--vocabulary-ranks", "3"], "--devices must be a multiple of --vocabulary-ranks"),
            (["--batch-size", "3"], "--batch-size must be a multiple of --devices over"),
        ]:
            with pytest.raises(SystemExit) as done:
                module.parse_arguments(arguments)
            assert done.value.code == 2
            assert message in capsys.readouterr().err
