// The CUDA side of device.h. Every kernel has a plain twin in pack.cpp or planes.cpp.
#include <algorithm>
#include <mutex>
#include <string>
#include <utility>

#include <cuda_runtime.h>

#include "device.h"
#include "planes.h"

namespace spotspeed {
namespace {

constexpr int kThreads = 256;
constexpr std::size_t kPackBatch = 128;  // items whose table fits the 4 KiB of kernel arguments
constexpr std::size_t kTileBytes = 32 << 10;
constexpr unsigned kMaxTiles = 256;

void check(cudaError_t code, const char* call) {
  if (code == cudaSuccess) return;
  // Errors of a call stay set until read; later unrelated calls must not report this one.
  (void)cudaGetLastError();
  throw DeviceError(std::string(call) + ": " + cudaGetErrorString(code));
}

cudaStream_t as_stream(std::uintptr_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

// Makes `device` current, and the caller's device again when it leaves scope.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~CurrentDevice() { (void)cudaSetDevice(previous_); }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int previous_ = 0;
};

class Event {
 public:
  Event() { check(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "cudaEventCreate"); }
  ~Event() {
    if (event_ != nullptr) (void)cudaEventDestroy(event_);
  }
  Event(Event&& other) noexcept : event_(std::exchange(other.event_, nullptr)) {}
  Event& operator=(Event&&) = delete;
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  cudaEvent_t get() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

class Stream {
 public:
  explicit Stream(int priority) {
    check(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, priority),
          "cudaStreamCreateWithPriority");
  }
  ~Stream() {
    if (stream_ == nullptr) return;
    (void)cudaStreamSynchronize(stream_);
    (void)cudaStreamDestroy(stream_);
  }
  Stream(Stream&& other) noexcept : stream_(std::exchange(other.stream_, nullptr)) {}
  Stream& operator=(Stream&&) = delete;
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

class QueuedCopies : public DeviceJob {
 public:
  QueuedCopies(std::vector<Event> ends, std::size_t size_bytes)
      : ends_(std::move(ends)), size_bytes_(size_bytes) {}
  ~QueuedCopies() override {
    for (const Event& end : ends_) (void)cudaEventSynchronize(end.get());
  }

  bool done() override {
    for (const Event& end : ends_) {
      const cudaError_t code = cudaEventQuery(end.get());
      if (code == cudaErrorNotReady) {
        (void)cudaGetLastError();
        return false;
      }
      check(code, "copy from the device");
    }
    return true;
  }

  std::size_t wait() override {
    for (const Event& end : ends_) check(cudaEventSynchronize(end.get()), "copy from the device");
    return size_bytes_;
  }

  std::size_t size_bytes() const override { return size_bytes_; }

