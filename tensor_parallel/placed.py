"""What every sharded layer has: a place among the ranks, a group handle, and random numbers of its own."""

from __future__ import annotations

import torch
from torch import nn

from tensor_parallel.errors import ConfigError
from tensor_parallel.group import Group, default_group
from tensor_parallel.partition import check_rank


class PlacedModule(nn.Module):
    """A module built for one place. Its group, when not given, is the process's own, found when first needed."""

    def __init__(self, world_size: int, rank: int, group: Group | None) -> None:
        super().__init__()
        check_rank(rank, world_size)
        self.world_size = world_size
        self.rank = rank
        self._group = group
        if group is not None:
            self._check_place(group)

    @property
    def group(self) -> Group:
        group = self._group or default_group()
        self._check_place(group)
        return group

    @group.setter
    def group(self, group: Group) -> None:
        self._check_place(group)
        self._group = group

    def _check_place(self, group: Group) -> None:
        if (group.rank, group.world_size) != (self.rank, self.world_size):
            raise ConfigError(
                f"{type(self).__name__} was built for rank {self.rank} of {self.world_size}, "
                f"but its group is rank {group.rank} of {group.world_size}; call init_tensor_parallel() or pass group="
            )


def rank_generator(rank: int, device: torch.device) -> torch.Generator | None:
    """A generator of this rank's own, seeded by one draw of the default one; None on meta, where nothing is drawn."""
    if device.type == "meta":
        return None
    seed = int(torch.randint(0, 2**31, ()).item())
    return torch.Generator(device).manual_seed(seed * 65_537 + rank)
