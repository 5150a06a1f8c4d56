// How fast Hopper's tensor cores multiply, dense and sparse, with operands where the prefill kernels have them: A in
// registers, B in shared memory (warpgroup products) or in registers.  See products.py, which compiles and runs it.
#include <cstdio>
#include <cstdlib>

#include "common/hopper.cuh"

namespace {

using namespace hierasparse;

constexpr int kThreads = 256, kColumns = 96, kSteps = 4, kTiles = 8;
constexpr uint32_t kOnes = 0x3f803f80u;      // bfloat16
constexpr uint32_t kMetadata = 0x4e4e4e4eu;  // values 0 and 1 of a group, 2 and 3 of the next
enum class Product { kWgmma, kWgmmaSp, kMma, kMmaSp };

constexpr bool of_warpgroup(Product product) { return product == Product::kWgmma || product == Product::kWgmmaSp; }

// Two random bfloat16 between 1/2 and 2, or minus that: power, and so the clock, depends on the bits that change.
__device__ uint32_t random_pair(uint32_t seed) {
  seed *= 2654435761u, seed ^= seed >> 15, seed *= 2246822519u, seed ^= seed >> 13;
  return (seed & 0x80ff80ffu) | 0x3f003f00u;
}

// Every element of the product gains 16 a step where all operands are ones: 16 values are multiplied, or kept.
template <Product kProduct>
__global__ void __launch_bounds__(kThreads, 1) multiply(int turns, bool ones, float* out) {
  extern __shared__ uint8_t raw[];
  const uint32_t start = (shared_address(raw) + 1023) / 1024 * 1024;
  const uint32_t b = start + threadIdx.x / 128 * kColumns * 128;  // of this warpgroup, one half: 64 of the depth
  for (int i = threadIdx.x; i < 2 * kColumns * 32; i += kThreads) {
    store_shared4(start + i * 4, ones ? kOnes : random_pair(i));
  }
  fence_async();
  __syncthreads();
  uint32_t x[4];
  for (int i = 0; i < 4; ++i) x[i] = ones ? kOnes : random_pair(threadIdx.x * 4 + i + 77777);
  const uint4 a{x[0], x[1], x[2], x[3]};
  float sum = 0.f;
  if constexpr (of_warpgroup(kProduct)) {
    float d[kColumns / 2] = {};
    const uint64_t at = wgmma_descriptor(b);
    for (int turn = 0; turn < turns; ++turn) {
      wgmma_hold(d);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        if constexpr (kProduct == Product::kWgmma) {
          wgmma(d, a, wgmma_behind(at, step * 32), true);
        } else if (step % 2 == 0) {
          wgmma_sp<0>(d, a, kMetadata, at, true);
        } else {
          wgmma_sp<1>(d, a, kMetadata, wgmma_behind(at, 64), true);
        }
      }
      wgmma_commit();
      wgmma_wait<0>();
    }
    wgmma_hold(d);
    for (float v : d) sum += v;
    sum /= kColumns / 2;
  } else {
    float d[kTiles][4] = {};
    uint32_t y[kTiles][4];
    for (int i = 0; i < kTiles * 4; ++i) y[i / 4][i % 4] = ones ? kOnes : random_pair(threadIdx.x * 64 + i);
    for (int turn = 0; turn < turns; ++turn) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        if constexpr (kProduct == Product::kMma) {
          mma<__nv_bfloat16>(d[i], a.x, a.y, a.z, a.w, y[i][0], y[i][1]);
        } else {
          mma_sp<__nv_bfloat16, 0>(d[i], a, y[i], kMetadata);
        }
      }
    }
    for (auto& tile : d) sum += tile[0] + tile[1] + tile[2] + tile[3];
    sum /= kTiles * 4;
  }
  out[blockIdx.x * kThreads + threadIdx.x] = sum;
}

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
  std::exit(1);
}

// Dense-equivalent operations of a CTA's turn.
double operations(Product product) {
  const bool sparse = product == Product::kWgmmaSp || product == Product::kMmaSp;
  const double depth = sparse ? 32 : 16;
  if (of_warpgroup(product)) return 2. * 2 * 64 * kColumns * kSteps * depth;
  return 2. * 8 * 16 * 8 * kTiles * depth;
}

// Prints whether the products of ones are right, and TFLOP/s of random ones in the second half of some time.
template <Product kProduct>
void measure(double seconds) {
  int device, sms;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
  const int shared = 2 * kColumns * 128 + 1024;
  check(cudaFuncSetAttribute(multiply<kProduct>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  float* out;
  check(cudaMallocManaged(&out, sms * kThreads * sizeof(float)));
  const int few = 100, many = 20000;
  multiply<kProduct><<<sms, kThreads, shared>>>(few, true, out);
  check(cudaDeviceSynchronize());
  bool right = true;
  for (int i = 0; i < sms * kThreads; ++i) right &= out[i] == 16.f * few * (of_warpgroup(kProduct) ? kSteps : 1);
  cudaEvent_t events[2];
  for (auto& event : events) check(cudaEventCreate(&event));
  auto timed = [&](int launches) {
    check(cudaEventRecord(events[0]));
    for (int i = 0; i < launches; ++i) multiply<kProduct><<<sms, kThreads, shared>>>(many, false, out);
    check(cudaEventRecord(events[1]));
    check(cudaDeviceSynchronize());
    float ms;
    check(cudaEventElapsedTime(&ms, events[0], events[1]));
    return ms / launches / 1e3;
  };
  timed(1);
  const int half = 1 + static_cast<int>(seconds / 2 / timed(3));
  timed(half);
  std::printf("%d\n", right);  // the reader's meter begins now
  std::fflush(stdout);
  const double took = timed(half);
  std::printf("%.1f\n", operations(kProduct) * many * sms / took / 1e12);
  check(cudaFree(out));
}

}  // namespace

int main(int argc, char** argv) {
  constexpr void (*kMeasures[])(double) = {measure<Product::kWgmma>, measure<Product::kWgmmaSp>, measure<Product::kMma>,
                                           measure<Product::kMmaSp>};
  const int product = argc == 3 ? std::atoi(argv[1]) : -1;
  if (product < 0 || product > 3) {
    std::fprintf(stderr, "usage: products PRODUCT SECONDS; PRODUCT is 0 to 3\n");
    return 2;
  }
  kMeasures[product](std::atof(argv[2]));
  return 0;
}
