// Host copies: every byte arrives, jobs end under every race, bad lists are refused.
#include <atomic>
#include <cstdint>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include <sys/wait.h>
#include <unistd.h>

#include "../host_copy.h"
#include "check.h"
#include "random_bytes.h"

using namespace spotspeed;
using check::Bytes;
using check::random_bytes;

namespace {

// Cuts [0, size) at random places and copies each part from `source` to the same place.
std::vector<Copy> random_parts(const Bytes& source, Bytes& target, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<Copy> copies;
  for (std::size_t offset = 0; offset < source.size();) {
    const std::size_t left = source.size() - offset;
    const std::size_t size = std::min<std::size_t>(left, random() % (random() % 8 ? 500 : 900'000));
    copies.push_back({source.data() + offset, target.data() + offset, size});
    offset += size;
  }
  return copies;
}

}  // namespace

TEST(streaming_agrees_with_its_twin_at_every_alignment) {
  const Bytes source = random_bytes(300'000, 1);
  for (std::size_t from = 0; from < 33; from += 4) {
    for (std::size_t to = 0; to < 33; to += 3) {
      for (const std::size_t size : {0, 1, 31, 65'535, 65'536, 65'537, 200'003}) {
        Bytes streamed(source.size(), std::byte{7}), plain(source.size(), std::byte{7});
        copy_streaming(source.data() + from, streamed.data() + to, size);
        copy_scalar(source.data() + from, plain.data() + to, size);
        CHECK(streamed == plain);
      }
    }
  }
}

TEST(every_byte_of_a_random_list_arrives) {
  CopyEngine engine(4, false);
  for (unsigned seed = 0; seed < 6; ++seed) {
    const Bytes source = random_bytes(5'000'000 + seed, seed);
    Bytes target(source.size());
    const auto job = engine.submit(random_parts(source, target, seed));
    CHECK(job->wait() == source.size());
    CHECK(job->done() && !job->cancelled() && job->copied_bytes() == source.size());
    CHECK(target == source);
  }
}

TEST(a_low_priority_engine_ends_without_help) {
  CopyEngine engine(2, true);
  const Bytes source = random_bytes(3'000'000, 2);
  Bytes target(source.size());
  const auto job = engine.submit({{source.data(), target.data(), source.size()}});
  CHECK(job->wait_for(std::chrono::seconds(60)));
  CHECK(target == source);
}

TEST(many_submitters_share_one_engine) {
  CopyEngine engine(3, false);
  std::atomic<int> whole{0};
  std::vector<std::thread> threads;
  for (unsigned seed = 0; seed < 6; ++seed) {
    threads.emplace_back([&engine, &whole, seed] {
      for (unsigned round = 0; round < 5; ++round) {
        const Bytes source = random_bytes(400'000, seed * 10 + round);
        Bytes target(source.size());
        const auto job = engine.submit(random_parts(source, target, round));
        std::thread other([job] { job->wait(); });
        job->wait();
        other.join();
        if (target == source) ++whole;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(whole == 30);
}

TEST(after_cancel_nothing_is_written) {
  CopyEngine engine(2, false);
  for (unsigned round = 0; round < 20; ++round) {
    const Bytes source(8'000'000, std::byte{1});
    Bytes target(source.size());
    const auto job = engine.submit({{source.data(), target.data(), source.size()}});
    job->cancel();
    CHECK(job->done());
    const std::size_t copied = job->copied_bytes();
    std::size_t ones = 0;
    for (const std::byte value : target) ones += static_cast<std::size_t>(value);
    CHECK(ones == copied);
    CHECK(job->cancelled() == (copied != source.size()));
    if (job->cancelled()) CHECK(check::throws<CopyCancelled>([&] { job->wait(); }));
  }
}

TEST(destroying_the_engine_ends_every_job) {
  const Bytes source(30'000'000, std::byte{1});
  Bytes first(source.size()), second(source.size());
  auto engine = std::make_unique<CopyEngine>(1, false);
  const auto a = engine->submit({{source.data(), first.data(), source.size()}});
  const auto b = engine->submit({{source.data(), second.data(), source.size()}});
  engine.reset();
  CHECK(a->done() && b->done());
}

TEST(a_forked_child_refuses_and_leaves_quietly) {
  auto engine = std::make_unique<CopyEngine>(2, false);
  std::byte source{1}, target{0};
  const pid_t child = fork();
  if (child == 0) {
    const bool refused =
        check::throws<std::logic_error>([&] { engine->submit({{&source, &target, 1}}); });
    engine.reset();
    std::_Exit(refused ? 0 : 1);
  }
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

TEST(bad_lists_are_refused_before_a_byte_moves) {
  CopyEngine engine(1, false);
  Bytes a(64), b(64);
  const auto refused = [&](const std::vector<Copy>& copies) {
    return check::throws<std::invalid_argument>([&] { engine.submit(copies)->wait(); });
  };
  CHECK(refused({{nullptr, b.data(), 1}}));
  CHECK(refused({{a.data(), nullptr, 1}}));
  CHECK(refused({{a.data(), b.data(), SIZE_MAX}}));
  CHECK(refused({{a.data(), a.data() + 8, 16}}));
  CHECK(refused({{a.data(), b.data(), 16}, {a.data(), b.data() + 15, 4}}));
  CHECK(refused({{a.data(), b.data() + 15, 4}, {a.data(), b.data(), 16}}));
  CHECK(!refused({{a.data(), b.data(), 16}, {a.data(), b.data() + 16, 4}, {nullptr, nullptr, 0}}));
  CHECK(check::throws<std::invalid_argument>([] { CopyEngine(0, false); }));
  CHECK(check::throws<std::invalid_argument>([] { CopyEngine(257, false); }));
}

TEST_MAIN
