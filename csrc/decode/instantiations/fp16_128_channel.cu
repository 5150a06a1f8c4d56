#include "../kernel.cuh"

namespace hierasparse::decode {

template cudaError_t run<__half, 128, false, false, 1>(const DecodeParams&, cudaStream_t);
template cudaError_t run<__half, 128, false, false, 2>(const DecodeParams&, cudaStream_t);

}  // namespace hierasparse::decode
