#include "device_plan.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace spotspeed {
namespace {

// Items of the buffer keep the alignment that their targets have, so that words stay words.
constexpr std::size_t kBufferAlignment = 256;

std::uintptr_t address(const std::byte* pointer) {
  return reinterpret_cast<std::uintptr_t>(pointer);
}

// A run of small copies whose targets are neighbours: copies [first, last) of the list.
struct Run {
  std::size_t first, last;
};

bool continues(const Copy& before, const Copy& copy) {
  const std::uintptr_t stop = address(before.target) + before.size, start = address(copy.target);
  return start >= stop && start - stop < kBridgedGap;
}

void cut(const Copy& copy, std::vector<Copy>& pieces) {
  for (std::size_t offset = 0; offset < copy.size; offset += kPieceBytes) {
    const std::size_t size = std::min(kPieceBytes, copy.size - offset);
    pieces.push_back({copy.source + offset, copy.target + offset, size});
  }
}

// Where the run's first byte lies in the buffer of `round`.
std::size_t place(const PackRound& round, const Copy& first) {
  const std::size_t start = (round.size + kBufferAlignment - 1) / kBufferAlignment *
                            kBufferAlignment;
  return start + address(first.target) % kBufferAlignment;
}

void add_run(const std::vector<Copy>& copies, const Run& run, DevicePlan& plan,
             std::size_t buffer_bytes) {
  const Copy& first = copies[run.first];
  const Copy& last = copies[run.last - 1];
  const std::size_t size = address(last.target) + last.size - address(first.target);
  if (plan.rounds.empty() || place(plan.rounds.back(), first) + size > buffer_bytes) {
    plan.rounds.emplace_back();
  }
  PackRound& round = plan.rounds.back();
  const std::size_t start = place(round, first);
  for (std::size_t i = run.first; i < run.last; ++i) {
    const std::size_t offset = start + (address(copies[i].target) - address(first.target));
    round.items.push_back({address(copies[i].source), offset, copies[i].size});
  }
  round.fetches.push_back({start, first.target, size});
  round.size = start + size;
}

class TwinBackend : public DeviceBackend {
 public:
  explicit TwinBackend(std::vector<std::byte>& buffer) : buffer_(buffer) {}
  void clear(std::size_t size) override { std::memset(buffer_.data(), 0, size); }
  void pack(const std::vector<PackItem>& items, std::size_t size) override {
    pack_host(items, buffer_.data(), size);
  }
  void fetch(const Fetch& fetch) override {
    std::memcpy(fetch.target, buffer_.data() + fetch.offset, fetch.size);
  }
  void copy(const Copy& piece, std::size_t) override {
    std::memcpy(piece.target, piece.source, piece.size);
  }

 private:
  std::vector<std::byte>& buffer_;
};

class DoneJob : public DeviceJob {
 public:
  explicit DoneJob(std::size_t size_bytes) : size_bytes_(size_bytes) {}
  bool done() override { return true; }
  std::size_t wait() override { return size_bytes_; }
  std::size_t size_bytes() const override { return size_bytes_; }

 private:
  std::size_t size_bytes_;
};

}  // namespace

DevicePlan plan_device(const std::vector<Copy>& copies, std::size_t buffer_bytes) {
  DevicePlan plan;
  // A run leaves room for its offset in the buffer, whatever its target's alignment.
  const std::size_t room = buffer_bytes > kBufferAlignment ? buffer_bytes - kBufferAlignment : 0;
  std::vector<Copy> some;
  for (const Copy& copy : copies) {
    if (copy.size != 0) some.push_back(copy);
    plan.size_bytes += copy.size;
  }
  for (std::size_t first = 0; first < some.size();) {
    std::size_t last = first;
    const std::uintptr_t start = address(some[first].target);
    while (last < some.size() && some[last].size < kPackBelow &&
           (last == first || continues(some[last - 1], some[last])) &&
           address(some[last].target) + some[last].size - start <= room) {
      ++last;
    }
    // One alone is as well copied directly.
    if (last - first < 2) {
      cut(some[first++], plan.pieces);
      continue;
    }
    add_run(some, {first, last}, plan, buffer_bytes);
    first = last;
  }
  return plan;
}

void carry_out(const DevicePlan& plan, DeviceBackend& backend) {
  for (std::size_t i = 0; i < plan.pieces.size(); ++i) backend.copy(plan.pieces[i], i);
  for (const PackRound& round : plan.rounds) {
    backend.clear(round.size);
    backend.pack(round.items, round.size);
    for (const Fetch& fetch : round.fetches) backend.fetch(fetch);
  }
}

std::shared_ptr<DeviceJob> TwinCopyEngine::submit(const std::vector<Copy>& copies,
                                                  std::uintptr_t) {
  check_copies(copies);
  const std::lock_guard<std::mutex> lock(mutex_);
  const DevicePlan plan = plan_device(copies, buffer_.size());
  TwinBackend backend(buffer_);
  carry_out(plan, backend);
  return std::make_shared<DoneJob>(plan.size_bytes);
}

}  // namespace spotspeed
