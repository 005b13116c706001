"""The processes that make a clip together, and how its work is shared out among them. Needs no PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from wan.errors import UserError

ULYSSES_LOSS = 0.035  # of a step's speed with each doubling, measured: 1.88x on 2 GPUs and 3.60x on 4
# The same, set high so that a ring is for what Ulysses cannot do, since each GPU then holds keys and values of all
# tokens. On 2 GPUs its step took 1 % longer than that of Ulysses.
RING_LOSS = 0.3


@dataclass(frozen=True)
class World:
    """This process among those that a launcher such as torchrun has started; alone without one.

    `address` is where the first of them can be reached, "" where that is asked of it.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    address: str = field(default="127.0.0.1", compare=False)

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> World:
        """What the launcher's environment says. Raises UserError."""
        numbers = {}
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)):
            text = environment.get(name) or str(default)
            if not text.isdecimal():
                raise UserError(f"the launcher's {name}={text!r} is no number; start the command with torchrun")
            numbers[name] = int(text)
        address = environment.get("MASTER_ADDR") or cls.address
        world = cls(numbers["RANK"], max(1, numbers["WORLD_SIZE"]), numbers["LOCAL_RANK"], address)
        missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
        if world.size > 1 and missing:
            raise UserError(f"WORLD_SIZE is {world.size} without {', '.join(missing)}: start the command with torchrun")
        return world

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0


@dataclass(frozen=True)
class Sizes:
    """How the work of a step is shared: its two forwards over `cfg` groups, a forward's tokens over `ulysses` * `ring`.

    For attention `ulysses` GPUs share the heads, and each has all keys of its heads from `ring` of them.
    """

    cfg: int = 1
    ulysses: int = 1
    ring: int = 1

    @property
    def ranks(self) -> int:
        """Processes that this takes."""
        return self.cfg * self.tokens

    @property
    def tokens(self) -> int:
        """Processes that share a forward's tokens."""
        return self.ulysses * self.ring

    def __str__(self) -> str:
        ring = f", `ring_size` {self.ring}" if self.ring > 1 else ""
        return f"`cfg_size` {self.cfg}, `ulysses_size` {self.ulysses}{ring}"

    def step(self, guided: float) -> float:
        """The time of a step, in forwards of one GPU; `guided` is the share of steps with guidance's second forward."""
        forwards = 1.0 if self.cfg == 2 else 1 + guided
        loss = (1 + ULYSSES_LOSS) ** (self.ulysses - 1).bit_length() * (1 + RING_LOSS) ** (self.ring - 1).bit_length()
        return forwards / self.tokens * loss


def choose_sizes(
    ranks: int,
    heads: int,
    guided: float,
    *,
    cfg: int | None = None,
    ulysses: int | None = None,
    ring: int | None = None,
) -> Sizes:
    """The fastest sizes for so many GPUs, with those that are given. Raises UserError that lists what goes."""
    going = [
        Sizes(one, other, ranks // one // other)
        for one in (1, 2)
        for other in range(1, ranks // one + 1)
        if ranks % (one * other) == 0 and heads % other == 0 and (one == 1 or guided > 0)
    ]
    given = {"cfg": cfg, "ulysses": ulysses, "ring": ring}
    fitting = [one for one in going if all(size in (None, getattr(one, name)) for name, size in given.items())]
    if fitting:
        return min(fitting, key=lambda one: (one.step(guided), one.cfg))
    asked = ", ".join(f"`{name}_size` {size}" for name, size in given.items() if size is not None)
    listed, why = "; ".join(map(str, going)), ", without guidance" if not guided else ""
    raise UserError(f"{asked} does not go with {ranks} GPUs and {heads} heads{why}; what goes: {listed}")
