"""Read pictures of the tiny world back: which shapes are there, where, in which colour. For measuring."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from training.scenes import COLOURS, SHAPES

SMALLEST = 50  # pixels; what is left of a covered shape may be less, the seam between two shapes is
VIVID = 0.3  # least difference between the highest and the lowest of R, G and B; backgrounds stay below


@dataclass(frozen=True)
class Seen:
    """One shape in one picture."""

    colour: str
    shape: str
    x: float
    y: float
    area: float  # pixels


def shapes_in(picture: Tensor) -> list[Seen]:
    """The shapes in a picture [3, H, W] in [-1, 1], by colour: in the tiny world no two share one."""
    rgb = (picture.float().cpu() + 1) / 2
    vivid = rgb.amax(0) - rgb.amin(0) > VIVID
    palette = torch.tensor(list(COLOURS.values()))
    nearest = (rgb[None] - palette[:, :, None, None]).square().sum(1).argmin(0)
    measured = []
    for index, name in enumerate(COLOURS):
        mine = (vivid & (nearest == index)).float()
        # where two shapes meet, thin lines of a third colour can come about: only pixels among their like count
        among = F.avg_pool2d(mine[None], 3, stride=1, padding=1)[0] * 9 > 4.5
        y, x = torch.nonzero(mine.bool() & among, as_tuple=True)
        if len(x) >= SMALLEST:
            measured.append(_measure(name, x.double() + 0.5, y.double() + 0.5))
    return measured


def _measure(name: str, x: Tensor, y: Tensor) -> Seen:
    across, down = x - x.mean(), y - y.mean()
    apart = torch.hypot(across, down)
    near = apart <= torch.quantile(apart, 0.99)  # a few stray pixels would outweigh the rest
    points, apart = torch.complex(across, down)[near], apart[near]
    # How much a shape looks the same after a third and a quarter of a turn, however it is turned. An equilateral
    # triangle has 0.66 and 0, a square 0 and 0.43, a circle 0 and 0; rounded corners take a fifth of that.
    third, quarter = (float((points**fold).mean().abs() / (apart**fold).mean()) for fold in (3, 4))
    shape = "triangle" if third > 0.4 else "square" if quarter > 0.18 else "circle"
    return Seen(name, shape, float(x.mean()), float(y.mean()), float(len(x)))


@dataclass(frozen=True)
class Read:
    """What is in each of B pictures, colour by colour."""

    present: Tensor  # bool [B, C]
    kind: Tensor  # int64 [B, C], indices of SHAPES
    place: Tensor  # [B, C, 2], pixels


def read_many(pictures: Tensor) -> Read:
    """The shapes in pictures [B, 3, H, W] in [-1, 1], on their device: as `shapes_in`, but for stray pixels."""
    rgb = (pictures.float() + 1) / 2
    vivid = rgb.amax(1) - rgb.amin(1) > VIVID
    palette = torch.tensor(list(COLOURS.values()), device=rgb.device)
    nearest = torch.stack([(rgb - colour[:, None, None]).square().sum(1) for colour in palette], 1).argmin(1)
    mine = (vivid[:, None] & (nearest[:, None] == torch.arange(len(palette), device=rgb.device)[:, None, None])).float()
    mine = (mine * (F.avg_pool2d(mine, 3, stride=1, padding=1) * 9 > 4.5)).flatten(2)  # [B, C, H * W]
    height, width = rgb.shape[2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    where = torch.stack([x, y], -1).flatten(0, 1).to(rgb.device) + 0.5  # [H * W, 2]
    area = mine.sum(2).clamp_min(1)
    place = mine @ where / area[..., None]
    across, down = (where.T[:, None, None] - place.permute(2, 0, 1)[..., None]).unbind(0)
    apart = torch.hypot(across, down)
    # no shape's points are further from its centre than twice the root of their mean square
    near = mine * (apart <= 2.1 * ((mine * apart.square()).sum(2) / area).sqrt()[..., None])

    def alike(fold: int) -> Tensor:
        turned = (torch.complex(across, down) ** fold * near).sum(2).abs()
        return turned / (apart**fold * near).sum(2).clamp_min(1e-6)

    triangle, square = alike(3) > 0.4, alike(4) > 0.18
    circle, square_, triangle_ = (SHAPES.index(name) for name in ("circle", "square", "triangle"))
    kind = torch.where(triangle, triangle_, torch.where(square, square_, circle))
    return Read(area >= SMALLEST, kind, place)
