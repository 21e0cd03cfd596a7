"""Models by name: one table of repositories, default protocols and call arguments (``data/models.yaml``)."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from itertools import starmap
from typing import Any

from calibrate.model.protocol import Settings

Configuration = Callable[[str], Settings]  # of a component by its name
EMBEDDED_MODEL = "tiny-longcat-image"
# Of a shipped set. On the embedded model the learning curve is flat from 4 prompts on (70 were recorded); 21 are three
# of each of the default set's seven kinds. The curve fits 16 of them while 5 are held out, so that it still sees that
# a model which needs 8, its next point, has enough.
DEFAULT_PROMPTS = 21


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One row of the table. None leaves the choice to the pipeline's own default."""

    alias: str
    pipeline_class: str
    repository: str | None = None  # of the checkpoint in diffusers' format
    embedded: str | None = None  # folder inside the package instead of a repository
    kind: str = "image"  # image, video or audio
    needs_image: bool = False
    prompts: str = "default"
    num_prompts: int | None = None
    num_steps: int | None = None
    guidance_scale: float | None = None
    guidance_argument: str | None = None  # None: guidance_scale
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    call_arguments: Settings = field(default_factory=dict)
    # Settings that no other checkpoint of the class has: "component.key" -> value; "pipeline" is model_index.json.
    configuration: Settings = field(default_factory=dict)

    @property
    def slug(self) -> str:
        """The name in run folders and in the registry."""
        return self.alias.lower()


@cache
def model_table() -> tuple[ModelSpec, ...]:
    """Every row, in the order of the file."""
    import yaml

    rows = yaml.safe_load((files("calibrate") / "data" / "models.yaml").read_bytes())
    return tuple(ModelSpec(alias=alias, **row) for alias, row in rows.items())


def find_model(name: str) -> ModelSpec | None:
    """The row with this alias or repository, whatever the case; None when there is none."""
    wanted = name.lower()
    for spec in model_table():
        if wanted in (spec.slug, (spec.repository or spec.slug).lower()):
            return spec
    return None


def recognise(
    pipeline_class: str, name: str, config: Configuration
) -> tuple[ModelSpec | None, str]:
    """The row of a checkpoint, and in words by what: its name, that of its origin, or settings that only it has.

    ``config("transformer")`` is a component's configuration. Without a row: what every checkpoint of the class needs.
    """
    rows = [row for row in model_table() if row.pipeline_class == pipeline_class]
    for known in (name, str(config("pipeline").get("_name_or_path") or "")):
        for row in rows:
            repository = (row.repository or row.slug).lower()
            if known.lower() in (row.slug, repository, repository.rpartition("/")[2]):
                return row, f"{row.alias}, by the name {known}"

    def agrees(key: str, value: Any) -> bool:
        component, setting = key.split(".")
        return config(component).get(setting) == value

    matching = [
        row
        for row in rows
        if row.configuration and all(starmap(agrees, row.configuration.items()))
    ]
    if len(matching) == 1:
        settings = ", ".join(matching[0].configuration)
        return matching[0], f"{matching[0].alias}, by its configuration ({settings})"
    return class_defaults(pipeline_class), ""


def class_defaults(pipeline_class: str) -> ModelSpec | None:
    """What any checkpoint of this pipeline class needs: its guidance argument and call arguments, without sizes."""
    for spec in model_table():
        if spec.pipeline_class == pipeline_class:
            return ModelSpec(
                alias=pipeline_class,
                pipeline_class=pipeline_class,
                kind=spec.kind,
                needs_image=spec.needs_image,
                prompts="default" if spec.embedded else spec.prompts,
                guidance_argument=spec.guidance_argument,
                call_arguments=spec.call_arguments,
            )
    return None
