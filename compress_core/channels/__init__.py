"""Finds channels that have to be removed together, and removes them.

Every slice of a tensor gets a label, and rules carry the labels through the operators of a trace (`algebra`, `rules`).
The labels give groups of channels (`groups`), the cost of a model with fewer channels (`costs`), and the sliced tensors
(`shrinking`). A comparison of outputs verifies that the smaller model computes the same (`proof`). The tensors of
transforms are cut as each transform declares (`following`), after decisions over a whole weight have been frozen
(`decisions`).
"""

from compress_core.channels.after_removal import lost_channels, renumbered, smaller_group
from compress_core.channels.algebra import Dims, Obstacle, Role
from compress_core.channels.costs import Costs, count_operations, operation_costs, parameter_costs
from compress_core.channels.errors import ShrinkError
from compress_core.channels.groups import ChannelGroup, ChannelGroups, Member, channel_groups
from compress_core.channels.heads import channel_groups_of_heads
from compress_core.channels.inputs import InputSpec, batch_size, example_arguments, input_specs
from compress_core.channels.proof import Certificate, prove
from compress_core.channels.rules import Step
from compress_core.channels.saved_groups import SavedGroup, check_channels, group_from_dict, group_to_dict
from compress_core.channels.shrink_model import (
    apply_all_or_nothing,
    averaged_module,
    check_optimizer,
    load_compressed_model,
    planned_shrinkage,
    shrink_model,
    shrink_optimizer,
)
from compress_core.channels.shrinking import Shrinkage, shrinkage
from compress_core.channels.trials import removable_groups

__all__ = [
    "Certificate",
    "ChannelGroup",
    "ChannelGroups",
    "Costs",
    "Dims",
    "InputSpec",
    "Member",
    "Obstacle",
    "Role",
    "SavedGroup",
    "ShrinkError",
    "Shrinkage",
    "Step",
    "apply_all_or_nothing",
    "averaged_module",
    "batch_size",
    "channel_groups",
    "channel_groups_of_heads",
    "check_channels",
    "check_optimizer",
    "count_operations",
    "example_arguments",
    "group_from_dict",
    "group_to_dict",
    "input_specs",
    "load_compressed_model",
    "lost_channels",
    "operation_costs",
    "parameter_costs",
    "planned_shrinkage",
    "prove",
    "removable_groups",
    "renumbered",
    "shrink_model",
    "shrink_optimizer",
    "shrinkage",
    "smaller_group",
]
