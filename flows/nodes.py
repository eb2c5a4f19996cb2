"""The training steps of a flow that trains on several nodes, `compute.train.nodes` of them.

Metaflow runs a step on several nodes (`@parallel`) only behind a step that says on how many, and before
one that joins them, which may not be the same. So a training step becomes three, and `install` puts them
into the flow's class before its graph is read: `pretrain` calls the nodes together, each of them runs
`pretrain_on_nodes`, and `pretrained` goes on with what node 0 has made. With one node the graph is as it stands.

The nodes share no files: each copies its input from the datastore, and stores its part of the checkpoints there.
"""

from __future__ import annotations

import os
import sys
import zlib
from pathlib import Path
from typing import Any

from metaflow import card, current, parallel, step

from a2d_core import launch
from a2d_core.config import Recipe
from a2d_core.settings import build


def install(flow: type) -> None:
    """Replace the training steps of a flow's class by those below."""
    for made in (pretrain, pretrain_on_nodes, pretrained_by_nodes, sft, sft_on_nodes, tuned_by_nodes):
        setattr(flow, made.__name__, made)
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # local nodes are started by the name `python`


@step
def pretrain(self: Any) -> None:
    """Call the nodes together that continue the pretraining."""
    self.nodes = count(self.recipe, "pretrain")
    self.next(self.pretrain_on_nodes, num_parallel=self.nodes)


@card(type="blank", id="training", refresh_interval=5)
@parallel
@step
def pretrain_on_nodes(self: Any) -> None:
    """Continue the pretraining on text, on each node."""
    from a2d_core.stages import pretrain

    self._train("pretrain", pretrain.run, this_node(self.recipe))
    self.next(self.pretrained_by_nodes)


@step
def pretrained_by_nodes(self: Any, inputs: Any) -> None:
    """Go on with what node 0 has made."""
    self.merge_artifacts(inputs[:1])
    self.pretrained = self.model
    self.next(self.sft)


@step
def sft(self: Any) -> None:
    """Call the nodes together that fine-tune."""
    self.nodes = count(self.recipe, "sft")
    self.next(self.sft_on_nodes, num_parallel=self.nodes)


@card(type="blank", id="training", refresh_interval=5)
@parallel
@step
def sft_on_nodes(self: Any) -> None:
    """Fine-tune on conversations, on each node."""
    from a2d_core.stages import sft

    self._train("sft", sft.run, this_node(self.recipe))
    self.next(self.tuned_by_nodes)


@step
def tuned_by_nodes(self: Any, inputs: Any) -> None:
    """Go on with what node 0 has made."""
    self.merge_artifacts(inputs[:1])
    self.next(self.sample)


def count(recipe: dict[str, Any], stage: str) -> int:
    """How many nodes a stage needs: where it is switched off, two, because Metaflow takes no fewer on Kubernetes."""
    made = build(Recipe, recipe)
    return made.compute.train.nodes if getattr(made, stage).enabled else 2


def this_node(recipe: dict[str, Any]) -> launch.Nodes:
    """The nodes of this step, as this one sees them; it ends with the process that has started it."""
    here = current.parallel
    if here.node_index:
        launch.die_with(os.getppid(), launch.terminate)  # a local node 0 that fails leaves the others waiting for it
    name = f"{current.run_id}/{current.step_name}/{current.retry_count}"
    port = 20_000 + zlib.crc32(name.encode()) % 10_000  # below those that the system gives to connections
    patience = 60 * build(Recipe, recipe).compute.train.meeting_minutes
    return launch.Nodes(here.num_nodes, here.node_index, f"{here.main_ip}:{port}", meeting_seconds=patience, share_files=False)
