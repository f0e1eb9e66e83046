"""What the hopper backend launches for heads of 8 bits after `runtime.prepass`: `kernels.hopper_eight` for each
precision, and the kernel that copies outputs of anchors to their groups.
"""

from __future__ import annotations

from typing import Any

from calibatt.plans.precision import EIGHT_BITS, INT8_FP8
from calibatt.runtime.device_schedule import DeviceSchedule
from calibatt.runtime.kernels.anchors import unpack_outputs
from calibatt.runtime.launch import Call, Given, Moving, tile_strides
from calibatt.runtime.prepass import ByPrecision, EightHeads
from calibatt.runtime.quantise import QUERY_GROUP


def forward(
    given: Given,
    room: dict[str, Moving],
    ready: ByPrecision,
    eight: EightHeads,
    bound: DeviceSchedule,
    video_start: int,
    processors: int,
) -> list[Call]:
    """The launches that compute, of what is in the room; one for each precision.

    Args:
        given: What the call reads and writes.
        room: The arrays of `prepass.arrays_for`, filled; with `packed_out`, in the dtype of the output, and, where
            lse is asked for, `packed_lse`, fp32, of as many rows as `q_codes`, if some heads have anchors.
        ready: The tiles.
        eight: Its heads of 8 bits.
        bound: The schedule.
        video_start: Tokens of the prefix.
        processors: Of the device.
    """
    from calibatt.runtime.kernels import gluon_compat, hopper, hopper_eight  # Gluon: only where it is used

    v, out, lse, lengths = given.v, given.out, given.lse, given.lengths
    batch, heads, all_tokens, head_dim = v.value.shape
    tokens, block_k = bound.core.grid.tokens, bound.core.blocks.block_k
    others = all_tokens > tokens

    def describe(x: Moving | None, rows: int, row: int) -> Moving | None:
        if x is None:
            return None
        layout = hopper_eight.row_layout(row, 8 * x.value.element_size(), 4)
        return x.described(gluon_compat.describe(x.value, tile_strides(x.value), [1, 1, rows, row], layout))

    calls = []
    for precision in EIGHT_BITS:
        tiles = ready.tiles_of(precision)
        if len(tiles) == 0:
            continue
        in_e4m3 = precision == INT8_FP8
        values = describe(room["v_codes"], head_dim, block_k) if in_e4m3 else describe(v, block_k, head_dim)
        arguments: dict[str, Any] = {
            "q_desc": describe(room["q_codes"], QUERY_GROUP, head_dim),
            "k_desc": describe(room["k_codes"], block_k, head_dim),
            "v_desc": values,
            "out_desc": describe(out.view(out.value[:, :, video_start : video_start + tokens]), QUERY_GROUP, head_dim),
            "packed_out_desc": describe(room.get("packed_out"), QUERY_GROUP, head_dim),
            "lse_ptr": lse,
            "packed_lse": room.get("packed_lse"),
            "lengths": lengths,
            "tiles": tiles,
            "columns": bound.columns,
            "counter": given.counters,
            "slots": eight.slots,
            "q_scales": room["q_scales"],
            "k_scales": room["k_scales"],
            "channels": room["channels"],
            "lse_shift": room.get("lse_shift"),
            "tokens": tokens,
            "all_tokens": all_tokens,
            "video_start": video_start,
            "heads": heads,
            "eight_heads": len(eight.heads),
            "q_groups": eight.groups,
            "key_blocks": room["k_scales"].value.shape[2],
            "tiles_of_batch": len(tiles),
            "work": len(tiles) * batch,
            "ANCHORED": "packed_out" in room,
            "LSE": lse is not None,
            "KV_SLOTS": hopper_eight.kv_slots(head_dim, block_k, 1 if in_e4m3 else 2),
            "OTHERS": others,
            "PADDED": others and lengths is not None,
            **hopper.LAUNCH_OPTIONS,
        }
        grid = (min(processors, len(tiles) * batch), 1, 1)
        calls.append(Call(hopper_eight.hopper_eight_forward, grid, arguments))
    return calls


def unpacking(
    given: Given,
    room: dict[str, Moving],
    eight: EightHeads,
    bound: DeviceSchedule,
    most_copies: int,
    video_start: int,
) -> Call:
    """The launch that copies outputs of anchors, `packed_out` and `packed_lse`, to their groups."""
    out, lse, packed = given.out, given.lse, room["packed_out"]
    batch, heads, all_tokens, head_dim = out.value.shape
    arguments = {
        "packed_ptr": packed,
        "packed_lse_ptr": room.get("packed_lse"),
        "heads_ptr": eight.anchored,
        "slots_ptr": eight.slots,
        "packed_heads_ptr": bound.heads,
        "first_ptr": bound.query_first,
        "copies_ptr": bound.query_copies,
        "out_ptr": out,
        "lse_ptr": lse,
        **dict(zip(("stride_b", "stride_h", "stride_n"), tile_strides(out.value), strict=False)),
        "eight_heads": len(eight.heads),
        "packed_tokens": packed.value.shape[2],
        "heads": heads,
        "all_tokens": all_tokens,
        "video_start": video_start,
        "most_copies": most_copies,
        "ROWS": QUERY_GROUP,
        "HEAD_DIM": head_dim,
        "num_warps": 4,
    }
    return Call(unpack_outputs, (len(eight.anchored), eight.groups, batch), arguments)
