// The plain C interface that Python loads. nvcc makes kernels and their launches of it; g++ (`-x c++`) makes loops over
// blocks, for tests without a GPU. Functions return 0, or an error that `d2o_error_text` explains.
#include "evict.cuh"
#include "step.cuh"

#ifdef __CUDACC__
#include <cooperative_groups.h>

#include <atomic>
#else
#include <memory>
#endif

#define D2O_API extern "C" __attribute__((visibility("default")))

using namespace d2o;

// Raised whenever a struct or a function below changes: library.py refuses another.
D2O_API int d2o_abi_version() { return 3; }

D2O_API int d2o_struct_size(int which) {
  const int sizes[] = {sizeof(EvictParams), sizeof(AppendParams), sizeof(ScoreParams)};
  return sizes[which];
}

D2O_API int d2o_max_victims() { return kMaxVictims; }

// The functions below run on this device. PyTorch has a CUDA runtime of its own, and this library has another.
D2O_API int d2o_use_device(int device) {
#ifdef __CUDACC__
  return cudaSetDevice(device);
#else
  return device ? 1 : 0;
#endif
}

// Bytes of workspace that an eviction needs, its parts being set.
D2O_API int64_t d2o_evict_workspace(const EvictParams* params) {
  EvictParams p = *params;
  return carve(p, nullptr);
}

#ifdef __CUDACC__

namespace {

template <class T>
__global__ void __launch_bounds__(kThreads) evict_kernel(const EvictParams p) {
  __shared__ EvictShared shared;
  const int items = p.batch * p.heads * p.num_parts;
  if (p.halves & kFind) {
    for (int n = blockIdx.x; n < items; n += gridDim.x) evict_find<T>(p, item_of(p, n), shared.find);
  }
  if (p.halves == (kFind | kApply)) cooperative_groups::this_grid().sync();
  if (p.halves & kApply) {
    for (int n = blockIdx.x; n < items; n += gridDim.x) evict_apply<T>(p, item_of(p, n), shared.apply);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) append_kernel(const AppendParams p) {
  append_head<T>(p, blockIdx.x);
}

__global__ void __launch_bounds__(kThreads) update_scores_kernel(const ScoreParams p) {
  update_scores_block(p, blockIdx.x);
}

using EvictKernel = void (*)(EvictParams);

EvictKernel evict_kernel_of(const EvictParams& p) {
  const EvictKernel kernels[] = {evict_kernel<float>, evict_kernel<Bf16>, evict_kernel<Half>};
  return kernels[p.dtype];
}

// Blocks of the eviction that the current device runs at once. Asked once a device and dtype.
int resident_blocks(const EvictParams& p, int* blocks) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices][3];
  int device = 0, processors = 0, each = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess && device < kDevices && (*blocks = known[device][p.dtype])) return cudaSuccess;
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, evict_kernel_of(p), kThreads, 0);
  }
  *blocks = processors * each;
  if (error == cudaSuccess && device < kDevices) known[device][p.dtype] = *blocks;
  return error;
}

}  // namespace

// Parts that each head is cut into: as many blocks as run at once, and no part under kThreads slots.
D2O_API int d2o_evict_parts(const EvictParams* p, int* parts) {
  int blocks = 0;
  const int error = resident_blocks(*p, &blocks);
  const int leads = p->batch * p->heads, most = (p->most_held + kThreads - 1) / kThreads;
  *parts = blocks / leads < 1 ? 1 : blocks / leads < most ? blocks / leads : most;
  return error;
}

D2O_API int d2o_evict(const EvictParams* params, void* workspace, void* stream) {
  EvictParams p = *params;
  carve(p, static_cast<char*>(workspace));
  int resident = 0;
  if (const int error = resident_blocks(p, &resident)) return error;
  const int items = p.batch * p.heads * p.num_parts;
  void* arguments[] = {&p};
  const dim3 blocks(items < resident ? items : resident);
  return cudaLaunchCooperativeKernel(reinterpret_cast<void*>(evict_kernel_of(p)), blocks, dim3(kThreads), arguments, 0,
                                     static_cast<cudaStream_t>(stream));
}

D2O_API int d2o_append(const AppendParams* p, void* stream) {
  const dim3 blocks(p->batch * p->heads), threads(kThreads);
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  if (p->dtype == 0) append_kernel<float><<<blocks, threads, 0, on>>>(*p);
  if (p->dtype == 1) append_kernel<Bf16><<<blocks, threads, 0, on>>>(*p);
  if (p->dtype == 2) append_kernel<Half><<<blocks, threads, 0, on>>>(*p);
  return cudaGetLastError();
}

D2O_API int d2o_update_scores(const ScoreParams* p, void* stream) {
  const int blocks = p->batch * p->heads * ((p->num_slots + kThreads - 1) / kThreads);
  update_scores_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(*p);
  return cudaGetLastError();
}

D2O_API const char* d2o_error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

#else

namespace {

// Shared memory as a block finds it: with anything in it.
template <class Shared>
std::unique_ptr<Shared> fresh() {
  auto shared = std::make_unique<Shared>();
  std::memset(static_cast<void*>(shared.get()), 0xff, sizeof(Shared));
  return shared;
}

template <class T>
void evict_blocks(const EvictParams& p) {
  const int items = p.batch * p.heads * p.num_parts;
  for (int n = 0; n < items && p.halves & kFind; ++n) {
    evict_find<T>(p, item_of(p, scheduled(n, items)), fresh<EvictShared>()->find);
  }
  for (int n = 0; n < items && p.halves & kApply; ++n) {
    evict_apply<T>(p, item_of(p, scheduled(n, items)), fresh<EvictShared>()->apply);
  }
}

}  // namespace

D2O_API int d2o_evict_parts(const EvictParams*, int* parts) {
  *parts = 3;
  return 0;
}

D2O_API int d2o_evict(const EvictParams* params, void* workspace, void*) {
  EvictParams p = *params;
  carve(p, static_cast<char*>(workspace));
  schedule = p.schedule;
  if (p.dtype == 0) evict_blocks<float>(p);
  if (p.dtype == 1) evict_blocks<Bf16>(p);
  if (p.dtype == 2) evict_blocks<Half>(p);
  return 0;
}

D2O_API int d2o_append(const AppendParams* p, void*) {
  schedule = p->schedule;
  for (int n = 0; n < p->batch * p->heads; ++n) {
    const int lead = scheduled(n, p->batch * p->heads);
    if (p->dtype == 0) append_head<float>(*p, lead);
    if (p->dtype == 1) append_head<Bf16>(*p, lead);
    if (p->dtype == 2) append_head<Half>(*p, lead);
  }
  return 0;
}

D2O_API int d2o_update_scores(const ScoreParams* p, void*) {
  schedule = p->schedule;
  const int blocks = p->batch * p->heads * score_blocks(*p);
  for (int n = 0; n < blocks; ++n) update_scores_block(*p, scheduled(n, blocks));
  return 0;
}

D2O_API const char* d2o_error_text(int) { return "the host build has one device"; }

#endif
