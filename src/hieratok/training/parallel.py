"""Several processes: gradients averaged over copies (DDP), or weights divided among the processes (FSDP2).

Both give whole weights and optimiser states in the same format, so a checkpoint does not depend on the number of
processes.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hieratok.core.distributed import process
from hieratok.core.layers import Blocks

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def shard(module: nn.Module, methods: Iterable[str] = ()) -> None:
    """FSDP2, in place: the weights of every transformer block, and the rest together, divided among all processes.

    Args:
        module: on its device; an optimiser made of its parameters afterwards holds this process's share.
        methods: names of methods besides `forward` that compute with the weights.
    """
    for blocks in [m for m in module.modules() if isinstance(m, Blocks)]:
        for block in blocks:
            fully_shard(block)
    fully_shard(module, reshard_after_forward=True)  # the averaged model has no backward pass that would reshard it
    for method in methods:
        register_fsdp_forward_method(module, method)


def replicate(module: nn.Module, device: torch.device) -> nn.Module:
    """DDP: a module whose gradients are averaged over the processes; the module itself with one process or nothing to
    train."""
    if not (process()[1] > 1 and any(p.requires_grad for p in module.parameters())):
        return module
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=ids, broadcast_buffers=False)


@contextlib.contextmanager
def synchronized(modules: Iterable[nn.Module], wanted: bool) -> Iterator[None]:
    """Whether backward passes in the block average gradients over the processes, or leave that to a later pass."""
    with contextlib.ExitStack() as stack:
        for module in modules:
            if isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(wanted)
            elif isinstance(module, DistributedDataParallel) and not wanted:
                stack.enter_context(module.no_sync())
        yield


def clip_gradients(module: nn.Module, norm: float) -> Tensor:
    """Clip the gradients to a joint norm of `norm`; returns the norm before, a scalar, the same on every process."""
    total = nn.utils.clip_grad_norm_([p for p in module.parameters() if p.grad is not None], norm)
    return total.full_tensor() if isinstance(total, DTensor) else total


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that may be divided among the processes."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def step_unless(optimizer: torch.optim.Optimizer, bad: Tensor) -> None:
    """An optimiser step, skipped if `bad` (a scalar, 0 or 1) is 1, without waiting for the device where possible.

    PyTorch's fused optimisers check `found_inf` themselves, for gradient scaling.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if optimizer.defaults.get("fused") and not any(isinstance(p, DTensor) for p in parameters):
        optimizer.found_inf = bad  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]
    elif not bool(bad):
        optimizer.step()


def whole_weights(module: nn.Module) -> dict[str, Tensor]:
    """A module's weights by name; under FSDP2 gathered on the first process (every process must call it)."""
    weights: Any = (
        get_model_state_dict(module, options=WHOLE) if isinstance(module, FSDPModule) else module.state_dict()
    )
    return weights


def whole_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimiser's state by the names of the module's parameters; gathered as `whole_weights`."""
    return get_optimizer_state_dict(module, optimizer, options=WHOLE)


def load_weights(module: nn.Module, weights: dict[str, Any]) -> None:
    """Load whole weights, which every process has read, into a module."""
    if isinstance(module, FSDPModule):
        set_model_state_dict(module, weights, options=StateDictOptions(full_state_dict=True))
    else:
        module.load_state_dict(weights)


def load_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the whole state of an optimiser."""
    set_optimizer_state_dict(module, optimizer, state, options=StateDictOptions(full_state_dict=True))
