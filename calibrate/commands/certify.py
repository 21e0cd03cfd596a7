"""The commands that promise: ``certify`` (which setting keeps a limit) and ``audit`` (whether it does so here)."""

from typing import Any

import click
from click import option

from calibrate.commands.announce import leave_to_rank_0, tell, tell_next, tell_plan
from calibrate.commands.options import FOLDER, POSITIVE, registry, rerunning_options
from calibrate.text import aligned, block
from coeffs.entry.fields import stated
from coeffs.errors import CheckFailed

LIMITS = ("psnr", "snr", "ssim", "lpips")
_SHARE = click.FloatRange(0, 1, min_open=True, max_open=True)


@click.command()
@click.argument("source", metavar="RUN")
@option(
    "--tier",
    "tiers",
    multiple=True,
    metavar="NAME:psnr=35,ssim=0.95",
    help="A tier and its limits; repeat [default: lossless:psnr=40 and high:psnr=25].",
)
@option("--psnr", type=float, help="Lowest PSNR in dB; with the next three a tier --quality.")
@option("--snr", type=float, help="Lowest SNR in dB, of sound and series.")
@option("--ssim", type=float, help="Lowest SSIM.")
@option("--lpips", type=float, help="Highest LPIPS; needs teacal[lpips].")
@option("--quality", default="high", help="Name of that tier.")
@option(
    "--risk",
    type=_SHARE,
    default=0.05,
    help="Share of prompts that may miss a limit.",
)
@option(
    "--confidence",
    type=_SHARE,
    default=0.95,
    help="That no certificate is false.",
)
@option(
    "--policies",
    default="plan,gate,fewer-steps",
    metavar="P,P,...",
    help="Fewer need fewer prompts.",
)
@option("--num-prompts", type=POSITIVE, help="[default: the fewest that can prove the risk]")
@rerunning_options
def certify(
    source: str, tiers: tuple[str, ...], quality: str, policies: str, **options: Any
) -> None:
    """Prove on prompts that nothing has seen which setting is the fastest whose samples keep a limit.

    Writes certificates into the run's entry.yaml, for `apply_tea_cache(pipe, entry, quality="high")`. Interrupted, the
    same command continues. Exit code 1 where a tier is not reached; the others are certified.

    \b
    Example:
        calibrate certify runs/flux1-dev-1a2b3c4d --psnr 30 --risk 0.1
    """
    if leave_to_rank_0("certify"):
        return
    from calibrate.certifying.certify import certify as run_certification
    from calibrate.certifying.certify import checked_run
    from calibrate.certifying.tiers import USUAL_TIERS, parse_tier

    given = stated({name: options.pop(name) for name in LIMITS})
    limits = ",".join(f"{name}={limit}" for name, limit in given.items())
    if limits:
        tiers = (*tiers, f"{quality}:{limits}")
    chosen = list(map(parse_tier, tiers)) or USUAL_TIERS
    run = checked_run(source)
    tell_plan("certify: which setting keeps a limit", run, tiers=", ".join(map(str, chosen)))
    done = run_certification(
        run, tiers=chosen, policies=policies.split(","), say=tell, **options
    )
    rows = [
        [one.tier, one.how, f"{one.missed} of {one.prompts}", f"{one.factor:.2f}x"]
        for one in done.certificates
    ]
    if rows:
        click.echo(aligned(["tier", "setting", "missed", "speed-up"], rows))
        click.echo(f"\ncertificates: {run / 'entry.yaml'}")
        tell_next(f"calibrate audit {run} --num-prompts 20", f"calibrate publish {run}")
    for name, reason in done.refused.items():
        click.echo(f"refused: {name}: {reason}")
    if done.unreached:
        raise CheckFailed("; ".join(done.unreached))


@click.command()
@click.argument("source", metavar="RUN|ENTRY")
@option("--tier", "tiers", multiple=True, metavar="NAME", help="Only this tier; repeat.")
@option(
    "--num-prompts",
    type=POSITIVE,
    default=20,
    help="More notice smaller shifts.",
)
@option("--lora", type=click.Path(exists=True), help="A LoRA that is loaded first.")
@option("--out", type=FOLDER, metavar="FOLDER", help="Where an entry's audit goes.")
@registry
@rerunning_options
def audit(source: str, **options: Any) -> None:
    """Run the certified settings here, against uncached runs on new prompts: do they keep what was promised?

    For another machine, --dtype, --model, --lora, kernel or argument than was certified. Exit code 1 where not.

    \b
    Example:
        calibrate audit runs/flux1-dev-1a2b3c4d --dtype float16 --num-prompts 20
    """
    if leave_to_rank_0("audit"):
        return
    from calibrate.certifying.audit import audit as run_audit
    from calibrate.runs.lock import folder_of

    folder = folder_of(source, options["registry"], options["out"])
    tell(
        block("audit: does a certificate hold here", {"entry": source, "folder": str(folder)})
    )
    done = run_audit(source, say=tell, **options)
    for one in done:
        click.echo(f"{one.certificate.promise}\n  holds here: {one.verdict}")
    failed = [one.certificate.tier for one in done if not one.holds]
    if failed:
        raise CheckFailed(
            f"{', '.join(failed)}: not shown to hold here; audit more prompts where in doubt, certify in these "
            'settings, or use quality="exact"'
        )


COMMANDS = [certify, audit]