 private:
  std::vector<Event> ends_;
  std::size_t size_bytes_;
};

// One launch's table travels as kernel arguments: no allocation, no copy that could wait.
struct PackBatch {
  std::uint64_t source[kPackBatch];
  std::uint64_t offset[kPackBatch];
  std::uint64_t size[kPackBatch];
};

template <typename Word>
__device__ void copy_words(const unsigned char* source, unsigned char* target, std::uint64_t size) {
  const auto address = reinterpret_cast<std::uint64_t>(target);
  const std::uint64_t to_boundary = (sizeof(Word) - address % sizeof(Word)) % sizeof(Word);
  const std::uint64_t head = to_boundary < size ? to_boundary : size;
  const std::uint64_t words = (size - head) / sizeof(Word);
  const std::uint64_t first = static_cast<std::uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const std::uint64_t stride = static_cast<std::uint64_t>(gridDim.x) * blockDim.x;
  const auto* from = reinterpret_cast<const Word*>(source + head);
  auto* to = reinterpret_cast<Word*>(target + head);
  for (std::uint64_t i = first; i < words; i += stride) to[i] = from[i];
  for (std::uint64_t i = first; i < head; i += stride) target[i] = source[i];
  for (std::uint64_t i = head + words * sizeof(Word) + first; i < size; i += stride) {
    target[i] = source[i];
  }
}

__global__ void pack_kernel(const PackBatch batch, unsigned char* target) {
  const auto* source = reinterpret_cast<const unsigned char*>(batch.source[blockIdx.y]);
  unsigned char* place = target + batch.offset[blockIdx.y];
  const std::uint64_t size = batch.size[blockIdx.y];
  const std::uint64_t skew =
      reinterpret_cast<std::uint64_t>(source) ^ reinterpret_cast<std::uint64_t>(place);
  // Both sides reach a word boundary together only when they are skewed by whole words.
  if (skew % 16 == 0) {
    copy_words<uint4>(source, place, size);
  } else if (skew % 4 == 0) {
    copy_words<std::uint32_t>(source, place, size);
  } else {
    copy_words<unsigned char>(source, place, size);
  }
}

template <unsigned Item>
__global__ void split_kernel(const unsigned char* source, unsigned char* target,
                             std::uint64_t count) {
  const std::uint64_t stride = static_cast<std::uint64_t>(gridDim.x) * blockDim.x;
  for (std::uint64_t i = static_cast<std::uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       i < count; i += stride) {
#pragma unroll
    for (unsigned p = 0; p < Item; ++p) target[p * count + i] = source[i * Item + p];
  }
}

template <unsigned Item>
__global__ void join_kernel(const unsigned char* source, unsigned char* target,
                            std::uint64_t count) {
  const std::uint64_t stride = static_cast<std::uint64_t>(gridDim.x) * blockDim.x;
  for (std::uint64_t i = static_cast<std::uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       i < count; i += stride) {
#pragma unroll
    for (unsigned p = 0; p < Item; ++p) target[i * Item + p] = source[p * count + i];
  }
}

// Kernels run on the device that holds the memory, whatever device is current.
int device_of(std::uint64_t address) {
  cudaPointerAttributes attributes{};
  check(cudaPointerGetAttributes(&attributes, reinterpret_cast<const void*>(address)),
        "cudaPointerGetAttributes");
  if (attributes.type != cudaMemoryTypeDevice && attributes.type != cudaMemoryTypeManaged) {
    throw std::invalid_argument("the address is not one of device memory");
  }
  return attributes.device;
}

unsigned blocks_for(std::uint64_t items) {
  const std::uint64_t blocks = (items + kThreads - 1) / kThreads;
  return static_cast<unsigned>(std::clamp<std::uint64_t>(blocks, 1, 4096));
}

template <typename Kernel>
void launch_planes(Kernel kernel, std::uint64_t source, std::uint64_t target, std::size_t count,
                   std::uintptr_t stream) {
  kernel<<<blocks_for(count), kThreads, 0, as_stream(stream)>>>(
      reinterpret_cast<const unsigned char*>(source), reinterpret_cast<unsigned char*>(target),
      count);
  check(cudaGetLastError(), "byte-plane kernel");
}

}  // namespace

struct DeviceCopyEngine::State {
  int device;
  std::vector<Stream> streams;
  std::mutex mutex;
};

bool cuda_built() { return true; }

int cuda_device_count() noexcept {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  (void)cudaGetLastError();
  return 0;
}

RegisteredMemory::RegisteredMemory(std::byte* address, std::size_t size) : address_(address) {
  if (address == nullptr || size == 0) throw std::invalid_argument("no memory to register");
  // Portable: page-locked for every device's context, not only for the current one.
  check(cudaHostRegister(address, size, cudaHostRegisterPortable), "cudaHostRegister");
}

RegisteredMemory::~RegisteredMemory() {
  (void)cudaHostUnregister(address_);
  (void)cudaGetLastError();
}

DeviceCopyEngine::DeviceCopyEngine(int device, int streams) : state_(std::make_unique<State>()) {
  if (streams < 1 || streams > 32) {
    throw std::invalid_argument("streams must be 1 to 32, not " + std::to_string(streams));
  }
  const CurrentDevice current(device);
  int least = 0, greatest = 0;
  check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "cudaDeviceGetStreamPriorityRange");
  state_->device = device;
  state_->streams.reserve(static_cast<std::size_t>(streams));
  for (int i = 0; i < streams; ++i) state_->streams.emplace_back(least);
}

DeviceCopyEngine::~DeviceCopyEngine() = default;

std::shared_ptr<DeviceJob> DeviceCopyEngine::submit(const std::vector<Copy>& copies,
                                                    std::uintptr_t after_stream) {
  check_copies(copies);
  const std::lock_guard<std::mutex> lock(state_->mutex);
  const CurrentDevice current(state_->device);
  std::vector<Stream>& streams = state_->streams;
  std::size_t size_bytes = 0;
  try {
    const Event ready;
    check(cudaEventRecord(ready.get(), as_stream(after_stream)), "cudaEventRecord");
    for (const Stream& stream : streams) {
      check(cudaStreamWaitEvent(stream.get(), ready.get(), 0), "cudaStreamWaitEvent");
    }
    std::size_t next = 0;
    for (const Copy& copy : copies) {
      if (copy.size == 0) continue;
      check(cudaMemcpyAsync(copy.target, copy.source, copy.size, cudaMemcpyDeviceToHost,
                            streams[next++ % streams.size()].get()),
            "cudaMemcpyAsync");
      size_bytes += copy.size;
    }
    std::vector<Event> ends;
    ends.reserve(streams.size());
    for (const Stream& stream : streams) {
      ends.emplace_back();
      check(cudaEventRecord(ends.back().get(), stream.get()), "cudaEventRecord");
    }
    return std::make_shared<QueuedCopies>(std::move(ends), size_bytes);
  } catch (...) {
    // Part of the list may be on its way: nothing may touch the ranges once the caller knows.
    for (const Stream& stream : streams) (void)cudaStreamSynchronize(stream.get());
    throw;
  }
}

void pack_device(const std::vector<PackItem>& items, std::uint64_t target, std::size_t target_size,
                 std::uintptr_t stream) {
  check_pack(items, target_size);
  if (items.empty()) return;
  const CurrentDevice current(device_of(target));
  for (std::size_t start = 0; start < items.size(); start += kPackBatch) {
    const std::size_t count = std::min(kPackBatch, items.size() - start);
    PackBatch batch{};
    std::uint64_t largest = 1;
    for (std::size_t i = 0; i < count; ++i) {
      batch.source[i] = items[start + i].source;
      batch.offset[i] = items[start + i].target_offset;
      batch.size[i] = items[start + i].size;
      largest = std::max(largest, items[start + i].size);
    }
    const auto tiles = static_cast<unsigned>(
        std::min<std::uint64_t>((largest + kTileBytes - 1) / kTileBytes, kMaxTiles));
    const dim3 grid(tiles, static_cast<unsigned>(count));
    pack_kernel<<<grid, kThreads, 0, as_stream(stream)>>>(
        batch, reinterpret_cast<unsigned char*>(target));
    check(cudaGetLastError(), "pack kernel");
  }
}

void split_planes_device(std::uint64_t source, std::uint64_t target, std::size_t item_bytes,
                         std::size_t count, std::uintptr_t stream) {
  check_item_bytes(item_bytes);
  if (count == 0) return;
  const CurrentDevice current(device_of(target));
  switch (item_bytes) {
    case 1: return launch_planes(split_kernel<1>, source, target, count, stream);
    case 2: return launch_planes(split_kernel<2>, source, target, count, stream);
    case 4: return launch_planes(split_kernel<4>, source, target, count, stream);
    case 8: return launch_planes(split_kernel<8>, source, target, count, stream);
    default: return launch_planes(split_kernel<16>, source, target, count, stream);
  }
}

void join_planes_device(std::uint64_t source, std::uint64_t target, std::size_t item_bytes,
                        std::size_t count, std::uintptr_t stream) {
  check_item_bytes(item_bytes);
  if (count == 0) return;
  const CurrentDevice current(device_of(target));
  switch (item_bytes) {
    case 1: return launch_planes(join_kernel<1>, source, target, count, stream);
    case 2: return launch_planes(join_kernel<2>, source, target, count, stream);
    case 4: return launch_planes(join_kernel<4>, source, target, count, stream);
    case 8: return launch_planes(join_kernel<8>, source, target, count, stream);
    default: return launch_planes(join_kernel<16>, source, target, count, stream);
  }
}

}  // namespace spotspeed
