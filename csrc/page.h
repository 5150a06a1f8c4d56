// The page layout for kernels: the same facts as hierasparse_vllm/page.py, which explains them.
// tests/unit/test_page_h.py compares the two for every layout, offset and value order; change both together.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define HS_HD __host__ __device__
#else
#define HS_HD
#endif

namespace hierasparse {

constexpr int kLayoutVersion = 3;
constexpr int kPageTokens = 256;
constexpr int kSubTokens = 64;
constexpr int kSubs = kPageTokens / kSubTokens;
constexpr int kAlign = 128;
constexpr int kIndexBytes = kAlign;
constexpr int kMetaBytes = 4;  // of a word with the nibbles of eight groups of four
constexpr int kWarp = 32;
constexpr uint32_t kSinkBit = 1u << 8;  // of the index word: the page's sink rows count

HS_HD constexpr int align_up(int n) { return (n + kAlign - 1) / kAlign * kAlign; }

// Sizes and offsets, in bytes from the start of one KV head's region of a page. A structural type, so that a kernel can
// take a whole layout as a template parameter.
struct PageLayout {
  int head_size;
  int value_bytes;
  int sparse_k;  // of the four sub-blocks
  int sparse_v;
  int sink_tokens;
  bool key_mean;

  // ---- sizes
  HS_HD constexpr int groups() const { return kSubTokens * head_size / 4; }
  HS_HD constexpr int sparse_value_bytes() const { return groups() * 2 * value_bytes; }
  HS_HD constexpr int sparse_bytes() const { return sparse_value_bytes() + groups() / 8 * kMetaBytes; }
  HS_HD constexpr int dense_bytes() const { return groups() * 4 * value_bytes; }
  HS_HD constexpr int mean_bytes() const { return key_mean ? align_up(head_size * value_bytes) : 0; }
  HS_HD constexpr int sink_bytes() const { return align_up(sink_tokens * head_size * value_bytes); }
  HS_HD constexpr int side_bytes(int sparse) const {
    return sparse * sparse_bytes() + (kSubs - sparse) * dense_bytes();
  }
  HS_HD constexpr int head_bytes() const { return align_up(v_offset() + side_bytes(sparse_v)); }

  // ---- offsets
  HS_HD constexpr int mean_offset() const { return kIndexBytes; }
  HS_HD constexpr int sink_k_offset() const { return mean_offset() + mean_bytes(); }
  HS_HD constexpr int sink_v_offset() const { return sink_k_offset() + sink_bytes(); }
  HS_HD constexpr int k_offset() const { return sink_v_offset() + sink_bytes(); }
  HS_HD constexpr int v_offset() const { return k_offset() + side_bytes(sparse_k); }

  // ---- index word: masks of sparse sub-blocks, K's in bits 0-3 and V's in bits 4-7, so that 0 is valid; and kSinkBit.
  // `first_page`: it is the request's page 0. There the first sink_tokens tokens are read from the sink rows; in all
  // other pages these are zero bytes that nobody reads. Without sink rows the bit is never set.
  HS_HD constexpr uint32_t encode_index(uint32_t k_mask, uint32_t v_mask, bool first_page) const {
    return (k_mask ^ first(sparse_k)) | (v_mask ^ first(sparse_v)) << kSubs |
           (first_page && sink_tokens > 0 ? kSinkBit : 0u);
  }
  HS_HD constexpr uint32_t k_mask(uint32_t word) const { return (word & kAllSubs) ^ first(sparse_k); }
  HS_HD constexpr uint32_t v_mask(uint32_t word) const { return (word >> kSubs & kAllSubs) ^ first(sparse_v); }
  HS_HD static constexpr bool has_sinks(uint32_t word) { return (word & kSinkBit) != 0; }

  // Offset of sub-block `sub`: sparse ones come first, in token order, then dense ones.
  HS_HD constexpr int k_sub(uint32_t mask, int sub) const { return k_offset() + place(mask, sub, sparse_k); }
  HS_HD constexpr int v_sub(uint32_t mask, int sub) const { return v_offset() + place(mask, sub, sparse_v); }

