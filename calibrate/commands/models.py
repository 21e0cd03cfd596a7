"""The command that lists the models that are known by name."""

import click


@click.command()
def models() -> None:
    """List the models that --model knows by name, with the steps, guidance and size that they are recorded at.

    \b
    Example:
        calibrate models
    """
    from calibrate.model.table import model_table
    from calibrate.text import aligned

    rows = []
    for spec in model_table():
        sizes = [spec.width, spec.height, spec.num_frames]
        size = "x".join(str(value) for value in sizes if value)
        steps, guidance = (
            str(value or "-") for value in (spec.num_steps, spec.guidance_scale)
        )
        owner = (spec.repository or "teacal itself").partition("/")[0]
        rows.append((spec.alias, spec.kind, steps, guidance, size or "-", owner))
    click.echo(aligned(("alias", "kind", "steps", "guidance", "size", "published by"), rows))


COMMANDS = [models]
