"""A Transformer learns to translate, beside an LSTM of equal size that is trained for as long.

    make example NAME=translation                        # English to Spanish, 31,000 verses
    make example NAME=translation ARGS="--language fr"   # English to French, a framework's texts

Both models see the same sentences in the same pieces (a joint byte-pair vocabulary, learnt from the
training sentences), for as many seconds of processor time. They are judged by their perplexity on
sentences that neither saw. A run that was killed goes on where it was, bit for bit; `--fresh`
starts again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from checkpoint import Checkpoint
from datasets import django_strings, verses
from rich.console import Console
from rich.table import Table
from seq2seq_training import (
    END,
    PADDING,
    START,
    Batch,
    Recipe,
    attention_maps,
    draw_maps,
    padded,
    train,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel
from torch import Tensor, nn

import nnarch
from nnarch.models.transformer import noam_schedule

MOST_TOKENS = 60  # longer sentences are left out
BATCH_TOKENS = 2048  # of the longer side, padding included

console = Console()


@dataclass(frozen=True)
class Corpus:
    """Sentences in pieces.

    Attributes:
        tokenizer: of both languages.
        train, unseen: pairs of sequences of tokens, without start and end.
        text: the pairs of `unseen` as they were.
    """

    tokenizer: Tokenizer
    train: list[tuple[list[int], list[int]]]
    unseen: list[tuple[list[int], list[int]]]
    text: list[tuple[str, str]]

    def decode(self, tokens: list[int]) -> str:
        """Tokens as text, up to the end."""
        kept = tokens[: tokens.index(END)] if END in tokens else tokens
        return self.tokenizer.decode([t for t in kept if t > END]).strip()


def make_corpus(pairs: list[tuple[str, str]], vocabulary: int) -> Corpus:
    """One sentence in twenty is kept to judge by, a thousand at most."""
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    held = min(1000, len(pairs) // 20)
    text, learnt = [pairs[i] for i in order[:held]], [pairs[i] for i in order[held:]]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<padding>", "<start>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((sentence for pair in learnt for sentence in pair), trainer)

    def encode(some: list[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        sides = [tokenizer.encode_batch([pair[side] for pair in some]) for side in (0, 1)]
        return [(a.ids, b.ids) for a, b in zip(*sides, strict=True)]

    fits = [p for p in encode(learnt) if 0 < len(p[0]) <= MOST_TOKENS and len(p[1]) <= MOST_TOKENS]
    encoded = encode(text)
    kept = [i for i, p in enumerate(encoded) if max(map(len, p)) <= MOST_TOKENS]
    return Corpus(tokenizer, fits, [encoded[i] for i in kept], [text[i] for i in kept])


def as_batch(pairs: list[tuple[list[int], list[int]]]) -> Batch:
    """Pairs as two tensors."""
    return padded([s for s, _ in pairs]), padded([[START, *t, END] for _, t in pairs])


def batches(pairs: list[tuple[list[int], list[int]]]) -> list[list[int]]:
    """Sentences of like length together, as many as make BATCH_TOKENS."""
    order = sorted(range(len(pairs)), key=lambda i: (len(pairs[i][1]), len(pairs[i][0]), i))
    groups: list[list[int]] = [[]]
    longest = 0
    for i in order:
        longest = max(longest, len(pairs[i][0]), len(pairs[i][1]) + 1)
        if groups[-1] and longest * (len(groups[-1]) + 1) > BATCH_TOKENS:
            groups.append([])
            longest = max(len(pairs[i][0]), len(pairs[i][1]) + 1)
        groups[-1].append(i)
    return groups


def training_batch(corpus: Corpus) -> Callable[[int], Batch]:
    """The n-th batch of a run: all batches in a random order, then all in another."""
    groups = batches(corpus.train)

    def batch(n: int) -> Batch:
        epoch, place = divmod(n, len(groups))
        order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(epoch))
        return as_batch([corpus.train[i] for i in groups[int(order[place])]])

    return batch


# -------------------------------------------------------------------------------------- models


def make_transformer(vocabulary: int, width: int, layers: int) -> Any:
    """The paper's model, smaller, pre-LN."""
    return nnarch.create_model(
        "transformer_base",
        vocabulary=vocabulary, d_model=width, heads=4, feedforward=4 * width, norm_first=True,
        encoder_layers=layers, decoder_layers=layers,
    )  # fmt: skip


