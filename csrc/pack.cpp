// The checks and the plain twin of the pack kernel (device.h).
#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "device.h"

namespace spotspeed {

void check_pack(const std::vector<PackItem>& items, std::size_t target_size) {
  std::vector<std::pair<std::uint64_t, std::uint64_t>> ranges;
  ranges.reserve(items.size());
  for (std::size_t i = 0; i < items.size(); ++i) {
    const PackItem& item = items[i];
    if (item.size == 0) continue;
    if (item.source == 0) {
      throw std::invalid_argument("item " + std::to_string(i) + ": null source");
    }
    if (item.target_offset > target_size || item.size > target_size - item.target_offset) {
      throw std::invalid_argument("item " + std::to_string(i) + ": bytes [" +
                              std::to_string(item.target_offset) + ", +" +
                              std::to_string(item.size) + ") are not inside a target of " +
                              std::to_string(target_size));
    }
    ranges.emplace_back(item.target_offset, item.target_offset + item.size);
  }
  if (!std::is_sorted(ranges.begin(), ranges.end())) std::sort(ranges.begin(), ranges.end());
  for (std::size_t i = 1; i < ranges.size(); ++i) {
    if (ranges[i].first < ranges[i - 1].second) {
      throw std::invalid_argument("two items are packed to the same bytes");
    }
  }
}

void pack_host(const std::vector<PackItem>& items, std::byte* target, std::size_t target_size) {
  check_pack(items, target_size);
  for (const PackItem& item : items) {
    if (item.size == 0) continue;
    std::memcpy(target + item.target_offset, reinterpret_cast<const std::byte*>(item.source),
                item.size);
  }
}

}  // namespace spotspeed
