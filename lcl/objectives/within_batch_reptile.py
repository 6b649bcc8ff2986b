r"""Within-batch Reptile: the batch's examples one after the other, then back part of the way.

The original Meta-Experience Replay, for small models. A batch (new and replayed rows) is dealt out
into s groups of k examples; alpha is the inner rate, beta the step within a group:

    theta_A = theta                                    where the step began
    for each group i of s:
        theta_W = theta
        for each example j of k:
            theta <- theta - alpha * grad L(example_ij; theta)           SGD, example by example
        theta <- theta_W + beta * (theta - theta_W)                      within-batch Reptile
    theta <- theta_A + gamma * (theta - theta_A)                         across-batch Reptile

"Learning to Learn without Forgetting by Maximizing Transfer and Minimizing Interference" (Riemer et
al., 1810.11910): algorithm 1; with s = 1 and beta = 1, algorithm 6, one big batch and one meta
step. The last line is the optimizer's, so this is an objective: it hands on

    (theta_A - theta) / (alpha * beta * s * k)

as the gradient. That tends to the examples' mean gradient as alpha goes to 0, so clipping, Adam and
the rate of a run without it fit; with plain SGD of rate gamma * alpha * beta * s * k it is the
algorithm to the letter. To first order in alpha it adds what raises the inner products of the
examples' gradients: that is the paper's point.

    8 rows, rows_per_example 1, groups 2:   group 0: rows 0 2 4 6     group 1: rows 1 3 5 7
    rows are new first, then replayed ones, so each group has its share of both, new ones first

Cost: the FLOPs of a plain step, but s * k small forward and backward passes in a row, where a large
model would be starved; memory of one more copy of the parameters. `lcl.optim.Reptile` is what large
models use.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from lcl.objectives.next_token import NextToken


@dataclasses.dataclass(frozen=True)
class WithinBatchReptile:
    """MER's within-batch meta-update as the gradient of a batch.

    The loss and the sums of a step are each example's when its turn came, which is after the ones
    before it were learned: a little lower than the loss of the batch at the step's start.

    Attributes:
      objective: the loss of an example.
      inner_rate: alpha > 0, the rate of the SGD inside.
      groups: s; 1 is algorithm 6.
      step_size: beta in (0, 1].
      rows_per_example: rows that are one example, a multiple of the devices that hold rows.

    >>> WithinBatchReptile(inner_rate=0.03).groups
    1
    """

    inner_rate: float
    objective: NextToken = dataclasses.field(default_factory=NextToken)
    groups: int = 1
    step_size: float = 1.0
    rows_per_example: int = 1
    changes_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuses rates and counts that are none."""
        if not 0.0 < self.inner_rate < float("inf"):
            raise ValueError(
                f"WithinBatchReptile.inner_rate={self.inner_rate} must be a finite number above 0"
            )
        if not 0.0 < self.step_size <= 1.0:
            raise ValueError(f"WithinBatchReptile.step_size={self.step_size} must lie in (0, 1]")
        for name in ("groups", "rows_per_example"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"WithinBatchReptile.{name}={value!r} must be a whole number, 1 or more"
                )
        if hasattr(self.objective, "value_and_grad"):
            raise ValueError(
                f"WithinBatchReptile.objective={type(self.objective).__name__} has a gradient of "
                "its own; its examples are small already: use NextToken"
            )

    def check_rows(self, batch_size: int, devices: int) -> None:
        """Refuses a batch that does not fall into groups of whole examples.

        Args:
          batch_size: rows of the global batch, replayed ones included.
          devices: over how many devices rows are spread (data x fsdp).

        Raises:
          ValueError: one line that names the value and the mend.
        """
        if self.rows_per_example % devices:
            raise ValueError(
                f"WithinBatchReptile.rows_per_example={self.rows_per_example} does not split over "
                f"data x fsdp = {devices} devices: use a multiple of {devices}"
            )
        unit = self.groups * self.rows_per_example
        if batch_size % unit:
            raise ValueError(
                f"WithinBatchReptile: {batch_size} rows do not fall into groups={self.groups} of "
                f"examples of rows_per_example={self.rows_per_example}: use a batch of a multiple "
                f"of {unit} rows, replayed ones included"
            )

    def __call__(
        self, model: Any, params: Any, batch: Any, num_sources: int
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss of the whole batch at once; see `NextToken`. Evaluations come here."""
        return self.objective(model, params, batch, num_sources)

    def value_and_grad(
        self, model: Any, params: Any, batch: Any, num_sources: int
    ) -> tuple[tuple[jax.Array, dict[str, jax.Array]], Any]:
        """((loss, sums), the meta-update as a gradient); see the file's head.

        Args:
          model: a Decoder.
          params: its parameters.
          batch: a Batch, fields [B, T], B a multiple of groups * rows_per_example.
          num_sources: as for the objective.
        """
        value_and_grad = jax.value_and_grad(self.objective, argnums=1, has_aux=True)

        def learn(theta: Any, example: Any) -> tuple[Any, Any]:
            (loss, sums), gradient = value_and_grad(model, theta, example, num_sources)
            theta = jax.tree.map(lambda t, g: t - self.inner_rate * g, theta, gradient)
            return theta, (loss * sums["weight"], sums)

        def group(theta: Any, examples: Any) -> tuple[Any, Any]:
            learned, told = jax.lax.scan(learn, theta, examples)
            back = jax.tree.map(lambda a, b: a + self.step_size * (b - a), theta, learned)
            return back, told

        dealt = jax.tree.map(self._deal, batch)
        end, told = jax.lax.scan(group, params, dealt)
        weighted_loss, sums = jax.tree.map(lambda x: jnp.sum(x, axis=(0, 1)), told)
        per_group = jax.tree.leaves(dealt)[0].shape[1]
        scale = self.inner_rate * self.step_size * self.groups * per_group
        gradient = jax.tree.map(lambda a, b: (a - b) / scale, params, end)
        weight = jnp.where(sums["weight"] > 0.0, sums["weight"], 1.0)
        return (weighted_loss / weight, sums), gradient

    def _deal(self, x_BT: jax.Array) -> jax.Array:
        """[B, T] -> [groups, examples, rows of an example, T], spread over devices as a batch is.

        An example takes every n-th row, so each device finds its part of it among its own rows.
        """
        examples = x_BT.shape[0] // self.rows_per_example
        dealt = jnp.moveaxis(x_BT.reshape(self.rows_per_example, examples, -1), 1, 0)
        dealt = dealt.reshape(examples // self.groups, self.groups, *dealt.shape[1:])
        return nn.with_logical_constraint(
            jnp.swapaxes(dealt, 0, 1), (None, None, "batch", "sequence")
        )
