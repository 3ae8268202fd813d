"""Parsing, and what becomes of errors: one clear message and exit status 2, the traceback with --debug."""

import argparse
import faulthandler
import io
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import fpdm
from fpdm.cli import demo, evaluate, experiment, info, latents, plan, replay, runs, sample, sweep, train, tune
from fpdm.names import unknown

COMMANDS = {
    "train": train,
    "info": info,
    "latents": latents,
    "runs": runs,
    "replay": replay,
    "plan": plan,
    "sample": sample,
    "tune": tune,
    "evaluate": evaluate,
    "sweep": sweep,
    "experiment": experiment,
    "demo": demo,
}
OUT_OF_MEMORY = re.compile("out of memory|not enough memory|can't allocate memory")
INTERRUPTED = 130  # as shells report a process ended by Ctrl-C


class Parser(argparse.ArgumentParser):
    """argparse, but an unknown option or command names the nearest one, and abbreviations are not guessed at."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, extra = self.parse_known_args(args, namespace)
        if extra:
            command = parsed.parser
            options = [option for action in command._actions for option in action.option_strings]
            flags = [word.split("=")[0] for word in extra if word.startswith("--")]
            command.error(unknown("option", flags[0], options) if flags else f"unexpected argument {extra[0]!r}")
        return parsed

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\nSee {self.prog} --help\n")


def make_parser() -> Parser:
    parser = Parser(prog="fpdm", description="Train and sample Fixed Point Diffusion Models.")
    parser.add_argument("--version", action="version", version=f"fpdm {fpdm.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").splitlines()[0]
        command = commands.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(run=module.run, parser=command)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status: 0 done, 2 refused, 130 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and not words[0].startswith("-") and words[0] not in COMMANDS:
        print(f"fpdm: {unknown('command', words[0], COMMANDS)}", file=sys.stderr)
        return 2
    options = make_parser().parse_args(words)
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may be no text, and are printed when all is done
        sys.stdout.reconfigure(errors="backslashreplace")
    # How long OpenMP's threads (of torch's CPU build) spin before they sleep. The default is so long that, beside one
    # busy process on two cores, `fpdm sample` took ten times as long as with this; alone it makes no difference.
    os.environ.setdefault("GOMP_SPINCOUNT", "8000")
    if not faulthandler.is_enabled():
        with suppress(OSError, ValueError, RuntimeError):  # where standard error is no file
            faulthandler.enable()  # a crash in native code, after days perhaps, says where it was
    try:
        with plain_warnings(options.parser.prog):
            return options.run(options)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the output, `head` for instance, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError, FloatingPointError, MemoryError, RuntimeError) as error:
        if options.debug or (told := telling(error)) is None:
            raise
        print(f"{options.parser.prog}: {told}", file=sys.stderr)
        return 2


@contextmanager
def plain_warnings(program: str) -> Iterator[None]:
    """Warnings for users without the line of code that gave them; those of libraries with it."""
    default = warnings.formatwarning

    def plain(message: Any, category: type[Warning], *where: Any, **line: Any) -> str:
        return (
            f"{program}: warning: {message}\n"
            if category is UserWarning
            else default(message, category, *where, **line)
        )

    warnings.formatwarning = plain
    try:
        yield
    finally:
        warnings.formatwarning = default


def telling(error: Exception) -> str | None:
    """What to say of an error; None for one that nobody foresaw, of which the traceback says more."""
    said = str(error)
    # torch's own exception of a GPU is a RuntimeError, too; on a CPU nothing but the message tells.
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(said)):
        first = said.strip().partition("\n")[0]
        return f"not enough memory ({first}): take a smaller --batch-size, or see --help for what else saves memory"
    return None if isinstance(error, RuntimeError) else said
