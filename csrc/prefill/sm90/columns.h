#pragma once

namespace hierasparse {

// Warpgroups with columns of their own, and how many (query, head of the group) each has: what registers hold.
constexpr int prefill_sm90_consumers(int head_size) { return head_size == 64 ? 3 : 2; }
constexpr int kPrefillSm90GroupColumns = 96;

// Most columns of a tile: those of a CTA.
constexpr int prefill_sm90_columns(int head_size) {
  return prefill_sm90_consumers(head_size) * kPrefillSm90GroupColumns;
}

}  // namespace hierasparse
