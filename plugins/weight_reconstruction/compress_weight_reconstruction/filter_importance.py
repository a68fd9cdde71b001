"""The filter importance `reconstruction`: what it costs the layers that read a channel to do without it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compress_core import Choice, ModelError
from compress_core.channels import ChannelGroup, Member, Role
from compress_weight_reconstruction.config import settings_for_choosing
from compress_weight_reconstruction.evidence import Evidence, Findings, observe
from compress_weight_reconstruction.solvers import channel_errors

logger = logging.getLogger(__name__)

# The choice point of filter pruning; by name, so that neither plugin imports the other.
_POINT = "filter_pruning.importance"
_ROLES = (Role.READS, Role.MAKES)
# Errors, and the channels that they belong to, of a weight that says nothing.
_NOTHING = (torch.empty(0, dtype=torch.float64), torch.empty(0, dtype=torch.int64))


class ReconstructionImportance:
    """Measures by how much the squared errors of a channel's readers rise if all other channels make up for it."""

    def measure(self, request: Any) -> Sequence[Tensor]:
        """Returns the importance of each channel; see `compress_filter_pruning.measured.DataImportance`.

        Args:
            request: The `ImportanceRequest` of filter pruning.

        Raises:
            ModelError: Nothing that makes or reads the channels of a group was seen on the data.
        """
        groups: Sequence[ChannelGroup] = request.groups
        config = settings_for_choosing(request.section)
        parameters = dict(request.model.named_parameters(remove_duplicate=False))
        members = [member for group in groups for member in group.members]
        names = dict.fromkeys(m.parameter for m in members if m.role in _ROLES)
        findings = observe(
            request.model,
            [name for name in names if name in parameters and parameters[name].ndim > 1],
            request.data,
            num_samples=config.num_samples,
            positions=config.positions,
        )
        found = [group_errors(group, findings, request.data.path, damping=config.damping) for group in groups]
        left_out: dict[str, str] = {}
        for group in groups:
            left_out |= unseen_readers(group, findings, parameters)
        for name, reason in left_out.items():
            logger.warning(
                "%s: what it costs '%s' to do without channels is not counted in full: %s",
                request.data.path,
                name,
                reason,
            )
        # Errors of different groups are compared as they are. On held-back training images (ResNet-56) dividing them by
        # their group's sum, or by a root of it, was worse, and by the operations that a channel costs not better.
        return found


def group_errors(group: ChannelGroup, findings: Findings, path: str, *, damping: float) -> Tensor:
    """Returns the error that removing each channel of a group causes, summed over the weights that read it.

    If no product reads the channels, it is the power of the outputs that are lost.

    Args:
        group: The group.
        findings: What was seen of its weights.
        path: Begins the messages of errors.
        damping: As in `channel_errors`.

    Returns:
        float64 on the CPU, shape (channels,).

    Raises:
        ModelError: No weight of the group was seen.
    """
    for role, error in ((Role.READS, _errors_of_readers), (Role.MAKES, _power_of_rows)):
        total, is_seen = torch.zeros(group.size, dtype=torch.float64), False
        for part, channels in _parts(group, findings.products, role):
            values, owners = error(part, channels, damping)
            wanted = owners >= 0
            is_seen |= bool(wanted.any())
            # A weight that is read twice in a forward makes two errors, as two weights with the same values do.
            total.index_add_(0, owners[wanted], values[wanted] * part.uses)
        if is_seen:
            return total.clamp_(min=0)
    names = sorted({member.parameter for member in group.members} & set(findings.uncounted))
    reasons = "; ".join(f"'{name}': {findings.uncounted[name]}" for name in names[:3])
    raise ModelError(
        f"{path}: 'reconstruction' knows nothing about the channels of '{group.members[0].parameter}' "
        f"({reasons}). Give data that reaches these layers and varies there, or list them in ignored_scopes"
    )


def unseen_readers(group: ChannelGroup, findings: Findings, parameters: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns which weights read channels of a group without counting, or only in part -> why.

    Args:
        group: The group.
        findings: What was seen of its weights.
        parameters: All parameters by name, shared ones under each of their names.
    """
    reasons: dict[str, str] = {}
    for member in group.members:
        name = member.parameter
        if name not in parameters or parameters[name].ndim < 2:
            continue
        reason = findings.uncounted.get(name)
        if member.role == Role.MAKES:
            # A weight that only makes channels has no error of its own; one with other uses may read them as well.
            names = [other for other, value in parameters.items() if value is parameters[name]]
            if reason is not None and (len(names) > 1 or name in findings.several):
                reasons[name] = f"{reason}; it may read the channels as well"
        elif member.role == Role.READS:
            read = _parts(group, {name: findings.products.get(name, [])}, Role.READS)
            if reason is not None:
                reasons[name] = reason
            elif any(not _is_alike(channels) for _, channels in read):
                reasons[name] = "its rows read different channels"
    return reasons


def _is_alike(channels: Tensor) -> bool:
    """Returns whether all rows have the same channels."""
    return bool((channels == channels[:, :1]).all())


def _parts(
    group: ChannelGroup, products: Mapping[str, list[Evidence]], role: Role
) -> Iterator[tuple[Evidence, Tensor]]:
    """Yields the products in which weights have a role, with the channel of each element as (groups, rows, columns)."""
    # Products tell the role, so a weight that is listed with both roles is looked at once.
    members = {(m.parameter, m.dim, m.channels.tobytes()): m for m in group.members if m.role in _ROLES}
    for member in members.values():
        for part in products.get(member.parameter, []):
            if _role(member, part) != role:
                continue
            channels = torch.from_numpy(member.channels)
            if part.rows is not None and member.dim == 0:
                channels = channels[slice(*part.rows)]
            shape = [-1 if dim == member.dim else 1 for dim in range(len(part.shape))]
            yield part, part.as_matrices(channels.view(shape).expand(part.shape))


def _role(member: Member, part: Evidence) -> Role:
    """Returns what a product does with the channels of a member.

    A weight that is used as it is and transposed, or as a table and as a head, makes and reads channels along the same
    dimension. What a product does is told by which side of the matrix that is.
    """
    use = part.use
    if use.groups > 1 or member.dim > 1:
        return member.role
    reads_first = use.kind == "transposed" or use.columns_first
    return Role.READS if (member.dim == 0) == reads_first else Role.MAKES


def _errors_of_readers(part: Evidence, channels: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Returns errors and their channels (-1: of none); of columns, each of which has to be read by all rows."""
    columns = channels[:, 0]
    if not _is_alike(channels):
        return _NOTHING
    owners, labels = torch.unique(columns, dim=1, return_inverse=True)
    weights = None if part.scale is None else part.scale.double().square().view(part.weight.shape[:2])
    errors = channel_errors(
        part.weight, part.normal, labels.to(part.weight.device), damping=damping, row_weights=weights
    )
    return errors.double().cpu().flatten(), owners.flatten()


def _power_of_rows(part: Evidence, channels: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    rows = channels[:, :, 0]
    if not _is_alike(channels.mT):
        return _NOTHING
    power = part.normal.target_power.double().cpu()
    scale = 1.0 if part.scale is None else part.scale.double().cpu().square().view(power.shape)
    return (power * scale).flatten(), rows.flatten()


CHOICES = [Choice(_POINT, "reconstruction", ReconstructionImportance())]
