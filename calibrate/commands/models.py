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
        sizes = filter(None, (spec.width, spec.height, spec.num_frames))
        owner = (spec.repository or "teacal itself").partition("/")[0]
        facts = (spec.num_steps, spec.guidance_scale, "x".join(map(str, sizes)))
        rows.append((spec.alias, spec.kind, *(str(fact or "-") for fact in facts), owner))
    click.echo(aligned(("alias", "kind", "steps", "guidance", "size", "published by"), rows))


COMMANDS = [models]
