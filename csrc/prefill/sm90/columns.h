#pragma once

namespace hierasparse {

// Columns (query, head of the group) of one warpgroup: what its registers hold.
constexpr int prefill_sm90_group_columns(int head_size) { return head_size == 64 ? 128 : 96; }

// Most columns of a tile: those of a CTA, whose two warpgroups have their own.
constexpr int prefill_sm90_columns(int head_size) { return 2 * prefill_sm90_group_columns(head_size); }

}  // namespace hierasparse
