"""From the launcher's environment to a connected rank: who am I, which device is mine, whom can I talk to.

A process without RANK and WORLD_SIZE is a world of one and needs no torch.distributed at all.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megads.errors import ConfigError
from megads.parallel.control import Control


@dataclass(frozen=True, slots=True)
class Place:
    """This process among all: global rank and size, and its number on its host."""

    rank: int
    world_size: int
    local_rank: int


def discover(environment: Mapping[str, str] | None = None) -> Place:
    """This process' place, from the variables that torchrun and `megads launch` set.

    Raises:
        ConfigError: a variable that is missing or no number, or a rank outside the world.
    """
    environment = os.environ if environment is None else environment
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return Place(0, 1, 0)
    rank, world_size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    if not 0 <= rank < world_size:
        raise ConfigError(
            "environment variable RANK is outside the world",
            found=f"RANK={rank}, WORLD_SIZE={world_size}",
            allowed="0 <= RANK < WORLD_SIZE",
        )
    return Place(
        rank, world_size, _number(environment, "LOCAL_RANK") if "LOCAL_RANK" in environment else rank
    )


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name)
    if text is None or not text.strip().isdigit():
        raise ConfigError(
            f"environment variable {name} names this process' place",
            found="nothing" if text is None else repr(text),
            allowed="a whole number >= 0",
            do="start with `python -m megads launch` or torchrun, or unset RANK and WORLD_SIZE for one process",
        )
    return int(text)


def device_of(place: Place) -> torch.device:
    """The GPU with this process' local rank where there are GPUs, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if place.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            "this host has fewer GPUs than processes",
            found=f"local rank {place.local_rank}, {torch.cuda.device_count()} GPUs",
            do="start as many processes a host as it has GPUs",
        )
    return torch.device("cuda", place.local_rank)


def connect(place: Place, *, timeout: float, device: torch.device) -> Control:
    """Join the other processes; returns the control channel. A world of one joins nobody.

    Args:
        timeout: seconds after which a collective that somebody did not join fails.
    """
    if place.world_size == 1:
        return Control(0, 1)
    limit = timedelta(seconds=timeout)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        rank=place.rank,
        world_size=place.world_size,
        timeout=limit,
    )
    return Control(place.rank, place.world_size, dist.new_group(backend="gloo", timeout=limit))


def disconnect() -> None:
    """Leave the other processes; harmless in a world of one."""
    if dist.is_initialized():
        dist.destroy_process_group()
