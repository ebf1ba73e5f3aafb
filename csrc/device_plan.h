// How a list of copies out of a device is carried out, decided apart from CUDA.
//
// Large copies are cut into pieces and dealt out to the streams, so that several are under way at
// once. Small neighbours are packed by the kernel into a buffer on the device, and fetched from
// there with one copy: 10,000 small tensors then cost a few dozen calls instead of 10,000. The
// same plan runs on a GPU (device.cu) and, as its plain twin, on host memory (TwinCopyEngine).
// Threads: pure functions; a backend belongs to one caller at a time.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <vector>

#include "device.h"

namespace spotspeed {

// Copies below this size are packed: a call costs as much as moving about so many bytes.
constexpr std::size_t kPackBelow = std::size_t{64} << 10;
constexpr std::size_t kPieceBytes = std::size_t{4} << 20;
// Targets of one fetch may be this far apart, less one byte: entries of a stream are aligned to 8.
// The bytes between them become zero.
constexpr std::size_t kBridgedGap = 8;
constexpr std::size_t kPackBufferBytes = std::size_t{16} << 20;

// `size` bytes from `offset` of the pack buffer to host memory.
struct Fetch {
  std::size_t offset;
  std::byte* target;
  std::size_t size;
};

// What goes through the pack buffer at once; rounds follow each other.
struct PackRound {
  std::vector<PackItem> items;
  std::vector<Fetch> fetches;
  std::size_t size = 0;  // of the buffer
};

struct DevicePlan {
  std::vector<Copy> pieces;
  std::vector<PackRound> rounds;
  std::size_t size_bytes = 0;  // of all copies
};

// Plans `copies`, which check_copies() accepts; with a buffer of 0 bytes nothing is packed.
DevicePlan plan_device(const std::vector<Copy>& copies, std::size_t buffer_bytes);

// What carries a plan out. Calls of the first three take effect in their order.
class DeviceBackend {
 public:
  virtual ~DeviceBackend() = default;
  virtual void clear(std::size_t size) = 0;  // the first bytes of the buffer
  virtual void pack(const std::vector<PackItem>& items, std::size_t size) = 0;
  virtual void fetch(const Fetch& fetch) = 0;
  virtual void copy(const Copy& piece, std::size_t number) = 0;
};

void carry_out(const DevicePlan& plan, DeviceBackend& backend);

// The plain twin of DeviceCopyEngine: the same plan over host addresses, done on return.
// Threads: submit() may be called from any thread.
class TwinCopyEngine {
 public:
  explicit TwinCopyEngine(std::size_t buffer_bytes = kPackBufferBytes) : buffer_(buffer_bytes) {}
  std::shared_ptr<DeviceJob> submit(const std::vector<Copy>& copies, std::uintptr_t after_event);

 private:
  std::mutex mutex_;
  std::vector<std::byte> buffer_;
};

}  // namespace spotspeed
