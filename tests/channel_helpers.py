"""What tests of channel groups share: groups in a readable form, masking as pruning does it, and the full check."""

import copy

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from compress_core.channels import (
    Role,
    batch_size,
    channel_groups,
    channel_groups_of_heads,
    input_specs,
    operation_costs,
    parameter_costs,
    prove,
    removable_groups,
    shrinkage,
)
from compress_core.trace import trace

COUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
}


def groups_of(model, *args, **options):
    return channel_groups(trace(model.eval(), args, **options))


def slices(group):
    """Returns {"name.dim": channels along it} of a group, running statistics and one-element masks included."""
    return {f"{member.parameter}.{member.dim}": member.channels.tolist() for member in group.members}


def group_with(found, parameter, dim):
    """Returns the only group with channels along a dimension of a parameter."""
    (group,) = [g for g in found.groups if any((m.parameter, m.dim) == (parameter, dim) for m in g.members)]
    return group


def mask(model, pairs):
    """Sets channels to zero as pruning does."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for group, channels in pairs:
            for member in group.members:
                if member.role != Role.OTHER and member.parameter in parameters:
                    gone = [index for index, channel in enumerate(member.channels.tolist()) if channel in channels]
                    parameters[member.parameter].index_fill_(member.dim, torch.tensor(gone, dtype=torch.long), 0)


def chosen(groups, generator):
    """Returns groups with a random part of their channels, never all and never none."""
    pairs = []
    for group in groups:
        if group.size > 1:
            count = int(torch.randint(1, group.size, (), generator=generator))
            pairs.append((group, set(torch.randperm(group.size, generator=generator)[:count].tolist())))
    return pairs


def check_shrinking(model, *args, seed=0):
    """Masks random channels of each prunable group, proves that the shrunk model agrees, and checks what is left.

    Args:
        model: The model; it is shrunk.
        args: Its inputs.
        seed: Which channels.

    Returns:
        The groups, the plan, and the certificate.
    """
    found_trace = trace(model.eval(), args, training=True)
    specs = input_specs(found_trace.forwards[0])
    found = channel_groups_of_heads(model, found_trace, specs)
    bearing, _ = removable_groups(model, found.prunable, specs)
    pairs = chosen(bearing, torch.Generator().manual_seed(seed))
    samples = batch_size(specs)
    groups = [group for group, _ in pairs]
    left = [group.size - len(channels) for group, channels in pairs]
    parameters, operations = parameter_costs(model, groups), operation_costs(found, groups, samples)
    whole = [group.size for group in groups]
    assert parameters.of(whole) == sum(p.numel() for p in model.parameters())
    assert samples * operations.of(whole) == operations_in(model, *args)
    plan = shrinkage(model, pairs)
    mask(model, pairs)
    certificate = prove(model, plan, specs)
    masked = copy.deepcopy(model)
    plan.apply(model)
    for expected, actual in zip(outputs_of(masked.eval(), *args), outputs_of(model.eval(), *args), strict=True):
        assert torch.allclose(expected, actual, rtol=1e-3, atol=1e-4 * float(expected.detach().abs().max()))
    assert parameters.of(left) == sum(p.numel() for p in model.parameters())
    assert samples * operations.of(left) == operations_in(model, *args)
    check_attributes(model)
    model.train()
    sum(output.square().sum() for output in outputs_of(model, *args)).backward()
    for parameter in model.parameters():
        assert parameter.grad is None or parameter.grad.shape == parameter.shape
    return found, plan, certificate


def outputs_of(model, *args):
    result = model(*args)
    return [result] if isinstance(result, torch.Tensor) else [r for r in result if isinstance(r, torch.Tensor)]


def operations_in(model, *args):
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # fused attention is not counted
    try:
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
            model.eval()(*args)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops()


def check_attributes(model):
    """The attributes of layers say what their tensors are."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, torch.nn.modules.conv._ConvTransposeNd):
            assert weight.shape[:2] == (module.in_channels, module.out_channels // module.groups)
        elif isinstance(module, torch.nn.modules.conv._ConvNd):
            assert weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
        elif isinstance(module, torch.nn.Linear):
            assert weight.shape == (module.out_features, module.in_features)
        elif isinstance(module, torch.nn.modules.batchnorm._NormBase) and weight is not None:
            assert weight.shape == (module.num_features,)
            assert module.running_mean is None or module.running_mean.shape == weight.shape
        elif isinstance(module, torch.nn.Embedding):
            assert weight.shape == (module.num_embeddings, module.embedding_dim)