 private:
  static constexpr uint32_t kAllSubs = (1u << kSubs) - 1;
  HS_HD static constexpr uint32_t first(int n) { return (1u << n) - 1; }
  HS_HD constexpr int place(uint32_t mask, int sub, int sparse) const {
    int rank = 0;
    for (int i = 0; i < sub; ++i) rank += mask >> i & 1;
    return mask >> sub & 1 ? rank * sparse_bytes() : sparse * sparse_bytes() + (sub - rank) * dense_bytes();
  }
};

// ---- order of the values inside a sub-block --------------------------------------------------------------------
// Kernels write most of these orders out, loop by loop; that they do it right, their own tests show.
// A lane's eight values of an operand-A fragment (m16n8k16, or m16n8k32 with 2:4) are contiguous: 16 bytes.

struct RowCol {
  int row, col;
};

// Row and column of the value at `place` in a matrix of `cols` stored columns: A fragments, row tile by row tile.
HS_HD constexpr RowCol fragment(int place, int cols) {
  const int h = place & 1, i = place >> 1 & 3, lane = place >> 3 & 31, tile = place >> 8, steps = cols / 16;
  return {16 * (tile / steps) + lane / 4 + 8 * (i & 1), 16 * (tile % steps) + 2 * (lane % 4) + 8 * (i >> 1) + h};
}

// V's rows, for both axes: row r of tile 4c + j (row 16 * tile + r of the operand) is channel 64c + 4r + j.
HS_HD constexpr int value_channel(int row) { return row / 64 * 64 + 4 * (row % 16) + row / 16 % 4; }
HS_HD constexpr int value_row(int channel) { return channel / 64 * 64 + 16 * (channel % 4) + channel % 64 / 4; }

// So the four channels of a group (dense V, whatever its axis: planes = 4), or the two values kept of it (V along
// channels: planes = 2), lie in one lane, 256 places apart. Order: 64 channels, 16 tokens, plane, lane, register, half.
struct ChannelPlace {
  int group, token, plane;  // of a dense value: channel 4 * group + plane
};

HS_HD constexpr ChannelPlace channel_fragment(int place, int planes) {
  const int h = place & 1, i = place >> 1 & 3, lane = place >> 3 & 31, plane = place >> 8 & (planes - 1);
  const int s = place / (256 * planes) % (kSubTokens / 16), c = place / (256 * planes) / (kSubTokens / 16);
  return {16 * c + lane / 4 + 8 * (i & 1), 16 * s + 2 * (lane % 4) + 8 * (i >> 1) + h, plane};
}

// Metadata: d / 16 words per lane, four words of a lane together. Word w of lane l is u32 number ...
HS_HD constexpr int meta_word(int w, int lane) { return (w / 4 * kWarp + lane) * 4 + w % 4; }

// ... and nibble n of it belongs, for an mma.sp operand (K; V along tokens, where it is channel value_channel(row)), to
// this row and group of that row's groups.
// Word w = m * pairs + p serves row tile m and k-steps 2p (metadata selector 0) and 2p + 1 (selector 1).
HS_HD constexpr RowCol meta_group(int w, int lane, int n, int pairs) {
  const int g = lane / 4, t = lane % 4;
  return {16 * (w / pairs) + g + 8 * (n >> 2), 8 * (2 * (w % pairs) + (t >> 1)) + 4 * (t & 1) + (n & 3)};
}

// The same for V along channels: the lane's own eight (row, token) places of 64 channels c = w / 4 and 16 tokens w % 4.
HS_HD constexpr ChannelPlace meta_channel_group(int w, int lane, int n) {
  const int h = n & 1, i = n >> 1;
  return {16 * (w / 4) + lane / 4 + 8 * (i & 1), 16 * (w % 4) + 2 * (lane % 4) + 8 * (i >> 1) + h, 0};
}

// ---- the mean and the sink rows of K: operand order
// Lane 4g + t reads eight values (16 bytes) per 32 channels: place 8 * (4s + t) + 2i + h has position 32s + 2t + 8i + h
// of the channel order, which is in half h of the lane's register i of B of m16n8k32, or in row g of A of two m16n8k16.
HS_HD constexpr int row_position(int place) {
  return place / 32 * 32 + 2 * (place >> 3 & 3) + 8 * (place >> 1 & 3) + (place & 1);
}
HS_HD constexpr int row_place(int position) {
  return position / 32 * 32 + 8 * (position >> 1 & 3) + 2 * (position >> 3 & 3) + (position & 1);
}

static_assert(PageLayout{128, 2, 4, 4, 1, true}.head_bytes() == 74624, "the figure of docs/page-format.md");

}  // namespace hierasparse
