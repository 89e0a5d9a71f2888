"""Passes of a model that a GPU replays from CUDA graphs.

A training step of the Q-Former consists of thousands of kernels of a few microseconds each, and a
process takes longer to launch them than a GPU takes to run them. The forward pass and the backward
pass are each captured as one CUDA graph, which is launched as a whole
(`torch.cuda.make_graphed_callables`).
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias, cast

import torch
from torch import nn
from torch.func import functional_call

Function: TypeAlias = Callable[..., tuple[torch.Tensor, ...]]

_CAPTURE: dict[str, Any] = {"allow_unused_input": True}
if "capture_error_mode" in inspect.signature(torch.cuda.make_graphed_callables).parameters:
    # Otherwise a thread that reads the next batch into pinned memory would make the capture fail.
    _CAPTURE["capture_error_mode"] = "thread_local"


class _Pass(nn.Module):
    """A function as a module whose parameters are those that the function uses."""

    def __init__(self, function: Function, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        self.function = function
        self.modules_used = nn.ModuleList(modules)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Call the function."""
        return self.function(*inputs)


class ReplayedPass:
    """A function of tensors that is replayed from CUDA graphs in training on a GPU.

    The graphs are captured in the first call with gradients on a GPU. They hold for the sizes, the
    dtypes, the precision and the parameters of that call; other calls, and those without gradients
    or on a CPU, run the function itself. Random numbers, such as those of dropout, depend on the
    generator of torch as always, also in the call that captures. The graphs keep the memory of
    their activations and gradients.

    The results of a call, and gradients of parameters that only this function uses, lie in memory
    that the next call overwrites. So each call must be followed by its backward pass before the
    next call, and gradients must be set to None between them, as `zero_grad` does by default. They
    must not be accumulated. A copy of a pass captures graphs of its own.
    """

    def __init__(self, function: Function, modules: Iterable[nn.Module]) -> None:
        """Create the pass.

        Args:
            function: Takes tensors and returns a tuple of tensors. It must not read values of
                tensors, since a CUDA graph contains no decisions.
            modules: Modules with all parameters that the function uses. They have no hooks.
        """
        self._function = function
        self._modules = list(modules)
        self._replay: Function | None = None
        """Takes the inputs and all trained parameters."""
        self._parameters: list[nn.Parameter] = []
        self._form: tuple[object, ...] | None = None
        """What must be the same in a call as in the captured one."""

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the function, by replaying it where that is possible."""
        if not (inputs[0].is_cuda and torch.is_grad_enabled()):
            return self._function(*inputs)
        form = self._form_of(inputs)
        if self._replay is None:
            self._replay, self._form = self._capture(inputs), form
        if form != self._form:
            return self._function(*inputs)
        return self._replay(*inputs, *self._parameters)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the graphs, which belong to the memory of these parameters."""
        return {**self.__dict__, "_replay": None, "_parameters": [], "_form": None}

    def _form_of(self, inputs: tuple[torch.Tensor, ...]) -> tuple[object, ...]:
        parameters = [one for module in self._modules for one in module.parameters()]
        return (
            torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
            *(module.training for module in self._modules),
            *((one.shape, one.dtype, one.device, one.requires_grad) for one in inputs),
            *((id(one), one.data_ptr(), one.requires_grad) for one in parameters),
        )

    def _capture(self, inputs: tuple[torch.Tensor, ...]) -> Function:
        """Capture the forward and the backward pass, after a few that warm up."""
        whole = _Pass(self._function, self._modules)
        trained = {name: one for name, one in whole.named_parameters() if one.requires_grad}
        self._parameters = list(trained.values())
        own = [one.detach().clone().requires_grad_(one.requires_grad) for one in inputs]
        # Autograd adds gradients to those of a parameter on the stream that was current when it
        # first saw the parameter, which DistributedDataParallel makes the default stream. A capture
        # runs on another stream, and may not use that one. So it differentiates by parameters of
        # its own, in the same memory.
        own += [nn.Parameter(one.detach()) for one in self._parameters]

        def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            given, parameters = tensors[: len(inputs)], tensors[len(inputs) :]
            weights = dict(zip(trained, parameters, strict=True))
            return functional_call(whole, weights, given)  # type: ignore[no-any-return]

        device = inputs[0].device
        random_state = torch.cuda.get_rng_state(device)
        with (
            torch.autocast(
                "cuda",
                dtype=torch.get_autocast_dtype("cuda"),
                enabled=torch.is_autocast_enabled("cuda"),
                # Weights that are converted outside of the graphs would never be updated.
                cache_enabled=False,
            ),
            warnings.catch_warnings(),
        ):
            # Up to torch 2.11, the passes that warm up run on another stream than the capture,
            # which is correct and only happens once.
            warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream")
            replay = torch.cuda.make_graphed_callables(run, tuple(own), **_CAPTURE)
        torch.cuda.set_rng_state(random_state, device)
        return cast("Function", replay)
