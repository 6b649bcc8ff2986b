"""Reading collectives out of a program's text: notations, loops, things written twice."""

# ruff: noqa: E501  (a program's lines are as long as the compiler makes them)

from __future__ import annotations

import pytest

from lcl.parallel.collectives import (
    axes_of,
    count_kernels,
    count_kinds,
    find_collectives,
    parse_groups,
)

MESH = {"data": 2, "fsdp": 2, "context": 2, "tensor": 1}

# A loop of 5 with an all-gather, a ring step in flight and a reduce-scatter fusion; then one of 3
# whose bound is carried by the loop; an all-reduce at the end; a kernel whose text spans lines.
PROGRAM = """\
HloModule step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%cond (p: (s32[], bf16[64,8])) -> pred[] {
  %p = (s32[], bf16[64,8]) parameter(0)
  %bound = s32[] constant(5)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %bound), direction=LT
}

%all-reduce-scatter.1 (x: f32[32,8]) -> f32[16,8] {
  %x = f32[32,8] parameter(0)
  %all-reduce.1 = f32[32,8] all-reduce(%x), channel_id=4, replica_groups=[4,2]<=[2,2,2]T(0,2,1), to_apply=%add
  ROOT %ds = f32[16,8] dynamic-slice(%all-reduce.1)
}

%start_fusion (x: bf16[4,8]) -> bf16[8,8] {
  ROOT %all-gather.1 = bf16[8,8] all-gather(%x), channel_id=9, replica_groups={{0,4},{1,5},{2,6},{3,7}}, dimensions={0}, frontend_attributes={chain_id="3"}
}

%done_fusion (x: bf16[4,8]) -> bf16[8,8] {
  ROOT %all-gather.2 = bf16[8,8] all-gather(%x), channel_id=9, replica_groups={{0,4},{1,5},{2,6},{3,7}}, dimensions={0}, frontend_attributes={chain_id="3"}
}

%body (p: (s32[], bf16[64,8])) -> (s32[], bf16[64,8]) {
  %p = (s32[], bf16[64,8]) parameter(0)
  %k = f32[] custom-call(%p), custom_call_target="tpu_custom_call", backend_config={
"more":"text"
}, metadata={op_name="kernel"}
  %whole = bf16[64,8]{1,0:T(8,128)(2,1)} all-gather(%k), channel_id=1, replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}, dimensions={0}, metadata={op_name="jit(f)/gather"}
  %go = (bf16[64,8], bf16[64,8], u32[], u32[]) collective-permute-start(%k), channel_id=2, source_target_pairs={{0,1},{1,0},{2,3},{3,2},{4,5},{5,4},{6,7},{7,6}}
  %come = bf16[64,8] collective-permute-done(%go)
  %scattered = f32[16,8] fusion(%k), kind=kCustom, calls=%all-reduce-scatter.1, metadata={op_name="jit(f)/scatter"}
  ROOT %out = (s32[], bf16[64,8]) tuple(%p, %come)
}

%cond2 (q: (s32[], s32[])) -> pred[] {
  %q = (s32[], s32[]) parameter(0)
  %i2 = s32[] get-tuple-element(%q), index=0
  %n2 = s32[] get-tuple-element(%q), index=1
  ROOT %lt2 = pred[] compare(%i2, %n2), direction=LT
}

%body2 (q: (s32[], s32[])) -> (s32[], s32[]) {
  %begun = bf16[8,8] fusion(%q), kind=kCustom, calls=%start_fusion
  ROOT %ended = bf16[8,8] fusion(%q), kind=kCustom, calls=%done_fusion
}

ENTRY %main (a: bf16[64,8]) -> f32[] {
  %a = bf16[64,8] parameter(0)
  %zero = s32[] constant(0)
  %three = s32[] constant(3)
  %t = (s32[], bf16[64,8]) tuple(%zero, %a)
  %loop = (s32[], bf16[64,8]) while(%t), condition=%cond, body=%body
  %t2 = (s32[], s32[]) tuple(%zero, %three)
  %loop2 = (s32[], s32[]) while(%t2), condition=%cond2, body=%body2
  %unread = (s32[]) while(%t3), condition=%nowhere, body=%none, metadata={op_name="odd"}
  ROOT %total = f32[] all-reduce(%a), channel_id=7, replica_groups={}, to_apply=%add
}
"""


