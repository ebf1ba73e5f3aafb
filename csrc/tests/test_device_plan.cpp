// What the plan of a device copy promises: every byte once, few calls, nothing beyond the ranges.
#include <cstdint>
#include <random>
#include <thread>
#include <vector>

#include "../device_plan.h"
#include "check.h"
#include "random_bytes.h"

using namespace spotspeed;
using check::Bytes;
using check::random_bytes;

namespace {

// `count` neighbours of `size` bytes, `gap` bytes apart in the target.
std::vector<Copy> neighbours(const Bytes& source, Bytes& target, std::size_t count,
                             std::size_t size, std::size_t gap) {
  std::vector<Copy> copies;
  for (std::size_t i = 0; i < count; ++i) {
    copies.push_back({source.data() + i * size, target.data() + i * (size + gap), size});
  }
  return copies;
}

std::size_t fetches(const DevicePlan& plan) {
  std::size_t count = 0;
  for (const PackRound& round : plan.rounds) count += round.fetches.size();
  return count;
}

}  // namespace

TEST(ten_thousand_small_neighbours_are_one_fetch) {
  const Bytes source(10'000 * 1'000);
  Bytes target(10'000 * 1'004);
  const DevicePlan plan = plan_device(neighbours(source, target, 10'000, 1'000, 4),
                                      kPackBufferBytes);
  CHECK(plan.pieces.empty() && plan.rounds.size() == 1 && fetches(plan) == 1);
  CHECK(plan.rounds[0].items.size() == 10'000 && plan.size_bytes == source.size());
}

TEST(what_does_not_fit_the_buffer_at_once_goes_in_rounds) {
  const Bytes source(1'000 * 1'000);
  Bytes target(source.size());
  const std::size_t buffer = 64 << 10;
  const DevicePlan plan = plan_device(neighbours(source, target, 1'000, 1'000, 0), buffer);
  CHECK(plan.rounds.size() > 10);
  for (const PackRound& round : plan.rounds) CHECK(round.size <= buffer);
}

TEST(without_a_buffer_every_copy_is_made_directly) {
  const Bytes source(100 * 10);
  Bytes target(source.size());
  const DevicePlan plan = plan_device(neighbours(source, target, 100, 10, 0), 0);
  CHECK(plan.rounds.empty() && plan.pieces.size() == 100);
}

TEST(large_copies_are_cut_and_lone_small_ones_are_not_packed) {
  const Bytes source(2 * kPieceBytes + 1 + 100);
  Bytes target(source.size() + kBridgedGap);
  const std::size_t large = 2 * kPieceBytes + 1;
  const DevicePlan plan =
      plan_device({{source.data(), target.data(), large},
                   {source.data() + large, target.data() + large + kBridgedGap, 100}},
                  kPackBufferBytes);
  CHECK(plan.rounds.empty() && plan.pieces.size() == 4);
}

TEST(any_list_of_copies_arrives_and_touches_nothing_else) {
  std::mt19937 random(11);
  for (unsigned round = 0; round < 60; ++round) {
    const Bytes source = random_bytes(400'000, round);
    Bytes target(600'000, std::byte{0xA5}), expected = target;
    std::vector<Copy> copies;
    std::size_t at = random() % 64, before = 0;
    while (copies.size() < 200) {
      const std::size_t size = random() % 40 == 0 ? random() % 90'000 : random() % 300;
      if (at + size > target.size()) break;
      const std::size_t from = random() % (source.size() - size);
      copies.push_back({source.data() + from, target.data() + at, size});
      for (std::size_t i = 0; i < size; ++i) expected[at + i] = source[from + i];
      // Between neighbours the bytes may become zero; the save has made them so already.
      for (std::size_t i = before; before != 0 && at - before < kBridgedGap && i < at; ++i) {
        target[i] = expected[i] = std::byte{0};
      }
      before = at + size;
      at = before + random() % 12;
    }
    TwinCopyEngine engine(round % 3 == 0 ? kPackBufferBytes : (round % 3) * 2'000);
    CHECK(engine.submit(copies, 0)->wait() > 0);
    CHECK(target == expected);
  }
}

TEST(several_threads_may_submit_to_one_engine) {
  const Bytes source = random_bytes(100'000, 3);
  std::vector<Bytes> targets(4, Bytes(source.size()));
  TwinCopyEngine engine;
  std::vector<std::thread> threads;
  for (Bytes& target : targets) {
    threads.emplace_back([&] {
      for (int i = 0; i < 20; ++i) {
        engine.submit(neighbours(source, target, 1'000, 100, 0), 0)->wait();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const Bytes& target : targets) CHECK(target == source);
}

TEST(copies_that_overlap_are_refused) {
  const Bytes source(100);
  Bytes target(100);
  TwinCopyEngine engine;
  CHECK(check::throws<std::invalid_argument>([&] {
    engine.submit({{source.data(), target.data(), 60}, {source.data(), target.data() + 50, 50}}, 0);
  }));
}

TEST_MAIN
