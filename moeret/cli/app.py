"""Runs one command, and turns what goes wrong into one line and a code."""

import os
import sys
from importlib.metadata import version
from typing import Annotated

import tyro
from safetensors import SafetensorError

from moeret.cli.indexing import Compact, Export, Index, Rollback, Verify
from moeret.cli.searching import Evaluate, Report, Route, Search
from moeret.cli.serving import Serve
from moeret.cli.sharing import Pull, Push
from moeret.cli.training import Convert, Experts, ExpertsAdd, Quickstart, Train
from moeret.errors import MoeretError
from moeret.terminal import OUT, complain, fail

Command = (
    Annotated[Quickstart, tyro.conf.subcommand("quickstart")]
    | Annotated[Convert, tyro.conf.subcommand("convert")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Experts, tyro.conf.subcommand("experts")]
    | Annotated[Index, tyro.conf.subcommand("index")]
    | Annotated[Compact, tyro.conf.subcommand("compact")]
    | Annotated[Rollback, tyro.conf.subcommand("rollback")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Push, tyro.conf.subcommand("push")]
    | Annotated[Pull, tyro.conf.subcommand("pull")]
    | Annotated[Search, tyro.conf.subcommand("search")]
    | Annotated[Route, tyro.conf.subcommand("route")]
    | Annotated[Serve, tyro.conf.subcommand("serve")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Report, tyro.conf.subcommand("report")]
)


def main() -> None:
    """Runs one command. Exit code 0 only on success; 1 for errors, 2 for wrong usage, 130 for an interrupt."""
    if sys.argv[1:] == ["--version"]:
        OUT.print(f"moeret {version('moeret')}")
        return
    command = None
    try:
        command = tyro.cli(
            Command,
            prog="moeret",
            description="Mixture-of-experts routed retrieval.",
            config=(tyro.conf.OmitSubcommandPrefixes,),
        )
        command.run()
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except MoeretError as error:
        fail(str(error))
    except SafetensorError as error:  # the safetensors library's own word for a disk that is full
        fail(f"{error}; what was published is whole")
    except OSError as error:
        place = error.filename2 or error.filename
        fail(f"{error.strerror or error}{f': {place}' if place else ''}; what was published is whole")
    except KeyboardInterrupt:
        resumable = isinstance(
            getattr(command, "command", command), Quickstart | Train | Index | Compact | ExpertsAdd | Pull
        )
        complain("interrupted" + ("; the same command goes on from where it was saved last" if resumable else ""))
        sys.exit(130)
