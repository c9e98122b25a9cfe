"""The text and the transformer that the language-model examples share.

The text comes with Python: the topics of `help()` and the docstrings of the standard library.
"""

from __future__ import annotations

import ast
import hashlib
import math
import sysconfig
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from shared import make_bar
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from torch_nnmath.functional import linear_cross_entropy

END = "<|end|>"  # the token that ends a text
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

# The text


def extract_docstrings(source: str) -> list[str]:
    """Returns the docstrings of a module and everything in it, without importing it."""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in the source
        nodes = [x for x in ast.walk(ast.parse(source)) if isinstance(x, kinds)]
        docstrings = map(ast.get_docstring, nodes)
        return [text for text in docstrings if text]


@cache
def load_corpus(size: str = "small") -> tuple[list[str], list[str]]:
    """Returns the training and the validation texts: the docstrings of a file, or a help topic.

    "small" is the standard library, "large" adds all installed packages. About one text in twenty
    is for validation, selected by a hash of the file's name. A repeated docstring is used once, so
    that none is in both.
    """
    texts = {f"topics/{name}": [text] for name, text in sorted(topics.items())}
    paths = sysconfig.get_paths()
    stdlib = Path(paths["stdlib"])
    roots = [stdlib, Path(paths["purelib"])] if size == "large" else [stdlib]
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            name = path.relative_to(root)
            if {"test", "tests", "idlelib", "pydoc_data"} & set(name.parts) or (
                root == stdlib and {"site-packages", "dist-packages"} & set(name.parts)
            ):
                continue
            try:
                source = path.read_text(encoding="utf-8")
                texts[name.as_posix()] = extract_docstrings(source)
            except (OSError, SyntaxError, ValueError, RecursionError):  # invalid on purpose
                continue
    earlier: set[str] = set()
    training: list[str] = []
    validation: list[str] = []
    for name, parts in texts.items():
        new = [text for text in dict.fromkeys(parts) if text not in earlier]
        earlier.update(new)
        if new:
            is_validation = hashlib.sha256(name.encode()).digest()[0] % 20 == 0
            (validation if is_validation else training).append("\n\n".join(new))
    return training, validation


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """Trains a byte-pair encoding, which can encode any other text as well."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@cache
def encode_corpus(size: str = "small", vocabulary: int = 8192) -> tuple[Tokenizer, Tensor, Tensor]:
    """Returns the tokenizer, and the ids (n,) of the training and the validation text."""
    training, validation = load_corpus(size)
    tokenizer = train_tokenizer(training, vocabulary)
    end = tokenizer.token_to_id(END)

    def encode(texts: Sequence[str]) -> Tensor:
        encoded = tokenizer.encode_batch(texts)
        return torch.tensor([i for text in encoded for i in (*text.ids, end)])

    return tokenizer, encode(training), encode(validation)


def split_blocks(ids: Tensor, context: int) -> Tensor:
    """Returns blocks (n, context + 1): inputs are `[:, :-1]`, targets `[:, 1:]`.

    Consecutive blocks overlap by one token, so that no token is a target twice.
    """
    return ids.unfold(0, context + 1, context)


# The model


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(width, heads))
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


class Transformer(nn.Module):
    """Ids (B, T) to logits (B, T, vocabulary); `head` is a Linear with the embedding's weight."""

    def __init__(self, vocabulary: int, width: int, layers: int, heads: int, context: int):
        super().__init__()
        self.context = context
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        for name, parameter in self.named_parameters():
            if name in ("embedding.weight", "position.weight"):
                nn.init.normal_(parameter, std=0.05)
            elif parameter.dim() == 2:
                is_residual = name.endswith(("out.weight", "mlp.3.weight"))
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * layers) if is_residual else 1))

    def features(self, ids: Tensor) -> Tensor:
        """The head's input (B, T, width)."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        return self.norm(self.blocks(self.embedding(ids) + self.position(positions)))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.features(ids))


class NextTokenLoss(nn.Module):
    """Token ids (B, T + 1) to the mean loss of every token but the first, given the ones before."""

    def __init__(self, model: Transformer, loss: Loss = linear_cross_entropy):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, ids: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):  # the attention that has a second derivative
            x = self.model.features(ids[:, :-1])
        return self.loss(x, self.model.head.weight, ids[:, 1:])


@dataclass(frozen=True)
class Setting:
    """Sizes of a model, of its training, and of the batch that is examined after training."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    context: int
    sequences: int  # in the examined batch, and in a training step
    steps: int
    lr: float = 3e-3


TINY = Setting(272, 6, 1, 2, context=16, sequences=16, steps=400, lr=1e-2)
SIZES = {  # by --size: a tiny model, whose Hessian fits in memory, and a larger one
    "quick": (replace(TINY, vocabulary=264, width=4, sequences=8, steps=20),
              Setting(1024, 32, 1, 2, context=32, sequences=8, steps=2)),
    "small": (TINY, Setting(4096, 128, 2, 4, context=64, sequences=8, steps=150)),
    "large": (TINY, Setting(32768, 512, 8, 8, context=256, sequences=16, steps=300, lr=1e-3)),
}  # fmt: skip


def build_transformer(setting: Setting, seed: int) -> Transformer:
    torch.manual_seed(seed)
    s = setting
    return Transformer(s.vocabulary, s.width, s.layers, s.heads, s.context)


def train_transformer(
    setting: Setting, ids: Tensor, seed: int, device: str, title: str
) -> Transformer:
    """Trains with AdamW and a cosine schedule on random sequences of the text."""
    model = build_transformer(setting, seed).to(device)
    module, data = NextTokenLoss(model), split_blocks(ids, setting.context)
    optimizer = torch.optim.AdamW(model.parameters(), setting.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, setting.steps)
    generator = torch.Generator().manual_seed(seed)
    with make_bar(f"{title}: training", setting.steps, "step") as progress:
        for _ in range(setting.steps):
            indices = torch.randint(len(data), (setting.sequences,), generator=generator)
            loss = module(data[indices].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.update()
        progress.set_postfix_str(f"loss {loss.item():.2f}", refresh=False)
    return model
