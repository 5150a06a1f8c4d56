// Runs the merge kernel of csrc/expand on a CPU.
// merge_kernel FOLDER D HEADS ROWS PARTS COUNT OUT_FLOAT PART_FLOAT BFLOAT16 reads FOLDER/out [ROWS, HEADS, D], out_lse
// [HEADS, ROWS], part [PARTS, COUNT, HEADS, D], part_lse [PARTS, HEADS, COUNT] and rows [COUNT], which may be empty,
// and writes out and out_lse.
#include "threads_on_cpu.h"
// clang-format off: the kernel needs what stands there
#include "../../csrc/expand/merge.cuh"
// clang-format on

using namespace hierasparse;

int main(int, char** args) {
  const std::string folder = std::string(args[1]) + "/";
  int n[8];
  for (int i = 0; i < 8; ++i) n[i] = std::atoi(args[i + 2]);
  const int d = n[0], heads = n[1], all = n[2], parts = n[3], count = n[4], bfloat16 = n[7];
  std::vector<char> out = read(folder + "out"), out_lse = read(folder + "out_lse"), part = read(folder + "part"),
                    part_lse = read(folder + "part_lse"), rows = read(folder + "rows");
  MergeParams p{};
  p.out = out.data(), p.out_lse = reinterpret_cast<float*>(out_lse.data());
  p.part = part.data(), p.part_lse = reinterpret_cast<const float*>(part_lse.data());
  p.parts = parts, p.count = count, p.heads = heads, p.head_size = d, p.out_float = n[5], p.part_float = n[6];
  p.out_stride = heads * d * (p.out_float ? 4 : 2), p.part_stride = heads * d * (p.part_float ? 4 : 2);
  p.parts_stride = p.part_stride * count;
  p.out_lse_stride = all, p.part_lse_stride = count, p.parts_lse_stride = int64_t{heads} * count;
  p.rows = rows.empty() ? nullptr : reinterpret_cast<const int32_t*>(rows.data());
  const auto kernel = bfloat16 ? merge::kernel_for<__nv_bfloat16>(p) : merge::kernel_for<__half>(p);
  run_threads(merge::kThreads, [&] {
    for (int cta = 0; cta < count * merge::ctas_of_row(p); ++cta) {
      blockIdx.x = cta;
      kernel(p);
    }
  });
  write(folder + "out", out);
  write(folder + "out_lse", out_lse);
}
