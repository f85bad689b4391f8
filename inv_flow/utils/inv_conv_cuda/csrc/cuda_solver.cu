// The CUDA solver: persistent blocks, each with one channel group, going through the batch. See wavefront.h for the parts.
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <tuple>

#include "cuda_solver.h"

namespace inv_conv {
namespace {

using wave::Block;
using wave::Form;
using wave::kFlat;
using wave::kRing;
using wave::kTile;
using wave::Orders;
using wave::Plan;
using wave::Quad;
using wave::Shape;
using wave::Weights;

constexpr int kMostThreads = 512;

template <typename T>
__device__ void fold_weights(const Weights<T>& weights) {
  weights.clear(threadIdx.x, blockDim.x);
  __syncthreads();
  weights.identity(threadIdx.x, blockDim.x);
  __syncthreads();
  for (int m = 0; m + 1 < weights.s.size; ++m) {
    weights.eliminate(m, threadIdx.x, blockDim.x);
    __syncthreads();
  }
  weights.fold(threadIdx.x, blockDim.x);
  __syncthreads();
}

// For weights too large for shared memory: one block a group.
template <typename T>
__global__ void __launch_bounds__(kMostThreads, 1)
    fold_kernel(const Shape shape, __grid_constant__ const Orders orders, const T* w, T* workspace) {
  const int group = blockIdx.x;
  fold_weights(Weights<T>{shape, orders.of(group), w + group * wave::kernel_count(shape),
                          workspace + group * wave::weight_count(shape)});
}

template <typename T, Form kForm, int P, int Q>
__global__ void __launch_bounds__(kMostThreads, 1)
    solve_kernel(const Shape shape, const Plan plan, __grid_constant__ const Orders orders, const T* y, const T* w, T* x,
                 T* workspace) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  constexpr int R = kForm == kTile && Q == 2 && sizeof(T) == 4 ? 0 : Q;  // for sm_75 this one would spill
#else
  constexpr int R = Q;
#endif
  extern __shared__ __align__(16) unsigned char shared[];
  T* state = reinterpret_cast<T*>(shared);
  const int group = blockIdx.x % shape.groups, code = orders.of(group);
  T* folded = workspace + group * wave::weight_count(shape);
  if (plan.shared_weights) {
    folded = state;
    state += wave::weight_count(shape);
    fold_weights(Weights<T>{shape, code, w + group * wave::kernel_count(shape), folded});
  }
  Block<T, kForm, P> block{shape, plan, group, code, y, x, folded, state, 0, 0};
  block.clear(threadIdx.x, blockDim.x);
  __syncthreads();

  const int share = threadIdx.x % plan.split, lane = threadIdx.x / plan.split, lanes = blockDim.x / plan.split;
  const int items = block.items();
  const auto own = block.item(lane);
  const auto tap = block.first_tap(share);
  Quad<T> held[4 * R + 1] = {};
  if (R > 0 && lane < items) block.template hold<R>(own, tap, held);
  const int stride = gridDim.x / shape.groups * plan.images;
  for (int first = blockIdx.x / shape.groups * plan.images; first < shape.batch; first += stride) {
    block.first = first;
    block.count = min(plan.images, shape.batch - first);
    if (kForm == kTile) block.bring(threadIdx.x, blockDim.x);
    if (kForm == kRing) {
      block.fetch(0, threadIdx.x, blockDim.x);
      INV_CONV_COPY_WAIT();
    }
    __syncthreads();
    for (int d = 0, turn = 0; d < block.steps(); ++d, turn = turn + 1 == wave::diagonals(shape) ? 0 : turn + 1) {
      if (kForm == kRing) block.fetch(d + 1, threadIdx.x, blockDim.x);
      for (int start = 0; start < items; start += lanes) {
        // every thread of a warp takes part in the exchange, with or without an item
        const bool busy = start + lane < items;
        const auto item = start == 0 ? own : block.item(start + lane);
        Quad<T> sum[P] = {};
        if (busy) block.template add_taps<R>(d, turn, item, tap, held, sum);
        for (int apart = plan.split / 2; apart > 0; apart /= 2)
#pragma unroll
          for (int q = 0; q < P; ++q)
#pragma unroll
            for (int o = 0; o < 4; ++o) sum[q].v[o] += __shfl_xor_sync(0xffffffffu, sum[q].v[o], apart);
        if (busy && share == 0) block.finish(d, turn, item, sum);
      }
      if (kForm == kRing) INV_CONV_COPY_WAIT();
      __syncthreads();
    }
    if (kForm == kTile) {
      block.store(threadIdx.x, blockDim.x);
      __syncthreads();
    }
  }
}

struct Device {
  int id, multiprocessors;
  size_t shared_limit;
};

// The current device. What it can do is asked once a device.
cudaError_t describe(Device& device) {
  static std::mutex lock;
  static std::map<int, Device> known;
  int id = 0, multiprocessors = 0, shared = 0;
  cudaError_t error = cudaGetDevice(&id);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> guard(lock);
  const auto found = known.find(id);
  if (found != known.end()) {
    device = found->second;
    return cudaSuccess;
  }
  error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, id);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, id);
  device = Device{id, multiprocessors, size_t(shared)};
  if (error == cudaSuccess) known[id] = device;
  return error;
}

