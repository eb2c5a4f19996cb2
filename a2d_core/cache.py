"""The KV cache of sampling: a slot for each position of each row, allocated once and written in place.

The library's own caches are concatenated anew in each forward, and cropped after it. Here the keys of a token go to the
slot of its logical position: those of the active block are overwritten at the next evaluation, a new prompt takes over
the slots of a finished one, and what is final is neither computed again nor copied.
"""

# Shapes: R rows, P slots of a row, W written tokens, G key-value heads, D head size, Q queries

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin


class SlotCache(Cache):
    """`rows` x `slots` places in each layer, and one more in each row, which nobody sees: for the keys of padding."""

    def __init__(self, rows: int, slots: int) -> None:
        super().__init__(layer_class_to_replicate=lambda: _SlotLayer(self))
        self.rows, self.slots = rows, slots
        self.target_W = torch.empty(0, dtype=torch.int64)
        self.seen: tuple[int, int] | None = None

    def place(self, position_RQ: Tensor, is_real_RQ: Tensor, row_R: Tensor) -> Tensor:
        """Where the keys of these positions go, as `write` takes it: flat, row by row."""
        return (row_R[:, None] * (self.slots + 1) + torch.where(is_real_RQ, position_RQ, self.slots)).flatten()

    def write(self, target_W: Tensor, seen: tuple[int, int] | None) -> SlotCache:
        """Say where the next forward's keys go, and what its queries see: the first so many rows and slots.

        None: they see nothing but each other.
        """
        self.target_W, self.seen = target_W, seen
        return self

    def move(self, source: int, target: int) -> None:
        """Give a row's keys another place."""
        for layer in self.layers:
            for stored in (layer.keys, layer.values):
                stored[target].copy_(stored[source])


class _SlotLayer(CacheLayerMixin):
    """One layer's keys and values, [R, P + 1, G, D]."""

    def __init__(self, owner: SlotCache) -> None:
        super().__init__()
        self.owner = owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the slots. Zeros, since a key that is masked must still be finite."""
        shape = self.owner.rows, self.owner.slots + 1, key_states.shape[1]
        self.keys = key_states.new_zeros(*shape, key_states.shape[-1])
        self.values = value_states.new_zeros(*shape, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Write new keys and values [R, G, Q, D]; returns those that the queries see, without a copy."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for stored, new in ((self.keys, key_states), (self.values, value_states)):
            stored.flatten(0, 1).index_copy_(0, self.owner.target_W, new.transpose(1, 2).flatten(0, 1))
        if self.owner.seen is None:
            return key_states, value_states
        rows, slots = self.owner.seen
        return self.keys[:rows, :slots].transpose(1, 2), self.values[:rows, :slots].transpose(1, 2)

    def get_seq_length(self) -> int:
        """What the network would count positions from, if it were not told them."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """What the network would size its mask by, if it were not given one."""
        return (self.owner.seen[1] if self.owner.seen else query_length), 0

    def get_max_length(self) -> int:
        """Slots of a row."""
        return self.owner.slots


class Graphs:
    """Replays a function of tensors as a CUDA graph, one for each set of shapes: a step costs one launch in place of hundreds."""

    def __init__(self) -> None:
        self.made: dict[tuple[torch.Size, ...], tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}

    def __call__(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """function(*inputs)."""
        shapes = tuple(x.shape for x in inputs)
        if shapes not in self.made:
            static = [x.clone() for x in inputs]
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                function(*static)  # whatever is set up at the first call is not recorded
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = function(*static)
            self.made[shapes] = graph, static, output
        graph, static, output = self.made[shapes]
        for kept, given in zip(static, inputs, strict=True):
            kept.copy_(given)
        graph.replay()
        return output.clone()  # the graph writes to the same place each time
