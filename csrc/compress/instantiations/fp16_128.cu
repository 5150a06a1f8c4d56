#include "../run.cuh"

namespace hierasparse::compress {

template cudaError_t run<__half, 128>(const StoreCompressParams&, int, cudaStream_t);

}  // namespace hierasparse::compress
