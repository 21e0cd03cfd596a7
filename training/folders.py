"""Writing and reading of finished model folders."""

import json
from pathlib import Path

from diffusers import DiffusionPipeline

from calibrate.model.checkpoint import find_checkpoint
from calibrate.model.loading import load_pipeline

ORIGIN_KEYS = ("_name_or_path", "name_or_path", "is_local", "local_files_only")


def strip_local_origin(folder: Path) -> None:
    """Remove from the configs where their parts were loaded from: it means nothing on another machine."""
    for file in folder.rglob("*.json"):
        if not file.name.endswith(("config.json", "model_index.json")):
            continue
        content = json.loads(file.read_text(encoding="utf-8"))
        kept = {key: value for key, value in content.items() if key not in ORIGIN_KEYS}
        if kept != content:
            file.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def load_finished(folder: Path) -> DiffusionPipeline:
    """Load a model folder in the dtype that is shipped."""
    pipeline = load_pipeline(find_checkpoint(str(folder)), dtype="bfloat16", device="cpu")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
