"""How much of a row each program of the splash kernels works on."""

from __future__ import annotations

import dataclasses

LANES = 128  # what a TPU's vector unit holds across: every block is a multiple
DEFAULT_BLOCK = 512


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """How many rows of queries and keys each program of the kernel works on.

    They change speed and on-chip memory, never the result. Each must be a multiple of 128 that
    divides the rows on one device (`key_compute` divides `key`).

    Attributes:
      query, key: rows fetched by a program of the forward kernel. None: the largest multiple of 128
        up to 512 that divides the rows.
      key_compute: keys multiplied at once, of the `key` fetched. None: all.
      dkv_query, dkv_key, dkv_key_compute: the same for the kernel of dk and dv. None: as forward.
      dq_query, dq_key: the same for the kernel of dq. None: as forward.
      fused_backward: dq comes out of the dk, dv kernel, which saves computing the scores again, but
        as S / dkv_key partial sums, each of q's size: for short rows only.

    Raises:
      ValueError: a size that is no positive multiple of 128, sizes of a kernel that a fused
        backward does not have.

    Example:
      >>> BlockSizes(key=1024, key_compute=512).fit(4096, 4096).dkv_key
      1024
      >>> BlockSizes().fit(640, 1024)  # doctest: +ELLIPSIS
      BlockSizes(query=128, key=512, ...)
    """

    query: int | None = None
    key: int | None = None
    key_compute: int | None = None
    dkv_query: int | None = None
    dkv_key: int | None = None
    dkv_key_compute: int | None = None
    dq_query: int | None = None
    dq_key: int | None = None
    fused_backward: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "fused_backward" or value is None:
                continue
            if value < 1 or value % LANES:
                raise ValueError(
                    f"{field.name}={value}: splash blocks are multiples of {LANES}; "
                    f"use {max(LANES, round(value / LANES) * LANES)}"
                )
        if self.fused_backward and (self.dq_query or self.dq_key):
            raise ValueError(
                f"dq_query={self.dq_query}, dq_key={self.dq_key}: a fused backward has no dq "
                "kernel; leave them out, or fused_backward=False"
            )

    def fit(self, query_length: int, key_length: int) -> BlockSizes:
        """Every size filled in for rows of these lengths.

        Raises:
          ValueError: a length that is no multiple of 128, or a size that does not divide it.
        """
        query = self.query or _largest_block("queries", query_length)
        key = self.key or _largest_block("keys", key_length)
        dkv_key = self.dkv_key or key
        fitted = BlockSizes(
            query=query,
            key=key,
            key_compute=self.key_compute or key,
            dkv_query=self.dkv_query or query,
            dkv_key=dkv_key,
            dkv_key_compute=self.dkv_key_compute or dkv_key,
            dq_query=None if self.fused_backward else self.dq_query or query,
            dq_key=None if self.fused_backward else self.dq_key or key,
            fused_backward=self.fused_backward,
        )
        whole = {
            "query": query_length,
            "key": key_length,
            "key_compute": key,
            "dkv_query": query_length,
            "dkv_key": key_length,
            "dkv_key_compute": dkv_key,
            "dq_query": query_length,
            "dq_key": key_length,
        }
        for name, length in whole.items():
            size = getattr(fitted, name)
            if size and length % size:
                raise ValueError(
                    f"{name}={size} does not divide {length}: use a multiple of {LANES} that does, "
                    "or leave it out"
                )
        return fitted


def _largest_block(what: str, length: int) -> int:
    if length % LANES or length < LANES:
        raise ValueError(
            f"{length} {what} on a device are no multiple of {LANES}, which splash needs: "
            f"use rows of {max(LANES, -(-length // LANES) * LANES)} a device, or impl='blockwise'"
        )
    return next(
        size for size in range(DEFAULT_BLOCK, 0, -LANES) if size <= length and length % size == 0
    )
