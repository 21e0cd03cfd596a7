"""Shared set-up: one thread, no network, no user registry, so that a test sees the same world everywhere."""

import os

os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    DIFFUSERS_VERBOSITY="error",
    TRANSFORMERS_VERBOSITY="error",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
    OMP_WAIT_POLICY="PASSIVE",
)
