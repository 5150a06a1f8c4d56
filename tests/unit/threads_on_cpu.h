// What CUDA gives a kernel of csrc/expand, on a CPU: a thread of the machine for each thread of a CTA, and CUDA's own
// headers for its types; files.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

static thread_local uint3 this_thread;
static thread_local dim3 this_block;
#define threadIdx this_thread
#define blockIdx this_block
#undef __shared__
#define __shared__ static
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __global__
#define __global__

static std::vector<std::unique_ptr<std::barrier<>>> warps;

static void __syncwarp() { warps[threadIdx.x / 32]->arrive_and_wait(); }
static int min(int a, int b) { return a < b ? a : b; }
static int __clz(int x) { return x == 0 ? 32 : __builtin_clz(x); }

// Calls `body` in every thread of a CTA.
static void run_threads(int count, const std::function<void()>& body) {
  warps.clear();
  for (int warp = 0; warp < count / 32; ++warp) warps.push_back(std::make_unique<std::barrier<>>(32));
  std::vector<std::thread> threads;
  for (int t = 0; t < count; ++t) {
    threads.emplace_back([&body, t] {
      threadIdx.x = t;
      body();
    });
  }
  for (std::thread& thread : threads) thread.join();
}

static std::vector<char> read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}
static void write(const std::string& path, const std::vector<char>& bytes) {
  std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}
