"""The command `nnarch`: every subcommand is a thin layer over a module of the same name."""

from __future__ import annotations

import fnmatch
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

app = typer.Typer(
    name="nnarch",
    help="Custom kernels for PyTorch: classify, measure, and see what runs on this machine.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
console = Console()


class UsageError(Exception):
    """What the user asked for can't be done; the message is one line."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: arguments without the program's name; the process's own by default.

    Raises:
        SystemExit: always; code 0 for success, 1 for a failed check, 2 for a bad request.
    """
    try:
        app(args=None if args is None else list(args), prog_name="nnarch")
    except UsageError as error:
        _complain(error)
        raise SystemExit(2) from None


def _complain(error: Exception) -> None:
    print(f"nnarch: {error}", file=sys.stderr)


def _version(wanted: bool) -> None:
    if wanted:
        import nnarch

        print(f"nnarch {nnarch.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Custom kernels for PyTorch: classify, measure, and see what runs on this machine."""


@app.command()
def demo(
    picture: Annotated[Path, typer.Option(help="Where the ratio bars go.")] = Path("out/demo.png"),
    timing: Annotated[bool, typer.Option(help="Time the models after classifying.")] = True,
) -> None:
    """Classify real photos beside torch, then time both."""
    from nnarch import demo as job
    from nnarch.classify import InputError

    try:
        job.run(console, picture, race=timing)
    except InputError as error:
        raise UsageError(str(error)) from error
    except job.Disagreement as error:
        _complain(error)
        raise typer.Exit(1) from None


@app.command()
def classify(
    images: Annotated[list[Path], typer.Argument(help="Photos in any format Pillow reads.")],
    weights: Annotated[
        Path | None,
        typer.Option(help="Checkpoint (.pth, .pt, .safetensors) with the model's state_dict."),
    ] = None,
    model: Annotated[str, typer.Option(help="A name of `nnarch models`.")] = "mobilenet_v2",
    labels: Annotated[
        Path | None, typer.Option(help="Class names, one a line; ImageNet's by default.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many classes to show.")] = 5,
) -> None:
    """Say what is on your own photos.

    Without --weights, mobilenet_v2 takes the ImageNet weights of the demo, where they are
    installed.
    """
    from nnarch import classify as job

    try:
        classifier = job.Classifier(model, weights, labels)
    except job.InputError as error:
        raise UsageError(str(error)) from error
    failed = False
    for image in images:
        try:
            _print_classes(image, classifier(image, top))
        except job.InputError as error:  # the other photos are still wanted
            _complain(error)
            failed = True
    if failed:
        raise typer.Exit(2)


def _print_classes(image: Path, classes: Sequence[tuple[str, float]]) -> None:
    console.print(f"[bold]{escape(str(image))}[/]")
    table = Table.grid(padding=(0, 2))
    for label, share in classes:
        table.add_row(f"  {escape(label)}", f"{share:.4f}")
    console.print(table)


@app.command()
def doctor() -> None:
    """Show what runs on this machine, and why the rest does not.

    Ends with code 1 where the native CPU kernels are missing or cannot run.
    """
    from nnarch import doctor as job

    for title, rows in job.sections():
        console.print(f"[bold]{title}[/]")
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True, min_width=24)
        table.add_column(overflow="fold")  # a path is shown to its end
        for what, state in rows:
            table.add_row(f"  {what}", state)
        console.print(table)
    if not job.healthy():
        raise typer.Exit(1)


@app.command()
def models(
    pattern: Annotated[str, typer.Argument(help="A shell pattern such as 'resnet*'.")] = "*",
) -> None:
    """List the architectures, with size, work and paper."""
    import nnarch

    names = nnarch.list_models(pattern)
    if not names:
        known = nnarch.list_models()
        hint = next((n for n in known if fnmatch.fnmatch(n, f"*{pattern}*")), known[0])
        raise UsageError(f"no model matches {pattern!r}; {len(known)} are known, such as {hint}")
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("model", no_wrap=True)
    for column in ("parameters", "GFLOP", "input"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("paper")
    for name in names:
        info = nnarch.model_info(name)
        size = "×".join(map(str, info.input_size))
        authors_and_year = re.split(r"(?<=\d{4}), ", info.paper, maxsplit=1)[0]
        work = f"{info.flops / 1e9:.3g}"
        table.add_row(name, f"{info.parameters:,}", work, size, authors_and_year)
    console.print(table)


@app.command()
def bench(
    only: Annotated[
        str | None, typer.Option(help="Part of a case's name or group, or a shell pattern.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="One case of every group.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="Threads; 1 is the figure of record.")] = 1,
    models: Annotated[bool, typer.Option(help="Include whole models.")] = True,
    html: Annotated[Path | None, typer.Option(help="Write one self-contained page.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Append the rows to this file.")] = None,
) -> None:
    """Measure nnarch against torch and other runtimes.

    ONNX Runtime and OpenVINO take part in whole models, where they are installed.
    """
    from nnarch import benchmarking

    try:
        benchmarking.run(only=only, quick=quick, threads=threads, models=models, html=html, csv=csv)
    except ValueError as error:
        raise UsageError(str(error)) from error


if __name__ == "__main__":
    main()
