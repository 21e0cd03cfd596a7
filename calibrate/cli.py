"""The program ``calibrate``: a shell over the library. Expected errors are one line on stderr, never a traceback."""

import sys
from importlib import import_module
from pathlib import Path

import click
from click_default_group import DefaultGroup

from calibrate import __version__
from calibrate.errors import EXPECTED
from calibrate.text import did_you_mean
from teacal import missing_package

AREAS = ("record", "fit", "plan", "verify", "certify", "registry", "models")


class _ExpectedError(click.ClickException):
    def __init__(self, message: str, exit_code: int):
        super().__init__(" ".join(message.split()))
        self.exit_code = exit_code  # type: ignore[misc] # click declares it for the class, reads the instance


class _Group(DefaultGroup):
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # An unset variable of a shell script: it would mean the current folder, or the default.
        for before, word in zip(["an argument", *args], args, strict=False):
            if word == "" or (word.startswith("--") and word.endswith("=")):
                name = word.removesuffix("=") or before
                raise click.UsageError(
                    f"{name}: empty; give a value, or leave the option away"
                )
        return super().parse_args(ctx, args)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.commands and not cmd_name.startswith("-"):
            hint = did_you_mean(cmd_name, self.commands) or "`calibrate --help` lists them"
            raise click.UsageError(f"No such command {cmd_name!r}; {hint}", ctx)
        return super().get_command(ctx, cmd_name)

    def invoke(self, ctx: click.Context):
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # click ends quietly when nobody reads on
        except OSError as error:
            where = error.filename or f"calibrate {ctx.invoked_subcommand}"
            raise _ExpectedError(
                f"{where}: {error.strerror or error}; check the path, its rights and the room on the disk",
                2,
            ) from error
        except Exception as error:
            missing = missing_package(error) if isinstance(error, ImportError) else None
            if missing is None and not isinstance(error, EXPECTED):
                raise
            raise _ExpectedError(
                missing or str(error), getattr(error, "exit_code", 2)
            ) from error


@click.group(
    cls=_Group,
    default="run",
    default_if_no_args=True,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        "show_default": True,
    },
)
@click.version_option(__version__, prog_name="calibrate")
def cli() -> None:
    """Calibrate step caching (TeaCache) of diffusion transformers: record, fit, plan, verify, register.

    Without a command it records, fits and drafts an entry. --model takes an alias (`calibrate models`
    lists them), a folder in diffusers' format or a hub id; without it the embedded tiny-longcat-image runs.

    \b
    Order of work, for a run folder RUN:
        calibrate --model NAME              record and fit: RUN and a draft entry
        calibrate plan RUN --speedup 2      which steps to compute, proven on real runs
        calibrate verify RUN                gate, plan and baselines on prompts never seen before
        calibrate certify RUN               a setting proven to keep a limit; audit: here too
        calibrate report RUN                the figures, plots and samples in one page
        calibrate publish RUN               into the registry; export ENTRY --to ENGINE for serving

    Exit codes: 0 done, 1 a check failed, 2 wrong usage or input, 3 incomplete (run again to continue).
    """


for _area in AREAS:
    for _command in import_module(f"calibrate.commands.{_area}").COMMANDS:
        cli.add_command(_command)


def main() -> None:
    """Run the program under the name by which it was called."""
    name = Path(sys.argv[0]).name
    cli(prog_name=name if name == "teacal" else "calibrate")
