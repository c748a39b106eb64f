"""The command line: its commands in the order of the way from a model to a report."""

from __future__ import annotations

from typing import Annotated

import typer

import unetc

from .commands.analyze import analyze
from .commands.build import build
from .commands.compile import compile_
from .commands.demo import demo
from .commands.doctor import doctor
from .commands.export import export
from .commands.inspect import inspect
from .commands.pareto import pareto
from .commands.plan import plan
from .commands.report import report
from .commands.sample import sample
from .commands.serve import serve
from .commands.verify import verify
from .groups import spliced

app = typer.Typer(
    name="unetc",
    help="Measure which parts of a diffusion model matter at which noise level, and build one pruned engine per phase.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for command in (analyze, plan, build, pareto, sample, serve, export, compile_, verify, report, inspect, doctor, demo):
    app.command(command.__name__.rstrip("_"))(spliced(command))


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(unetc.__version__)
        raise typer.Exit
