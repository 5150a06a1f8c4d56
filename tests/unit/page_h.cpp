// Prints what csrc/page.h says, one line per fact, for test_page_h.py.
#include <cstdio>
#include <cstdlib>

#include "../../csrc/page.h"

using namespace hierasparse;

static void layouts() {
  const int sinks[] = {0, 1, 64};
  for (int d = 64; d <= 256; d *= 2)
    for (int bytes = 1; bytes <= 4; bytes *= 2)
      for (int k = 0; k <= kSubs; ++k)
        for (int v = 0; v <= kSubs; ++v)
          for (int s : sinks)
            for (int mean = 0; mean <= 1; ++mean) {
              const PageLayout l{d, bytes, k, v, s, mean == 1};
              std::printf("layout %d %d %d %d %d %d : %d %d %d %d %d %d", d, bytes, k, v, s, mean, l.head_bytes(),
                          l.mean_offset(), l.sink_k_offset(), l.sink_v_offset(), l.k_offset(), l.v_offset());
              for (uint32_t mask = 0; mask < 16; ++mask) {
                const bool own_k = __builtin_popcount(mask) == k, own_v = __builtin_popcount(mask) == v;
                if (own_k) {
                  const uint32_t word = l.encode_index(mask, (1u << v) - 1, true);
                  std::printf(" %u %u %d", word, l.k_mask(word), l.has_sinks(word));
                  for (int sub = 0; sub < kSubs; ++sub) std::printf(" %d", l.k_sub(mask, sub));
                }
                if (own_v) {
                  const uint32_t word = l.encode_index((1u << k) - 1, mask, false);
                  std::printf(" %u %u %d", word, l.v_mask(word), l.has_sinks(word));
                  for (int sub = 0; sub < kSubs; ++sub) std::printf(" %d", l.v_sub(mask, sub));
                }
              }
              std::printf("\n");
            }
}

// Logical indices, as page.py counts them: kept 2 * group + e, dense token * D + place in the channel order.
static void orders(int d) {
  const int values = kSubTokens * d;
  std::printf("kept k %d :", d);
  for (int p = 0; p < values / 2; ++p) {
    const RowCol at = fragment(p, d / 2);
    std::printf(" %d", at.row * (d / 2) + at.col);
  }
  std::printf("\nkept v_token %d :", d);
  for (int p = 0; p < values / 2; ++p) {
    const RowCol at = fragment(p, kSubTokens / 2);
    std::printf(" %d", (at.col / 2 * d + value_channel(at.row)) * 2 + at.col % 2);
  }
  std::printf("\nkept v_channel %d :", d);
  for (int p = 0; p < values / 2; ++p) {
    const ChannelPlace at = channel_fragment(p, 2);
    std::printf(" %d", (at.token * (d / 4) + at.group) * 2 + at.plane);
  }
  std::printf("\ndense k %d :", d);
  for (int p = 0; p < values; ++p) {
    const RowCol at = fragment(p, d);
    std::printf(" %d", at.row * d + at.col);
  }
  std::printf("\ndense v %d :", d);
  for (int p = 0; p < values; ++p) {
    const ChannelPlace at = channel_fragment(p, 4);
    std::printf(" %d", at.token * d + 4 * at.group + at.plane);
  }
  const char* kinds[] = {"k", "v_token", "v_channel"};
  for (int kind = 0; kind < 3; ++kind) {
    int* group = static_cast<int*>(std::malloc(sizeof(int) * values / 4));
    for (int w = 0; w < d / 16; ++w)
      for (int lane = 0; lane < kWarp; ++lane)
        for (int n = 0; n < 8; ++n) {
          const RowCol at = meta_group(w, lane, n, kind == 0 ? d / 64 : 1);
          const ChannelPlace own = meta_channel_group(w, lane, n);
          group[meta_word(w, lane) * 8 + n] = kind == 0   ? at.row * (d / 4) + at.col
                                              : kind == 1 ? at.col * d + value_channel(at.row)
                                                          : own.token * (d / 4) + own.group;
        }
    std::printf("\nnibbles %s %d :", kinds[kind], d);
    for (int n = 0; n < values / 4; ++n) std::printf(" %d", group[n]);
    std::free(group);
  }
  std::printf("\nrow positions %d :", d);
  for (int place = 0; place < d; ++place) std::printf(" %d", row_position(place));
  std::printf("\nrow places %d :", d);
  for (int position = 0; position < d; ++position) std::printf(" %d", row_place(position));
  std::printf("\nvalue rows %d :", d);
  for (int channel = 0; channel < d; ++channel) std::printf(" %d", value_row(channel));
  std::printf("\n");
}

int main() {
  std::printf("constants : %d %d %d %d %d %d %u\n", kLayoutVersion, kPageTokens, kSubTokens, kAlign, kIndexBytes,
              kMetaBytes, kSinkBit);
  layouts();
  for (int d = 64; d <= 256; d *= 2) orders(d);
}