def test_a_whole_program():
    found, remarks = find_collectives(PROGRAM, MESH)
    assert remarks == ["a loop's count could not be read (odd): counted once"]
    assert count_kinds(found) == {
        "all-gather": 2, "collective-permute": 1, "reduce-scatter": 1, "all-reduce": 1
    }  # fmt: skip
    by_place = {(one.kind, one.axes): one for one in found}
    gather = by_place["all-gather", "context"]
    assert (gather.times, gather.num_bytes, gather.sent_bytes) == (5, 1024, 512)
    assert gather.op == "jit(f)/gather"
    ring = by_place["collective-permute", "context"]
    assert (ring.times, ring.sent_bytes) == (5, 1024)
    scatter = by_place["reduce-scatter", "fsdp"]  # written as all-reduce and slice
    assert (scatter.times, scatter.num_bytes, scatter.sent_bytes) == (5, 1024, 512)
    assert scatter.op == "jit(f)/scatter"
    chained = by_place["all-gather", "data"]  # written in two fusions, once in flight
    assert (chained.times, chained.num_bytes) == (3, 128)
    last = by_place["all-reduce", "data+fsdp+context"]
    assert (last.times, last.num_bytes, last.sent_bytes) == (1, 4, 7)
    assert count_kernels(PROGRAM) == 1


def test_what_leaves_a_slice():
    """Slices reduce among themselves first: a part of the array crosses, by every chip."""
    found, _ = find_collectives(PROGRAM, MESH, num_slices=2)
    crossing = {one.axes: one.dcn_bytes for one in found if one.dcn_bytes}
    assert crossing == {"data": 64, "data+fsdp+context": 1}


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
        ("replica_groups={}", [[0, 1, 2, 3]]),
    ],
)
def test_notations_of_groups(text, groups):
    assert parse_groups(f"(%x), {text}, dimensions={{0}}", 4).tolist() == groups


def test_axes():
    groups = parse_groups("replica_groups=[2,4]<=[2,2,2]T(1,0,2)", 8)
    assert axes_of(groups, MESH) == "data+context"


BETWEEN = """\
HloModule step

ENTRY %main (g: f32[64,128]) -> f32[64,128] {
  %g = f32[64,128] parameter(0)
  %token = token[] after-all()
  %send = (f32[64,128], u32[], token[]) send(%g, %token), channel_id=3, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="KIND"}
  %recv = (f32[64,128], u32[], token[]) recv(%token), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="KIND"}
  ROOT %done = f32[64,128] copy(%g)
}
"""


@pytest.mark.parametrize(
    "kind, factor", [("ALL_REDUCE", 1.0), ("REDUCE_SCATTER", 0.5), ("ALL_GATHER", 1.0)]
)
def test_what_passes_between_slices_is_a_send_to_the_host(kind, factor):
    found, remarks = find_collectives(BETWEEN.replace("KIND", kind), MESH, num_slices=2)
    (one,) = found  # sent once and received once
    assert (one.kind, one.axes, one.group_size) == (kind.lower().replace("_", "-"), "data", 2)
    assert one.sent_bytes == one.dcn_bytes == factor * 64 * 128 * 4
    assert not remarks


def test_an_unknown_transfer_between_slices_is_told():
    found, remarks = find_collectives(BETWEEN.replace("KIND", "TELEPATHY"), MESH, num_slices=2)
    assert not found
    assert remarks == ["a transfer between slices of unknown kind TELEPATHY: left out"]
