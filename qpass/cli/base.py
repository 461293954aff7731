"""The command line itself: options that commands share, what they print, how errors end."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from qpass.errors import Breach, QpassError
from qpass.printing import finite, printed

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Quantize transformers: plan, quantize, measure, look at what was done, export.\n\n"
    "--debug, anywhere, shows where an error comes from. Exit status: 0 done, 1 a limit does not hold or graphs differ, "
    "2 wrong use or input, 130 interrupted.",
)


#: What shells give a command that Ctrl-C has ended.
_INTERRUPTED = 130


def _recipe_names(incomplete: str) -> list[str]:
    from qpass.recipe import PRESETS

    return [name for name in PRESETS if name.startswith(incomplete)]


Source = Annotated[Path, typer.Argument(help="Folder of a transformers model, or of an artifact")]
Model = Annotated[Path, typer.Argument(help="Folder of a transformers model in float")]
RecipeOption = Annotated[
    str | None,
    typer.Option(
        help="Preset, spec or YAML file, perhaps with changes: int4+kv=int8. Default: int8; an artifact has its own",
        autocompletion=_recipe_names,
    ),
]
Recipes = Annotated[str, typer.Option(help="Recipes, separated by commas", autocompletion=_recipe_names)]
Dtype = Annotated[str, typer.Option(help="Of the float model: float32, bfloat16, float16; auto: as it is stored")]
Data = Annotated[Path, typer.Option(help="Text; documents apart by lines of <|endoftext|>")]
Calibration = Annotated[
    Path | None, typer.Option(help="Text that formats and codes are chosen by; documents as in --data")
]
Window = Annotated[
    int | None,
    typer.Option(help="Tokens of a window; by default 1024 (blame: 256), or as many as the model takes", min=2),
]
Windows = Annotated[int, typer.Option(help="Windows, the first of each document first", min=1)]
Inner = Annotated[str, typer.Option(help="What compiles the rest of the graph: inductor, aot_eager, eager")]
Json = Annotated[bool, typer.Option("--json", help="Plain data instead of a table")]
Page = Annotated[Path | None, typer.Option("-o", "--output", help="Write a page to look at in a browser (.html)")]


def show(result: Any, as_json: bool) -> None:
    """Print a result on stdout: its `to_json()`, or what rich makes of it."""
    from rich.console import Console

    console = Console(markup=False, emoji=False, highlight=False)
    if as_json:
        print(json.dumps(finite(result.to_json()), indent=1, allow_nan=False))
    elif not hasattr(result, "__rich__"):
        print(result)
    elif console.is_terminal:
        console.print(result.__rich__(), soft_wrap=True)
    else:  # a file or a pipe is as wide as its lines
        print(printed(result))


def check_page(output: Path | None) -> None:
    """Raises `QpassError`, before anything is done, for a name that is none of a page, or that cannot be written."""
    if output is None:
        return
    if output.suffix.lower() not in (".html", ".htm"):
        raise QpassError(f"{output}: -o writes a page; give a name that ends in .html (or --json for data)")
    if output.is_dir():
        raise QpassError(f"{output}: is a folder; give the name of a file")
    if not output.absolute().parent.is_dir():
        raise QpassError(f"{output}: there is no folder {output.absolute().parent}")


def deliver(result: Any, output: Path | None, as_json: bool) -> None:
    """A page into a file, if there is to be one; otherwise, or beside it as plain data, what `show` does."""
    if output is not None:
        result.to_html(output)
        typer.echo(f"{output}: {output.stat().st_size:,} bytes", err=True)
    if output is None or as_json:
        show(result, as_json)


def split(recipes: str) -> list[str]:
    """The recipes of an option. Raises `QpassError` if there is none."""
    found = [name.strip() for name in recipes.split(",") if name.strip()]
    if not found:
        raise QpassError("--recipes names none; give presets or specs, separated by commas")
    return found


def main(arguments: list[str] | None = None) -> None:
    """The entry point: an error is one line on stderr, its traceback only with --debug."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    if not debug:
        _quiet()
    if threading.current_thread() is threading.main_thread():  # who is told to end cleans up as one who is interrupted
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        status = app(args=given, prog_name="qpass", standalone_mode=False)
    except BrokenPipeError:  # whoever reads the output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except Exception as error:
        if debug and not isinstance(error, Breach):
            traceback.print_exc()
        status, line = _ended(error)
        typer.echo(line, err=True)
    if status == _INTERRUPTED:
        typer.echo("qpass: interrupted", err=True)
    raise SystemExit(status or 0)


def _ended(error: Exception) -> tuple[int, str]:
    """Exit status and the line that says why."""
    if isinstance(error, QpassError):
        return 1 if isinstance(error, Breach) else 2, f"qpass: {str(error).splitlines()[0]}"
    if hasattr(error, "format_message"):  # typer's own, of arguments
        context = getattr(error, "ctx", None)
        path = context.command_path if context is not None else "qpass"
        if type(error).__name__ == "NoArgsIsHelpError":
            return 2, str(error.format_message())
        return 2, f"qpass: {error.format_message()} ({path} --help)"
    if isinstance(error, typer.Abort):
        return _INTERRUPTED, "qpass: stopped"
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return 2, f"qpass: {type(error).__name__}: {first} (--debug shows where)"


def _quiet() -> None:
    """What libraries have to say to their developers is not for those who type a command."""
    for module in ("torch", "transformers", "accelerate", "copyreg"):
        warnings.filterwarnings("ignore", module=module)
    for category in (FutureWarning, DeprecationWarning):
        warnings.simplefilter("ignore", category)
    logging.getLogger("torch").setLevel(logging.ERROR)


def check_dtype(name: str) -> None:
    """Raises `QpassError` for what is no float type of a model."""
    if name not in ("auto", "float32", "bfloat16", "float16"):
        raise QpassError(f"--dtype {name}: write float32, bfloat16, float16, or auto")
