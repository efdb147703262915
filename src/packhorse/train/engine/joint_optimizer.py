"""Several optimizers behind the interface of one: two algorithms together, or one optimizer for each weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from packhorse.train.engine.gradient_norm import GradientNorm


class JointOptimizer(Optimizer):
    """Optimizers over disjoint parameters behind one `param_groups`, one `state` and one `step`.

    Checkpoints, learning rate, gradient scaler and accelerate see one optimizer.
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        self.parts = list(parts)
        super().__init__([group for part in parts for group in part.param_groups], {})
        # The same dictionaries as in the parts, so that a learning rate set here reaches them.
        self.param_groups = [group for part in parts for group in part.param_groups]
        self._share_state()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ANN401
        """Step every part."""
        assert closure is None, "the loss is computed once per step"
        for part in self.parts:
            part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore groups and states of all parts."""
        super().load_state_dict(state_dict)
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
        self._share_state()

    def _share_state(self) -> None:
        """Use one mapping for all parts: states are kept by parameter, and no parameter is in two parts."""
        for part in self.parts:
            part.state = self.state


class InBackwardOptimizer(JointOptimizer):
    """One optimizer per parameter, which steps in the backward pass as soon as the gradient is complete.

    The gradient is freed at once, so that no two exist at the same time. This is exact where a step has one backward
    pass and no gradient is changed after it (no accumulation, clipping or loss scale), which the plan ensures.
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        super().__init__(parts)
        self._norm = GradientNorm()

    def step_in_backward(self) -> None:
        """Register the steps; called after sharding, which replaces the parameters."""
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
        """Do nothing: every parameter was stepped in the backward pass."""

    def take_norm(self) -> Tensor:
        """Return the global norm of the gradients since the last call, a scalar; a collective if sharded."""
        return self._norm.take()