// How many blocks of a kernel fit on a multiprocessor at once; asked once for each way to launch it.
cudaError_t find_resident(const Device& device, const void* kernel, const Plan& plan, int& resident) {
  static std::mutex lock;
  static std::map<std::tuple<int, const void*, int, size_t>, int> known;
  const auto key = std::make_tuple(device.id, kernel, plan.threads, plan.shared_bytes);
  const std::lock_guard<std::mutex> guard(lock);
  const auto found = known.find(key);
  if (found != known.end()) {
    resident = found->second;
    return cudaSuccess;
  }
  // the device's limit, so that it holds for every later launch of the kernel, too
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(device.shared_limit));
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, plan.threads, plan.shared_bytes);
  if (error == cudaSuccess) known[key] = resident;
  return error;
}

template <typename T>
using Kernel = void (*)(const Shape, const Plan, const Orders, const T*, const T*, T*, T*);

template <typename T, Form kForm>
Kernel<T> kernel_of(int pixels, int held) {
  if constexpr (kForm != kFlat) {
    if (held == 1) return solve_kernel<T, kForm, 1, 1>;
    if (held == 2) return solve_kernel<T, kForm, 1, 2>;
    if constexpr (wave::most_held(sizeof(T)) > 2) {
      if (held == 3) return solve_kernel<T, kForm, 1, 3>;
      if (held == 4) return solve_kernel<T, kForm, 1, 4>;
    }
  }
  return pixels == 2 ? solve_kernel<T, kForm, 2, 0> : solve_kernel<T, kForm, 1, 0>;
}

template <typename T>
Kernel<T> kernel_of(const Plan& plan) {
  if (plan.form == kTile) return kernel_of<T, kTile>(plan.pixels, plan.held);
  if (plan.form == kRing) return kernel_of<T, kRing>(plan.pixels, plan.held);
  return kernel_of<T, kFlat>(plan.pixels, 0);
}

}  // namespace

template <typename T>
int64_t workspace_count(const Shape& shape) {
  Device device;
  if (describe(device) != cudaSuccess) return 0;  // solve_cuda meets the same error and returns it
  const Plan plan = wave::choose_plan(shape, sizeof(T), device.multiprocessors, device.shared_limit);
  return plan.shared_weights ? 0 : shape.groups * wave::weight_count(shape);
}

template <typename T>
cudaError_t solve_cuda(const Shape& shape, const Orders& orders, const T* y, const T* w, T* x, T* workspace, cudaStream_t stream) {
  Device device;
  cudaError_t error = describe(device);
  if (error != cudaSuccess) return error;
  const Plan plan = wave::choose_plan(shape, sizeof(T), device.multiprocessors, device.shared_limit);
  if (!plan.shared_weights) {
    fold_kernel<T><<<shape.groups, kMostThreads, 0, stream>>>(shape, orders, w, workspace);
    error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  const Kernel<T> kernel = kernel_of<T>(plan);
  int resident = 0;
  error = find_resident(device, reinterpret_cast<const void*>(kernel), plan, resident);
  if (error != cudaSuccess) return error;
  // as many blocks as run at once, a whole number a group
  const int64_t units = (int64_t(shape.batch) + plan.images - 1) / plan.images;
  const int64_t room = int64_t(resident < 1 ? 1 : resident) * device.multiprocessors / shape.groups;
  const int64_t each = room < 1 ? 1 : room < units ? room : units;
  kernel<<<unsigned(each * shape.groups), plan.threads, plan.shared_bytes, stream>>>(shape, plan, orders, y, w, x, workspace);
  return cudaGetLastError();
}

template int64_t workspace_count<float>(const Shape&);
template int64_t workspace_count<double>(const Shape&);
template cudaError_t solve_cuda<float>(const Shape&, const Orders&, const float*, const float*, float*, float*, cudaStream_t);
template cudaError_t solve_cuda<double>(const Shape&, const Orders&, const double*, const double*, double*, double*, cudaStream_t);

}  // namespace inv_conv
