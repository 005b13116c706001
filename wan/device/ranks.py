"""The processes that make a clip together, and how its work is shared out among them. Needs no PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from wan.errors import UserError

ULYSSES_LOSS = 0.035  # of a step's speed with each doubling, measured: 1.88x on 2 GPUs and 3.60x on 4
# The same, set high so that a ring is for what Ulysses cannot do, since each GPU then holds keys and values of all
# tokens. On 2 GPUs its step took 1 % longer than that of Ulysses.
RING_LOSS = 0.3
USUAL = 32_760  # tokens of a clip of 81 frames at 480p


@dataclass(frozen=True)
class World:
    """This process among those that a launcher such as torchrun has started; alone without one.

    `address` is where the first of them can be reached, "" where that is asked of it. `local_size` are those on its
    machine, 0 where that is not known.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    address: str = field(default="127.0.0.1", compare=False)
    local_size: int = field(default=0, compare=False)

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> World:
        """What the launcher's environment says. Raises UserError."""
        numbers = {}
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 0)):
            text = environment.get(name) or str(default)
            if not text.isdecimal():
                raise UserError(f"the launcher's {name}={text!r} is no number; start the command with torchrun")
            numbers[name] = int(text)
        address = environment.get("MASTER_ADDR") or cls.address
        size, local_size = max(1, numbers["WORLD_SIZE"]), numbers["LOCAL_WORLD_SIZE"]
        world = cls(numbers["RANK"], size, numbers["LOCAL_RANK"], address, local_size)
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

    For attention `ulysses` GPUs share the heads, and each has all keys of its heads from `ring` of them. `faster` are
    sizes for which a GPU has too little memory.
    """

    cfg: int = 1
    ulysses: int = 1
    ring: int = 1
    faster: Sizes | None = field(default=None, compare=False, kw_only=True)

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
        why = f"; a GPU has too little memory for {self.faster}, which is faster" if self.faster else ""
        return f"`cfg_size` {self.cfg}, `ulysses_size` {self.ulysses}{ring}{why}"

    def step(self, guided: float, tokens: int) -> float:
        """The time of a step on a clip of so many tokens, in forwards of one GPU, with what is filled up.

        `guided` is the share of steps with guidance's second forward.
        """
        forwards = 1.0 if self.cfg == 2 else 1 + guided
        loss = (1 + ULYSSES_LOSS) ** (self.ulysses - 1).bit_length() * (1 + RING_LOSS) ** (self.ring - 1).bit_length()
        return forwards * self._count(tokens) / tokens * loss

    def leaves_some_idle(self, tokens: int) -> bool:
        """Whether the last process would have fewer of a clip's tokens than zeros to fill them up."""
        count = self._count(tokens)
        return 2 * (tokens - (self.tokens - 1) * count) < count

    def _count(self, tokens: int) -> int:
        """The tokens that each process computes."""
        return -(-tokens // self.tokens)


def possible_sizes(
    ranks: int,
    heads: int,
    guided: float,
    *,
    cfg: int | None = None,
    ulysses: int | None = None,
    ring: int | None = None,
) -> list[Sizes]:
    """The sizes that go with so many GPUs, and with those that are given. Raises UserError that lists what goes."""
    going = [
        Sizes(one, other, ranks // one // other)
        for one in (1, 2)
        for other in range(1, ranks // one + 1)
        if ranks % (one * other) == 0 and heads % other == 0 and (one == 1 or guided > 0)
    ]
    given = {"cfg": cfg, "ulysses": ulysses, "ring": ring}
    if fitting := [one for one in going if all(size in (None, getattr(one, name)) for name, size in given.items())]:
        return fitting
    asked = ", ".join(f"`{name}_size` {size}" for name, size in given.items() if size is not None)
    listed, why = "; ".join(map(str, going)), ", without guidance" if not guided else ""
    raise UserError(f"{asked} does not go with {ranks} GPUs and {heads} heads{why}; what goes: {listed}")


def choose_sizes(
    possible: Sequence[Sizes], guided: float, tokens: int = USUAL, fits: Callable[[Sizes], bool] = lambda _: True
) -> Sizes:
    """The fastest for clips of so many tokens, of those that a GPU's memory `fits`.

    Where it fits none, of those that need the least.
    """

    def cost(one: Sizes) -> tuple[bool, float, int]:
        return one.leaves_some_idle(tokens), one.step(guided, tokens), one.cfg

    fastest, most = min(possible, key=cost), max(one.tokens for one in possible)
    fitting = [one for one in possible if fits(one)] or [one for one in possible if one.tokens == most]
    chosen = min(fitting, key=cost)
    return chosen if chosen == fastest else replace(chosen, faster=fastest)
