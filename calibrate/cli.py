"""The program ``calibrate``: a shell over the library. Expected errors are one line on stderr, never a traceback."""

from importlib import import_module

import click
from click_default_group import DefaultGroup

from calibrate import __version__


class _ExpectedError(click.ClickException):
    def __init__(self, message: str, exit_code: int):
        super().__init__(" ".join(message.split()))
        self.exit_code = exit_code


class _Group(DefaultGroup):
    def invoke(self, ctx: click.Context):
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise _ExpectedError("interrupted; run the same command again to continue", 3) from None
        except OSError as error:
            if error.filename is None:
                raise
            message = f"{error.filename}: {error.strerror}; check the path, its rights and the disk"
            raise _ExpectedError(message, 2) from error
        except Exception as error:
            from calibrate.errors import CalibrateError
            from coeffs.errors import CoeffsError
            from runtime.errors import RuntimeCacheError

            if not isinstance(error, (CalibrateError, CoeffsError, RuntimeCacheError)):
                raise
            raise _ExpectedError(str(error), error.exit_code) from error


@click.group(cls=_Group, default="run", default_if_no_args=True)
@click.version_option(__version__, prog_name="calibrate")
def cli() -> None:
    """Calibrate step caching (TeaCache) of diffusion transformers: record, fit, verify, register.

    Without a command the whole job runs, and without --model on the embedded tiny-longcat-image.
    Exit codes: 0 done, 1 a check failed, 2 wrong usage or input, 3 incomplete (run again to continue).
    """


for _area in ("record", "fit", "verify", "plan", "registry"):
    for _command in import_module(f"calibrate.commands.{_area}").COMMANDS:
        cli.add_command(_command)


def main() -> None:
    """Entry point of the program."""
    cli(prog_name="calibrate")
