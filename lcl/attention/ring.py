"""Ring attention: rows longer than a device holds; keys and values travel, queries stay.

Legend: B batch, T tokens of a row on one device (queries, keys), N query heads, K key/value heads,
H head dim, c devices that share a row.

    step        0         1         2         3         each device attends to the keys it holds,
    device 0    k0        k3        k2        k1        while they are already on their way to the
    device 1    k1   ->   k0   ->   k3   ->   k2        next device; what it has found is joined
    device 2    k2        k1        k0        k3        with what it finds (`merge`, exact). With
    device 3    k3        k2        k1        k0        the keys go their row indices and documents.

    backward    the same way once more; k, v carry float32 sums dk, dv along, which come home with
                the last hop. The saved out and log-sum-exp are those of the whole row.

Memory a device: O(T), whatever c. The loop over steps is rolled, so compile time does not grow with
c. Sent a device and pass: forward c - 1 times (k, v), backward c - 1 times (k, v) and c times
(dk, dv); the last step stands outside the loop, so that k and v are not sent to where nobody needs
them.

Inside is blockwise attention, which decides by the travelling row indices, hence any order of rows,
or on TPU splash attention, whose mask is compiled in: one kernel for each case that the layout
leaves (`ring_cases`), and for zigzag rows a single one without any mask (`_Zigzag`).

Liu, Zaharia and Abbeel 2023 (arXiv:2310.01889); joining and backward as in FlashAttention-2
(arXiv:2307.08691).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lcl.attention.blockwise import blockwise_backward, blockwise_forward, row_delta
from lcl.attention.context_plan import ContextPlan
from lcl.attention.ring_cases import Cases, ring_cases
from lcl.attention.rows import Relation, Rows
from lcl.attention.splash_partial import splash_backward, splash_forward


def merge(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> tuple:
    """Joins attention over two disjoint sets of keys into attention over both.

    Args:
      a, b: (out, lse) each: out float32 [..., H], the softmax average over its own keys, 0 without
        keys; lse float32 [...], log of the sum of exp(scores), -inf without keys.

    Returns:
      (out, lse) over the union.

    Example (two keys of equal score, values 2 and 4):
      >>> out, lse = merge((jnp.array([2.0]), jnp.array(0.0)), (jnp.array([4.0]), jnp.array(0.0)))
      >>> float(out[0]), round(float(lse), 4)
      (3.0, 0.6931)
    """
    (out_a, lse_a), (out_b, lse_b) = a, b
    top = jnp.maximum(lse_a, lse_b)
    # Without keys on both sides, -inf - -inf would be NaN; 0 gives exp(-inf) = 0 twice.
    top = jnp.where(jnp.isneginf(top), 0.0, top)
    weight_a, weight_b = jnp.exp(lse_a - top), jnp.exp(lse_b - top)
    total = weight_a + weight_b
    some = total > 0.0
    total = jnp.where(some, total, 1.0)
    out = (weight_a / total)[..., None] * out_a + (weight_b / total)[..., None] * out_b
    return out, jnp.where(some, top + jnp.log(total), -jnp.inf)


def ring(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, rows: Rows, plan: ContextPlan
) -> jax.Array:
    """softmax(scale * q k^T + mask) v over rows that a ring of devices shares; inside `shard_map`.

    Args:
      q_BTNH, k_BTKH, v_BTKH: this device's tokens, float32 or bfloat16.
      rows: their original row indices (blockwise inside: required where context > 1) and documents.
      plan: the ring.

    Returns:
      [B, T, N, H] in q's dtype; differentiable once, in reverse. A query that sees no key gives 0,
      and its gradients are 0. Output and log-sum-exp are tagged "context" and "context_lse": with
      both kept, the backward pass needs no second ring forward.

    Raises:
      ValueError: what the inner attention cannot serve.
    """
    return _ring(q_BTNH, k_BTKH, v_BTKH, rows, plan)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _ring(q_BTNH, k_BTKH, v_BTKH, rows: Rows, plan: ContextPlan):
    return _forward(q_BTNH, k_BTKH, v_BTKH, rows, plan)[0]


def _forward(q_BTNH, k_BTKH, v_BTKH, rows: Rows, plan: ContextPlan):
    inner = _inner(plan, q_BTNH.shape[1])
    # The rows are the same in every layer. Were that to be seen, all that follows from them alone
    # would be lifted out of the loop over layers and kept, once a step of the ring: gigabytes.
    q_BTNH, rows = lax.optimization_barrier((q_BTNH, rows))
    keys = (k_BTKH, v_BTKH, rows)

    def step(found, keys, number):
        return inner.forward(found, q_BTNH, rows, keys, number)

    found = inner.forward(None, q_BTNH, rows, keys, 0)
    out_BTNH, lse_BTN = inner.join(_travel(step, found, keys, inner.num_steps, plan))
    out_BTNH = checkpoint_name(out_BTNH.astype(q_BTNH.dtype), "context")
    lse_BTN = checkpoint_name(lse_BTN, "context_lse")
    return out_BTNH, (q_BTNH, k_BTKH, v_BTKH, rows, out_BTNH, lse_BTN)


def _backward(plan: ContextPlan, residuals, dout_BTNH):
    q_BTNH, k_BTKH, v_BTKH, rows, out_BTNH, lse_BTN = residuals
    inner = _inner(plan, q_BTNH.shape[1])
    dout_BTNH, rows = lax.optimization_barrier((dout_BTNH, rows))  # as in the forward pass
    delta_BTN = inner.delta(out_BTNH, dout_BTNH)
    queries = (q_BTNH, lse_BTN, delta_BTN, dout_BTNH.astype(q_BTNH.dtype), rows)
    keys = (k_BTKH, v_BTKH, rows)

    def step(sums, keys, number):
        dq, dkv, last = sums
        # On its way while this step computes: the sum over all steps but the one just done.
        dkv = _shift(jax.tree.map(jnp.add, dkv, last), plan)
        dq, *last = inner.backward(dq, queries, keys, number)
        return dq, dkv, tuple(last)

    dq, *dkv = inner.backward(None, queries, keys, 0)
    zeros = tuple(jnp.zeros_like(x) for x in dkv)
    sums = (dq, tuple(dkv), zeros)
    dq, dkv, last = _travel(step, sums, keys, inner.num_steps, plan)
    dk, dv = _shift(jax.tree.map(jnp.add, dkv, last), plan, -inner.num_steps)
    dq = inner.join(dq)
    return dq.astype(q_BTNH.dtype), dk.astype(k_BTKH.dtype), dv.astype(v_BTKH.dtype), None


_ring.defvjp(_forward, _backward)


def _travel(step: Callable, state: Any, keys: Any, num_steps: int, plan: ContextPlan) -> Any:
    """state = step(state, keys of `number` devices back, number) for number = 1 .. num_steps."""
    if not num_steps:
        return state

    def rolled(carry, _):
        state, keys, number = carry
        # Neither depends on the other: the next keys arrive while these are attended to.
        return (step(state, keys, number), _shift(keys, plan), number + 1), None

    # The number is tied to the keys: were it the same in every layer, what a branch of its own
    # makes (zeros, even) would be lifted out of the loop over layers and kept for each step.
    keys, number = lax.optimization_barrier((_shift(keys, plan), jnp.int32(1)))
    if num_steps > 1:
        carry = (state, keys, number)
        (state, keys, number), _ = lax.scan(rolled, carry, None, length=num_steps - 1)
    return step(state, keys, number)


def _shift(x: Any, plan: ContextPlan, by: int = 1) -> Any:
    """Every leaf from each device to the one `by` further on."""
    pairs = [(i, (i + by) % plan.context) for i in range(plan.context)]
    if by % plan.context == 0:
        return x
    return jax.tree.map(lambda leaf: lax.ppermute(leaf, plan.axis, pairs), x)


def _inner(plan: ContextPlan, local_length: int) -> _Blockwise | _Splash:
    if plan.inner == "blockwise":
        return _Blockwise(plan)
    mask = plan.mask
    if plan.layout == "zigzag" and plan.context > 1 and mask.causal and mask.window is None:
        return _Zigzag(plan)
    return _Splash(plan, ring_cases(mask, plan.layout, local_length, plan.context))


class _Blockwise:
    """Every step is the same: what a query sees, the travelling rows say."""

    delta = staticmethod(row_delta)

    def __init__(self, plan: ContextPlan) -> None:
        self.num_steps = plan.context - 1
        self._rules: dict[str, Any] = dict(mask=plan.mask, scale=plan.scale, soft_cap=plan.soft_cap)

    def forward(self, found, q_BTNH, rows: Rows, keys, number):
        k_BSKH, v_BSKH, key_rows = keys
        part = blockwise_forward(q_BTNH, k_BSKH, v_BSKH, query=rows, key=key_rows, **self._rules)
        return part if found is None else merge(found, part)

    def backward(self, dq_BTNH, queries, keys, number):
        q_BTNH, *sums, rows = queries
        k_BSKH, v_BSKH, key_rows = keys
        dq, dk, dv = blockwise_backward(
            q_BTNH, k_BSKH, v_BSKH, *sums, query=rows, key=key_rows, **self._rules
        )
        return dq if dq_BTNH is None else dq_BTNH + dq, dk, dv

    def join(self, x):
        return x


class _Splash:
    """A kernel for each case; step 0 has its own, the others look theirs up."""

    def __init__(self, plan: ContextPlan, cases: Cases) -> None:
        self.num_steps = cases.num_steps
        self._plan = plan
        self._cases = cases
        self._rules: dict[str, Any] = dict(
            scale=plan.scale,
            soft_cap=plan.soft_cap,
            block_sizes=plan.block_sizes,
            interpret=plan.interpret,
        )

    def _switch(self, number, branch: Callable, *operands):
        """branch(case)(*operands) for the case of this device and that `number` back."""
        branches = [branch(case) for case in self._cases.distinct]
        if len(branches) == 1:
            return branches[0](*operands)
        here = lax.axis_index(self._plan.axis)
        which = jnp.asarray(self._cases.which)[here, (here - number) % self._plan.context]
        return lax.switch(which, branches, *operands)

    def forward(self, found, q_BTNH, rows: Rows, keys, number):
        queries, keys = (q_BTNH, rows.segment_ids_BT), _with_segments(keys)
        if found is None:
            return self._attend(self._cases.own, queries, keys)

        def branch(relation: Relation | None):
            def add(found, queries, keys):
                if relation is None:
                    return found
                return merge(found, self._attend(relation, queries, keys))

            return add

        return self._switch(number, branch, found, queries, keys)

    def backward(self, dq_BTNH, queries, keys, number):
        queries, keys = _with_segments(queries), _with_segments(keys)
        if dq_BTNH is None:
            return self._gradients(self._cases.own, queries, keys)

        def branch(relation: Relation | None):
            def add(dq_BTNH, queries, keys):
                if relation is None:
                    return dq_BTNH, *(jnp.zeros(x.shape, jnp.float32) for x in keys[:2])
                dq, dk, dv = self._gradients(relation, queries, keys)
                return dq_BTNH + dq, dk, dv

            return add

        return self._switch(number, branch, dq_BTNH, queries, keys)

    def join(self, x):
        """What `forward` and `backward` carry, as whole arrays."""
        return x

    def delta(self, out_BTNH, dout_BTNH):
        """sum over H of out * dout, float32 [B, T, N]."""
        return jnp.sum(dout_BTNH.astype(jnp.float32) * out_BTNH.astype(jnp.float32), axis=-1)

    def _attend(self, relation: Relation, queries, keys):
        q_BTNH, query_segments = queries
        k_BSKH, v_BSKH, key_segments = keys
        return splash_forward(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            relation=relation,
            query_segments_BT=query_segments,
            key_segments_BS=key_segments,
            **self._rules,
        )

    def _gradients(self, relation: Relation, queries, keys):
        q_BTNH, lse_BTN, delta_BTN, dout_BTNH, query_segments = queries
        k_BSKH, v_BSKH, key_segments = keys
        return splash_backward(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            lse_BTN,
            delta_BTN,
            dout_BTNH,
            relation=relation,
            query_segments_BT=query_segments,
            key_segments_BS=key_segments,
            **self._rules,
        )


class _Zigzag(_Splash):
    """Causal over zigzag rows: two full squares each step; the second depends on the side.

        keys of:          an earlier device     a later device
                          early   late          early   late
        early queries       2      .              .      .
        late queries        1      .              1      2

    So after step 0 there is one kernel, without a mask, and nothing to branch on. The squares are
    taken one after the other (a loop of two): what a kernel needs besides its operands, such as a
    log-sum-exp 128 lanes wide, is then half as large, and sums are updated in place.
    """

    def __init__(self, plan: ContextPlan) -> None:
        which = np.zeros((plan.context, plan.context), np.int32)
        super().__init__(plan, Cases(Relation(causal=True), (), which, plan.context - 1))

    def _squares(self, number):
        """The halves of queries and keys in squares 1 and 2; half 1 is the late one."""
        earlier = lax.axis_index(self._plan.axis) >= number
        second = jnp.where(earlier, 0, 1)
        return jnp.stack([1, second]), jnp.stack([0, second])

    def forward(self, found, q_BTNH, rows: Rows, keys, number):
        if found is None:
            return _in_halves(super().forward(None, q_BTNH, rows, keys, number))
        queries = _in_halves((q_BTNH, rows.segment_ids_BT))
        keys = _in_halves(_with_segments(keys))

        def square(found, halves):
            query_half, key_half = halves
            part = self._attend(_FULL, _half(queries, query_half), _half(keys, key_half))
            joined = merge(_half(found, query_half), part)
            return _put_half(found, joined, query_half), None

        return lax.scan(square, found, self._squares(number))[0]

    def backward(self, dq_BTNH, queries, keys, number):
        if dq_BTNH is None:
            dq, dk, dv = super().backward(None, queries, keys, number)
            return _in_halves(dq), dk, dv
        queries, keys = _in_halves(_with_segments(queries)), _in_halves(_with_segments(keys))

        def square(sums, halves):
            dq, dkv = sums
            query_half, key_half = halves
            more_dq, *more = self._gradients(
                _FULL, _half(queries, query_half), _half(keys, key_half)
            )
            dq = _put_half(dq, _half(dq, query_half) + more_dq, query_half)
            more = jax.tree.map(jnp.add, _half(dkv, key_half), tuple(more))
            return (dq, _put_half(dkv, more, key_half)), None

        zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in keys[:2])
        (dq, dkv), _ = lax.scan(square, (dq_BTNH, zeros), self._squares(number))
        return dq, *self.join(dkv)

    def join(self, x):
        return jax.tree.map(lambda y: y.reshape(y.shape[0], -1, *y.shape[3:]), x)


_FULL = Relation(causal=False)


def _with_segments(x: tuple) -> tuple:
    """The rows at the end replaced by their documents, which is all that splash looks at."""
    *arrays, rows = x
    return (*arrays, rows.segment_ids_BT)


def _in_halves(x: Any) -> Any:
    """[B, T, ...] -> [B, 2, T / 2, ...], every leaf."""
    return jax.tree.map(lambda y: y.reshape(y.shape[0], 2, -1, *y.shape[2:]), x)


def _half(x: Any, which) -> Any:
    """[B, 2, T / 2, ...] -> [B, T / 2, ...], every leaf."""
    return jax.tree.map(lambda y: lax.dynamic_index_in_dim(y, which, axis=1, keepdims=False), x)


def _put_half(x: Any, half: Any, which) -> Any:
    return jax.tree.map(
        lambda y, part: lax.dynamic_update_index_in_dim(y, part, which, axis=1), x, half
    )
