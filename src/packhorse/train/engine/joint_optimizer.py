"""Several optimizers that are one to everybody else: two algorithms side by side, or one for each weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from packhorse.train.engine.gradient_norm import GradientNorm


class JointOptimizer(Optimizer):
    """Optimizers over disjoint parameters behind one `param_groups`, one `state` and one `step`.

    So checkpoints, learning rate, gradient scaler and accelerate see one optimizer.
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        self.parts = list(parts)
        super().__init__([group for part in parts for group in part.param_groups], {})
        # The very groups of the parts: what is set here is set there.
        self.param_groups = [group for part in parts for group in part.param_groups]
        self._share_state()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ANN401
        """Steps every part."""
        assert closure is None, "the loss is computed once a step"
        for part in self.parts:
            part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Puts groups and states of all parts where they were."""
        super().load_state_dict(state_dict)
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
        self._share_state()

    def _share_state(self) -> None:
        """States are kept by parameter, and no parameter is in two parts: one mapping serves all."""
        for part in self.parts:
            part.state = self.state


class InBackwardOptimizer(JointOptimizer):
    """An optimizer for each parameter, which steps in the backward pass as soon as the gradient is complete.

    The gradient is freed at once, so that no two exist at the same time. Exact where a step has one backward pass and
    no gradient is changed after it (no accumulation, clipping or loss scale), which the plan sees to.
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        super().__init__(parts)
        self._norm = GradientNorm()

    def step_in_backward(self) -> None:
        """Registers the steps; after sharding, which puts other parameters in the place of these."""
        for part in self.parts:
            (group,) = part.param_groups
            (parameter,) = group["params"]
            parameter.register_post_accumulate_grad_hook(self._stepper(part))

    def _stepper(self, part: Optimizer) -> Any:  # noqa: ANN401
        def step(parameter: Tensor) -> None:
            assert parameter.grad is not None
            self._norm.add(parameter.grad)
            part.step()
            parameter.grad = None

        return step

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ANN401
        """Nothing: all has been stepped."""

    def take_norm(self) -> Tensor:
        """Global norm of the gradients since the last call, a scalar; a collective where weights are sharded."""
        return self._norm.take()
