// What device.h declares, in a build without CUDA: the same names, and a clear refusal.
#include "device.h"

namespace spotspeed {
namespace {

[[noreturn]] void refuse() {
  throw DeviceError("this build of spotspeed has no CUDA kernels: install nvcc and rebuild");
}

}  // namespace

struct DeviceCopyEngine::State {};

bool cuda_built() { return false; }

int cuda_device_count() noexcept { return 0; }

RegisteredMemory::RegisteredMemory(std::byte*, std::size_t, int) : address_(nullptr), device_(0) {
  refuse();
}
RegisteredMemory::~RegisteredMemory() = default;

DeviceCopyEngine::DeviceCopyEngine(int, int) { refuse(); }
DeviceCopyEngine::~DeviceCopyEngine() = default;

std::shared_ptr<DeviceJob> DeviceCopyEngine::submit(const std::vector<Copy>&, std::uintptr_t) {
  refuse();
}

void pack_device(const std::vector<PackItem>&, std::uint64_t, std::size_t, std::uintptr_t) {
  refuse();
}

}  // namespace spotspeed
