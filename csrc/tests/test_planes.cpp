// Byte planes and packing: the fast path, the plain twin and the definition agree.
#include <cstdint>
#include <vector>

#include "../device.h"
#include "../planes.h"
#include "check.h"
#include "random_bytes.h"

using namespace spotspeed;
using check::Bytes;
using check::random_bytes;

TEST(split_is_its_definition_and_join_undoes_it) {
  for (const std::size_t item : {1, 2, 4, 8, 16}) {
    for (std::size_t count = 0; count < 140; ++count) {
      // Exactly sized, oddly aligned buffers: the sanitizer sees every byte beyond them.
      const Bytes source = random_bytes(item * count + 1, static_cast<unsigned>(count));
      Bytes fast(item * count + 3), plain(item * count), back(item * count + 5);
      split_planes(source.data() + 1, fast.data() + 3, item, count);
      split_planes_scalar(source.data() + 1, plain.data(), item, count);
      for (std::size_t i = 0; i < count; ++i) {
        for (std::size_t p = 0; p < item; ++p) {
          CHECK(plain[p * count + i] == source[1 + i * item + p]);
        }
      }
      CHECK(Bytes(fast.begin() + 3, fast.end()) == plain);
      join_planes(fast.data() + 3, back.data() + 5, item, count);
      CHECK(Bytes(back.begin() + 5, back.end()) == Bytes(source.begin() + 1, source.end()));
      join_planes_scalar(plain.data(), fast.data() + 3, item, count);
      CHECK(Bytes(fast.begin() + 3, fast.end()) == Bytes(source.begin() + 1, source.end()));
    }
  }
}

TEST(unknown_item_sizes_are_refused) {
  std::byte byte{};
  for (const std::size_t item : {0, 3, 5, 6, 7, 9, 32}) {
    CHECK(check::throws<std::invalid_argument>([&] { split_planes(&byte, &byte, item, 0); }));
    CHECK(check::throws<std::invalid_argument>([&] { join_planes(&byte, &byte, item, 0); }));
  }
}

TEST(packing_puts_every_item_where_it_was_asked) {
  const Bytes a = random_bytes(100, 1), b = random_bytes(7, 2);
  const auto address = [](const Bytes& bytes) {
    return reinterpret_cast<std::uint64_t>(bytes.data());
  };
  Bytes target(120, std::byte{9});
  pack_host({{address(b), 110, 7}, {address(a), 5, 100}, {0, 0, 0}}, target.data(), target.size());
  Bytes expected(120, std::byte{9});
  std::copy(a.begin(), a.end(), expected.begin() + 5);
  std::copy(b.begin(), b.end(), expected.begin() + 110);
  CHECK(target == expected);
}

TEST(packing_outside_the_target_is_refused) {
  Bytes source(16), target(16);
  const auto from = reinterpret_cast<std::uint64_t>(source.data());
  const auto refused = [&](const std::vector<PackItem>& items) {
    return check::throws<std::invalid_argument>(
        [&] { pack_host(items, target.data(), target.size()); });
  };
  CHECK(refused({{from, 1, 16}}));
  CHECK(refused({{from, 17, 1}}));
  CHECK(refused({{from, UINT64_MAX, 2}}));
  CHECK(refused({{0, 0, 1}}));
  CHECK(refused({{from, 0, 8}, {from, 7, 2}}));
}

TEST(a_build_without_cuda_says_so) {
  CHECK(!cuda_built() && cuda_device_count() == 0);
  CHECK(check::throws<DeviceError>([] { DeviceCopyEngine(0, 1); }));
  CHECK(check::throws<DeviceError>([] { pack_device({}, 1, 1, 0); }));
}

TEST_MAIN
