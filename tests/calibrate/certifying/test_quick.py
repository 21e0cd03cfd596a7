"""One prompt through verification, certification and audit of a real but tiny transformer, within a second or two."""

import dataclasses
import json

from tiny_pipeline import TinyPipeline

import coeffs
from calibrate import audit, certify, fit, record, verify
from calibrate.certifying.tiers import Tier
from calibrate.runs.purposes import purposes
from calibrate.trials.setting import FEWER_STEPS, GATE, PLAN, UNIFORM


def test_one_prompt_is_verified_another_certified_and_a_third_audited(tmp_path):
    pipe, run = TinyPipeline(), tmp_path / "run"
    record(pipe, prompts=["a", "b"], steps=4, out=run, progress=False)
    entry = dataclasses.replace(fit(run, degree=1), plans=(coeffs.Plan(schedule="CSCC"),))
    coeffs.save(entry, run / "entry.yaml")
    options = {"model": pipe, "progress": False}

    verified = verify(run, prompts=["c"], budgets=[3], **options)
    rows = verified.summary.set_index("policy")
    assert (
        {PLAN, UNIFORM, FEWER_STEPS} <= set(rows.index) <= {PLAN, UNIFORM, FEWER_STEPS, GATE}
    )
    assert (rows.loc[[PLAN, UNIFORM, FEWER_STEPS], "computed_steps"] == 3).all()
    assert (rows["psnr_db"] > 10).all() and (rows["prompts"] == 1).all()
    facts = json.loads((run / "verify" / "verification.json").read_text())
    assert facts["entry"] == entry.label and facts["model"] == entry.model
    assert facts["transformer_class"] == entry.transformer_class

    tiers = [Tier("any", {"psnr_db": 5.0}), Tier("none", {"psnr_db": 1000.0})]
    certified = certify(
        run, prompts=["d", "e"], tiers=tiers, policies=["plan"], risk=0.5, confidence=0.5,
        **options,
    )  # fmt: skip
    (certificate,) = certified.certificates
    assert (certificate.tier, certificate.plan.schedule) == ("any", "CSCC")
    assert certified.unreached[0].startswith("none (PSNR >= 1000 dB): no policy keeps it")
    assert coeffs.load(run / "entry.yaml").certificates == certified.certificates

    (audited,) = audit(run, prompts=["f"], num_prompts=1, **options)
    assert audited.holds and audited.missed == 0
    served = sorted(purpose.split()[0] for purpose in purposes(run).values())
    assert served == ["audited", "certifying", "certifying", "judged"]