def make_lstm(vocabulary: int, width: int, parameters: int) -> Any:
    """Two layers each way with attention, as wide as comes nearest to so many parameters."""

    def build(hidden: int) -> Any:
        return nnarch.create_model(
            "lstm_seq2seq", vocabulary=vocabulary, embedding=width, hidden=hidden, layers=2,
            dropout=0.1,
        )  # fmt: skip

    with torch.device("meta"):
        sizes = {hidden: count(build(hidden)) for hidden in range(32, 1025, 32)}
    return build(min(sizes, key=lambda hidden: abs(sizes[hidden] - parameters)))


def count(model: nn.Module) -> int:
    """Parameters."""
    return sum(p.numel() for p in model.parameters())


def lengths_of(tokens: Tensor) -> Tensor:
    """How many tokens of each sentence are no padding."""
    return (tokens != PADDING).sum(1)


def logits_of(model: nn.Module, source: Tensor, target: Tensor) -> Tensor:
    """[B, T, V], from either model."""
    if hasattr(model, "config"):
        return model(source, target)
    return model(source, target, lengths_of(source))


def smoothed_loss(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """What the models are trained by."""
    if hasattr(model, "loss"):
        return model.loss
    return lambda source, target: nnarch.functional.cross_entropy(
        logits_of(model, source, target[:, :-1]).flatten(0, 1),
        target[:, 1:].flatten(),
        ignore_index=PADDING,
        label_smoothing=0.1,
    )


@torch.inference_mode()
def perplexity(model: nn.Module, corpus: Corpus) -> float:
    """Of the unseen sentences, a piece; the end of a sentence is a piece."""
    model.eval()
    nats = pieces = 0.0
    for group in batches(corpus.unseen):
        source, target = as_batch([corpus.unseen[i] for i in group])
        nats += nnarch.functional.cross_entropy(
            logits_of(model, source, target[:, :-1]).flatten(0, 1).float(),
            target[:, 1:].flatten(),
            ignore_index=PADDING,
            reduction="sum",
        ).item()
        pieces += float((target[:, 1:] != PADDING).sum())
    return math.exp(nats / pieces)


def translate(model: Any, corpus: Corpus, picks: list[int], beams: int = 4) -> list[str]:
    """Some of the unseen sentences, by the Transformer."""
    model.eval()
    source, _ = as_batch([corpus.unseen[i] for i in picks])
    return [corpus.decode(t) for t in model.generate(source, beams=beams).tolist()]


def draw(model: Any, corpus: Corpus, pick: int, path: Path) -> None:
    """Where the decoder looked while it translated one sentence."""
    source, _ = as_batch([corpus.unseen[pick]])
    written = model.generate(source)
    target = torch.cat([torch.full((1, 1), START), written[:, :-1]], 1)
    with torch.no_grad(), attention_maps(model) as maps:
        model(source, target)
    rows, columns = (
        [corpus.tokenizer.decode([t]) if t > END else "(end)" for t in tokens[0].tolist()]
        for tokens in (written, source)
    )
    draw_maps(maps[0][0], rows, columns, path)


# ----------------------------------------------------------------------------------- the example


def new_run(model: nn.Module, rate: dict[str, float], path: Path) -> Checkpoint:
    """An optimizer with the paper's schedule, and the file that keeps the run."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1.0, betas=(0.9, 0.98), eps=1e-9)
    schedule = noam_schedule(optimizer, **rate)
    return Checkpoint(path, model=model, optimizer=optimizer, schedule=schedule)


def same_time(seconds: float, model: nn.Module, batch: Callable[[int], Batch]) -> int:
    """How many steps of `model` take so long, by what ten of a copy take."""
    import copy
    import tempfile

    trial = copy.deepcopy(model)
    with tempfile.TemporaryDirectory() as folder:
        run = new_run(trial, {"d_model": 512, "warmup": 100}, Path(folder) / "trial.pt")
        _, took = train(trial, smoothed_loss(trial), batch, Recipe(12), run, console, "timing")
    return max(1, round(seconds / took * 12))


def main(
    language: Annotated[str, typer.Option(help="es (verses) or fr (a framework's texts)")] = "es",
    steps: Annotated[int, typer.Option(help="of the Transformer's optimizer")] = 900,
    width: int = 192,
    layers: int = 3,
    vocabulary: int = 4000,
    accumulate: Annotated[int, typer.Option(help="batches a step")] = 1,
    amp: Annotated[bool, typer.Option(help="products in bfloat16")] = False,
    fresh: Annotated[bool, typer.Option(help="forget an unfinished run")] = False,
    folder: Annotated[Path, typer.Option(help="checkpoints and pictures")] = Path(
        "out/translation"
    ),
) -> None:
    """Train both, compare them, print translations, draw where the Transformer looked."""
    if language not in ("es", "fr"):
        raise typer.BadParameter(f"language must be es or fr, got {language!r}")
    corpus = make_corpus(verses() if language == "es" else django_strings(), vocabulary)
    size, batch = corpus.tokenizer.get_vocab_size(), training_batch(corpus)
    console.print(f"{len(corpus.train):,} pairs to learn, {len(corpus.unseen):,} to judge by")
    folder = folder / f"{language}_{steps}"
    if fresh:
        for path in folder.glob("*.pt"):
            path.unlink()

    torch.manual_seed(0)
    model = make_transformer(size, width, layers)
    rate = {"d_model": width, "warmup": min(400, steps // 3), "factor": 1.0}
    run = new_run(model, rate, folder / "transformer.pt")
    recipe = Recipe(steps, accumulate, amp=amp)
    _, seconds = train(model, smoothed_loss(model), batch, recipe, run, console, "Transformer")

    torch.manual_seed(0)
    lstm = make_lstm(size, width, count(model))
    plan = Checkpoint(folder / "plan.pt")
    saved = plan.load() or {"steps": same_time(seconds, lstm, batch)}
    plan.save(**saved)
    rate = {"d_model": 512, "warmup": min(100, saved["steps"] // 3), "factor": 1.0}
    lstm_run = new_run(lstm, rate, folder / "lstm.pt")
    recipe = Recipe(saved["steps"], accumulate, amp=amp)
    _, lstm_seconds = train(lstm, smoothed_loss(lstm), batch, recipe, lstm_run, console, "LSTM")

    report(
        corpus,
        {"Transformer": (model, steps, seconds), "LSTM": (lstm, saved["steps"], lstm_seconds)},
    )
    show(model, corpus)
    picture = folder / "attention.png"
    draw(model, corpus, shortest_of(corpus, 14), picture)
    console.print(f"picture: {picture}")


def report(corpus: Corpus, runs: dict[str, tuple[nn.Module, int, float]]) -> None:
    """The table of both models."""
    table = Table("model", "parameters", "steps", "CPU seconds", "perplexity, unseen")
    for name, (model, steps, seconds) in runs.items():
        found = perplexity(model, corpus)
        table.add_row(name, f"{count(model):,}", str(steps), f"{seconds:.0f}", f"{found:.2f}")
    console.print(table)


def show(model: Any, corpus: Corpus) -> None:
    """Six unseen sentences, what they should be and what they became."""
    picks = sorted({shortest_of(corpus, n) for n in (6, 9, 12, 16, 20, 26)})
    for pick, written in zip(picks, translate(model, corpus, picks), strict=True):
        source, target = corpus.text[pick]
        console.print(
            f"[bold]{source.strip()}[/bold]\n  wanted   {target.strip()}\n  written  {written}"
        )


def shortest_of(corpus: Corpus, tokens: int) -> int:
    """An unseen sentence of about so many tokens."""
    return min(range(len(corpus.unseen)), key=lambda i: (abs(len(corpus.unseen[i][0]) - tokens), i))


if __name__ == "__main__":
    typer.run(main)
