// GPU memory to host memory, and the kernels that prepare it.
//
// Built from device.cu where nvcc was found and from device_absent.cpp where not; the functions
// are the same, and throw DeviceError when there is no CUDA to run them.
//
// Device addresses belong to the CUDA runtime's primary context of their device, the one that
// PyTorch uses. `stream` arguments are cudaStream_t values as integers (0: the default stream).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <vector>

#include "host_copy.h"

namespace spotspeed {

class DeviceError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Whether the CUDA sources are in this build; true does not mean that a GPU is there.
bool cuda_built();
// GPUs that this process can use; 0 without CUDA, driver or GPU. Never throws.
int cuda_device_count() noexcept;

// Page-locks host memory, so that the copy engines of the GPU reach it at full speed.
// Lifetime: the memory must stay mapped as long as this object; it unlocks in its destructor.
// `device` is the one that this process computes on: no context is made on any other.
class RegisteredMemory {
 public:
  RegisteredMemory(std::byte* address, std::size_t size, int device);
  ~RegisteredMemory();
  RegisteredMemory(const RegisteredMemory&) = delete;
  RegisteredMemory& operator=(const RegisteredMemory&) = delete;

 private:
  std::byte* address_;
  int device_;
};

// Copies in flight from device to host; the ranges must stay valid until it is done.
// Threads: any thread may ask or wait.
class DeviceJob {
 public:
  virtual ~DeviceJob() = default;  // waits for the copies
  // Whether all copies have ended well; throws DeviceError when one failed.
  virtual bool done() = 0;
  // Waits for all copies; returns their bytes.
  virtual std::size_t wait() = 0;
  virtual std::size_t size_bytes() const = 0;
};

// Copies device memory to host memory on streams of its own, of the lowest priority, as
// device_plan.h decides. Its pack buffer is made when there first is something to pack; where the
// device has no memory for it, small copies are made one by one.
// Threads: submit() may be called from any thread, one at a time.
class DeviceCopyEngine {
 public:
  // Throws std::invalid_argument unless 1 <= streams <= 32, DeviceError without that device.
  DeviceCopyEngine(int device, int streams);
  ~DeviceCopyEngine();  // waits for what was submitted
  DeviceCopyEngine(const DeviceCopyEngine&) = delete;
  DeviceCopyEngine& operator=(const DeviceCopyEngine&) = delete;

  // Copies once what `after_event` (a cudaEvent_t; 0: nothing) was recorded behind has ended, and
  // waits for nothing that was queued later. Sources are device addresses; targets host addresses,
  // registered ones if the call is to return at once. Fewer than 8 bytes between two targets may
  // become zero.
  std::shared_ptr<DeviceJob> submit(const std::vector<Copy>& copies, std::uintptr_t after_event);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// Packs many small device tensors into one device buffer with one kernel launch.
// Twin: pack_host(). Source i lands at target_offsets[i] of the target.
struct PackItem {
  std::uint64_t source;  // address
  std::uint64_t target_offset;
  std::uint64_t size;
};

// Throws std::invalid_argument unless every item lies inside [0, target_size) and no two items
// overlap in the target.
void check_pack(const std::vector<PackItem>& items, std::size_t target_size);
// The plain twin: the same bytes, for host addresses.
void pack_host(const std::vector<PackItem>& items, std::byte* target, std::size_t target_size);
// Queues the kernel on `stream`; the item table is copied before it returns.
void pack_device(const std::vector<PackItem>& items, std::uint64_t target, std::size_t target_size,
                 std::uintptr_t stream);

}  // namespace spotspeed
