// The CUDA side of device.h; plain twins: pack.cpp of the kernel, device_plan.cpp of the engine.
#include <algorithm>
#include <mutex>
#include <string>
#include <utility>

#include <cuda_runtime.h>
#include <dlfcn.h>

#include "device.h"
#include "device_plan.h"

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

// Whether the calling thread has a device's context already. The runtime cannot tell: it calls
// device 0 the current one of a thread that has used none.
bool has_context() {
  using Function = int (*)(void**);  // cuCtxGetCurrent
  static const auto current = [] {
    void* driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
    return driver == nullptr ? nullptr
                             : reinterpret_cast<Function>(dlsym(driver, "cuCtxGetCurrent"));
  }();
  void* context = nullptr;
  return current != nullptr && current(&context) == 0 && context != nullptr;
}

// Makes `device` current, and the caller's device again when it leaves scope. A thread that has
// used no device is left with this one: setting device 0 again would make a context there, for
// which every rank of a node would take hundreds of MB of the first GPU.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) : previous_(device), device_(device) {
    if (has_context()) check(cudaGetDevice(&previous_), "cudaGetDevice");
    check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~CurrentDevice() {
    if (previous_ != device_) (void)cudaSetDevice(previous_);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int previous_, device_;
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

// Device memory for packing, or none where the device has no room for it.
class PackBuffer {
 public:
  PackBuffer() = default;
  ~PackBuffer() {
    if (address_ != nullptr) (void)cudaFree(address_);
  }
  PackBuffer(const PackBuffer&) = delete;
  PackBuffer& operator=(const PackBuffer&) = delete;

  void make(std::size_t size) {
    if (is_tried_) return;
    is_tried_ = true;
    if (cudaMalloc(&address_, size) == cudaSuccess) {
      size_ = size;
    } else {
      address_ = nullptr;
      (void)cudaGetLastError();
    }
  }
  std::byte* data() const { return static_cast<std::byte*>(address_); }
  std::size_t size() const { return size_; }

 private:
  void* address_ = nullptr;
  std::size_t size_ = 0;
  bool is_tried_ = false;
};

void copy_to_host(std::byte* target, const std::byte* source, std::size_t size,
                  cudaStream_t stream) {
  check(cudaMemcpyAsync(target, source, size, cudaMemcpyDeviceToHost, stream), "cudaMemcpyAsync");
}

// The buffer is used on the first stream alone, in whose order a round follows the one before it,
// also that of an earlier submit().
class CudaBackend : public DeviceBackend {
 public:
  CudaBackend(std::byte* buffer, const std::vector<Stream>& streams)
      : buffer_(buffer), streams_(streams) {}
  void clear(std::size_t size) override {
    check(cudaMemsetAsync(buffer_, 0, size, streams_[0].get()), "cudaMemsetAsync");
  }
  void pack(const std::vector<PackItem>& items, std::size_t size) override {
    pack_device(items, reinterpret_cast<std::uint64_t>(buffer_), size,
                reinterpret_cast<std::uintptr_t>(streams_[0].get()));
  }
  void fetch(const Fetch& fetch) override {
    copy_to_host(fetch.target, buffer_ + fetch.offset, fetch.size, streams_[0].get());
  }
  void copy(const Copy& piece, std::size_t number) override {
    // From the last stream on: the first also packs.
    const std::size_t stream = streams_.size() - 1 - number % streams_.size();
    copy_to_host(piece.target, piece.source, piece.size, streams_[stream].get());
  }

 private:
  std::byte* buffer_;
  const std::vector<Stream>& streams_;
};

}  // namespace

struct DeviceCopyEngine::State {
  int device;
  PackBuffer buffer;  // outlives the streams that use it
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

RegisteredMemory::RegisteredMemory(std::byte* address, std::size_t size, int device)
    : address_(address), device_(device) {
  if (address == nullptr || size == 0) throw std::invalid_argument("no memory to register");
  const CurrentDevice current(device);
  // Portable: page-locked for every device's context, not only for the current one.
  check(cudaHostRegister(address, size, cudaHostRegisterPortable), "cudaHostRegister");
}

RegisteredMemory::~RegisteredMemory() {
  try {
    const CurrentDevice current(device_);
    (void)cudaHostUnregister(address_);
  } catch (const DeviceError&) {
    // The process ends and CUDA is gone already.
  }
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
                                                    std::uintptr_t after_event) {
  check_copies(copies);
  const std::lock_guard<std::mutex> lock(state_->mutex);
  const CurrentDevice current(state_->device);
  const std::vector<Stream>& streams = state_->streams;
  const auto is_small = [](const Copy& copy) { return copy.size < kPackBelow; };
  if (std::count_if(copies.begin(), copies.end(), is_small) > 1) {
    state_->buffer.make(kPackBufferBytes);
  }
  const DevicePlan plan = plan_device(copies, state_->buffer.size());
  try {
    for (const Stream& stream : streams) {
      if (after_event == 0) break;
      check(cudaStreamWaitEvent(stream.get(), reinterpret_cast<cudaEvent_t>(after_event), 0),
            "cudaStreamWaitEvent");
    }
    CudaBackend backend(state_->buffer.data(), streams);
    carry_out(plan, backend);
    std::vector<Event> ends;
    ends.reserve(streams.size());
    for (const Stream& stream : streams) {
      ends.emplace_back();
      check(cudaEventRecord(ends.back().get(), stream.get()), "cudaEventRecord");
    }
    return std::make_shared<QueuedCopies>(std::move(ends), plan.size_bytes);
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

}  // namespace spotspeed
